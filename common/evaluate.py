"""What a finished run is worth beside its own probe: few labels, transfer, fine-tuning, strange images, depth.

    python -m common.linear_probe RUN                                  # linear probe and kNN, on the run's own data set
    python -m common.linear_probe RUN --dataset cifar100               # on another: transfer
    python -m common.linear_probe RUN --labels 0.01 0.1 --finetune     # with few labels, frozen and fine-tuned
    python -m common.linear_probe RUN --ood patterns DIR               # telling what is not of the data set

Any run of any script. What is found is printed and added to RUN/evaluation.json, by data set.
"""
import copy
import importlib
import json
import math
import statistics
import sys
from pathlib import Path

import torch

from common import cli, encoders, linear_probe, ood, pictures
from common.cli import Refusal
from common.data import NAMES, load
from common.finetune import balanced, finetune
from common.palette import dequantise, quantise
from common.run import write_file


def arguments(argv):
    parser = cli.Parser(prog="python -m common.linear_probe", description="Judges a finished run of any script.")
    add = parser.add_argument
    add("run", metavar="RUN", help="folder of a finished run")
    add("--dataset", choices=NAMES, default=None, help="what to judge it on; by default what it was trained on")
    add("--data-dir", default=None, metavar="DIR", help="folder of downloads or of your images; by default the run's")
    add("--labels", nargs="+", type=cli.number(float, 0, high=1), default=None, metavar="SHARE",
        help="probe with these shares of the labels, too, e.g. 0.01 0.1")
    add("--draws", type=cli.count, default=5, help="draws of labels for each share")
    add("--finetune", action="store_true", help="fine-tune the encoder on the labels, beside the same from scratch")
    add("--frozen-stages", type=cli.count_or_zero, default=0, help="first stages that --finetune leaves as they are")
    add("--steps", type=cli.count, default=500, help="steps of --finetune, 64 images each")
    add("--ood", nargs="+", default=None, metavar="D",
        help="data sets, or folders of images, to tell from the run's own")
    add("--blocks", action="store_true", help="a linear probe on each block of a GCRL, and its picture blocks.png")
    add("--device", default="auto", help="auto (CUDA if there is one), cpu, cuda or cuda:N")
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto", help="mixed precision, as in training")
    add("--workers", type=cli.count_or_zero, default=cli.cores(), help="processes that decode images")
    add("--cache-gb", type=cli.nonnegative, default=8.0, help="GB of decoded images kept on the device")
    args = parser.parse_args(sys.argv[1:] if argv is None else [str(a) for a in argv])
    if not args.finetune:
        cli.refuse_unused(parser, args, ("frozen_stages", "steps"), "a run without --finetune")
    if not args.labels:
        cli.refuse_unused(parser, args, ("draws",), "a run without --labels")
    return args


def main(argv=None):
    """Prints the tables and returns what RUN/evaluation.json has for the data set."""
    args = arguments(argv)
    device = cli.pick_device(args.device)
    amp = cli.pick_amp(args.amp, device)
    autocast = torch.autocast(device.type, amp, enabled=amp is not None)
    method, settings = encoders.settings(args.run)
    path, found = Path(args.run) / "evaluation.json", {}
    if path.exists():
        try:
            found = dict(json.loads(path.read_text()))
        except (ValueError, TypeError):
            raise Refusal(f"{path} is damaged: put it right or move it away") from None
    _, module = encoders.load(args.run, device)
    _, untrained = encoders.load(args.run, device, trained=False)
    if args.frozen_stages > len(module.stages()):
        raise Refusal(f"--frozen-stages {args.frozen_stages} is more than the encoder has, {len(module.stages())}")
    if args.blocks and method != "gcrl":
        raise Refusal(f"--blocks is for runs of gcrl.py, {args.run} is one of {method}.py")

    def open_data(name, folder):
        return load(name, folder, settings.image_size, device, args.workers, args.cache_gb, settings.seed)

    name, views = args.dataset or settings.dataset, getattr(settings, "views_dir", None)
    if views and (args.ood or args.data_dir or name != settings.dataset):
        raise Refusal(f"{args.run} has views of its own (--views-dir): it can be judged on these alone")
    downloads = "data" if settings.dataset == "folder" else settings.data_dir
    place = args.data_dir or views or (settings.data_dir if name == settings.dataset else downloads)
    data, outside = open_data(name, place), {}
    for other in args.ood or ():
        if other not in NAMES[:-1] and not Path(other).is_dir():
            raise Refusal(f"--ood {other} is neither a data set ({', '.join(NAMES[:-1])}) nor a folder of images")
        try:
            strange = open_data(other, downloads) if other in NAMES[:-1] else open_data("folder", other)
        except Refusal as refusal:
            raise Refusal(f"--ood {other}: {refusal}") from None
        outside[other] = strange.test or strange.train
    if not data.labelled and (args.labels or args.finetune or args.blocks or not args.ood):
        raise Refusal(f"there is nothing to judge the classes by: {data.unlabelled}; --ood needs no labels")

    def encode(module):
        def call(x):                                                          # uint8 (N, C, S, S) to (N, D)
            with autocast, torch.no_grad():
                return module(x.float() / 255)
        return call

    result = found.setdefault(f"{name} {args.data_dir}" if args.data_dir else name, {})

    def keep(**more):
        for key, values in more.items():
            result[key] = {**result.get(key, {}), **values}
        write_file(path, lambda part: part.write_text(json.dumps(found) + "\n"))

    x = {}
    if data.labelled:
        rows = {"untrained": (encode(untrained), untrained), "trained": (encode(module), module)}
        accuracies, x = linear_probe.evaluate(data, rows)
        print(f"{args.run} on {name}\n\n{linear_probe.table(accuracies, method)}", flush=True)
        keep(**accuracies)
    if args.labels:
        keep(labels=few_labels(data, x, args.labels, args.draws))
    if args.finetune:
        keep(finetune=fine_tuned(data, module, untrained, args, amp))
    if outside:
        likelihood = gcrl_likelihood(args.run, device, autocast) if method == "gcrl" and settings.alpha > 0 else None
        keep(ood=strangers(data, x.get("trained"), (encode(module), module), outside, likelihood))
    if args.blocks:
        own = (name, place) == (settings.dataset, settings.data_dir)
        keep(blocks=by_block(data, args.run, "" if own else f"-{name}", device, autocast))
    print(f"\nsaved in {path}")
    return result


# ---- few labels


def mean_and_deviation(values):
    return {"mean": statistics.mean(values), "deviation": statistics.stdev(values) if len(values) > 1 else 0.0}


def few_labels(data, x, shares, draws):
    """{share: {row: mean and deviation of the probe's accuracy over the draws, "draws": the indices}}, printed."""
    print(f"\n{'linear probe, share of labels':34}{'images':>8}" + "".join(f"{row:>16}" for row in x))
    results = {}
    for share in shares:
        drawn = [balanced(data.labelled.labels, share, seed) for seed in range(draws)]
        accuracy = {row: mean_and_deviation([
            linear_probe.linear_probe(train_x[index], data.labelled.labels[index], test_x, data.test.labels)
            for index in (d.to(train_x.device) for d in drawn)]) for row, (train_x, test_x) in x.items()}
        print(f"{f'{100 * share:g} %, {draws} draws':34}{len(drawn[0]):8}" + "".join(map(shown, accuracy.values())))
        results[str(share)] = {**accuracy, "draws": [index.tolist() for index in drawn]}
    return results


def shown(accuracy):
    return f"{100 * accuracy['mean']:9.1f} +- {100 * accuracy['deviation']:3.1f}"


def fine_tuned(data, module, untrained, args, amp):
    """{"share, n frozen": {"finetuned", "scratch": mean and deviation, ...}}: of --labels, or once of all; printed."""
    stages = module.stages()
    weights = [sum(p.numel() for part in stage for p in ([part] if torch.is_tensor(part) else part.parameters()))
               for stage in stages]
    frozen = sum(weights[: args.frozen_stages])
    print(f"\nfine-tuned, {args.frozen_stages} of {len(stages)} stages frozen "
          f"({100 * frozen / sum(weights):.0f} % of the weights), beside the same network trained from scratch")
    print(f"{'':34}{'images':>8}{'fine-tuned':>16}{'from scratch':>16}")
    results = {}
    for share in args.labels or [1.0]:
        drawn = [balanced(data.labelled.labels, share, seed) for seed in range(args.draws if share < 1 else 1)]
        accuracy = {row: mean_and_deviation([
            finetune(copy.deepcopy(start), data.labelled, index, data.test, stages, amp, args.steps, seed=seed)
            for seed, index in enumerate(drawn)])
            for row, start, stages in (("finetuned", module, args.frozen_stages), ("scratch", untrained, 0))}
        print(f"{f'{100 * share:g} %, draws {len(drawn)}':34}{len(drawn[0]):8}" +
              "".join(map(shown, accuracy.values())), flush=True)
        results[f"{share}, {args.frozen_stages} frozen"] = {
            **accuracy, "frozen_stages": args.frozen_stages, "frozen_weights": frozen / sum(weights),
            "steps": args.steps, "draws": [index.tolist() for index in drawn] if share < 1 else None}
    return results


# ---- strange images


def strangers(data, labelled_x, encoder, outside, likelihood):
    """{outside: {score: {"auroc", "aupr", "fpr95"}}} of the data set's own test images against each outside, printed.
    Without test images the scores are fitted without a tenth of the training images, which stand for them.

    labelled_x: features of the labelled and of the test images, or None without labels. encoder: (encode, module).
    likelihood: None, or two functions of uint8 images: log p in nats, and the images in the palette's colours.
    """
    def encoded(images):
        return linear_probe.features(encoder[0], images, encoder[1])          # (N, D)
    train_x = encoded(data.train)
    if not data.test:
        if len(train_x) < 4:
            raise Refusal(f"--ood needs more images to compare with than {len(train_x)}")
        order = torch.randperm(len(train_x), generator=torch.Generator().manual_seed(0))
        held, kept = order.tensor_split([max(1, len(order) // 10)])
        own_x, train_x = train_x[held.to(train_x.device)], train_x[kept.to(train_x.device)]
    if labelled_x:
        probe_x, y = labelled_x[0], data.labelled.labels
        weights = linear_probe.chosen_fit(linear_probe.standardised(probe_x, probe_x)[0], y, int(y.max()) + 1)

    def scores(x, images):
        """{name: (N,)}, higher for stranger images, of features x (N, D)."""
        found = {}
        if labelled_x:
            standard = linear_probe.standardised(probe_x, x)[1]
            found["probability, of the probe"] = ood.uncertainty(linear_probe.logits(standard, weights))
            found["Mahalanobis, of class means"] = ood.mahalanobis(probe_x, x, y)
        found["Mahalanobis, no labels"] = ood.mahalanobis(train_x, x)
        found["kNN distance, no labels"] = ood.knn_distance(train_x, x)
        if likelihood and data.test:                                          # of training images it would be too high
            log_prob, seen = likelihood
            nats = -linear_probe.features(log_prob, images, batch_size=128).double().cpu()
            bits = linear_probe.features(lambda batch: ood.complexity(seen(batch))[:, None], images)[:, 0].cpu()
            found["likelihood, no labels"] = nats
            found["likelihood less complexity"] = nats / math.log(2) - bits
        return {name: score.cpu() for name, score in found.items()}

    own, results = scores(encoded(data.test) if data.test else own_x, data.test), {}
    for name, images in outside.items():
        theirs, results[name] = scores(encoded(images), images), {}
        print(f"\n{'strange: ' + name:34}{'AUROC':>8}{'AUPR':>8}{'FPR95':>8}")
        for score in own:
            measures = {"auroc": ood.auroc, "aupr": ood.aupr, "fpr95": ood.fpr}
            results[name][score] = {key: measure(own[score], theirs[score]) for key, measure in measures.items()}
            print(f"{score:34}" + "".join(f"{100 * value:8.1f}" for value in results[name][score].values()), flush=True)
    return results


# ---- GCRL: likelihood, and features by depth


def gcrl_likelihood(folder, device, autocast):
    """Two functions of uint8 (N, 3, S, S): log p of their tokens but the first, nats (N,), and the images uint8 in the
    colours of the palette, which is what the tokens say of them."""
    model = importlib.import_module("gcrl").trained(folder, device)

    @torch.no_grad()
    def log_prob(x):
        with autocast:
            return model.log_prob(quantise(x, model.palette))

    def seen(x):
        return (255 * dequantise(quantise(x, model.palette), model.palette)).round().byte()
    return log_prob, seen


def by_block(data, folder, suffix, device, autocast):
    """{block: accuracy} of linear probes on the mean over the positions of each block's output (iGPT, section 4.1: the
    best is in the middle), printed and drawn as blocks.png, with the suffix before its end."""
    model = importlib.import_module("gcrl").trained(folder, device)
    blocks = {"embedding": model.embedding}
    blocks |= {f"encoder {i + 1}, {block.axis}": block for i, block in enumerate(model.encoder)}
    blocks |= {f"decoder {i + 1}": block for i, block in enumerate(model.decoder)}
    seen = {}
    for name, block in blocks.items():
        block.register_forward_hook(lambda _, __, out, name=name: seen.__setitem__(name, out.float().mean(dim=(1, 2))))

    @torch.no_grad()
    def encode(x):
        with autocast:
            model.logits(quantise(x, model.palette))
        return torch.cat(list(seen.values()), dim=1)                          # (N, blocks C)
    train_x, test_x = (linear_probe.features(encode, images, batch_size=128).split(model.embedding.embedding_dim, dim=1)
                       for images in (data.labelled, data.test))
    accuracy = {name: linear_probe.linear_probe(a, data.labelled.labels, b, data.test.labels)
                for name, a, b in zip(seen, train_x, test_x)}
    print(f"\n{'linear probe by depth':34}")
    print("\n".join(f"{name:34}{100 * value:8.1f}" for name, value in accuracy.items()), flush=True)
    write_file(Path(folder) / f"blocks{suffix}.png", lambda part: pictures.curve(part, accuracy))
    return accuracy
