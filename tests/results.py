# SPDX-License-Identifier: MIT
"""Measures the README's tables of results and of claims:

    python tests/results.py --budget small [--seeds 3] [--jobs 2]   # every method, by each script's own recipe
    python tests/results.py --claims [NAME ...] --data-dir DIR      # small experiments behind claims of the papers
    python tests/results.py --pictures SIMCLR_RUN GCRL_RUN          # the picture at the top of the README, of two runs

Trains and evaluates all rows in --out, one after the other or --jobs at a time. Finished runs are not repeated, and
interrupted ones continue. The results of a row are written to tests/results/BUDGET/ROW-SEED.json, together with GCRL's
samples for the first seed. They are not measured again even if the run is gone: delete the file for that. The tables,
tests/results/BUDGET.md and claims.md, and BUDGET.png, the curves of kNN, show everything that was ever measured. With
--data-dir the images are those of a folder (DIR/train/CLASS/*, DIR/test/CLASS/*), else CIFAR-10 is downloaded.
"""
import argparse
import contextlib
import hashlib
import importlib
import json
import math
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "tests" / "results"
sys.path.insert(0, str(ROOT))                                                 # of the scripts, and common

from common import cli, pictures

BUDGETS = {  # flags for all rows
    "shapes": "--dataset shapes",
    "shapes-float32": "--dataset shapes --amp off",
    "small": "--small",
    "gpu": "--epochs 100",
    "gpu-200": "--epochs 200",
}
ROWS = {  # the choices that define a row; all else is the script's default for the data set
    "SimCLR": "simclr.py", "MoCo, queue": "moco.py", "MoCo, memory bank": "moco.py --dictionary memory-bank",
    "MoCo, end-to-end": "moco.py --dictionary end-to-end", "CMC, L and ab": "cmc.py --dictionary end-to-end",
    "CMC, Y and CbCr": "cmc.py --dictionary end-to-end --views ycbcr",
    "CMC, R, G and B": "cmc.py --dictionary end-to-end --views rgb",
    "CMC, L and ab, memory bank": "cmc.py --dictionary memory-bank", "CPC": "cpc.py",
    "DIM, local": "dim.py --estimator infonce", "DIM, global": "dim.py --estimator infonce --objective global",
    "DIM, both": "dim.py --estimator infonce --objective both", "AMDIM": "dim.py --objective multiscale",
    "GCRL, generative": "gcrl.py --alpha 1 --beta 0", "GCRL, contrastive": "gcrl.py --alpha 0 --beta 1",
    "GCRL, hybrid": "gcrl.py --alpha 1 --beta 1", "GCRL, hybrid, alpha 8": "gcrl.py --alpha 8 --beta 1",
}
LONGER = {  # with --budget small only
    "SimCLR, width 32": "simclr.py --width 32 --epochs 26",
    "SimCLR, width 32, 40 epochs": "simclr.py --width 32 --epochs 40",
    "CMC, L and ab, memory bank, NCE": "cmc.py --contrast nce --dictionary memory-bank --schedule steps --epochs 30",
    # As long as 5 epochs of the hybrid: a step takes 0.53 of its time without L_c, and 0.7 to 0.9 without L_g.
    "GCRL, generative, 9 epochs": "gcrl.py --alpha 1 --beta 0 --epochs 9",
    "GCRL, contrastive, 7 epochs": "gcrl.py --alpha 0 --beta 1 --epochs 7",
}
SCORES = ("probability, of the probe", "Mahalanobis, of class means", "Mahalanobis, no labels",
          "kNN distance, no labels", "likelihood, no labels", "likelihood less complexity")
PUBLISHED = {  # linear accuracies reported by others, on CIFAR-10 unless noted
    "SimCLR": "85.6 (ResNet-18, batch 512, 100 epochs: dkobak/simclr-cifar10)",
    "MoCo, queue": "kNN 82.6 (of the head's output, 200 epochs: MoCo's CIFAR demo)",
    "CMC, Y and CbCr": "75.8 (100 classes of ImageNet, softmax)",
    "CPC": "84.5 (8 px patches, batch 64, 1000 epochs: lightning-bolts)",
    "DIM, local": "75.6 (infoNCE, its own encoder, MLP on fc; table 1)",
    "DIM, global": "52.8 (its own encoder, MLP on fc; table 1)",
    "AMDIM": "91.2 (its large encoder, 300 epochs)",
}

# ---- claims: each is one sentence of a paper, the arms that test it, and the conditions under which it holds

SMALL = "--small --image-size 16 --width 8 --epochs 10 --batch-size 128"
SIMCLR, MOCO = f"simclr.py {SMALL}", f"moco.py {SMALL} --negatives 1024"
END_TO_END, FROZEN = f"moco.py {SMALL} --dictionary end-to-end", (0, 3, 5)
CPC = "cpc.py --small --image-size 16 --patch 8 --stride 4 --steps 2 --width 8 --epochs 10"
DIM, AMDIM = f"dim.py {SMALL}", "dim.py --objective multiscale --small --width 8 --units 128 --epochs 4"
CMC, BANK = f"cmc.py {SMALL} --width 4 --dictionary end-to-end", f"moco.py {SMALL} --dictionary memory-bank"
GCRL = "gcrl.py --small --image-size 12 --width 64 --encoder-layers 1 --decoder-layers 1 --heads 4 --epochs 4"
MORE, LESS, NOT_MORE = ">", "<", "not >"
CLAIMS = {  # name: (sentence, {arm: command, or (command, row of its table), or (command, measure)}, [(a, sign, b)])
    "composition": (
        "Random crop with colour distortion learns far more than either alone or another pair (SimCLR, figure 5)",
        {"crop + colour": f"{SIMCLR} --augmentations crop flip colour grey",
         "crop": f"{SIMCLR} --augmentations crop flip", "colour": f"{SIMCLR} --augmentations flip colour grey",
         "crop + blur": f"{SIMCLR} --augmentations crop flip --blur 0.5",
         "crop + grey": f"{SIMCLR} --augmentations crop flip grey"},
        [("crop + colour", MORE, other) for other in ("crop", "colour", "crop + blur", "crop + grey")]),
    "colour": (
        "Stronger colour distortion helps the contrastive network and not the supervised one (SimCLR, table 1)",
        {f"{kind}, s = {s}": f"{SIMCLR} --jitter {s}{flag}" for s in (0.125, 0.5)
         for kind, flag in (("contrastive", ""), ("supervised", " --loss supervised"))},
        [("contrastive, s = 0.5", MORE, "contrastive, s = 0.125"),
         ("supervised, s = 0.5", NOT_MORE, "supervised, s = 0.125")]),
    "head": (
        "A non-linear head is better than a linear one, and that better than none (SimCLR, figure 8)",
        {"non-linear": f"{SIMCLR} --augmentations crop flip colour grey", "linear": f"{SIMCLR} --head linear",
         "none": f"{SIMCLR} --head none"},
        [("non-linear", MORE, "linear"), ("linear", MORE, "none")]),
    "before-head": (
        "h, before the head, is a better representation than z behind it (SimCLR, table 3)",
        {"h": f"{SIMCLR} --augmentations crop flip colour grey",
         "z": (f"{SIMCLR} --augmentations crop flip colour grey", "projection")}, [("h", MORE, "z")]),
    "loss": (
        "NT-Xent learns more than the logistic and the margin loss (SimCLR, table 4)",
        {"NT-Xent": f"{SIMCLR} --augmentations crop flip colour grey", "logistic": f"{SIMCLR} --loss logistic",
         "margin": f"{SIMCLR} --loss margin"}, [("NT-Xent", MORE, "logistic"), ("NT-Xent", MORE, "margin")]),
    "temperature": (
        "The temperature matters: a middling one is better than a high one (SimCLR, table 5)",
        {"tau = 0.2": f"{SIMCLR} --augmentations crop flip colour grey", "tau = 1": f"{SIMCLR} --tau 1"},
        [("tau = 0.2", MORE, "tau = 1")]),
    "longer": (
        "Longer training learns more (SimCLR, figure 9)",
        {"10 epochs": f"{SIMCLR} --augmentations crop flip colour grey", "3 epochs": f"{SIMCLR} --epochs 3"},
        [("10 epochs", MORE, "3 epochs")]),
    "larger-batch": (
        "With few epochs a larger batch learns more (SimCLR, figure 9)",
        {"batch 32": f"{SIMCLR} --batch-size 32", "batch 256": f"{SIMCLR} --batch-size 256"},
        [("batch 256", MORE, "batch 32")]),
    "negatives": (
        "More negatives learn more, in the queue as in the memory bank (MoCo, figure 3)",
        {"queue of 128": f"{MOCO} --negatives 128", "queue of 2048": f"{MOCO} --negatives 2048",
         "bank, 128 drawn": f"{BANK} --negatives 128", "bank, all": f"{BANK} --negatives 0",
         "end-to-end, 64": f"{END_TO_END} --batch-size 64", "end-to-end, 256": f"{END_TO_END} --batch-size 256"},
        [("queue of 2048", MORE, "queue of 128"), ("bank, all", MORE, "bank, 128 drawn"),
         ("end-to-end, 256", MORE, "end-to-end, 64")]),
    "momentum": (
        "A slowly moving key encoder is better than one that is copied each step (MoCo, section 4.1)",
        {"m = 0": f"{MOCO} --m 0", "m = 0.5": f"{MOCO} --m 0.5", "m = 0.9": f"{MOCO} --m 0.9", "m = 0.99": MOCO},
        [("m = 0.99", MORE, "m = 0"), ("m = 0.9", MORE, "m = 0")]),
    "shuffling": (
        "Without shuffling, batch norm leaks: the loss falls and the features suffer (MoCo, appendix A.9)",
        {"shuffled": MOCO, "not shuffled": f"{MOCO} --no-shuffle", "shuffled, loss": (MOCO, "loss"),
         "not shuffled, loss": (f"{MOCO} --no-shuffle", "loss")},
        [("not shuffled, loss", LESS, "shuffled, loss"), ("shuffled", MORE, "not shuffled")]),
    "directions": (
        "Predicting in four directions learns more than in one (CPC v2)",
        {"four": CPC, "one": f"{CPC} --directions 1"}, [("four", MORE, "one")]),
    "layer-norm": (
        "Layer norm is better than batch norm, by which the patches tell on each other (CPC v2)",
        {"layer norm": CPC, "batch norm": f"{CPC} --norm batch"}, [("layer norm", MORE, "batch norm")]),
    "local": (
        "Local mutual information learns more than global (DIM, table 1)",
        {"local": DIM, "global": f"{DIM} --objective global"}, [("local", MORE, "global")]),
    "estimators": (
        "infoNCE and JSD are better objectives than the Donsker-Varadhan bound (DIM)",
        {"infonce": DIM, "jsd": f"{DIM} --estimator jsd", "dv": f"{DIM} --estimator dv"},
        [("infonce", MORE, "dv"), ("jsd", MORE, "dv")]),
    "full-graph": (
        "All pairs of views learn more than those with the first view alone (CMC)",
        {"full": f"{CMC} --views rgb", "core": f"{CMC} --views rgb --graph core"}, [("full", MORE, "core")]),
    "colour-space": (
        "Views that part light from colour learn more than R, G and B (CMC)",
        {"L and ab": CMC, "R, G and B": f"{CMC} --views rgb"}, [("L and ab", MORE, "R, G and B")]),
    "scales": (
        "Several scales learn more than one (AMDIM)",
        {"1-5, 1-7, 5-5": AMDIM, "1-5": f"{AMDIM} --tasks 1-5"}, [("1-5, 1-7, 5-5", MORE, "1-5")]),
    "hybrid": (
        "The hybrid has the features of the contrastive model and the likelihood of the generative one (GCRL)",
        {"hybrid": GCRL, "contrastive": f"{GCRL} --alpha 0", "hybrid, nats": (GCRL, "nats"),
         "generative, nats": (f"{GCRL} --beta 0", "nats")},
        [("contrastive", NOT_MORE, "hybrid"), ("hybrid, nats", NOT_MORE, "generative, nats")]),
    "alpha": (
        "With a larger alpha the hybrid has both: contrastive features and the generative model's likelihood (GCRL)",
        {"contrastive": f"{GCRL} --alpha 0", "alpha = 1": GCRL, "alpha = 8": f"{GCRL} --alpha 8",
         "alpha = 143": f"{GCRL} --alpha 143", "alpha = 1, nats": (GCRL, "nats"),
         "alpha = 8, nats": (f"{GCRL} --alpha 8", "nats"), "alpha = 143, nats": (f"{GCRL} --alpha 143", "nats"),
         "generative, nats": (f"{GCRL} --beta 0", "nats"), "contrastive, kNN": (f"{GCRL} --alpha 0", "knn"),
         "alpha = 1, kNN": (GCRL, "knn"), "alpha = 8, kNN": (f"{GCRL} --alpha 8", "knn")},
        [("contrastive", NOT_MORE, "alpha = 8"), ("alpha = 8, nats", NOT_MORE, "generative, nats")]),
    "equal-time": (
        "The hybrid is no worse either than longer runs of each loss alone that take the same time (GCRL)",
        {"hybrid": f"{GCRL} --alpha 8", "contrastive, 5 epochs": f"{GCRL} --alpha 0 --epochs 5",
         "hybrid, nats": (f"{GCRL} --alpha 8", "nats"),
         "generative, 7 epochs, nats": (f"{GCRL} --beta 0 --epochs 7", "nats")},
        [("contrastive, 5 epochs", NOT_MORE, "hybrid"), ("hybrid, nats", NOT_MORE, "generative, 7 epochs, nats")]),
    "outside": (
        "The hybrid's likelihood tells other images, `patterns`, from its own as well as the generative model's, and "
        "better than contrastive features do (GCRL)",
        {"hybrid, AUROC": (f"{GCRL} --alpha 8", "AUROC, likelihood, no labels"),
         "generative, AUROC": (f"{GCRL} --beta 0", "AUROC, likelihood, no labels"),
         "contrastive, AUROC by kNN": (f"{GCRL} --alpha 0", "AUROC, kNN distance, no labels"),
         "contrastive, AUROC by Mahalanobis": (f"{GCRL} --alpha 0", "AUROC, Mahalanobis, no labels")},
        [("generative, AUROC", NOT_MORE, "hybrid, AUROC"), ("hybrid, AUROC", MORE, "contrastive, AUROC by kNN"),
         ("hybrid, AUROC", MORE, "contrastive, AUROC by Mahalanobis")]),
    "few-labels": (
        "With 1 % of the labels a fine-tuned encoder is better than the same network from scratch (SimCLR, table 7)",
        {"pre-trained": (SIMCLR, "finetuned, 0 frozen"), "from scratch": (SIMCLR, "scratch, 0 frozen")},
        [("pre-trained", MORE, "from scratch")]),
    "frozen": (
        "First layers are general: with few labels they may stay frozen, the last may not (Yosinski et al. 2014)",
        {f"{n} of 5 stages frozen": (SIMCLR, f"finetuned, {n} frozen") for n in FROZEN},
        [("0 of 5 stages frozen", NOT_MORE, "3 of 5 stages frozen"),
         ("3 of 5 stages frozen", MORE, "5 of 5 stages frozen")]),
}
FINETUNE = ["--labels", "0.01", "--finetune", "--draws", "3", "--frozen-stages", *map(str, FROZEN)]
OUTSIDE = ["--ood", "patterns"]
HOLDS, FAILS, UNKNOWN = "holds", "does not hold here", "cannot be told"


def verdict(values, arms, comparisons):
    """HOLDS, FAILS or UNKNOWN, by a rule that was fixed before the runs. values: {arm: [value of each seed]}.

    a > b holds where mean(a) - mean(b) is more than twice its standard error and fails where it is less than minus
    that; a not > b fails where a > b holds, and holds otherwise. A claim holds where all of its comparisons do, and
    fails where one fails. The standard error is s sqrt(1/n_a + 1/n_b), s the deviation over seeds pooled over all arms
    of the claim with that measure.
    """
    told = []
    for a, sign, b in comparisons:
        alike = [values[arm] for arm in values if measure_of(arms[arm])[0] == measure_of(arms[a])[0]]
        free = sum(len(x) - 1 for x in alike)
        if free == 0:
            return UNKNOWN
        spread = math.sqrt(sum(statistics.variance(x) * (len(x) - 1) for x in alike if len(x) > 1) / free)
        error = spread * math.sqrt(1 / len(values[a]) + 1 / len(values[b]))
        gap = (statistics.mean(values[a]) - statistics.mean(values[b])) * (-1 if sign == LESS else 1)
        certain = (gap > 2 * error) - (gap < -2 * error)
        told.append(certain if sign != NOT_MORE else -1 if certain == 1 else 1)
    return FAILS if -1 in told else HOLDS if all(t == 1 for t in told) else UNKNOWN


def measure_of(arm):
    """(kind of measure, how to read it off a row's JSON in %, or nats, and the digits to print) of a claim's arm."""
    name = "trained" if isinstance(arm, str) else arm[1]
    if name == "loss":
        return "loss", lambda row: row["log"][-1]["loss"], 3
    if name == "nats":
        return "nats", lambda row: row["result"]["nats"], 3
    if name == "knn":
        return "kNN", lambda row: 100 * row["result"]["knn"]["trained"], 1
    if name.startswith("AUROC"):
        score = name.removeprefix("AUROC, ")
        return "AUROC", lambda row: 100 * row["evaluation"]["ood"]["patterns"][score]["auroc"], 1
    if name.endswith("frozen"):
        what, stages = name.split(", ")
        return "accuracy", lambda row: 100 * row["evaluation"]["finetune"][f"0.01, {stages}"][what]["mean"], 1
    return "accuracy", lambda row: 100 * row["result"]["linear"][name], 1


# ---- runs


def check(words, folder):
    """Ends the program if the run in `folder` has other settings than this command (a list of words) gives it."""
    told = json.loads((folder / "args.json").read_text())["settings"]
    wanted = vars(importlib.import_module(words[0].removesuffix(".py")).arguments(words[1:]))
    for flag in (word for word in words if word.startswith("--") and word != "--out"):
        name = flag.removeprefix("--").replace("-", "_")
        if told[name] != wanted[name]:
            sys.exit(f"results.py: {folder} has {flag} {told[name]}, not {wanted[name]}: name another --out")


def run(words, log, rounds=1, patience=150):
    """Runs python with these words, its output appended to the file `log`. After `patience` seconds, prints how long it
    will take by its own estimate, and how long `rounds` such runs would take."""
    with open(log, "a") as file:
        file.write(f"$ python {shlex.join(words)}\n")
        file.flush()
        with subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT) as program:
            with contextlib.suppress(subprocess.TimeoutExpired):
                program.wait(patience)
            left = re.findall(r"(?:(\d+):)?(\d+):(\d\d) left", log.read_text())
            if left and program.poll() is None:
                seconds = patience + sum(int(n or 0) * unit for n, unit in zip(left[-1], (3600, 60, 1)))
                print(f"{log.stem} takes about {seconds / 3600:.1f} hours; all runs, if they take as long, "
                      f"{rounds * seconds / 3600:.0f}", flush=True)
    if program.returncode:
        sys.exit(f"results.py: python {shlex.join(words)} failed, see {log}")


def measure(words, data, seed, folder, kept, evaluation, rounds):
    """Trains by a command and evaluates with the flags `evaluation`, unless this is done already. Writes the row, all
    about the run, to the file `kept`, and returns it.

    words: of the command. data: [flags of the data set]. rounds: how many runs there are to do, for the estimate.
    """
    place, log = data[data.index("--data-dir") + 1] if "--data-dir" in data else "DIR", folder.with_suffix(".log")
    words = [*words, *data, "--seed", str(seed), "--out", str(folder)]
    command = shlex.join(["python", *words[:-2]]).replace(place, "DIR")
    evaluated = ["/".join(Path(word).parts[-2:]) for word in evaluation]      # without the folder's path
    row = json.loads(kept.read_text()) if kept.exists() and not folder.exists() else {}

    def has_evaluation(row):
        return not evaluated or row.get("evaluated") == evaluated
    if row.get("command") == command and has_evaluation(row):
        return row
    started = (folder / "args.json").exists()
    if started:
        check(words, folder)
    if not (folder / "result.json").exists():
        run([words[0], "--resume", str(folder)] if started else words, log, rounds)
    stored = json.loads(kept.read_text()) if kept.exists() else {}
    if evaluation and not ((folder / "evaluation.json").exists() and (not stored or has_evaluation(stored))):
        run(["-m", "common.evaluation", str(folder), *evaluation], log)
    about = json.loads((folder / "args.json").read_text())
    judged = folder / "evaluation.json"
    judged = json.loads(judged.read_text()) if judged.exists() else {}
    row = {"command": command, "evaluated": evaluated or stored.get("evaluated", []), **about, "argv": None,
           "result": json.loads((folder / "result.json").read_text()), "evaluation": next(iter(judged.values()), {}),
           "log": [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]}
    row["settings"] |= {"data_dir": "DIR", "out": None}
    ood = row["evaluation"].get("ood", {})
    row["evaluation"] |= {"ood": {"/".join(Path(other).parts[-2:]): ood[other] for other in ood}} if ood else {}
    for table in ("labels", "finetune"):                                      # the lists of images are long
        for entry in row["evaluation"].get(table, {}).values():
            entry.pop("draws", None)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    row["commit"] = stored["commit"] if stored.get("command") == command else commit.stdout.strip()
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(row) + "\n")
    if kept.name.startswith("gcrl") and seed == 0 and (folder / "samples.png").exists():
        shutil.copy(folder / "samples.png", kept.with_suffix(".png"))
    print(f"{time.strftime('%H:%M')} {row['command']}: linear {100 * row['result']['linear']['trained']:.1f}",
          flush=True)
    return row


def key_of(arm):
    """The name of the files of an arm."""
    return hashlib.sha1((arm if isinstance(arm, str) else arm[0]).encode()).hexdigest()[:10]


def slug(text):
    return "".join(letter if letter.isalnum() else "-" for letter in text.lower().replace(", ", "-"))


# ---- tables


def cell(rows, get, digits=1):
    """The mean of get(row), and with several seeds the standard deviation; empty where the rows have no such thing."""
    try:
        values = [get(row) for row in rows]
    except (KeyError, TypeError):
        return ""
    text = f"{statistics.mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):.{digits}f}"


def markdown(lines):
    lines = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join(" | ".join(["", *line, ""]).strip() for line in lines)


def machine(rows):
    """The sentence that says on what, and with what, the rows were measured."""
    told = sorted({f"{row['device']}, {row.get('precision', '')}, torch {row['torch']}, {row['threads']} "
                   f"thread{'s' * (row['threads'] > 1)} a run".replace(", ,", ",") for row in rows})
    return f"Measured on: {'; '.join(told)}; commits {', '.join(sorted({row['commit'] for row in rows}))}."


def methods_table(found, published):
    """Markdown of {row: [what `measure` returned for each seed]}: linear probe / kNN, and the linear probe for each
    share of the labels. Minutes are those of the fastest seed: others may have been paused. published: {row: what
    others report}."""
    def pair(rows, kind):
        return " / ".join(cell(rows, lambda row: 100 * row["result"][measure][kind]) for measure in ("linear", "knn"))
    shares = sorted({share for rows in found.values() for row in rows for share in row["evaluation"].get("labels", {})})
    lines = [["", "whitened pixels", "untrained", "trained", *(f"{100 * float(share):g} % of labels"
                                                               for share in shares),
              "seeds", "minutes, fastest seed", "GB", *["published, in another setting"] * bool(published)]]
    for title, rows in found.items():
        first = rows[0]["result"]
        others = [kind for kind in first["linear"] if kind not in ("pixels", "untrained", "trained")]
        trained = "; ".join([pair(rows, "trained"), *(f"{kind} {pair(rows, kind)}" for kind in others)])
        if "nats" in first:
            trained += f"; {cell(rows, lambda row: row['result']['nats'], 3)} nats per token"
        lines.append([title, pair(rows, "pixels"), pair(rows, "untrained"), trained,
                      *(cell(rows, lambda row: 100 * row["evaluation"]["labels"][share]["trained"]["mean"])
                        for share in shares), str(len(rows)),
                      f"{min(row['result']['seconds'] for row in rows) / 60:.1f}",
                      cell(rows, lambda row: row["result"]["peak_memory"] / 1e9),
                      *[published.get(title, "")] * bool(published)])
    return markdown(lines)


def ood_table(found):
    """Markdown: how well SimCLR and GCRL tell other images from their own, by each score; None without such rows."""
    found = {row: rows for row, rows in found.items() if row == "SimCLR" or row.startswith("GCRL")}
    others = sorted({other for rows in found.values() for row in rows for other in row["evaluation"].get("ood", {})})
    lines = [["", *found]]
    for other in others:
        for score in SCORES:
            lines.append([f"AUROC, {other}: {score}"] + [
                cell(rows, lambda row: 100 * row["evaluation"]["ood"][other][score]["auroc"])
                for rows in found.values()])
    return markdown(lines) if others else None


def differences_table(kept):
    """Markdown: by how much GCRL's hybrids differ from the model of one loss, on average over the seeds that both have,
    as each seed has its own palette and initial weights; None without two such rows."""
    def value(row, measure):
        found = row["result"][measure]
        return found if measure == "nats" else 100 * found["trained"]
    lines = [["", "linear probe", "kNN", "nats per token"]]
    for hybrid in ("GCRL, hybrid", "GCRL, hybrid, alpha 8"):
        for other in ("GCRL, contrastive", "GCRL, generative"):
            rows, others = ({row["settings"]["seed"]: row for row in kept.get(name, [])} for name in (hybrid, other))
            pairs = [(rows[seed], others[seed]) for seed in rows if seed in others]
            if pairs:
                lines.append([f"{hybrid}, less {other}", *(
                    cell(pairs, lambda pair: value(pair[0], measure) - value(pair[1], measure), digits)
                    for measure, digits in (("linear", 1), ("knn", 1), ("nats", 3)))])
    return markdown(lines) if len(lines) > 1 else None


def read_rows(folder):
    """{row: [what is kept of each seed in `folder`]}."""
    kept = {row: [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))
                  if re.fullmatch(rf"{slug(row)}-\d+", path.stem)] for row in (*ROWS, *LONGER)}
    for row, rows in kept.items():
        if len({re.sub(r"--seed \d+", "", each["command"]) for each in rows}) > 1:
            sys.exit(f"results.py: {folder} has seeds of {row} by different commands: delete what is out of date")
    return {row: rows for row, rows in kept.items() if rows}


def read_claims(folder):
    """All rows that are kept in `folder`, and {claim: {arm: [value of each seed]}} where all of its arms are there."""
    rows, values = {}, {}
    for path in sorted(folder.glob("*.json")):
        rows.setdefault(path.stem.split("-")[0], []).append(json.loads(path.read_text()))
    for name, (_, arms, _) in CLAIMS.items():
        with contextlib.suppress(KeyError):
            values[name] = {arm: [measure_of(how)[1](row) for row in rows[key_of(how)]] for arm, how in arms.items()}
    return sum(rows.values(), []), values


def claims_table(claims):
    """Markdown of {claim: {arm: [value of each seed]}}: the claims with their arms and verdicts."""
    lines = [["claim", "arms", "verdict"]]
    for name, values in claims.items():
        sentence, arms, comparisons = CLAIMS[name]
        text = "; ".join(f"{arm} {cell(values[arm], float, measure_of(arms[arm])[2])}" for arm in arms)
        lines.append([f"{sentence} [`{name}`]", text, f"**{verdict(values, arms, comparisons)}**"])
    return markdown(lines)


def curves(found, path):
    """A PNG with a panel for each row: its kNN in training, the mean of its seeds where all have one, over the minutes
    of the fastest. Rows measured on another machine than most are left out, as their minutes cannot be compared."""
    panels, usual = [], statistics.mode(row["device"] for rows in found.values() for row in rows)
    for title, rows in found.items():
        if any(row["device"] != usual for row in rows):
            continue
        points = []
        for epoch, entries in enumerate(zip(*(row["log"] for row in rows)), 1):
            if all("knn" in entry for entry in entries):
                seconds = min(sum(entry["seconds"] for entry in row["log"][:epoch]) for row in rows)
                points.append((seconds / 60, 100 * statistics.mean(entry["knn"] for entry in entries)))
        if points:
            panels.append((f"{title}: kNN, %, over minutes", points, {}))
    if panels:
        pictures.plot(path, *panels, height=150)


def overview(simclr, gcrl, path, height=330, gap=12):
    """One PNG of two runs' pictures, side by side: views, nearest neighbours, the curve, and completions."""
    names = [simclr / "views.png", simclr / "neighbours.png", simclr / "curve.png", gcrl / "completions.png"]
    parts = [Image.open(name).convert("RGB") for name in names]
    parts = [part.resize((round(part.width * height / part.height), height), Image.LANCZOS) for part in parts]
    sheet, left = Image.new("RGB", (sum(part.width + gap for part in parts) - gap, height), "white"), 0
    for part in parts:
        sheet.paste(part, (left, 0))
        left += part.width + gap
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)


# ---- the command


def subset(folder, place, images=1000):
    """A folder of links to the first so many images of each class of the training part, and to the whole test part."""
    for source in sorted(path for part in ("train", "test") for path in (folder / part).iterdir()):
        linked = place / source.parent.name / source.name
        linked.mkdir(parents=True, exist_ok=True)
        for image in sorted(source.iterdir())[: images if source.parent.name == "train" else None]:
            if not (linked / image.name).exists():
                (linked / image.name).symlink_to(image.resolve())
    return place


def main(argv=None):
    parser = argparse.ArgumentParser(description="Measures the README's tables of results and of claims.",
                                     formatter_class=cli.Help)
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--budget", choices=BUDGETS, help="measure every method with this budget")
    what.add_argument("--claims", nargs="*", choices=CLAIMS, metavar="NAME", help="test these claims, or all, on "
                      "10,000 images of --data-dir: " + ", ".join(CLAIMS))
    what.add_argument("--pictures", nargs=2, type=Path, metavar=("SIMCLR_RUN", "GCRL_RUN"), help="draw the picture at "
                      "the top of the README, tests/results/overview.png")
    add("--data-dir", type=Path, default=None, help="folder DIR/train/CLASS/*, DIR/test/CLASS/* instead of CIFAR-10")
    add("--seeds", type=int, default=None, help="seeds for each row (default: 1; for claims 2)")
    add("--labels", nargs="*", type=float, default=[0.01, 0.1], help="fractions of the labels to probe with as well")
    add("--ood", nargs="*", default=[], help="data sets or folders to detect as out-of-distribution")
    add("--rows", nargs="+", choices=(*ROWS, *LONGER), default=list(ROWS), metavar="ROW", help="only these rows")
    add("--jobs", type=int, default=1, help="runs at a time; set OMP_NUM_THREADS to divide the cores")
    add("--out", type=Path, default=None, help="folder of the runs (default: runs/results-BUDGET)")
    args = parser.parse_args(argv)
    if args.pictures:
        return overview(*args.pictures, RESULTS / "overview.png")
    claims = args.budget is None
    if args.data_dir and args.budget not in (None, "small"):
        parser.error(f"--budget {args.budget} has its own images: leave out --data-dir")
    if claims and not args.data_dir:
        parser.error("--claims needs --data-dir, a folder of images: DIR/train/CLASS/*, DIR/test/CLASS/*")
    name, seeds = args.budget or "claims", range(args.seeds or 1 + claims)
    out = (args.out or ROOT / "runs" / f"results-{name}").resolve()
    out.mkdir(parents=True, exist_ok=True)
    data = [] if name.startswith("shapes") else ["--dataset", "cifar10", "--data-dir", str(ROOT / "data")]
    if args.data_dir:
        folder = args.data_dir.resolve()
        some = out / f"images-{hashlib.sha1(str(folder).encode()).hexdigest()[:10]}"
        data = ["--dataset", "folder", "--data-dir", str(subset(folder, some) if claims else folder)]
    others = [str(Path(other).resolve()) if Path(other).is_dir() else other for other in args.ood]
    evaluation = ["--labels", *map(str, args.labels)] if args.labels else []
    evaluation += ["--ood", *others] if others else []

    if claims:                                                                # {command: flags of its evaluation}
        chosen = args.claims or list(CLAIMS)
        commands = {}
        for arm in (arm for claim in chosen for arm in CLAIMS[claim][1].values()):
            command, more = (arm, "") if isinstance(arm, str) else arm
            commands[command] = (FINETUNE if more.endswith("frozen") else OUTSIDE if more.startswith("AUROC") else
                                 commands.get(command, []))
        keys = {command: key_of(command) for command in commands}
    else:
        if args.budget != "small" and not LONGER.keys().isdisjoint(args.rows):
            parser.error(f"--rows {', '.join(LONGER)} needs --budget small")
        keys = {f"{(ROWS | LONGER)[row]} {BUDGETS[args.budget]}": slug(row) for row in args.rows}
        commands = dict.fromkeys(keys, evaluation)

    jobs = [(command, seed) for command in commands for seed in seeds]
    print(f"{len(jobs)} runs, {args.jobs} at a time, in {out}", flush=True)

    def job(command, seed):
        key = f"{keys[command]}-{seed}"
        return measure(shlex.split(command), data, seed, out / key, RESULTS / name / f"{key}.json", commands[command],
                       rounds=-(-len(jobs) // args.jobs))
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda each: job(*each), jobs))                         # raises what a job raised
    if claims:
        rows, values = read_claims(RESULTS / name)
        text = claims_table(values)
    else:
        found, published = read_rows(RESULTS / name), PUBLISHED if name.startswith("gpu") else {}
        rows = sum(found.values(), [])
        text = "\n\n".join(filter(None, (methods_table(found, published), differences_table(found), ood_table(found))))
        curves(found, RESULTS / f"{name}.png")
    text = f"{text}\n\n{machine(rows)}\n"
    (RESULTS / f"{name}.md").write_text(text)
    print(f"\n{text}\nwritten to {RESULTS / f'{name}.md'}")


if __name__ == "__main__":
    main()
