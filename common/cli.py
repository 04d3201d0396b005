"""What every script does at its command line: flags with a range, one-sentence refusals, device and precision."""
import argparse
import math
import os
import sys

import torch


class Refusal(ValueError):
    """Something the user has to change. Its text is one sentence that names the flag or the file and the way out."""


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """A flag a line, with its default where it has one."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=28, width=120)

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse with errors as a Refusal."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=Help, allow_abbrev=False, **kwargs)

    def error(self, message):
        raise Refusal(f"{message} (--help lists the flags)")


def number(kind, low, low_included=False, high=math.inf):
    """An argparse type: an int or float (`kind`) above `low` (or equal, if included) and at most `high`."""
    def parse(text):
        bound = f"{'at least' if low_included else 'above'} {low}" + (f" and at most {high}" if high < math.inf else "")
        try:
            value = kind(text)
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {what} {bound}") from None
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} is not a finite number")
        if not (low < value or low_included and low == value) or value > high:
            raise argparse.ArgumentTypeError(f"{text} is not {bound}")
        return value
    return parse


count = number(int, 1, True)                # 1, 2, ...
count_or_zero = number(int, 0, True)        # 0, 1, 2, ...
positive = number(float, 0)
nonnegative = number(float, 0, True)


def add_run_flags(parser):
    """The flags that mean the same to every method: where the data is, what the run uses and where it is kept."""
    add = parser.add_argument
    add("--small", action="store_true", help="settings of a real data set for about half an hour to an hour without a "
        "GPU: smaller images, networks and batches, fewer epochs; other flags go before it")
    add("--data-dir", default="data", metavar="DIR",
        help="folder of downloads, or of your images (DIR/train/CLASS/*, DIR/test/CLASS/*)")
    add("--seed", type=number(int, 0, True, 2**32 - 1), default=0, 
        help="of the weights, the order, the augmentation, and of shapes")
    add("--device", default="auto", help="auto (CUDA if there is one), cpu, cuda or cuda:N")
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto",
        help="mixed precision; auto takes bf16, fp16 or off as the hardware has it")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--workers", type=count_or_zero, default=cores(), help="processes that decode images")
    add("--cache-gb", type=nonnegative, default=8.0, help="GB of decoded images kept on the device; more is streamed")
    add("--out", default=None, help="folder of the run; by default the next free runs/METHOD-DATASET-SEED")
    add("--resume", default=None, metavar="RUN", help="go on with the run in this folder, with its settings")


def refuse_unused(parser, args, names, choice):
    """Refusal where one of these settings is not at its default: the choice, as "--flag value", does not use them."""
    for name in names:
        if getattr(args, name) != parser.get_default(name):
            raise Refusal(f"--{name.replace('_', '-')} means nothing to {choice}: leave it out")


def cores():
    """A default for --workers: the cores this process may use, at most 8."""
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def program(main, memory="--batch-size, --width, --image-size or --cache-gb"):
    """Runs a script's main as a program: a Refusal is one sentence on stderr and exit status 2, without traceback.

    memory: the flags that lower the need of memory, for the sentence of where there is too little.
    """
    name = os.path.basename(sys.argv[0])
    free = limit_memory()
    try:
        main()
    except Refusal as refusal:
        status, sentence = 2, str(refusal)
    except torch.OutOfMemoryError:
        status, sentence = 2, f"the GPU is out of memory: lower {memory}"
    except MemoryError:
        status, sentence = 2, f"this needs more memory than the {free / 1e9:.1f} GB that were free: lower {memory}"
    except OSError as error:
        if error.filename is None and error.strerror is None:
            raise
        status, sentence = 2, f"{error.filename or 'a file'}: {error.strerror}"
    except RuntimeError as error:
        if "PytorchStreamWriter" in str(error):
            status, sentence = 2, "a checkpoint could not be written: make room on the disk of --out, then --resume"
        elif "DefaultCPUAllocator" in str(error) or "could not create" in str(error):            # torch's, oneDNN's
            status, sentence = 2, f"this needs more memory than the {free / 1e9:.1f} GB that were free: lower {memory}"
        else:
            raise
    except KeyboardInterrupt:
        status, sentence = 130, "interrupted"
    else:
        return
    print(f"{name}: {sentence}", file=sys.stderr)
    sys.exit(status)


def limit_memory():
    """Bytes of memory that are free now. On Linux without CUDA the process is bound by them from here on: an allocation
    that goes beyond them fails, here and with a sentence, where the system would grant it and then kill the process.
    """
    try:
        import resource                                                       # Windows has none
        told = dict(line.split()[:2] for file in ("/proc/meminfo", "/proc/self/status") for line in open(file)
                    if line.startswith(("MemAvailable:", "VmData:")))
        free, taken = 1024 * int(told["MemAvailable:"]), 1024 * int(told["VmData:"])
    except (ImportError, OSError, KeyError):
        return math.nan
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):   # of a container
        if os.path.exists(file) and (limit := open(file).read().strip()).isdecimal():
            free = min(free, int(limit))
    if not torch.cuda.is_available():                                         # its driver reserves more than it takes
        resource.setrlimit(resource.RLIMIT_DATA, (taken + free, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    return free


def pick_device(name):
    """"auto" is CUDA where there is one, else the CPU; other names are torch's ("cpu", "cuda", "cuda:1", "mps").

    Each process that torchrun starts takes the CUDA device of its own number.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None and torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise Refusal(f"--device {name}: this machine has no such device, try --device auto or --device cpu") from None
    return device


def pick_amp(name, device):
    """The dtype of autocast: torch.bfloat16, torch.float16 or None (float32).

    "auto" is bf16 where the hardware multiplies it (CUDA from Ampere on, CPUs with AMX or AVX-512 BF16), fp16 on older
    GPUs, which needs a gradient scaler, else float32.
    """
    if name == "auto":
        if device.type == "cuda":
            name = "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
        elif device.type == "cpu":
            has = torch.cpu.get_capabilities()
            name = "bf16" if has.get("amx_bf16") or has.get("avx512_bf16") else "off"
        else:
            name = "off"
    if name == "fp16" and device.type != "cuda":
        raise Refusal("--amp fp16 needs a CUDA device, try --amp auto")
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[name]
