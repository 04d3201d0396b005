# SPDX-License-Identifier: MIT
"""The folder of a run: settings, log, results, and a checkpoint that survives a kill at any moment."""
import contextlib
import copy
import itertools
import json
import math
import os
import signal
import sys
import textwrap
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import torchvision

from . import Refusal, data, distributed, linear_probe, pictures, shown
from .progress import Monitor, Progress, clock


class Run:
    """The folder of one run. If there are several processes, only the first one writes.

    Everything that has a state_dict and affects how training continues is passed to `track`.
    """

    def __init__(self, script, settings, device, rank=0, **facts):
        """script: the path of the script, whose name is that of the method. settings: plain values. facts: values that
        follow from them, to be printed as well.

        The folder is settings["resume"], or a new one: settings["out"], or the next free runs/METHOD-DATASET-SEED[-2,
        -3, ...]. It is created when training starts (`with run:`), so that an earlier interruption leaves none behind.
        Raises Refusal if settings["out"] is taken, or no folder can be made there.
        """
        self.method, self.settings, self.device, self.rank = Path(script).stem, settings, device, rank
        self.tracked, self.history, self.encoders, self.signal, self.since = {}, [], {}, None, time.perf_counter()
        self.resumed, self.facts, self.size = bool(settings["resume"]), facts, None           # training images
        self.folder = Path(settings["resume"] or settings["out"] or
                           "runs/{}-{dataset}-{seed}".format(self.method, **settings))
        if self.resumed or rank > 0:
            return
        if settings["out"]:
            refuse_taken(self.folder)
        wanted = (self.folder if settings["out"] else self.folder.parent).absolute()
        there = next(folder for folder in (wanted, *wanted.parents) if folder.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise Refusal(f"{self.folder} cannot be made, as {there} is not a folder that you may write to: name "
                          f"another with --out")

    def say(self, text):
        if self.rank == 0:
            try:
                print(shown(text, kept="\n"), flush=True)
            except BrokenPipeError:                                           # Ctrl-C ends `| tee`, too
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def ready(self, what, text):
        """Prints a line about the start-up: what is ready, and the seconds since the previous line or the start."""
        now = time.perf_counter()
        self.say(f"{what}: {text} ({now - self.since:.1f} s)")
        self.since = now

    def data(self, data_dir=None, store_size=None):
        """(images, batches): the `data.Data` of the run, and the `data.Batches` to train on. Also prints the settings.

        data_dir: replaces settings["data_dir"]. store_size: as in `data.load`.
        """
        s = self.settings
        if s.get("store_size") and s["dataset"] != "folder":
            raise Refusal("--store-size is for the photographs of --dataset folder: leave it out")
        if (s.get("store_size") or s["image_size"]) < s["image_size"]:
            raise Refusal(f"--store-size {s['store_size']} is less than --image-size {s['image_size']}: raise it")
        self.images = data.load(s["dataset"], data_dir or s["data_dir"], s["image_size"], self.device, s["workers"],
                                s["cache_gb"], s["seed"], store_size)
        self.size = len(self.images.train)
        batches = data.Batches(self.images.train, s["batch_size"], s["seed"], *distributed.rank_and_world())
        words = [f"{k.replace('_', '-')} {v}" for k, v in {**s, **self.facts}.items() if v is not None]
        self.say(textwrap.fill(f"{self.method}: " + ", ".join(words), 100, subsequent_indent="    ",
                               break_on_hyphens=False))
        self.ready("data", self.images)
        return self.images, batches

    def wrap(self, model, sync_batch_norm=True, method=None):
        """The model as it is trained: wrapped by `distributed.wrap` and, with --compile, compiled, the whole of it or
        only the method of this name."""
        net = distributed.wrap(model, self.device, sync_batch_norm)
        self.ready("model", f"{sum(p.numel() for p in model.parameters()):,} parameters")
        if self.settings["compile"] and method:
            setattr(model, method, torch.compile(getattr(model, method)))
            return net
        return torch.compile(net) if self.settings["compile"] else net

    # ---- files

    def make_folder(self):
        """Creates the folder of a new run, with its args.json."""
        if self.rank > 0:
            return
        if self.settings["out"]:
            refuse_taken(self.folder)
            self.folder.mkdir(parents=True, exist_ok=self.folder.exists())    # another run may have made it
        else:
            first = self.folder
            first.parent.mkdir(parents=True, exist_ok=True)                   # a broken link: an error, once
            for number in itertools.count(2):
                with contextlib.suppress(FileExistsError):
                    self.folder.mkdir()
                    break
                self.folder = Path(f"{first}-{number}")
        capabilities = getattr(torch.cpu, "get_capabilities", dict)           # missing in older versions
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else \
            f"{self.device.type}, {capabilities().get('cpu_name', '')}, {os.cpu_count()} cores"
        self.write_json("args.json", {
            "method": self.method, "settings": self.settings, "argv": sys.argv, "device": device,
            "python": sys.version.split()[0], "torch": torch.__version__, "torchvision": torchvision.__version__,
            "numpy": np.__version__, "threads": torch.get_num_threads(),
            **{name: str(value) for name, value in self.facts.items()}})

    def write(self, name, write):
        if self.rank == 0:
            write_file(self.folder / name, write)

    def write_json(self, name, value):
        self.write(name, lambda path: path.write_text(json.dumps(value, indent=1) + "\n"))

    def picture(self, name, *images):
        """Writes a PNG with rows from each of the tensors (N, 3, S, S) in turn, so that views of the same image are in
        one column."""
        rows = [row for rows in zip(*(x.split(8) for x in images)) for row in rows]
        self.write(name, lambda path: pictures.tiles(path, torch.cat(rows), 8))

    def log(self, **entry):
        """Appends the line of a finished epoch to log.jsonl."""
        self.history.append(entry)
        self.write("log.jsonl", lambda path: path.write_text("".join(json.dumps(e) + "\n" for e in self.history)))

    # ---- checkpoint

    def track(self, **objects):
        self.tracked.update(objects)

    def progress(self, epochs, steps, batch_size, metrics):
        """A new `Progress` of this run, which is tracked."""
        self.track(progress=Progress(self, epochs, steps, batch_size, metrics))
        return self.tracked["progress"]

    def watch(self, autocast, encoders):
        """Sets the encoders to evaluate, during training and at its end. Must be called after `progress` and before
        `restore`, because the "trained" encoders are copied here as the "untrained" ones.

        autocast: a context. encoders: {row of the table: Module}, among them "trained", which is saved in encoder.pt.
        """
        if self.rank > 0:                                                     # these wait in the next step
            return
        self.autocast, copies = autocast, copy.deepcopy(encoders)
        for row, encoder in encoders.items():
            self.encoders |= {f"un{row}": copies[row], row: encoder} if row.startswith("trained") else {row: encoder}
        if self.images.labelled:
            self.tracked["progress"].monitor = Monitor(self.images, self.encoders, autocast, self.settings["knn_every"])

    def save_encoder(self):
        if self.encoders:
            self.write("encoder.pt", lambda path: torch.save(self.encoders["trained"].state_dict(), path))

    def save(self, epoch, step):
        """Writes checkpoint.pt, from which training continues at `step` of `epoch`, and encoder.pt. Raises Refusal if a
        weight is not finite, so that the last good checkpoint is kept."""
        state = {name: thing.state_dict() for name, thing in self.tracked.items()}
        if not all(value.isfinite().all() for value in state.get("model", {}).values()):
            raise self.not_finite("the weights are not finite")
        state.update(method=self.method, epoch=epoch, step=step, history=self.history, images=self.size)
        self.write("checkpoint.pt", lambda path: torch.save(state, path))
        self.save_encoder()

    def not_finite(self, what):
        """A Refusal that says what is not finite."""
        kept = f"the last good checkpoint is kept in {self.folder}" if self.saved() else "nothing was saved yet"
        return Refusal(f"{what}: lower --lr, or undo another extreme setting ({kept})")

    def saved(self):
        return (self.folder / "checkpoint.pt").exists()

    def restore(self):
        """Loads the checkpoint into the tracked objects. Returns the (epoch, step) to continue at: (0, 0) in a new run.

        Raises Refusal if the checkpoint is damaged or has another structure than this run would save (`alike`), such as
        that of another model, which would otherwise only fail during training.
        """
        if self.resumed and not self.saved() and (self.folder / "encoder.pt").exists():
            raise Refusal(f"{self.folder}/checkpoint.pt is missing, and training anew would overwrite the results "
                          f"there: put it back or start a new run")
        if not self.resumed or not self.saved():                              # or killed in its first epoch
            return 0, 0
        path, optimizer = self.folder / "checkpoint.pt", self.tracked["optimizer"]
        try:
            state = read_tensors(path)
            for p in (p for group in optimizer.param_groups for p in group["params"]):
                p.grad = torch.zeros_like(p)
            optimizer.step()                                                  # creates its state, to compare with
            optimizer.zero_grad()
            for name, thing in self.tracked.items():
                now = thing.state_dict()
                if isinstance(thing, torch.amp.GradScaler) and not (now and state[name]):
                    continue                                                  # {} in a run without fp16
                if name == "optimizer":                                       # a newer torch may have new settings
                    groups = zip(now["param_groups"], state[name]["param_groups"], strict=True)
                    state[name]["param_groups"] = [{**new, **old} for new, old in groups]
                if not alike(state[name], now):
                    raise ValueError(f"its {name} is of another kind")
                thing.load_state_dict(copy.deepcopy(state[name]))             # not the pages mapped from the file
            epoch, step, history = state["epoch"], state["step"], list(state["history"])
            if not alike([epoch, step], [0, 0]) or min(epoch, step) < 0 or not \
                    0 <= sum(entry["seconds"] for entry in history) < math.inf or not json.dumps(history):
                raise ValueError("it names no place in training")
        except Exception as error:                                            # zip, pickle, key and shape errors
            reason = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:200]
            raise Refusal(f"{path} is not a valid checkpoint of this run ({reason}): replace it by a good one or "
                          f"start a new run") from None
        if (had := state.get("images", self.size)) != self.size:              # older runs have not noted it
            raise Refusal(f"--data-dir has {self.size} training images, but {had} when {self.folder} was saved: name "
                          f"those, or start a new run")
        self.history = history
        return epoch, step

    # ---- from the first step to the last

    def __enter__(self):
        """From here on Ctrl-C and SIGTERM only set `stop_requested`; a second one ends the program at once. Raises
        Refusal if another process is training this run."""
        def handler(number, frame):
            self.signal = number
            self.reset_signals()
            with contextlib.suppress(RuntimeError):                           # in the midst of printing a line
                self.say("\nstopping after this step (once more: at once, without saving)")
        self.handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in self.handlers:                                          # before a folder is there to be left
            signal.signal(number, handler)
        try:
            if not self.resumed:
                self.make_folder()
            self.lock = lock(self.folder / "args.json") if self.rank == 0 else None
        except BaseException:                                                 # __exit__ will not be called
            self.reset_signals()
            raise
        self.say(f"run folder: {self.folder}")
        self.since = time.perf_counter()                                      # start of the first step
        if progress := self.tracked.get("progress"):
            progress.begin()
        return self

    def reset_signals(self):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def __exit__(self, error, *_):
        self.reset_signals()
        if progress := self.tracked.get("progress"):
            progress.timer.cancel()
        if self.lock:
            self.lock.close()                                                 # Windows removes no open file
        failed = error and issubclass(error, (Exception, KeyboardInterrupt))
        if failed and self.rank == 0 and not self.resumed and not self.saved() and not self.history:
            (self.folder / "args.json").unlink(missing_ok=True)               # a new run without any result
            self.folder.rmdir()
        if not error and self.stop_requested():                               # during the last epoch's evaluation
            self.say(f"\nstopped, trained and saved; evaluate with --resume {self.folder}")
            sys.exit(128 + (self.signal or signal.SIGTERM))
        if not failed:
            distributed.end()

    def stop_requested(self):
        return distributed.any_process(self.signal is not None)

    def stop(self, epoch, step):
        """Saves, prints how to continue, and exits with status 130 (Ctrl-C) or 143 (SIGTERM)."""
        self.save(epoch, step)
        distributed.any_process(False)              # waits until all have saved: once one has ended, torchrun kills all
        self.say(f"\nstopped and saved at step {step} of epoch {epoch + 1}; continue with --resume {self.folder}")
        sys.exit(128 + (self.signal or signal.SIGTERM))

    def finish(self, measures=("linear", "knn"), **more):
        """Evaluates the encoders (`linear_probe.evaluate`), prints the table, writes result.json and neighbours.png,
        and returns the results. All processes but the first do nothing and return {}.

        measures: keys of `linear_probe.MEASURES`. more: further results.
        """
        if self.rank > 0:
            return {}
        memory, queries, candidates = peak_memory(self.device), self.images.test, self.images.labelled
        self.save_encoder()                                                   # it may be missing in older runs
        if candidates:
            found, features = linear_probe.evaluate(self.images, self.encoders, self.autocast, measures)
            h, query_h = features["trained"]
        else:
            self.say(f"\nno linear probe and no kNN: {self.images.unlabelled}")
            found, queries, candidates = {}, self.images.centred, self.images.centred
            h = query_h = linear_probe.features(self.encoders["trained"], candidates, self.autocast)
        found |= linear_probe.on_the_sphere(queries, self.encoders, self.autocast)
        self.say("\n" + linear_probe.table(found, self.method))
        self.write("neighbours.png", lambda path: pictures.neighbours(path, queries, query_h, candidates, h))
        seconds = sum(entry["seconds"] for entry in self.history)
        result = dict.fromkeys(measures) | found | more | {"seconds": seconds, "peak_memory": memory}
        self.write_json("result.json", result)
        peak = f", peak memory {memory / 1e9:.1f} GB" if memory else ""
        self.say(f"\ntrained in {clock(seconds)}{peak}; results and pictures in {self.folder}")
        return result


def write_file(path, write):
    """Calls write(part) for a file next to `path`, then renames it to `path`: a kill leaves the old file or the new."""
    part = path.with_name(f".{path.name}.part")
    try:
        write(part)
        with open(part, "rb+") as file:
            os.fsync(file.fileno())                                           # survives a power cut
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)                                        # not `part`; a full disk's has none
        raise
    os.replace(part, path)


def read_tensors(path):
    """The dict that torch.save wrote to the file `path`, with tensors on the CPU, memory-mapped from the file. No code
    in it is run. Raises various errors if the file is damaged."""
    if not path.is_file():                                                    # reading a pipe would wait for ever
        raise FileNotFoundError(f"{path} is no file")
    with zipfile.ZipFile(path) as parts:
        if sum(part.file_size for part in parts.infolist()) > path.stat().st_size:
            raise ValueError("it would unpack to more than it is")
        if bad := parts.testzip():                                            # torch.load checks no checksum
            raise ValueError(f"{bad} in it is damaged")
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(state, dict):
        raise TypeError("it holds no dict")
    return state


def alike(a, b):
    """Whether a has the structure of b: types, keys, lengths, and the shapes and dtypes of tensors; and finite numbers.
    Integer keys may be missing: an optimizer has no state for a parameter without a gradient."""
    if torch.is_tensor(b):
        return torch.is_tensor(a) and (a.shape, a.dtype) == (b.shape, b.dtype)
    if isinstance(b, dict):
        return isinstance(a, dict) and a.keys() <= b.keys() and all(
            alike(a[key], b[key]) if key in a else isinstance(key, int) for key in b)
    if isinstance(b, (list, tuple)):
        return isinstance(a, (list, tuple)) and len(a) == len(b) and all(map(alike, a, b))
    return type(a) is type(b) and (not isinstance(a, float) or math.isfinite(a))


def refuse_taken(folder):
    """Raises Refusal if the folder named by --out cannot be used for a new run."""
    if (folder / "args.json").exists():
        raise Refusal(f"--out {folder} already holds a run: continue it with --resume {folder}, or name another folder")
    if (folder.exists() or folder.is_symlink()) and (not folder.is_dir() or any(folder.iterdir())):
        raise Refusal(f"--out {folder} exists and is not an empty folder: name another")


def lock(path):
    """Opens the file and locks it until it is closed or this process ends in any way. Raises Refusal if another process
    has locked it."""
    file = open(path)
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise Refusal(f"{path.parent} is being trained by another process: stop it, or wait for its end") from None
    except (ImportError, OSError):                                            # Windows, a file system without locks
        pass
    return file


def peak_memory(device):
    """Peak memory in bytes, on CUDA of the tensors on the device, else of the process; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:                                                       # Windows has none
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def cosine(step, steps, warmup=0.0):
    """Factor of the peak learning rate: linear warm-up over the fraction `warmup` of the steps, then a cosine to 0."""
    warmup = warmup * steps
    if step < warmup:
        return min(1.0, (step + 1) / warmup)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
