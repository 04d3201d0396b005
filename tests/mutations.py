# SPDX-License-Identifier: MIT
"""What share of wrong lines tests/test_devices.py catches: each `.to(device)`, `send(x, device)`, `device=...`,
`.cpu()` and `torch.Generator(device)` of the project is taken out in turn, in a copy.

    python tests/mutations.py               # all, about half an hour
    python tests/mutations.py cmc.py common/data.py
"""
import ast
import contextlib
import multiprocessing
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import torchvision  # noqa: F401, for the children, which begin with it

ROOT = Path(__file__).resolve().parent.parent
FILES = [*sorted(ROOT.glob("*.py")), *sorted((ROOT / "common").glob("**/*.py"))]
LEGAL = {  # what is left runs on a GPU all the same (an index on the CPU; a value on the CPU already): (file, line)
    ("cmc.py", "model.remember(z, augment.send(index, z.device), 0.0)"),
    ("moco.py", "model.bank[distributed.gather(augment.send(index, device))] = distributed.gather(q)"),
    ("common/cli.py", "torch.empty(1, device=device)"),
    ("common/data.py", "return next(self.batches([index.cpu()])).cpu()"),
    ("common/linear_probe.py",
     "order = torch.randperm(len(train_x), generator=torch.Generator().manual_seed(0)).to(train_x.device)"),
    ("common/linear_probe.py", "values = torch.linalg.svdvals(h.float().cpu())"),
    ("common/linear_probe.py", "index = torch.randint(len(train_x), (batch_size,)).to(train_x.device)"),
    ("common/linear_probe.py",
     "d2 = (2 - 2 * h @ h.T).clamp(min=0)[~torch.eye(len(h), dtype=torch.bool, device=h.device)]"),
    ("common/pictures.py", "images = images.cpu().float() / 255 if images.dtype == torch.uint8 else "
     "images.detach().cpu().float()"),
    ("common/progress.py", "y, test_y = (part.labels[index.to(part.device)] for part, index in self.parts)"),
    ("common/evaluation/features.py",
     "index = (x @ h.T).topk(min(7, len(h)), dim=1).indices.cpu()               # (Q, k)"),
    ("common/evaluation/features.py",
     "y = tsne(F.normalize(linear_probe.features(encoder, images, autocast, index=index).cpu(), dim=1))"),
    ("common/evaluation/features.py",
     "labels = [0] * len(y) if images.labels is None else images.labels.cpu()[index].tolist()"),
    ("common/evaluation/few_labels.py", "generator, labels = torch.Generator().manual_seed(seed), labels.cpu()"),
    ("common/evaluation/few_labels.py",
     "loss = F.cross_entropy(logits.float(), images.labels[augment.send(batch, device)])"),
    ("common/evaluation/few_labels.py",
     "return linear_probe.linear_probe(*(z[index.to(y.device)] for z in (train_x, y)), test_x, images.test.labels)"),
    ("common/evaluation/generation.py", "x = drawn(torch.zeros(n, size, size, dtype=torch.int64, device=device))"),
    ("common/evaluation/generation.py",
     "mean1, cov1, mean2, cov2 = (x.cpu().double() for x in (mean1, cov1, mean2, cov2))"),
    ("common/evaluation/out_of_distribution.py",
     "order = torch.randperm(len(train_x), generator=torch.Generator().manual_seed(0)).to(train_x.device)"),
}


def mutants(source):
    """Yields (line number, what is taken out, the source without it)."""
    lines = source.encode().splitlines(keepends=True)
    at = lambda line, column: sum(map(len, lines[: line - 1])) + column

    def text(node):
        return source.encode()[at(node.lineno, node.col_offset) : at(node.end_lineno, node.end_col_offset)]

    def without(node, new):
        start, end = at(node.lineno, node.col_offset), at(node.end_lineno, node.end_col_offset)
        return (source.encode()[:start] + new + source.encode()[end:]).decode()

    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        places = [arg for arg in node.args if "device" in ast.unparse(arg)]
        if name == "cpu" or name == "to" and places:
            yield node.lineno, f".{name}(...)", without(node, text(node.func.value))
        elif name == "send":
            yield node.lineno, "send", without(node, text(node.args[0]))
        elif text(node.func) == b"torch.Generator" and node.args:
            yield node.lineno, "Generator", without(node, b"torch.Generator()")
        for keyword in node.keywords:
            if keyword.arg == "device" and name != "partial":
                rest = [text(arg) for arg in (*node.args, *node.keywords) if arg is not keyword]
                yield node.lineno, "device=", without(node, text(node.func) + b"(" + b", ".join(rest) + b")")


def selection(path):
    """The tests that run the file's lines, for pytest -k."""
    if path.parent == ROOT:
        return f"(gpu or start_to_end) and {path.stem}" + " or sampling or alone" * (path.stem in ("cmc", "gcrl"))
    if path.name in ("augment.py", "data.py", "progress.py"):
        return "gpu or start_to_end"
    return "sampling or evaluation" + " or start_to_end" * (path.parent.name != "evaluation")


def run_tests(project, chosen):
    """Ends the process with pytest's status."""
    os.chdir(project)
    sys.path[:] = [place for place in sys.path if Path(place) not in (ROOT, ROOT / "tests")]
    with open(os.devnull, "w") as silent, contextlib.redirect_stdout(silent):
        status = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "tests/test_devices.py", "-k", chosen])
    os._exit(int(status))


def main(names):
    caught, missed, legal = 0, [], 0
    for path in FILES:
        where = str(path.relative_to(ROOT))
        if names and where not in names:
            continue
        source = path.read_text()
        for line, what, mutant in mutants(source):
            told = source.splitlines()[line - 1].strip()
            if (where, told) in LEGAL:
                legal += 1
                continue
            with tempfile.TemporaryDirectory() as folder:
                copy = Path(folder) / "project"
                shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "__pycache__", "runs", "data"))
                (copy / where).write_text(mutant)
                child = multiprocessing.get_context("fork").Process(target=run_tests, args=(copy, selection(path)))
                child.start()
                child.join()
            if child.exitcode == 0:
                missed.append((where, line, what, told))
            caught += child.exitcode == 1
            print({0: "missed", 1: "caught"}.get(child.exitcode, f"pytest's status {child.exitcode}:"),
                  f"{where}:{line}", what, told, flush=True)
    print(f"{caught} of {caught + len(missed)} caught; {legal} more are legal on a GPU; missed:", *missed, sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
