"""Training a classifier on some labels: an encoder fine-tuned, all of it or its last stages, or from scratch."""
import torch
import torch.nn.functional as F
from torch import nn

from common import augment, linear_probe


def balanced(labels, fraction, seed):
    """Indices (n,), sorted, of `fraction` of each class of labels (N,), at least one of each, drawn from the seed."""
    generator, labels = torch.Generator().manual_seed(seed), labels.cpu()
    drawn = []
    for label in labels.unique():
        of_class = (labels == label).nonzero()[:, 0]
        order = torch.randperm(len(of_class), generator=generator)
        drawn.append(of_class[order[: max(1, round(fraction * len(of_class)))]])
    return torch.cat(drawn).sort().values


def freeze(module, stages):
    """No gradient for the first `stages` of module.stages() (modules or parameters). Returns their modules, which have
    to stay in eval mode: batch norm's statistics are frozen, too."""
    parts = [part for stage in module.stages()[:stages] for part in stage]
    for part in parts:
        part.requires_grad_(False)
    return [part for part in parts if isinstance(part, nn.Module)]


def finetune(module, images, index, test, frozen_stages, amp=None, steps=500, batch_size=64, lr=1e-3, seed=0):
    """Test accuracy in [0, 1] of a linear classifier on the encoder, both trained on the images of `index`.

    module: maps RGB (N, 3, S, S) in [0, 1] to features (N, D); trained in place, but for its first stages. images,
    test: `Images` with labels. amp: the dtype of autocast, or None. Flips and shifts by an eighth of the side; AdamW,
    the rate falling to 0 by a cosine. What is trained from scratch has the same recipe, so that the two differ by where
    they start.
    """
    device, classes = images.device, int(torch.cat([images.labels, test.labels]).max()) + 1
    autocast = torch.autocast(device.type, amp, enabled=amp is not None)
    frozen, rng = freeze(module, frozen_stages), augment.Random(seed)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        dim = module.eval()(images.at(torch.zeros(1, dtype=torch.int64)).to(device) / 255).shape[1]
        head = nn.Linear(dim, classes).to(device)
    trained = [p for p in (*module.parameters(), *head.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    module.train()
    for part in frozen:
        part.eval()
    order = [index[torch.randint(len(index), (batch_size,), generator=rng.generator)] for _ in range(steps)]
    for batch, x in zip(order, images.batches(order)):
        x = augment.horizontal_flip(x.float() / 255, rng.uniform(batch_size) < 0.5)
        reach = x.shape[-1] // 8
        x = augment.shift(x, *rng.uniform(batch_size, 2, low=-reach, high=reach + 1).floor().unbind(1))
        with autocast:
            logits = head(module(x))
        loss = F.cross_entropy(logits.float(), images.labels[batch.to(device)])
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        schedule.step()

    @torch.no_grad()
    def classify(x):
        with autocast:
            return head(module(x.float() / 255))
    return (linear_probe.features(classify, test, module).argmax(dim=1) == test.labels).float().mean().item()
