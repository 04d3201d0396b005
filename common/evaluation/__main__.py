# SPDX-License-Identifier: MIT
"""The command line: evaluates a run, prints tables and adds the results to RUN/evaluation.json, by data set."""
import json
import sys
from pathlib import Path

import torch

from .. import Refusal, cli, linear_probe
from ..data import HOMES, NAMES, image_files, load
from ..run import write_file
from . import depth, features, few_labels, out_of_distribution, runs


def arguments(argv):
    parser = cli.Parser(prog="python -m common.evaluation", description="Evaluates a run of any script. With "
                        "--export, --map or --neighbours it does only that.")
    add, number = parser.add_argument, parser.number
    add("run", type=cli.path, metavar="RUN", help="folder of a run")
    add("--dataset", choices=NAMES, help="data set to evaluate on (default: the run's, or the images in --data-dir)")
    add("--data-dir", type=cli.path, metavar="DIR", help="folder of downloads or of your images (default: the run's)")
    number("--labels", None, "(0, 1]", "also probe with these fractions of the labels, e.g. 0.01 0.1", nargs="+",
           metavar="SHARE", kind=float)
    number("--draws", 5, "[1, inf)", "random draws of labels for each fraction")
    add("--finetune", action="store_true", help="fine-tune the encoder on the labels, and train one from scratch")
    number("--frozen-stages", [0], "[0, inf)", "number of first stages that --finetune keeps frozen, or several "
        "numbers to compare", nargs="+", metavar="N", kind=int)
    number("--epochs", None, "[1, inf)", "passes of --finetune over the labelled images, drawn with replacement; twice "
        "as many from scratch (default: 60 with at most a hundredth of the labels, else 30; at least 200 steps)",
        kind=int)
    add("--ood", nargs="+", type=cli.path, metavar="D",
        help="data sets or folders of images to detect as out-of-distribution")
    add("--blocks", action="store_true", help="linear probe of each block of a generator, plotted in blocks.png")
    add("--export", type=cli.path, metavar="FILE", help="write features, labels and file names to this .npz file, for "
        "numpy.load")
    add("--map", action="store_true", help="plot the test features in two dimensions (t-SNE), in map.png")
    add("--neighbours", nargs="+", type=cli.file, metavar="IMAGE", help="find the training images whose features are "
        "closest to those of your images: nearest.png, and their names")
    add("--device", default="auto", help="auto (CUDA, else MPS, else the CPU), cpu, mps, cuda or cuda:N")
    add("--amp", choices=("auto", "bf16", "fp16", "off"), help="mixed precision (default: that of the run)")
    number("--workers", cli.cores(), "[0, inf)", "processes that decode images")
    number("--cache-gb", 8.0, "[0, inf)", "GB of decoded images to keep on the device")
    args = parser.parse_args(sys.argv[1:] if argv is None else [str(a) for a in argv])
    if args.export or args.map or args.neighbours:
        parser.refuse_unused(args, ("labels", "finetune", "ood", "blocks"), "with --export, --map and --neighbours")
    if not args.finetune:
        parser.refuse_unused(args, ("frozen_stages", "epochs"), "without --finetune")
    if not args.labels:
        parser.refuse_unused(args, ("draws",), "without --labels")
    return args


def main(argv=None):
    """Prints the tables and returns what RUN/evaluation.json contains for the data set."""
    args = arguments(argv)
    device, folder = cli.pick_device(args.device), Path(args.run)
    settings, encoder = runs.load_encoder(args.run, device)
    amp = cli.pick_amp(args.amp or settings.amp, device)
    autocast = torch.autocast(device.type, amp, enabled=amp is not None)
    if max(args.frozen_stages) > (n := len(few_labels.stages(encoder))):
        raise Refusal(f"--frozen-stages {max(args.frozen_stages)} is more than the {n} stages of the encoder: lower it")
    generator = runs.load_generator(args.run, device, needed=False) if args.ood or args.blocks else None
    if args.blocks and generator is None:
        raise Refusal(f"--blocks needs a generator, and {args.run} has none")
    yours = args.data_dir and (settings.dataset not in HOMES or image_files(args.data_dir))   # not downloads
    name, views = args.dataset or ("folder" if yours else settings.dataset), getattr(settings, "views_dir", None)
    if views and (args.ood or args.neighbours or args.data_dir or name != settings.dataset):
        raise Refusal(f"{args.run} has views of its own (--views-dir): it can only be evaluated on these")
    downloads = "data" if settings.dataset == "folder" else settings.data_dir
    place = args.data_dir or views or (settings.data_dir if name == settings.dataset else downloads)
    own = name == settings.dataset and place in (settings.data_dir, views)    # the run's own images
    suffix = "" if own else f"-{name}"                                        # of picture names

    def open_data(name, folder):
        return load(name, folder, settings.image_size, device, args.workers, args.cache_gb, settings.seed)

    if args.data_dir and name in NAMES[:2]:
        raise Refusal(f"--data-dir has no effect on --dataset {name}, which is generated: leave one of them out")
    images, outside = open_data(name, place), {}
    if args.export:
        features.export(Path(args.export), images, encoder, autocast)
    if args.map:
        features.draw_map(folder / f"map{suffix}.png", images.test or images.centred, images.classes, encoder, autocast)
    if args.neighbours:
        features.show_neighbours(folder / f"nearest{suffix}.png", args.neighbours, images, encoder, autocast)
    if args.export or args.map or args.neighbours:
        return None

    path = folder / "evaluation.json"
    try:
        found = {on: {measure: {**rows} for measure, rows in measures.items()}
                 for on, measures in (cli.read_json(path) if path.exists() else {}).items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        raise Refusal(f"{path} is damaged: repair it or move it away") from None
    for other in args.ood or ():
        if other not in NAMES[:-1] and not Path(other).is_dir():
            raise Refusal(f"--ood {other} is neither a data set ({', '.join(NAMES[:-1])}) nor a folder of images")
        try:
            strange = open_data(other, downloads) if other in NAMES[:-1] else open_data("folder", other)
        except Refusal as refusal:
            raise Refusal(f"--ood {other}: {refusal}") from None
        outside[other] = strange.test or strange.train
    if not images.labelled and (args.labels or args.finetune or args.blocks or not args.ood):
        raise Refusal(f"there are no labels to evaluate with: {images.unlabelled}; --ood needs none")

    result = found.setdefault(f"{name} {args.data_dir}" if args.data_dir else name, {})

    def keep(**more):
        for key, values in more.items():
            result[key] = {**result.get(key, {}), **values}
        write_file(path, lambda part: part.write_text(json.dumps(found) + "\n"))

    x, untrained = {}, runs.load_encoder(args.run, device, trained=False)[1]
    if images.labelled:
        accuracies, x = linear_probe.evaluate(images, {"untrained": untrained, "trained": encoder}, autocast)
        print(f"{args.run} on {name}\n\n{linear_probe.table(accuracies, cli.read_settings(args.run)[0])}", flush=True)
        keep(**accuracies)
    if args.labels:
        keep(labels=few_labels.probe(images, x, args.labels, args.draws))
    if args.finetune:
        keep(finetune=few_labels.compare_finetuning(
            images, encoder, untrained, args.labels or [1.0], args.draws, args.frozen_stages, args.epochs, amp))
    if outside:
        keep(ood=out_of_distribution.detect(images, x.get("trained"), encoder, outside, generator, autocast))
    if args.blocks:
        keep(blocks=depth.probe(images, generator, folder / f"blocks{suffix}.png", autocast))
    print(f"\nsaved in {path}")
    return result


if __name__ == "__main__":
    cli.program(main, memory="--cache-gb or name another --device")
