"""The encoder of a finished run, whichever script made it."""
import copy
import importlib
import json
from argparse import Namespace
from pathlib import Path

import torch

from common.cli import Refusal


def settings(folder, method=None):
    """(method, settings as a Namespace) of the run in `folder`. method: the only one that will do, where there is one.

    Raises Refusal where there is no such run.
    """
    try:
        told = json.loads((Path(folder) / "args.json").read_text())
        found, args = told["method"], Namespace(**told["settings"])
    except (OSError, ValueError, KeyError, TypeError):
        raise Refusal(f"{folder}: no run there, {Path(folder) / 'args.json'} is missing or damaged: name the folder "
                      f"that a script has made") from None
    if method not in (None, found):
        raise Refusal(f"{folder} is a run of {found}.py, not of {method}.py")
    return found, args


def weights(folder, name):
    """The weights in encoder.pt or checkpoint.pt (`name`) of the run's folder, on the CPU. Raises Refusal where they
    are missing or damaged."""
    path = Path(folder) / name
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return state["model"] if name == "checkpoint.pt" else state
    except FileNotFoundError:
        raise Refusal(f"{path} is missing: that run has not come to its end, go on with --resume {folder}") from None
    except Exception as error:                                                # zip, pickle and key errors
        reason = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
        raise Refusal(f"{path} cannot be read ({reason}): train that run again") from None


def fill(module, state, path):
    """module with the weights `state`, read from `path`. Raises Refusal where they are not of such a module."""
    try:
        module.load_state_dict(state)
    except (RuntimeError, TypeError) as error:                                # of other layers; not weights at all
        reason = str(error).strip().splitlines()[-1].strip()
        raise Refusal(f"{path} is not of that run's model ({reason}): it was made by another run or another version of "
                      f"the script") from None
    return module


def load(folder, device, trained=True):
    """(settings, module) of the run: the module takes RGB (N, 3, S, S) in [0, 1], S = settings.image_size, to features
    (N, D), in eval mode. trained=False: as it was before training (GCRL's palette, which is data, is there either way).

    The script of the method, beside common/, is imported by the name that the run's args.json has.
    """
    method, args = settings(folder)
    state = weights(folder, "encoder.pt")
    torch.manual_seed(args.seed)
    try:
        module = importlib.import_module(method).encoder(args)
    except ModuleNotFoundError:
        raise Refusal(f"{folder} is a run of {method}.py, which has to lie beside common/ to read it") from None
    fill(module if trained else copy.deepcopy(module), state, f"{folder}/encoder.pt")         # checked either way
    if not trained:
        if "palette" in state:
            module.set_palette(state["palette"], state["first_pixel"])
    return args, module.to(device, memory_format=torch.channels_last).eval()
