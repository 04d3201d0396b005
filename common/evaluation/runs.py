# SPDX-License-Identifier: MIT
"""Loads the encoder and the generator of a run, whichever script made it, and saves files in its folder."""
import importlib.util
import io
import itertools
from pathlib import Path

import torch

from .. import Refusal, cli
from ..run import read_tensors, write_file

ROOT = Path(__file__).resolve().parents[2]  # of the scripts


def load_script(folder, method=None):
    """(module, settings) of the script that made the run in `folder`: METHOD.py next to common/. It is found by path,
    since a run's own data must never decide what is imported. method: the only method that is accepted, if any."""
    method, _ = cli.read_settings(folder, method)
    path, package = ROOT / f"{method}.py", ".".join(__package__.split(".")[:-2])             # of common/, if it has one
    if not path.is_file():
        raise Refusal(f"{folder} is a run of {method}.py, which has to be next to common/ to read it")
    spec = importlib.util.spec_from_file_location(f"{package}.{method}" if package else method, path)
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    if not hasattr(module, "build_encoder"):
        raise Refusal(f"{folder}: {path} is not the script of a method: it has no build_encoder(args)")
    return module, module.arguments(["--resume", str(folder)])                # checks the settings


def load_encoder(folder, device, trained=True):
    """(settings, module) of the run: RGB (N, 3, S, S) in [0, 1], S = settings.image_size, to features (N, D), in eval
    mode. trained=False: in its state before training. The caller's random state does not change."""
    script, args = load_script(folder)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(args.seed)
        module, state = filled(script.build_encoder, args, folder, "encoder.pt")
        if not trained:                                                       # a damaged file was refused all the same
            torch.default_generator.manual_seed(args.seed)
            module = script.build_encoder(args)
            if hasattr(module, "keep_data"):
                module.keep_data(state)
    return args, module.to(device, memory_format=torch.channels_last).eval()


def load_generator(folder, device, method=None, needed=True):
    """The run's generator as last saved, in eval mode. If there is none: Refusal, or None if it is not needed."""
    script, args = load_script(folder, method)
    try:
        if not hasattr(script, "build_generator"):
            raise Refusal(f"{Path(script.__file__).name} has no generator")
        with torch.device("meta"):
            script.build_generator(args)
    except Refusal as refusal:
        if needed:
            raise Refusal(f"{folder}: {refusal}") from None
        return None
    return filled(script.build_generator, args, folder, "checkpoint.pt")[0].to(device).eval()


def filled(build, args, folder, name):
    """The module build(args) with the weights in encoder.pt or checkpoint.pt (`name`) in the folder of the run, and
    these weights. Raises Refusal if they are missing, damaged or not of such a module, which is first tried on the meta
    device, where even an enormous module takes no memory."""
    path = Path(folder) / name
    try:
        state = read_tensors(path)
        state = state["model"] if name == "checkpoint.pt" else state
    except FileNotFoundError:
        saved = (Path(folder) / "encoder.pt").exists()                        # else --resume would train it anew
        raise Refusal(f"{path} is missing: " + ("put it back" if saved else f"try --resume {folder}")) from None
    except Exception as error:                                                # zip, pickle and key errors
        reason = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:200]
        raise Refusal(f"{path} cannot be read ({reason}): train that run again") from None
    try:
        with torch.device("meta"):
            build(args).load_state_dict(state, assign=True)
        (module := build(args)).load_state_dict(state)
        if not all(value.isfinite().all() for value in module.state_dict().values()):
            raise ValueError("values that are not finite")
    except Exception as error:                                                # other layers, or no weights
        reason = str(error).strip().split("\n")[-1].strip()[:200] or type(error).__name__
        raise Refusal(f"{path} is not of that run's model ({reason}): it was made by another run or another version of "
                      f"the script") from None
    return module, state


def keep(path, write):
    """Saves what write(file) writes as `path` or, if that exists with other contents, as the first of NAME-2, NAME-3,
    ... that is free or has these contents already. Prints the name of the file."""
    write(file := io.BytesIO())
    for number in itertools.count(1):
        free = path if number == 1 else path.with_name(f"{path.stem}-{number}{path.suffix}")
        if not free.exists():
            write_file(free, lambda part: part.write_bytes(file.getvalue()))
        if free.read_bytes() == file.getvalue():
            return print(free, flush=True)
