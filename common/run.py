"""A run's folder: settings, log, and a checkpoint that survives a kill at any moment."""
import contextlib
import itertools
import json
import math
import os
import signal
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import torch
import torchvision

from . import Refusal, data, distributed, linear_probe, pictures
from .progress import Progress, clock


class Run:
    """The folder of one run. Only the first process of a multi-process run writes.

    Everything that has a state_dict and decides how training goes on is given to `track`.
    """

    def __init__(self, script, settings, device, rank=0, **facts):
        """script: the path of the script, whose name is the method's. settings: plain values. facts: what follows from
        them, printed beside them.

        The folder is settings["resume"], or a new one, which is made when training begins (`with run:`): until then an
        interruption leaves nothing behind. Raises Refusal where settings["out"] is taken.
        """
        self.method, self.settings, self.device, self.rank = Path(script).stem, settings, device, rank
        self.tracked, self.history, self.signal, self.since = {}, [], None, time.perf_counter()
        self.resumed, self.facts = bool(settings["resume"]), facts
        self.folder = Path(settings["resume"]) if self.resumed else None
        if settings["out"] and not self.resumed and rank == 0:
            refuse_taken(Path(settings["out"]))

    def say(self, text):
        if self.rank == 0:
            print(text, flush=True)

    def ready(self, what, text):
        """A line of the start-up: what is ready, and the seconds since the line before (or since the run began). Before
        the first one stand the settings."""
        now = time.perf_counter()
        if self.facts is not None:
            words = [f"{k.replace('_', '-')} {v}" for k, v in {**self.settings, **self.facts}.items() if v is not None]
            self.say(textwrap.fill(f"{self.method}: " + ", ".join(words), 100, subsequent_indent="    ",
                                   break_on_hyphens=False))
            self.facts = None
        self.say(f"{what}: {text} ({now - self.since:.1f} s)")
        self.since = now

    def data(self, data_dir=None, store_size=None):
        """(images, batches) by the settings of the run: `data.Data`, and the `data.Batches` that train.

        data_dir: in place of settings["data_dir"]. store_size: as in `data.load`.
        """
        names = ("image_size", "workers", "cache_gb", "seed", "batch_size")
        size, workers, cache_gb, seed, batch_size = (self.settings[name] for name in names)
        if self.settings.get("store_size") and self.settings["dataset"] != "folder":
            raise Refusal("--store-size is for the photographs of --dataset folder: leave it out")
        place = data_dir or self.settings["data_dir"]
        images = data.load(self.settings["dataset"], place, size, self.device, workers, cache_gb, seed, store_size)
        batches = data.Batches(images.train, batch_size, seed, *distributed.rank_and_world())
        self.ready("data", images)
        return images, batches

    # ---- files

    def make_folder(self):
        """Makes a new run's folder, settings["out"] or the next free runs/METHOD-DATASET-SEED[-2, -3, ...], with its
        args.json."""
        name, self.folder = "runs/{}-{dataset}-{seed}".format(self.method, **self.settings), Path(os.devnull)
        if self.settings["out"] and self.rank == 0:
            self.folder = Path(self.settings["out"])
            refuse_taken(self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)
        elif self.rank == 0:
            for number in itertools.count(1):
                self.folder = Path(name if number == 1 else f"{name}-{number}")
                with contextlib.suppress(FileExistsError):
                    self.folder.mkdir(parents=True)
                    break
        capabilities = getattr(torch.cpu, "get_capabilities", dict)           # older torch has none
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else \
            f"{self.device.type}, {capabilities().get('cpu_name', '')}, {os.cpu_count()} cores"
        self.write_json("args.json", {
            "method": self.method, "settings": self.settings, "argv": sys.argv, "device": device,
            "python": sys.version.split()[0], "torch": torch.__version__, "torchvision": torchvision.__version__,
            "numpy": np.__version__, "threads": torch.get_num_threads()})

    def write(self, name, write):
        if self.rank == 0:
            write_file(self.folder / name, write)

    def write_json(self, name, value):
        self.write(name, lambda path: path.write_text(json.dumps(value, indent=1) + "\n"))

    def picture(self, name, *images):
        """Writes a PNG with a row of each of the tensors (N, 3, S, S) in turn, `pictures.rows`."""
        self.write(name, lambda path: pictures.rows(path, *images))

    def log(self, **entry):
        """Adds the line of a finished epoch to log.jsonl."""
        self.history.append(entry)
        self.write_log()

    def write_log(self):
        self.write("log.jsonl", lambda path: path.write_text("".join(json.dumps(e) + "\n" for e in self.history)))

    # ---- checkpoint

    def track(self, **objects):
        self.tracked.update(objects)

    def progress(self, epochs, steps, batch_size, metrics):
        """A `Progress` of this run, tracked."""
        self.track(progress=Progress(self, epochs, steps, batch_size, metrics))
        return self.tracked["progress"]

    def save(self, epoch, step):
        """Writes checkpoint.pt: training goes on at `step` of `epoch`."""
        state = {name: thing.state_dict() for name, thing in self.tracked.items()}
        state.update(method=self.method, epoch=epoch, step=step, history=self.history)
        self.write("checkpoint.pt", lambda path: torch.save(state, path))

    def saved(self):
        return (self.folder / "checkpoint.pt").exists()

    def restore(self):
        """Puts the checkpoint into what is tracked. Returns (epoch, step) to go on at: (0, 0) in a new run.

        Raises Refusal where the checkpoint is cut off, or another method's or model's.
        """
        if not self.resumed or not self.saved():                              # killed before its first epoch ended
            return 0, 0
        path = self.folder / "checkpoint.pt"
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            if state["method"] != self.method:
                raise ValueError(f"it is {state['method']}'s")
            for name, thing in self.tracked.items():
                thing.load_state_dict(state[name])
            epoch, step, self.history = state["epoch"], state["step"], state["history"]
        except Exception as error:                                            # zip, pickle, key and shape errors
            reason = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
            raise Refusal(f"{path} is not a whole checkpoint of this run ({reason}): put a good one in its place or "
                          f"start a new run") from None
        self.write_log()
        return epoch, step

    # ---- from the first step to the last

    def __enter__(self):
        """From here on Ctrl-C and SIGTERM only ask `stop_requested`; a second one ends the program at once."""
        if not self.resumed:
            self.make_folder()
        self.say(f"run folder: {self.folder}")
        self.since = time.perf_counter()                                      # of the first step's start

        def handler(number, frame):
            self.signal = number
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self.handlers[number])
        self.handlers = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, error, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        failed = error and issubclass(error, (Exception, KeyboardInterrupt))
        if failed and self.rank == 0 and not self.resumed and not self.saved() and not self.history:
            (self.folder / "args.json").unlink(missing_ok=True)               # a new run that came to nothing
            self.folder.rmdir()
        if not failed and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()                         # NCCL wants it of all at about one time

    def stop_requested(self):
        return distributed.any_process(self.signal is not None)

    def stop(self, epoch, step):
        """Saves, says how to go on and exits with 130 (Ctrl-C) or 143 (SIGTERM)."""
        self.save(epoch, step)
        self.say(f"\nstopped and saved at step {step} of epoch {epoch + 1}; go on with --resume {self.folder}")
        sys.exit(128 + (self.signal or signal.SIGTERM))

    def finish(self, images, encoders, autocast, measures=("linear", "knn"), **more):
        """Writes encoder.pt, evaluates the encoders (`linear_probe.evaluate`), prints the table, and writes result.json
        and neighbours.png. Returns the results; in all but the first process it does nothing and returns {}.

        images: `data.Data`. encoders: {row of the table: Module}, among them "untrained" and "trained", the one that is
        kept. measures: of `linear_probe.MEASURES`. more: further results.
        """
        if self.rank > 0:
            return {}
        memory, result, trained = peak_memory(self.device), dict.fromkeys(measures), encoders["trained"]
        self.write("encoder.pt", lambda path: torch.save(trained.state_dict(), path))
        if images.labelled:
            accuracies, features = linear_probe.evaluate(images, encoders, autocast, measures)
            result.update(accuracies)
            queries, candidates, (h, query_h) = images.test, images.labelled, features["trained"]
            self.say("\n" + linear_probe.table(accuracies, self.method))
        else:
            self.say(f"\nno linear probe and no kNN: {images.unlabelled}")
            queries = candidates = images.centred
            h = query_h = linear_probe.features(trained, candidates, autocast)
        self.write("neighbours.png", lambda path: pictures.neighbours(path, queries, query_h, candidates, h))
        result.update(more, seconds=sum(entry["seconds"] for entry in self.history), peak_memory=memory)
        self.write_json("result.json", result)
        peak = f", peak memory {memory / 1e9:.1f} GB" if memory else ""
        self.say(f"\ntrained in {clock(result['seconds'])}{peak}; results and pictures in {self.folder}")
        return result


def write_file(path, write):
    """Calls write(part) for a file beside `path` and puts that in its place at once: a kill leaves a whole file."""
    part = path.with_name(f".{path.name}.part")
    try:
        write(part)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    with open(part, "rb+") as file:
        os.fsync(file.fileno())                                               # a power cut, too
    os.replace(part, path)


def refuse_taken(folder):
    """Raises Refusal where a new run cannot have the folder that --out names."""
    if (folder / "args.json").exists():
        raise Refusal(f"--out {folder} holds a run already: go on with --resume {folder}, or name another folder")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise Refusal(f"--out {folder} exists and is not an empty folder: name another")


def peak_memory(device):
    """Bytes: of the CUDA device's allocations, else of the process, or None where that is not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:                                                       # Windows has none
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def cosine(step, steps, warmup=0.0):
    """Factor of the peak learning rate: linear over the share `warmup` of the steps, then half a cosine down to 0."""
    warmup = warmup * steps
    if step < warmup:
        return min(1.0, (step + 1) / warmup)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
