"""What an encoder is worth with few labels: frozen under a linear probe, fine-tuned, all of it or its last stages, and
beside both the same network trained from scratch."""
import copy
import statistics
import time

import torch
import torch.nn.functional as F
from torch import nn

from .. import augment, linear_probe

BATCH_SIZE = 64  # of fine-tuning


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


def finetune(module, images, index, test, frozen_stages, amp=None, steps=500, batch_size=BATCH_SIZE, lr=1e-3, seed=0):
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
        flip = augment.random_horizontal_flip(rng, len(x))
        x = augment.apply(x, flip + augment.random_shift(rng, len(x), reach=x.shape[-1] // 8))
        with autocast:
            logits = head(module(x))
        loss = F.cross_entropy(logits.float(), images.labels[augment.send(batch, device)])
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        schedule.step()

    logits = linear_probe.features(nn.Sequential(module, head), test, autocast)
    return (logits.argmax(dim=1) == test.labels).float().mean().item()


def mean_and_deviation(values):
    return {"mean": statistics.mean(values), "deviation": statistics.stdev(values) if len(values) > 1 else 0.0}


def probe(images, x, shares, draws):
    """{share: {row: mean and deviation of the probe's accuracy over the draws, "draws": the indices}}, printed."""
    print(f"\n{'linear probe, share of labels':34}{'images':>8}" + "".join(f"{row:>16}" for row in x))
    results = {}
    for share in shares:
        drawn = [balanced(images.labelled.labels, share, seed) for seed in range(draws)]
        accuracy = {row: mean_and_deviation([
            linear_probe.linear_probe(train_x[index], images.labelled.labels[index], test_x, images.test.labels)
            for index in (d.to(train_x.device) for d in drawn)]) for row, (train_x, test_x) in x.items()}
        print(f"{f'{100 * share:g} %, {draws} draws':34}{len(drawn[0]):8}" + "".join(map(shown, accuracy.values())))
        results[str(share)] = {**accuracy, "draws": [index.tolist() for index in drawn]}
    return results


def shown(accuracy):
    return f"{100 * accuracy['mean']:9.1f} +- {100 * accuracy['deviation']:3.1f}"


def compare_finetuning(images, encoder, untrained, shares, draws, frozen_stages, epochs, amp):
    """{"share, n frozen": {"finetuned", "scratch": mean and deviation, ...}}, printed. All labels are one draw."""
    stages = encoder.stages()
    weights = [sum(p.numel() for part in stage for p in ([part] if torch.is_tensor(part) else part.parameters()))
               for stage in stages]
    frozen = sum(weights[:frozen_stages])
    print(f"\nfine-tuned, {frozen_stages} of {len(stages)} stages frozen "
          f"({100 * frozen / sum(weights):.0f} % of the weights), beside the same network trained from scratch")
    print(f"{'':34}{'images':>8}{'fine-tuned':>16}{'from scratch':>16}")
    results = {}
    for share in shares:
        drawn = [balanced(images.labelled.labels, share, seed) for seed in range(draws if share < 1 else 1)]
        passes, found = epochs or (60 if share <= 0.01 else 30), {"finetuned": [], "scratch": []}
        start = time.perf_counter()
        for seed, index in enumerate(drawn):
            for row, begin, frozen_here, n in (("finetuned", encoder, frozen_stages, passes),
                                               ("scratch", untrained, 0, 2 * passes)):
                steps = max(1, round(n * len(index) / BATCH_SIZE))
                found[row].append(finetune(copy.deepcopy(begin), images.labelled, index, images.test, frozen_here, amp,
                                           steps, seed=seed))
            if time.perf_counter() - start > 10:
                print(f"  draw {seed + 1} of {len(drawn)}: {100 * found['finetuned'][-1]:.1f}, from scratch "
                      f"{100 * found['scratch'][-1]:.1f} ({time.perf_counter() - start:.0f} s)", flush=True)
        accuracy = {row: mean_and_deviation(values) for row, values in found.items()}
        print(f"{f'{100 * share:g} %, draws {len(drawn)}':34}{len(drawn[0]):8}" +
              "".join(map(shown, accuracy.values())), flush=True)
        results[f"{share}, {frozen_stages} frozen"] = {
            **accuracy, "frozen_stages": frozen_stages, "frozen_weights": frozen / sum(weights),
            "epochs": passes, "draws": [index.tolist() for index in drawn] if share < 1 else None}
    return results
