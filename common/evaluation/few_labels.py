# SPDX-License-Identifier: MIT
"""Evaluation with few labels: a linear probe of the frozen encoder, or fine-tuning of all of it or of its last stages,
compared with the same network trained from scratch."""
import copy
import statistics

import torch
import torch.nn.functional as F
from torch import nn

from .. import augment, linear_probe

BATCH_SIZE, LEAST_STEPS = 64, 200  # of fine-tuning


def balanced(labels, fraction, seed):
    """Sorted indices (n,) of a random `fraction` of each class in labels (N,), at least one of each."""
    generator, labels = torch.Generator().manual_seed(seed), labels.cpu()
    drawn = []
    for label in labels.unique():
        of_class = (labels == label).nonzero()[:, 0]
        order = torch.randperm(len(of_class), generator=generator)
        drawn.append(of_class[order[: max(1, round(fraction * len(of_class)))]])
    return torch.cat(drawn).sort().values


def stages(module):
    """Lists of modules and parameters by depth: module.stages(), or the children if it has no stages."""
    return module.stages() if hasattr(module, "stages") else [[child] for child in module.children()]


def freeze(module, n):
    """Freezes the first n `stages`. Returns their modules, which must stay in eval mode because of batch norm."""
    parts = [part for stage in stages(module)[:n] for part in stage]
    for part in parts:
        part.requires_grad_(False)
    return [part for part in parts if isinstance(part, nn.Module)]


def finetune(module, images, index, test, frozen_stages, amp=None, steps=500, batch_size=BATCH_SIZE, lr=1e-3, seed=0):
    """Test accuracy in [0, 1] of the encoder with a linear classifier, both trained on the images in `index`.

    module: an encoder, trained in place except for the frozen stages. images, test: `Images` with labels. amp: dtype of
    autocast, or None. Augmented by flips and shifts by an eighth of the side; AdamW with a cosine schedule.
    """
    device, classes = images.device, int(torch.cat([images.labels, test.labels]).max()) + 1
    autocast = torch.autocast(device.type, amp, enabled=amp is not None)
    frozen, rng = freeze(module, frozen_stages), augment.Random(seed)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        dim = module.eval()(images.at(torch.zeros(1, dtype=torch.int64)).to(device) / 255).shape[1]
        head = nn.Linear(dim, classes).to(device)
    whole = nn.Sequential(module, head)
    optimizer = torch.optim.AdamW([p for p in whole.parameters() if p.requires_grad], lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    module.train()
    for part in frozen:
        part.eval()
    order = [index[torch.randint(len(index), (batch_size,), generator=rng.generator)] for _ in range(steps)]
    for batch, x in zip(order, linear_probe.counted(images.batches(order), steps, "steps of fine-tuning")):
        flip = augment.random_horizontal_flip(rng, len(x))
        x = augment.apply(x, flip + augment.random_shift(rng, len(x), reach=x.shape[-1] // 8))
        with autocast:
            logits = whole(x)
        loss = F.cross_entropy(logits.float(), images.labels[augment.send(batch, device)])
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
    logits = linear_probe.features(whole, test, autocast)
    return (logits.argmax(dim=1) == test.labels).float().mean().item()


def compare(title, rows, labels, shares, draws, score):
    """Prints and returns {share: {row: mean and deviation of score(row, share, indices, seed) over the draws, "draws":
    the indices}}. With all labels there is one draw."""
    print(f"\n{title:34}{'images':>8}" + "".join(f"{row:>16}" for row in rows))
    results = {}
    for share in shares:
        drawn = [balanced(labels, share, seed) for seed in range(draws if share < 1 else 1)]
        found = {row: [] for row in rows}
        for seed, index in enumerate(linear_probe.counted(drawn, len(drawn), f"draws of {100 * share:g} %")):
            for row in rows:
                found[row].append(score(row, share, index, seed))
        accuracy = {row: {"mean": statistics.mean(values), "deviation": statistics.stdev(values) if len(values) > 1
                          else 0.0} for row, values in found.items()}
        print(f"{f'{100 * share:g} %, draws {len(drawn)}':34}{len(drawn[0]):8}" + "".join(
            f"{100 * x['mean']:9.1f} +- {100 * x['deviation']:3.1f}" for x in accuracy.values()), flush=True)
        results[str(share)] = {**accuracy, "draws": [index.tolist() for index in drawn] if share < 1 else None}
    return results


def probe(images, x, shares, draws):
    """`compare` by linear probes. x: {row: features of the labelled images, features of the test images}."""
    y = images.labelled.labels

    def score(row, share, index, seed):
        train_x, test_x = x[row]
        return linear_probe.linear_probe(*(z[index.to(y.device)] for z in (train_x, y)), test_x, images.test.labels)
    return compare("linear probe, share of labels", list(x), y, shares, draws, score)


def compare_finetuning(images, encoder, untrained, shares, draws, frozen_stages, epochs, amp):
    """{"share, n frozen": `compare` of "finetuned" and "scratch", trained by the same recipe but for twice as long} for
    each n in frozen_stages. epochs: as many images as in so many passes, or None: 60 or 30, but `LEAST_STEPS`."""
    weights = [sum(p.numel() for part in stage for p in ([part] if torch.is_tensor(part) else part.parameters()))
               for stage in stages(encoder)]
    passes = {str(share): epochs or (60 if share <= 0.01 else 30) for share in shares}
    labels, done, found = images.labelled.labels, {}, {}

    def score(row, share, index, seed):
        start, still, longer = (encoder, n, 1) if row == "finetuned" else (untrained, 0, 2)
        if (key := (row, still, share, seed)) not in done:                    # "scratch" is the same for each n
            steps = longer * max(1 if epochs else LEAST_STEPS, round(passes[str(share)] * len(index) / BATCH_SIZE))
            done[key] = finetune(copy.deepcopy(start), images.labelled, index, images.test, still, amp, steps,
                                 seed=seed)
        return done[key]
    for n in frozen_stages:
        frozen = sum(weights[:n]) / sum(weights)
        print(f"\nfine-tuned, {n} of {len(weights)} stages frozen ({100 * frozen:.0f} % of the weights), and the "
              f"same network trained from scratch")
        for share, values in compare("fine-tuning, share of labels", ["finetuned", "scratch"], labels, shares, draws,
                                     score).items():
            found[f"{share}, {n} frozen"] = {**values, "frozen_stages": n, "frozen_weights": frozen,
                                             "epochs": passes[share]}
    return found
