"""The README's tables of results:   python tests/results.py --budget gpu [--data-dir DIR] [--seeds 1] [--jobs 1]

Trains and judges every row, one after the other or --jobs at a time, in --out; what is there is not done again, and
what was stopped goes on. Writes --out/table.md. With --data-dir the images are a folder's, else CIFAR-10 is downloaded.
"""
import argparse
import importlib
import json
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))                                                 # for the scripts' arguments
BUDGETS = {  # image size, epochs, batch size; width of the ResNets; then those of GCRL, and its width
    "cpu": dict(ours=(16, 2, 128), width=8, gcrl=(12, 2, 64), gcrl_width=64, gcrl_flags="--encoder-layers 1 "
                "--decoder-layers 1 --heads 4 --colours 64 --lr 0.003 --crop-min 0.3", samples=500),
    "small": dict(recipe="--small", samples=500),                             # each script's own recipe, see RECIPES
    "gpu": dict(recipe="--epochs 100", samples=5000),
    "gpu-200": dict(recipe="--epochs 200", samples=5000),
    "tiny": dict(ours=(16, 1, 16), width=2, gcrl=(8, 1, 16), gcrl_width=8, gcrl_flags="--encoder-layers 1 "
                 "--decoder-layers 1 --heads 2 --colours 4", samples=8),
}
RESNET = "--arch resnet18 --stem cifar"
MOCO = f"moco.py {RESNET} --width W --blur 0 --tau 0.1 --crop-min 0.2 --lr 0.12 --head linear --weight-decay 1e-4"
CMC = f"cmc.py {RESNET} --width H --crop-min 0.4 --lr 0.2 --weight-decay 1e-4"
DIM = f"dim.py {RESNET} --width W --units 512 --views 2 --estimator infonce --lr 0.001"
ROWS = {
    "SimCLR": f"simclr.py {RESNET} --width W --jitter 0.5 --blur 0 --crop-min 0.2 --tau 0.2 --lr 0.2 "
              "--optimizer sgd --weight-decay 1e-4 --warmup 0.05",
    "MoCo, queue": f"{MOCO} --dictionary queue --negatives 4096 --m 0.99",
    "MoCo, memory bank": f"{MOCO} --dictionary memory-bank --negatives 4096 --augmentation v2",
    "MoCo, end-to-end": f"{MOCO} --dictionary end-to-end",
    "CMC, L and ab": f"{CMC} --views lab --dictionary end-to-end --tau 0.2",
    "CMC, Y and CbCr": f"{CMC} --views ycbcr --dictionary end-to-end --tau 0.2",
    "CMC, R, G and B": f"{CMC} --views rgb --dictionary end-to-end --tau 0.2",
    "CMC, L and ab, memory bank": f"{CMC} --views lab --dictionary memory-bank --negatives 4096 --tau 0.1",
    "CPC": f"cpc.py {RESNET} --width W --patch 8 --stride 4 --steps K --context-width 64 --lr 0.001",
    "DIM, local": f"{DIM} --objective local",
    "DIM, global": f"{DIM} --objective global",
    "DIM, both": f"{DIM} --objective both",
    "AMDIM": "dim.py --objective multiscale --image-size 32 --width W --units 512 --depth 1 --lr 0.001",
    "GCRL, generative": "gcrl.py --alpha 1 --beta 0",
    "GCRL, contrastive": "gcrl.py --alpha 0 --beta 1",
    "GCRL, hybrid": "gcrl.py --alpha 1 --beta 1",
}
RECIPES = {  # of small, gpu and gpu-200: the choices that make the row; all else is the script's default for CIFAR-10
    "SimCLR": "simclr.py", "MoCo, queue": "moco.py", "MoCo, memory bank": "moco.py --dictionary memory-bank",
    "MoCo, end-to-end": "moco.py --dictionary end-to-end", "CMC, L and ab": "cmc.py --dictionary end-to-end",
    "CMC, Y and CbCr": "cmc.py --dictionary end-to-end --views ycbcr",
    "CMC, R, G and B": "cmc.py --dictionary end-to-end --views rgb", "CMC, L and ab, memory bank": "cmc.py",
    "CPC": "cpc.py", "DIM, local": "dim.py --estimator infonce",
    "DIM, global": "dim.py --estimator infonce --objective global",
    "DIM, both": "dim.py --estimator infonce --objective both", "AMDIM": "dim.py --objective multiscale",
    "GCRL, generative": "gcrl.py --alpha 1 --beta 0", "GCRL, contrastive": "gcrl.py --alpha 0 --beta 1",
    "GCRL, hybrid": "gcrl.py --alpha 1 --beta 1",
}
SCORES = ("probability, of the probe", "Mahalanobis, of class means", "Mahalanobis, no labels",
          "kNN distance, no labels", "likelihood, no labels", "likelihood less complexity")
PUBLISHED = {  # linear accuracy that others report, on CIFAR-10 but where it says otherwise
    "SimCLR": "85.6 (ResNet-18, batch 512, 100 epochs: dkobak/simclr-cifar10)",
    "MoCo, queue": "kNN 82.6 (200 epochs: MoCo's CIFAR demo)",
    "CMC, Y and CbCr": "75.8 (100 classes of ImageNet, softmax)",
    "CPC": "84.5 (8 px patches, batch 64, 1000 epochs: lightning-bolts)",
    "DIM, local": "75.6 (infoNCE, its own encoder, MLP on fc; table 1)",
    "DIM, global": "52.8 (its own encoder, MLP on fc; table 1)",
    "AMDIM": "91.2 (its large encoder, 300 epochs)",
}


def command(row, budget, data, folder, seed):
    """The words of one training run."""
    if "recipe" in budget:
        return [*shlex.split(f"{RECIPES[row]} {budget['recipe']}"), *data, "--seed", str(seed), "--out", str(folder)]
    words, gcrl = ROWS[row], row.startswith("GCRL")
    size, epochs, batch = budget["gcrl" if gcrl else "ours"]
    steps = min(5, (size - 8) // 4)                                           # CPC's, within its grid
    for letter, value in (("W", budget["width"]), ("H", max(1, budget["width"] // 2)), ("K", max(2, steps))):
        words = words.replace(f" {letter} ", f" {value} ")
    if gcrl:
        words += f" --width {budget['gcrl_width']} {budget['gcrl_flags']}"
    if "--image-size" not in words:
        words += f" --image-size {size}"
    return [*shlex.split(words), *data, "--epochs", str(epochs), "--batch-size", str(batch), "--seed", str(seed),
            "--out", str(folder)]


def check(words, folder):
    """Ends the program where the run in `folder` has other settings than these words of a command give it."""
    told = json.loads((folder / "args.json").read_text())["settings"]
    wanted = vars(importlib.import_module(words[0].removesuffix(".py")).arguments(words[1:]))
    for flag in (word for word in words if word.startswith("--") and word != "--out"):
        name = flag.removeprefix("--").replace("-", "_")
        if told[name] != wanted[name]:
            sys.exit(f"results.py: {folder} has {flag} {told[name]}, not {wanted[name]}: name another --out")


def run(words, log):
    """python with these words, its output added to the file `log`."""
    with open(log, "a") as file:
        file.write(f"$ python {shlex.join(words)}\n")
        file.flush()
        done = subprocess.run([sys.executable, *words], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.exit(f"results.py: python {shlex.join(words)} failed, see {log}")


def measure(row, seed, args):
    """Trains and judges a row, as far as that is not done. Returns its result.json, evaluation.json and command."""
    budget, name = BUDGETS[args.budget], row.lower().replace(",", "").replace(" ", "-")
    folder, log = args.out / f"{name}-{seed}", args.out / f"{name}-{seed}.log"
    place = str(args.data_dir.resolve() if args.data_dir else ROOT / "data")
    data = ["--dataset", "folder" if args.data_dir else "cifar10", "--data-dir", place]
    words = command(row, budget, data, folder, seed)
    started = (folder / "args.json").exists()
    if started:
        check(words, folder)
    if not (folder / "result.json").exists():
        run([words[0], "--resume", str(folder)] if started else words, log)
    key = data[1]
    evaluation = folder / "evaluation.json"
    judged = json.loads(evaluation.read_text()).get(key, {}) if evaluation.exists() else {}
    if not (set(map(str, args.labels)) <= judged.get("labels", {}).keys() and set(args.ood) <= judged.get(
            "ood", {}).keys()):
        run(["-m", "common.evaluation", str(folder), "--labels", *map(str, args.labels), "--ood", *args.ood], log)
    judged = json.loads(evaluation.read_text())[key]
    print(f"{row}, seed {seed}: linear {100 * judged['linear']['trained']:.1f}", flush=True)
    shown = shlex.join(words[:-2]).replace(place, "DIR")
    return dict(result=json.loads((folder / "result.json").read_text()), judged=judged, frechet=None, command=shown,
                folder=folder)


def frechet(folder, seed, args):
    """The Frechet distances of a generative run's samples, by the features of SimCLR's run, where there is one."""
    simclr = args.out / f"simclr-{seed}"

    def found():
        told = (json.loads(path.read_text()) for path in folder.glob("distances-T1.0-kall-seed*.json"))
        return next((t["frechet"] for t in told if t.get("frechet", {}).get("run") == str(simclr)), None)
    if simclr.exists() and not found():
        run(["gcrl.py", "--sample", str(folder), "--samples", str(BUDGETS[args.budget]["samples"]), "--frechet",
             str(simclr)], folder.with_suffix(".log"))
    return found()


def cell(runs, get, scale=100.0, digits=1):
    """The mean of get(run), and with several seeds the standard deviation; empty where the runs have no such thing."""
    try:
        values = [scale * get(run) for run in runs]
    except (KeyError, TypeError):
        return ""
    text = f"{statistics.mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} +- {statistics.stdev(values):.{digits}f}"


def markdown(lines):
    lines = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join(" | ".join(["", *line, ""]).strip() for line in lines)


def tables(found, args):
    """Markdown of the measured rows, {row: [a dict of `measure` for each seed]}: all of them; and GCRL's claim, beside
    SimCLR."""
    shares, first = [str(share) for share in args.labels], next(iter(found.values()))
    lines = [["", "linear", "kNN", *(f"{100 * float(s):g} % of labels" for s in shares), "untrained, linear", "s", "GB",
              "published (not this setting)"]]
    for title, runs, kind in [("whitened pixels", first, "pixels"), *((row, runs, "trained")
                                                                      for row, runs in found.items())]:
        line = [title, *(cell(runs, lambda r: r["judged"][measure][kind]) for measure in ("linear", "knn")),
                *(cell(runs, lambda r: r["judged"]["labels"][share][kind]["mean"]) for share in shares)]
        more = [cell(runs, lambda r: r["judged"]["linear"]["untrained"]),
                cell(runs, lambda r: r["result"]["seconds"], 1, 0),
                cell(runs, lambda r: r["result"]["peak_memory"], 1e-9)]
        mlp = cell(runs, lambda r: r["result"]["mlp"]["trained"])             # as Hjelm et al. judge DIM
        said = [PUBLISHED.get(title, ""), f"here {mlp} by an MLP" if mlp else ""]
        more.append("; ".join(filter(None, said)))
        lines.append(line + (more if kind == "trained" else [""] * 4))

    claim = {row: runs for row, runs in found.items() if row == "SimCLR" or row.startswith("GCRL")}
    measures = {"nats per token": (lambda r: r["result"]["nats"], 1, 3),
                "linear": (lambda r: r["judged"]["linear"]["trained"],),
                "kNN": (lambda r: r["judged"]["knn"]["trained"],),
                "Frechet distance of samples": (lambda r: r["frechet"]["samples"], 1, 3),
                "Frechet distance of test images": (lambda r: r["frechet"]["test"], 1, 3)}
    for outside in args.ood:
        for score in SCORES:
            measures[f"AUROC, {'/'.join(Path(outside).parts[-2:])}: {score}"] = (
                lambda r, outside=outside, score=score: r["judged"]["ood"][outside][score]["auroc"],)
    claims = [["", *claim], *([title, *(cell(runs, *measure) for runs in claim.values())]
                              for title, measure in measures.items())]
    told = json.loads(next(args.out.glob("*/args.json")).read_text())
    machine = f"{told['device']}, torch {told['torch']}, {told['threads']} threads a run; seeds: {args.seeds}"
    commands = "\n".join(f"    python {runs[0]['command']}" for runs in found.values())
    data = f"{args.data_dir or 'CIFAR-10'}, --budget {args.budget}"
    parts = [f"{data}, {machine}", markdown(lines), *([markdown(claims)] if claim else []), commands]
    return "\n\n".join(parts) + "\n"


def main(argv=None):
    parser = argparse.ArgumentParser(description="The README's tables of results.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--budget", choices=BUDGETS, required=True, help="how large and how long")
    add("--data-dir", type=Path, default=None, help="a folder DIR/train/CLASS/*, DIR/test/CLASS/* in place of CIFAR-10")
    add("--seeds", type=int, default=1, help="runs of each row")
    add("--labels", nargs="+", type=float, default=[0.01, 0.1], help="shares of the labels")
    add("--ood", nargs="+", default=["patterns"], help="data sets or folders to tell from it")
    add("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help="these rows alone")
    add("--jobs", type=int, default=1, help="rows at a time; give each its cores with OMP_NUM_THREADS")
    add("--out", type=Path, default=None,
        help="folder of the runs and of table.md; by default runs/results-BUDGET beside the scripts")
    args = parser.parse_args(argv)
    if args.data_dir and args.budget.startswith("gpu"):
        parser.error(f"--budget {args.budget} has recipes for CIFAR-10 itself: leave --data-dir out")
    args.out = (args.out or ROOT / "runs" / f"results-{args.budget}").resolve()
    args.ood = [str(Path(name).resolve()) if Path(name).is_dir() else name for name in args.ood]
    args.out.mkdir(parents=True, exist_ok=True)
    jobs = [(row, seed) for seed in range(args.seeds) for row in args.rows]
    with ThreadPoolExecutor(args.jobs) as pool:
        found = dict(zip(jobs, pool.map(lambda job: measure(*job, args), jobs)))
    for (row, seed), measured in found.items():
        if row in ("GCRL, generative", "GCRL, hybrid"):
            measured["frechet"] = frechet(measured["folder"], seed, args)
    text = tables({row: [found[row, seed] for seed in range(args.seeds)] for row in args.rows}, args)
    (args.out / "table.md").write_text(text)
    print(f"\n{text}\nwritten to {args.out / 'table.md'}")


if __name__ == "__main__":
    main()
