# SPDX-License-Identifier: MIT
"""The command line of every script: settings, one-sentence errors, device and precision."""
import argparse
import functools
import json
import math
import os
import shlex
import signal
import sys
from pathlib import Path

import torch

from . import Refusal, data

MPS_FROM = (2, 8)  # before this version of torch, MPS lacks operations that are used here
FREE_ON_RESUME = {"help", "resume", "device", "compile", "workers", "data_dir", "cache_gb", "knn_every"}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises Refusal on errors and shows each flag's default in its help."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=functools.partial(Help, max_help_position=28, width=120), allow_abbrev=False,
                         **kwargs)

    def error(self, message):
        raise Refusal(f"{message} (--help lists the flags)")

    def number(self, flag, default, interval, help, kind=None, group=None, **more):
        """Adds a flag for a number in an interval such as "(0, 1]", of type `kind` (by default the default's)."""
        parse = in_interval(interval, kind or type(default))
        (group or self).add_argument(flag, default=default, type=parse, help=help, **more)

    def refuse_unused(self, args, names, choice):
        """Raises Refusal if one of the settings `names`, ignored because of `choice` ("with --flag"), was changed."""
        for name in names:
            if getattr(args, name) != self.get_default(name):
                raise Refusal(f"--{name.replace('_', '-')} has no effect {choice}: leave it out")


class Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        if isinstance(action.default, list) and action.default:
            return f"{action.help} (default: {shlex.join(map(str, action.default))})"
        silent = action.default in (None, []) or action.default is False
        return action.help if silent else super()._get_help_string(action)


def path(text):
    """A path on the command line. Shells expand ~ only at the beginning of a word, not in --out=~/run."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return os.path.expanduser(text)


def file(text):
    """The path of an existing file on the command line."""
    if not os.path.isfile(name := path(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a file")
    return name


class RunParser(Parser):
    """The parser of a training script, with the flags that all methods share."""

    def __init__(self, script, method, epochs, batch_size, photographs=False, datasets=data.NAMES):
        """epochs, batch_size: defaults. photographs: whether views are cut from a folder's uncropped photographs."""
        if not Path(script).stem.isidentifier():
            raise Refusal(f"{Path(script).name}: runs have the name of their script, which may only hold letters, "
                          f"digits and _: rename it")
        super().__init__(prog=Path(script).name, add_help=False, description=f"{method}. The defaults shown are those "
                         f"for --dataset shapes, or for the flags given together with --help.")
        group = self.add_argument_group("settings that all methods share")
        add, number = group.add_argument, functools.partial(self.number, group=group)
        add("-h", "--help", action="store_true", help="show this list of flags")
        add("--dataset", choices=datasets, default="shapes", help="images to train on; shapes and folder need no "
            "download")
        add("--small", action="store_true", help="settings with which a real data set takes ten minutes to "
            "two hours without a GPU: smaller images, networks and batches, fewer epochs; other flags override them")
        add("--data-dir", type=path, default="data", metavar="DIR",
            help="folder of downloads, or of your images (DIR/train/CLASS/*, DIR/test/CLASS/*)")
        number("--image-size", 32, "[8, inf)", "side of the images in pixels")
        if photographs:
            number("--store-size", None, "[8, inf)", "side to which a folder's photographs are resized whole before "
                   "views are cut from them (default: twice the image size or, if less, the largest photo's side)", int)
        number("--epochs", epochs, "[1, inf)", "passes over the training images")
        number("--batch-size", batch_size, "[2, inf)", "images per step, over all processes")
        number("--seed", 0, "[0, 4294967295]", "random seed of weights, order, augmentation and generated images")
        add("--device", default="auto", help="auto (CUDA, else MPS, else the CPU), cpu, mps, cuda or cuda:N")
        add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto",
            help="mixed precision; auto chooses bf16, fp16 or off to suit the hardware")
        add("--compile", action="store_true", help="use torch.compile: faster on a GPU after half a minute")
        number("--workers", cores(), "[0, 1024]", "processes that decode images")
        number("--cache-gb", 8.0, "[0, inf)", "GB of decoded images to keep on the device; larger sets are streamed")
        number("--knn-every", None, "[1, inf)", "epochs between kNN evaluations on the test images; one always follows "
               "the last epoch (default: as often as 5 %% of the training time allows)", int, metavar="N")
        add("--out", type=path, help="folder of the run (default: the next free runs/METHOD-DATASET-SEED)")
        add("--resume", type=path, metavar="RUN", help="continue the run in this folder, with its settings")

    def parse(self, argv, presets, free=()):
        """The settings of a new run, or of the run that --resume names, as a Namespace.

        presets: [(choices, settings)]: if all the choices, such as dict(dataset="folder"), apply to a run, by flags or
        by earlier entries, the settings replace the flags' defaults. Later entries override earlier ones, and flags on
        the command line override all of them. --help shows the values that would be used. free: settings of the script
        that may change on --resume, as they affect its speed or say where its data are. Raises Refusal.
        """
        settings, absent = vars(self.parse_args([])), object()

        def given_in(argv):
            args = self.parse_args(argv, argparse.Namespace(**dict.fromkeys(settings, absent)))
            return {name: value for name, value in vars(args).items() if value is not absent}

        given = given_in(sys.argv[1:] if argv is None else [str(a) for a in argv])
        if "resume" in given:
            try:
                stored = read_settings(given["resume"], Path(self.prog).stem)[1]
            except Refusal as refusal:
                raise Refusal(f"--resume {refusal}") from None
            try:
                settings |= given_in(as_flags(stored))                        # parsed, so checked, as flags are
                for name, value in stored.items():                            # nothing that flags cannot give
                    if settings.get(name, absent) != value:
                        raise ValueError(f"{name} {value!r}")
            except ValueError as error:                                       # such as a Refusal
                raise Refusal(f"{given['resume']}/args.json is damaged or of another version of {self.prog} "
                              f"({str(error)[:200]}): name another run") from None
            settings["out"] = given["resume"]
            for name in given.keys() - FREE_ON_RESUME - set(free):
                if given[name] != settings[name]:
                    raise Refusal(f"--{name.replace('_', '-')} cannot change on --resume (the run has "
                                  f"{settings[name]}): leave it out, or start a new run")
        else:
            for choices, preset in presets:
                settings |= preset if choices.items() <= (settings | given).items() else {}
        self.set_defaults(**settings)
        if given.pop("help", False):
            self.print_help()
            sys.exit(0)
        settings.pop("help")
        if "data_dir" in given and "resume" not in given and (settings | given)["dataset"] in ("shapes", "patterns"):
            raise Refusal("--data-dir has no effect on generated images: add --dataset folder, or leave it out")
        if given.get("small") and (settings | given)["dataset"] == "shapes":
            raise Refusal("--small is for real images: --dataset shapes takes a few minutes without it, leave it out")
        return argparse.Namespace(**settings | given)


def read_settings(folder, method=None):
    """(method, settings) of the run in `folder`, from its args.json. method: the method that is expected, if any.

    Raises Refusal if there is no such run. The method is the name of a script beside common/, never a path.
    """
    path = Path(folder) / "args.json"
    try:
        stored = read_json(path)
        found, settings = stored["method"], dict(stored["settings"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise Refusal(f"{folder}: no run there, {path} is missing or damaged: name the folder that a script has "
                      f"made") from None
    if not isinstance(found, str) or not found.isidentifier():
        raise Refusal(f"{path}: the method {str(found)[:80]!r} is not the name of a script, do not trust that folder")
    if method not in (None, found):
        raise Refusal(f"{folder} is a run of {found}.py, not of {method}.py")
    return found, settings


def read_json(path):
    """The contents of a JSON file. Raises OSError, or ValueError or RecursionError if it is no JSON or enormous."""
    if not path.is_file() or path.stat().st_size > 2**22:                     # reading a pipe would block for ever
        raise ValueError(f"{path} is no file of at most 4 MB")
    return json.loads(path.read_bytes())


def as_flags(settings):
    """The settings as the words of a command line. Raises ValueError if that is impossible."""
    words = []
    for name, value in settings.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, list):
            words += [flag, *map(str, value)]
        elif value is not None and value is not False:
            words.append(flag if value is True else f"{flag}={value}")
    os.fsencode("".join(words))                                               # ValueError if it cannot
    if any("\0" in word or len(word) > 4096 for word in words):
        raise ValueError("a word that no system takes")
    return words


def in_interval(interval, kind):
    """An argparse type: an int or float (`kind`) in an interval such as "[0, 1]", or "(0, inf)", which is open."""
    low, high = map(float, interval[1:-1].split(","))
    high = min(high, 2**32) if kind is int else high                          # torch's limit
    named = interval.replace("inf", "2^32") if kind is int else interval

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan                                                  # in no interval
        if not (low < value < high or value == low and interval[0] == "[" or value == high and interval[-1] == "]"):
            raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' * (kind is int)}number in {named}")
        return value
    return parse


def cores():
    """The default of --workers: the number of cores that this process may use, at most 8."""
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def program(main, memory="--batch-size, --width, --image-size or --cache-gb"):
    """Runs a script's main as a program. Errors that the user can fix become one sentence on stderr and exit status 2,
    without a traceback.

    memory: the flags that reduce the use of memory, for the sentence about having too little.
    """
    def interrupt(number, frame):
        raise KeyboardInterrupt(number)
    if "RANK" not in os.environ:                                              # torchrun's may be blocked in C++
        signal.signal(signal.SIGTERM, interrupt)
    free = limit_memory()
    if hasattr(sys.stdout, "reconfigure"):                                    # names that the terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return main()
    except KeyboardInterrupt as stop:
        status = 128 + (stop.args or [signal.SIGINT])[0]
        sentence = "interrupted: what was saved is kept, and --resume RUN continues a run"
    except Exception as error:
        status, sentence = 2, way_out(error, free, memory)
        if sentence is None:
            raise
    path = Path(sys.argv[0])
    print(f"{path.parent.name if path.name == '__main__.py' else path.name}: {sentence}", file=sys.stderr)
    sys.exit(status)


def way_out(error, free, memory):
    """The sentence for an error that the user can fix, or None for a bug of the program."""
    text = str(error) if isinstance(error, RuntimeError) else ""              # torch's
    if isinstance(error, Refusal):
        return str(error)
    if isinstance(error, OSError) and (error.filename or error.strerror):
        return f"{error.filename or 'a file'}: {error.strerror}"
    if isinstance(error, torch.OutOfMemoryError) or "MPS backend out of memory" in text:
        return f"the GPU is out of memory: lower {memory}"
    # oneDNN could not create "a memory" or "a primitive"; "a primitive descriptor": it does not have the operation.
    onednn = "could not create" in text and "descriptor" not in text
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in text or onednn:
        there = "there is" if math.isnan(free) else f"the {free / 1e9:.1f} GB that were free"
        return f"this needs more memory than {there}: lower {memory}"
    if any(word in text for word in ("PytorchStreamWriter", "inline_container", "iostream")):
        return "a checkpoint could not be written: make room on the disk of --out, then --resume"
    if text and ("gloo" in text or isinstance(error, torch.distributed.DistError)):
        return f"another process has ended or does not answer: see its own message (here: {text.splitlines()[0]})"
    if "DataLoader worker" in text:
        return ("a worker process could not send its images or was killed: lower --workers (0 uses none), enlarge "
                "/dev/shm (docker run --shm-size) or set TMPDIR to a short path")
    if any(what in text for what in ("C compiler", "C++ compiler", "triton installation")):
        return "--compile needs a C++ compiler and, on a GPU, Triton: install them, or leave it out"
    return None


def limit_memory():
    """The bytes of memory that are free now. On Linux without CUDA the process is limited to them from here on, so that
    a larger allocation fails at once; the system would grant it and kill the process once the memory is used."""
    try:
        import resource                                                       # Windows has none
        lines = (Path("/proc/meminfo").read_text() + Path("/proc/self/status").read_text()).splitlines()
        sizes = dict(line.split()[:2] for line in lines if line.startswith(("MemAvailable:", "VmData:")))
        free, taken = 1024 * int(sizes["MemAvailable:"]), 1024 * int(sizes["VmData:"])
    except (ImportError, OSError, KeyError):
        return math.nan
    for file in "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes":           # of a container
        if os.path.exists(file) and (limit := Path(file).read_text().strip()).isdecimal():
            free = min(free, int(limit))
    if not torch.cuda.is_available():                                         # CUDA reserves more than it uses
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        limits = [limit for limit in (taken + free, soft, hard) if limit != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_DATA, (min(limits), hard))
    return free


def pick_device(name):
    """The torch.device for --device. "auto" prefers CUDA, then MPS (Apple's GPUs), then the CPU; all else is torch's
    ("cpu", "cuda:1", "mps"). Each process that torchrun starts gets the CUDA device of its local rank."""
    if name == "auto":
        mps = torch.backends.mps.is_available() and torch.__version__ >= MPS_FROM
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        device = torch.device(name)
        if device.type == "meta":                                             # it has no values
            raise NotImplementedError
        if device.type == "cuda" and device.index is None and torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError):
        raise Refusal(f"--device {name}: this machine has no such device, try --device auto or --device cpu") from None
    if device.type == "mps" and torch.__version__ < MPS_FROM:
        raise Refusal(f"--device {name} needs torch 2.8, not {torch.__version__}: update it or use --device cpu")
    return device


def pick_amp(name, device):
    """The dtype of autocast, or None for float32. "auto" is bf16 if the hardware supports it (CUDA from Ampere on, CPUs
    with AMX or AVX-512 BF16), fp16 on older GPUs, which needs a gradient scaler, and otherwise float32."""
    if name == "auto":
        has = getattr(torch.cpu, "get_capabilities", dict)()                  # older torch cannot tell
        if device.type == "cuda":
            name = "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
        else:
            name = "bf16" if device.type == "cpu" and (has.get("amx_bf16") or has.get("avx512_bf16")) else "off"
    if name == "fp16" and device.type not in ("cuda", "cpu"):
        raise Refusal(f"--amp fp16 needs a CUDA device or the CPU, not {device.type}: try --amp auto")
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[name]
