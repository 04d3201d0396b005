"""A run's folder (settings, log, a checkpoint that survives a kill at any moment) and what is on the terminal."""
import argparse
import json
import math
import os
import resource
import shutil
import signal
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import torch
import torchvision

from common import distributed, encoders, linear_probe, pictures
from common.cli import Refusal

# Settings that may change on --resume: where and how fast it runs, not what is computed.
FREE_ON_RESUME = {"resume", "device", "compile", "workers", "data_dir", "cache_gb", "micro_batch"}


def parse(parser, argv, defaults, by=("dataset",)):
    """The arguments of a new run, or of the run that --resume names.

    defaults: {"shapes" or "shapes memory-bank": {setting: value}}, what a run uses unless a flag says otherwise, where
    the flags named in `by` have all these values; a later entry goes before an earlier one. "small" stands for the flag
    --small. --help shows those of the flags beside it. A resumed run takes its settings from its args.json.
    """
    argv = sys.argv[1:] if argv is None else [str(a) for a in argv]
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--resume")
    first.add_argument("--small", action="store_true")
    for name in by:
        first.add_argument(f"--{name}", default=parser.get_default(name))
    try:
        told = first.parse_known_args(argv)[0]
    except argparse.ArgumentError:                                            # a flag without its value
        return parser.parse_args(argv)                                        # says so
    if told.resume is not None:
        try:
            stored = vars(encoders.settings(told.resume, Path(parser.prog).stem)[1])
        except Refusal as refusal:
            raise Refusal(f"--resume {refusal}") from None
        args = stored_arguments(parser, argv, stored, FREE_ON_RESUME, "on --resume")
        args.out = told.resume
        return args
    if told.small and told.dataset == "shapes":
        raise Refusal("--small is for real images: --dataset shapes takes two minutes without it, leave it out")
    chosen = {getattr(told, name) for name in by} | ({"small"} if told.small else set())
    for values, settings in defaults.items():
        if chosen.issuperset(values.split()):
            parser.set_defaults(**settings)
    return parser.parse_args(argv)


def stored_arguments(parser, argv, stored, free, when):
    """The arguments of a run with the settings `stored`. argv may change those in `free`; else Refusal, which says
    `when`."""
    parser.set_defaults(**stored)
    args = parser.parse_args(sys.argv[1:] if argv is None else [str(a) for a in argv])
    changed = [name for name in stored if name not in free and getattr(args, name) != stored[name]]
    if changed:
        raise Refusal(f"--{changed[0].replace('_', '-')} cannot change {when} (the run has {stored[changed[0]]}): "
                      f"leave it out, or start a new run")
    return args


class Run:
    """The folder of one run. Only the first process of a multi-process run writes.

    Everything that has a state_dict and decides how training goes on is given to `track`.
    """

    def __init__(self, method, settings, device, rank=0):
        """settings: plain values. The folder is settings["resume"], or a new one, which is made when training begins
        (`with run:`): until then an interruption leaves nothing behind. Raises Refusal where settings["out"] is taken.
        """
        self.method, self.settings, self.device, self.rank, self.tracked = method, settings, device, rank, {}
        self.history, self.signal, self.resumed = [], None, bool(settings["resume"])
        self.folder, self.since = None, time.perf_counter()
        if self.resumed:
            self.folder = Path(settings["resume"])
        elif settings["out"] and rank == 0:
            refuse_taken(Path(settings["out"]))

    def make_folder(self):
        """Makes the folder of a new run (settings["out"], else the next free one), with its args.json."""
        self.folder = free_folder(self.method, self.settings) if self.rank == 0 else Path(os.devnull)
        self.write_json("args.json", {
            "method": self.method, "settings": self.settings, "argv": sys.argv, "device": device_name(self.device),
            "python": sys.version.split()[0], "torch": torch.__version__, "torchvision": torchvision.__version__,
            "numpy": np.__version__, "threads": torch.get_num_threads()})

    def write(self, name, write):
        if self.rank == 0:
            write_file(self.folder / name, write)

    def write_json(self, name, value):
        self.write(name, lambda path: path.write_text(json.dumps(value, indent=1) + "\n"))

    def track(self, **objects):
        self.tracked.update(objects)

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

    def log(self, **entry):
        """Adds the line of a finished epoch to log.jsonl."""
        self.history.append(entry)
        self.write_log()

    def write_log(self):
        self.write("log.jsonl", lambda path: path.write_text("".join(json.dumps(e) + "\n" for e in self.history)))

    def say(self, *words):
        if self.rank == 0:
            print(*words, flush=True)

    def ready(self, what, text):
        """A line of the start-up: what is ready, and the seconds since the line before (or since the run began)."""
        now = time.perf_counter()
        self.say(f"{what}: {text} ({now - self.since:.1f} s)")
        self.since = now

    def finish(self, data, encoders, device, measures=("linear", "knn"), **more):
        """Judges the encoders (`linear_probe.evaluate`), prints the table, and writes result.json and neighbours.png.

        encoders: "untrained", "trained" and further rows of the table, each (encode, module). measures: of
        `linear_probe.MEASURES`. more: further results. Returns the results.
        """
        memory, result = peak_memory(device), dict.fromkeys(measures)         # of training, before judging takes more
        if data.labelled:
            accuracies, x = linear_probe.evaluate(data, encoders, measures)
            result.update(accuracies)
            queries, images, (features, query_features) = data.test, data.labelled, x["trained"]
            self.say("\n" + linear_probe.table(accuracies, self.method))
        else:
            self.say(f"\nno linear probe and no kNN: {data.unlabelled}")
            queries = images = data.train
            features = query_features = linear_probe.features(encoders["trained"][0], images, encoders["trained"][1])
        self.write("neighbours.png", lambda path: pictures.neighbours(
            path, queries, query_features, images, features))
        result.update(more, seconds=sum(entry["seconds"] for entry in self.history), peak_memory=memory)
        self.write_json("result.json", result)
        self.say(f"\ntrained in {clock(result['seconds'])}, peak memory {result['peak_memory'] / 1e9:.1f} GB; "
                 f"results and pictures in {self.folder}")
        return result

    def __enter__(self):
        """From here on Ctrl-C and SIGTERM only ask `stop_requested`; a second one ends the program at once."""
        if not self.resumed:
            self.make_folder()
        self.say(f"run folder: {self.folder}")
        self.since = time.perf_counter()                                      # of the first step's start

        def handler(number, frame):
            self.signal = number
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self.before[number])
        self.before = {n: signal.signal(n, handler) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, error, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
        failed = error and issubclass(error, (Exception, KeyboardInterrupt))
        if failed and self.rank == 0 and not self.resumed and not self.saved() and not self.history:
            (self.folder / "args.json").unlink(missing_ok=True)               # a new run that came to nothing
            self.folder.rmdir()

    def describe(self, **facts):
        """Prints the resolved settings, and facts that follow from them."""
        words = [f"{k.replace('_', '-')} {v}" for k, v in {**self.settings, **facts}.items() if v is not None]
        self.say(textwrap.fill(f"{self.method}: " + ", ".join(words), 100, subsequent_indent="    ",
                               break_on_hyphens=False))

    def stop_requested(self):
        return distributed.any_process(self.signal is not None)

    def stop(self, epoch, step):
        """Saves, says how to go on and exits with 130 (Ctrl-C) or 143 (SIGTERM)."""
        self.save(epoch, step)
        self.say(f"\nstopped and saved at step {step} of epoch {epoch + 1}; go on with --resume {self.folder}")
        sys.exit(128 + (self.signal or signal.SIGTERM))


def write_file(path, write):
    """Calls write(part) for a file beside `path` and puts that in its place at once: a kill leaves a whole file."""
    part = path.with_name(f".{path.name}.part")
    try:
        write(part)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    with open(part, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(part, path)
    directory = os.open(path.parent, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)


def free_folder(method, settings):
    """Makes and returns settings["out"], or the next free runs/METHOD-DATASET-SEED[-2, -3, ...]."""
    if settings["out"]:
        folder = Path(settings["out"])
        refuse_taken(folder)
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    name, number = f"runs/{method}-{settings['dataset']}-{settings['seed']}", 1
    while True:
        folder = Path(name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1


def refuse_taken(folder):
    """Raises Refusal where a new run cannot have the folder that --out names."""
    if (folder / "args.json").exists():
        raise Refusal(f"--out {folder} holds a run already: go on with --resume {folder}, or name another folder")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise Refusal(f"--out {folder} exists and is not an empty folder: name another")


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.cpu.get_capabilities().get('cpu_name', '')}, {os.cpu_count()} cores"


def peak_memory(device):
    """Bytes: of the CUDA device's allocations, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def cosine(step, steps, warmup):
    """Factor of the peak learning rate: linear over the share `warmup` of the steps, then half a cosine down to 0."""
    warmup = warmup * steps
    if step < warmup:
        return min(1.0, (step + 1) / warmup)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def set_rate(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr


def spread(h):
    """Of features (N, D): the root mean square distance of h / |h| from its mean, a scalar tensor in [0, 1].

    0 where all images have one direction (collapse), near 1 where directions fill the sphere.
    """
    h = torch.nn.functional.normalize(h.detach().float(), dim=1)
    return (1 - h.mean(dim=0).square().sum()).clamp(min=0).sqrt()


COLLAPSED = 0.01  # a spread below this is one point up to noise
FIRST_LINE, LATER_LINES = 10.0, 60.0  # seconds after the first step, and between lines
LONG = 3 * 3600  # seconds of training after which a run is told of --small


class Progress:
    """The epoch's means, and the lines that show how training goes on.

    A line ten seconds after the first step, one about each minute, and one at the end of each epoch, on a terminal and
    in a log file alike; a terminal also has a line that is rewritten all the time.

    metrics: {name: (label, note)} of what `update` is given. Values stay on the device until a line is due, so the loop
    does not wait for the device each step.
    """

    def __init__(self, run, epochs, steps, batch_size, metrics):
        """steps: of an epoch."""
        self.run, self.epochs, self.steps, self.images, self.metrics = run, epochs, steps, steps * batch_size, metrics
        self.pending, self.sums, self.seconds, self.last = [], [0.0] * len(metrics), 0.0, None
        self.read_at = self.line_at = self.first_at = None                    # set by the first step
        self.first_seconds, self.done, self.lines = 0.0, 0, 0                 # of the first step; steps after it

    def state_dict(self):
        self.read()
        return {"sums": self.sums, "seconds": self.seconds}

    def load_state_dict(self, state):
        self.sums, self.seconds = state["sums"], state["seconds"]

    def update(self, epoch, step, values):
        """After a step: values is a list of scalar tensors, in the order of the metrics. May raise Refusal (`read`)."""
        self.at = epoch, step
        self.pending.append(torch.stack([v.detach().float() for v in values]))
        if self.first_at is None:
            self.read_at = self.run.since
            self.read()
            self.first_at, self.first_seconds = self.read_at, self.read_at - self.run.since
            # Where nothing is compiled or loaded in it, a slow first step is as slow as the next and said at once.
            like_others = self.run.device.type == "cpu" and not self.run.settings["compile"]
            self.line_at = FIRST_LINE + (self.run.since if like_others else self.first_at)
        else:
            self.done += 1
        now = time.perf_counter()
        if now > self.line_at:
            self.read()
            self.line(self.status(), end="\n")
            if not self.lines:
                self.warn_if_long()
            self.lines, self.line_at = self.lines + 1, now + LATER_LINES
        elif now - self.read_at > 0.5 or step + 1 == self.steps:
            self.read()
            if sys.stdout.isatty():
                self.line(self.status()[: shutil.get_terminal_size().columns - 1])

    def read(self):
        """Fetches the pending values. Raises Refusal where one is not finite, before any checkpoint takes it."""
        if not self.pending:
            return
        rows = torch.stack(self.pending).double().cpu().tolist()
        epoch, step = self.at
        for at, row in enumerate(rows, step + 2 - len(rows)):
            if not all(map(math.isfinite, row)):
                kept = f"the last good checkpoint is kept in {self.run.folder}" if self.run.saved() else \
                    "nothing was saved yet"
                raise Refusal(f"the loss is not finite at step {at} of epoch {epoch + 1}: lower --lr ({kept})")
            self.sums = [s + v for s, v in zip(self.sums, row)]
        self.pending, self.last = [], rows[-1]
        now = time.perf_counter()
        self.seconds += now - self.read_at
        self.read_at = now

    def text(self, values):
        words = [f"{label} {value:.3f}{f' ({note})' if note else ''}"
                 for (label, note), value in zip(self.metrics.values(), values)]
        if "spread" in self.metrics and values[list(self.metrics).index("spread")] < COLLAPSED:
            words.append("COLLAPSED: all images have one feature")
        return "  ".join(words)

    def status(self):
        """Where training is, the last step's values, the speed so far and the time that is left at this speed."""
        epoch, step = self.at
        return (f"epoch {epoch + 1}/{self.epochs}  step {step + 1}/{self.steps}  {self.text(self.last)}  "
                f"{self.images / self.steps / self.step_seconds():,.0f} images/s  {clock(self.left())} left")

    def step_seconds(self):
        """The mean of the steps that are read but the first, which also compiles and allocates."""
        return (self.read_at - self.first_at) / self.done if self.done else self.first_seconds

    def left(self):
        """Seconds to the end of training."""
        epoch, step = self.at
        return ((self.epochs - epoch) * self.steps - step - 1) * self.step_seconds()

    def warn_if_long(self):
        """Tells who trains at the defaults of a real data set without a GPU that there is --small."""
        if self.left() > LONG and not self.run.settings["small"] and self.run.settings["dataset"] != "shapes":
            self.line(f"At this speed the run takes {self.left() / 3600:,.0f} hours; with --small (smaller images, "
                      f"networks and batches, fewer epochs) it takes about one, for 50,000 images on two CPU cores.",
                      end="\n")

    def line(self, text, end=""):
        if self.run.rank == 0:
            print(("\r\033[K" if sys.stdout.isatty() else "") + text, end=end, flush=True)

    def end_epoch(self, epoch, **more):
        """Prints the epoch's means and logs them."""
        means = [s / self.steps for s in self.sums]
        speed = self.images / max(self.seconds, 1e-9)
        left = (self.epochs - epoch - 1) * self.seconds
        self.line(f"epoch {epoch + 1}/{self.epochs}  {self.text(means)}  {speed:,.0f} images/s  {clock(left)} left",
                  end="\n")
        self.run.log(epoch=epoch + 1, **dict(zip(self.metrics, means)), **more, seconds=round(self.seconds, 3))
        self.sums, self.seconds = [0.0] * len(self.metrics), 0.0


def clock(seconds):
    """1:02:03 or 2:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
