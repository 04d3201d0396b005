# SPDX-License-Identifier: MIT
"""The features at each depth of a generator: linear probes of its blocks (iGPT, Chen et al. 2020, section 4.1)."""
import torch
from torch import nn

from .. import linear_probe, pictures
from ..run import write_file
from ..transformer import Block


class Blocks(nn.Module):
    """RGB (N, 3, S, S) in [0, 1] to the `outputs` {name: (N, C)} of the embeddings and transformer blocks, by depth,
    averaged over positions: (N, blocks * C)."""

    def __init__(self, model):
        super().__init__()
        self.model, self.outputs = model, {}
        for name, block in model.named_modules():
            if isinstance(block, (nn.Embedding, Block)):
                name = f"{name}, {block.axis}" if isinstance(block, Block) else name
                block.register_forward_hook(
                    lambda _, __, out, name=name: self.outputs.__setitem__(name, out.float().mean(dim=(1, 2))))

    def forward(self, x):
        self.model.logits(self.model.tokens(x))
        return torch.cat(list(self.outputs.values()), dim=1)


def probe(images, model, path, autocast):
    """{block: accuracy} of linear probes, which are also printed and plotted in the picture `path`."""
    blocks = Blocks(model)
    train_x, test_x = (linear_probe.features(blocks, part, autocast, batch_size=128).chunk(len(blocks.outputs), dim=1)
                       for part in (images.labelled, images.test))
    accuracy = {name: linear_probe.linear_probe(a, images.labelled.labels, b, images.test.labels)
                for name, a, b in zip(blocks.outputs, train_x, test_x)}
    print(f"\n{'linear probe by depth':34}")
    print("\n".join(f"{name:34}{100 * value:8.1f}" for name, value in accuracy.items()), flush=True)
    points = [(i, 100 * value) for i, value in enumerate(accuracy.values())]
    text = {i: f"{name}\n{100 * value:.1f}".replace(", ", "\n") for i, (name, value) in enumerate(accuracy.items())}
    write_file(path, lambda part: pictures.plot(part, ("linear probe by depth, %", points, {}),
                                                width=110 * len(points) + 20, names=text))
    return accuracy
