# SPDX-License-Identifier: MIT
"""A device that is not there: CUDA, or MPS, as far as devices go.

    with Device("cuda") as device: ...

All tensors are the CPU's, but the storage of each carries a pretended device. `Functions` sees what Python calls: it
answers x.device, makes the copies, and pretends where a tensor is made. `Operations`, below it, sees each operation,
those of the backward pass and of optimisers too: one over two devices raises, as on MPS one that MPS lacks.
`device.events` has the copies and the waits, [(kind, what, place)]:

    "copy"     from host to device, of pinned memory and without a wait
    "wait"     the host waits for the device: a value or a tensor is read, a size depends on values (nonzero, a boolean
               mask), or a copy is of pageable memory, or is not said to be non_blocking

Not simulated: the kernels' rounding, autocast's lists (the CPU's are taken), memory, streams, several devices.
"""
import contextlib
import functools
import re
import sys
import unittest.mock
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

ROOT, CPU, Tensor = Path(__file__).resolve().parent.parent, torch.device("cpu"), torch.Tensor
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "unique_consecutive", "bincount",
         "equal", "is_nonzero", "_linalg_eigh", "_linalg_svd"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
MIXED = INDEXING | {"fill_", "where", "masked_fill", "masked_fill_"}  # take a number that is a CPU tensor


def device_of(x):
    """The device that a tensor pretends to be on."""
    return getattr(x.untyped_storage(), "pretended", CPU)


def place(x, device):
    x.untyped_storage().pretended = device
    return x


def tensors(*values):
    """The tensors among nested lists and dicts."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += tensors(*value)
        elif isinstance(value, dict):
            found += tensors(*value.values())
    return found


def device_in(values):
    """The device of the tensors among the values: the one that is not the CPU, if there is one."""
    return next((d for d in map(device_of, tensors(values)) if d != CPU), CPU)


@functools.cache
def lacked_by_mps():
    """Names of the operations that have kernels, but none for MPS, by the table that torch is made from."""
    table = Path(torch.__file__).parents[1] / "torchgen/packaged/ATen/native/native_functions.yaml"
    kernels = {}
    for block in re.split(r"^- func: ", table.read_text(), flags=re.M)[1:]:
        keys = set(", ".join(re.findall(r"^    ([A-Z][\w, ]+): ", block, flags=re.M)).split(", ")) - {""}
        kernels[re.match(r"[\w.]+", block)[0]] = keys, re.search(r"structured_delegate: ([\w.]+)", block)

    def lacks(name):
        keys, delegate = kernels[name]
        return lacks(delegate[1]) if delegate else {"CPU", "CUDA"} <= keys and not any(
            key == "MPS" or key.startswith("Composite") for key in keys)
    in_python = re.findall(r'impl\("(\w+)"', Path(torch.backends.mps.__file__).read_text())
    return {name for name in kernels if lacks(name)} - {*in_python} | {"_linalg_eigh"}        # of torch before 2.14


class Generator(torch.Generator):
    """A generator that pretends to be on a device."""

    def __new__(cls, device="cpu"):
        self = super().__new__(cls)
        self.pretended = torch.device(device)
        return self

    device = property(lambda self: self.pretended)


class Autocast(torch.autocast):
    def __init__(self, device_type, dtype=None, enabled=True, cache_enabled=None):
        super().__init__("cpu", dtype, enabled, cache_enabled)


class Device:
    """kind: "cuda" or "mps". capability: of CUDA; (7, 5), a T4, has no bf16."""

    def __init__(self, kind, capability=(8, 0)):
        self.device, self.capability, self.events, self.current = torch.device(kind, 0), capability, [], CPU
        self.counting = True

    def __enter__(self):
        self.stack, cuda = contextlib.ExitStack(), self.device.type == "cuda"
        group, engine = torch._C._group_tensors_by_device_and_dtype, torch.autograd._engine_run_backward

        def backward(*args, **kwargs):                                        # in it Recompute computes again
            with Functions(self):
                return engine(*args, **kwargs)
        for target, name, value in (
                (torch.cuda, "is_available", lambda: cuda), (torch.backends.mps, "is_available", lambda: not cuda),
                (torch, "Generator", Generator),
                (torch.cuda, "get_device_capability", lambda _: self.capability),
                (torch.cuda, "get_device_name", lambda _: "a GPU that is not there"),
                (torch.cuda, "max_memory_allocated", lambda _: 10**9), (torch, "autocast", Autocast),
                *((torch, name, lambda _, function=getattr(torch, name): function("cpu"))
                  for name in ("is_autocast_enabled", "get_autocast_dtype")),
                (torch.cuda, "mem_get_info", lambda _: (2**33, 2**33)),
                (torch.autograd, "_engine_run_backward", backward),
                (torch.cuda, "get_rng_state", lambda _: torch.get_rng_state()),
                (torch.cuda, "set_rng_state", lambda state, _: torch.set_rng_state(state)),
                (torch._C, "_group_tensors_by_device_and_dtype", lambda *args: {
                    (device_in(value[0]), dtype): value for (_, dtype), value in group(*args).items()})):
            self.stack.enter_context(unittest.mock.patch.object(target, name, value))
        for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):            # by age
            self.stack.enter_context(
                unittest.mock.patch.object(torch.optim.Optimizer, name, lambda _: None, create=True))
        self.stack.enter_context(Operations(self))
        self.stack.enter_context(Functions(self))
        return self

    def __exit__(self, *error):
        return self.stack.__exit__(*error)

    @contextlib.contextmanager
    def uncounted(self):
        before, self.counting = self.counting, False
        yield
        self.counting = before

    def note(self, kind, what):
        """An event, with the line of the project, or else of the test, that made it."""
        frame, first = sys._getframe(1), None
        while frame and self.counting:
            path = Path(frame.f_code.co_filename)
            if ROOT in path.parents and path != Path(__file__):
                first = f"{path.name}:{frame.f_lineno}"
                break
            frame = frame.f_back
        if self.counting:
            self.events.append((kind, what, first))

    def copied(self, source, to, non_blocking, what):
        """Notes a copy of `source` to the device `to`, if it is one between host and device."""
        if device_of(source) == CPU != to and source.numel():
            pinned = getattr(source.untyped_storage(), "pinned", False)
            self.note("copy" if pinned and non_blocking else "wait", what)
            if non_blocking and to.type == "mps":
                raise AssertionError("a copy to MPS with non_blocking: the source may be freed before it is read")
        elif to == CPU != device_of(source):
            self.note("wait", what)

    def named(self, device):
        """A device as a script names it, with the index that tensors have."""
        device = torch.device(device)
        return device if device == CPU or device.type == "meta" else torch.device(device.type, device.index or 0)


class Functions(TorchFunctionMode):
    def __init__(self, sim):
        super().__init__()
        self.sim = sim

    def __torch_function__(self, func, types, args=(), kwargs=None):
        sim, kwargs, name = self.sim, dict(kwargs or {}), getattr(func, "__name__", "")
        x = args[0] if args and isinstance(args[0], Tensor) else None
        owner = getattr(getattr(func, "__self__", None), "__name__", "")
        if name in ("__get__", "__set__"):
            if owner in ("device", "is_cuda", "is_cpu", "is_mps"):
                return device_of(x) if owner == "device" else device_of(x).type == owner[3:]
            return func(*args, **kwargs)
        if name == "__deepcopy__":
            return place(func(*args, **kwargs), device_of(x))
        if name == "pin_memory":
            assert device_of(x) == CPU, "cannot pin a tensor of a device"
            copy = x.clone()
            copy.untyped_storage().pinned = True
            return copy
        if name == "is_pinned":
            return getattr(x.untyped_storage(), "pinned", False)
        if name == "numpy" and device_of(x) != CPU:
            raise TypeError(f"can't convert {device_of(x)} device type tensor to numpy. Use Tensor.cpu() first")
        if name == "tolist" and device_of(x) != CPU:
            sim.note("wait", name)
        if name in ("to", "cpu", "cuda"):
            return self.moved(name, x, args[1:], kwargs)
        device = kwargs.get("device")
        if device is not None:
            device = kwargs["device"] = sim.named(device)
            kwargs["device"] = device if device.type == "meta" else CPU
        elif name not in ("tensor", "as_tensor"):
            device = device_in((args, kwargs))
        self.check_generator(kwargs.get("generator"), device)
        if name in ("tensor", "as_tensor", "new_tensor"):
            if name == "new_tensor" or device is None and x is not None:
                device = device_of(x)
            result = func(*args, **kwargs)
            if device in (None, CPU) or name != "new_tensor" and x is not None and device_of(x) == device:
                return result
            sim.copied(result, device, False, name)
            return place(result.clone(), device)
        quiet = name == "one_hot" and len(args) + len(kwargs) > 1             # looks at the values on the CPU alone
        before, sim.current = sim.current, device or CPU
        try:
            with sim.uncounted() if quiet else contextlib.nullcontext():
                return func(*args, **kwargs)
        finally:
            sim.current = before

    def moved(self, name, x, args, kwargs):
        """x.to(...), x.cpu(), x.cuda()."""
        target = {"cpu": CPU, "cuda": self.sim.device}.get(name, kwargs.pop("device", None))
        rest = []
        for value in args:
            if isinstance(value, (str, torch.device)):
                target = value
            elif isinstance(value, Tensor):
                target, rest = device_of(value), [*rest, value.dtype]
            else:
                rest.append(value)
        target = device_of(x) if target is None else self.sim.named(target)
        dtype = next((value for value in rest if isinstance(value, torch.dtype)), kwargs.get("dtype")) or x.dtype
        flags = [value for value in rest if isinstance(value, bool)]
        non_blocking, copy = (flags + [False, False])[:2] if flags else (False, False)
        non_blocking, copy = kwargs.get("non_blocking", non_blocking), kwargs.get("copy", copy)
        form = kwargs.get("memory_format", torch.preserve_format)
        if target.type == "meta":
            return x.to(target)
        if target == device_of(x):
            return x.to(dtype=dtype, copy=copy, memory_format=form)
        if dtype == torch.float64 and target.type == "mps":
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        self.sim.copied(x, target, non_blocking, name)
        return place(x.to(dtype=dtype, copy=True, memory_format=form), target)

    def check_generator(self, generator, device):
        if generator is not None:
            has, wanted = getattr(generator, "pretended", CPU).type, (device or CPU).type
            if has != wanted:
                raise RuntimeError(f"Expected a '{wanted}' device type for generator but found '{has}'")


class Operations(TorchDispatchMode):
    def __init__(self, sim):
        super().__init__()
        self.sim = sim

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        sim, kwargs, name = self.sim, kwargs or {}, func._schema.name.split("::")[1]
        found, many = tensors(args, kwargs), name.startswith("_foreach")
        devices = {device_of(x) for x in found}
        target = next((d for d in devices if d != CPU), CPU) if found else sim.current
        if len(devices) > 1:
            self.check_mixed(func, name, args, found, target)
        if target != CPU:
            mask = name in INDEXING and any(i.dtype in (torch.bool, torch.uint8) for i in tensors(args[1]))
            if name in WAITS or mask or name == "repeat_interleave" and kwargs.get("output_size") is None:
                sim.note("wait", "a boolean mask" if mask else name)
            if target.type == "mps" and f"{name}.{func._overloadname}".removesuffix(".default") in lacked_by_mps():
                raise NotImplementedError(f"The operator 'aten::{name}' is not implemented for the MPS device")
        result = func(*args, **kwargs)
        if target != CPU and name not in ("copy_", "_local_scalar_dense"):
            for x in tensors(result):
                if target.type == "mps" and x.dtype == torch.float64:
                    raise TypeError(f"{name}: the MPS framework doesn't support float64.")
                if device_of(x) == CPU and not (many and any(x is y for y in found)):
                    place(x, target)
        return result

    def check_mixed(self, func, name, args, found, target):
        """Raises where CUDA would of tensors of two devices, and notes the copies that it makes."""
        if name == "copy_":
            to, source = args[:2]
            return self.sim.copied(source, device_of(to), args[2] if len(args) > 2 else False, name)

        def allowed(x):
            if device_of(x) != CPU:
                return True
            if name in INDEXING and device_of(args[0]) != CPU and any(x is i for i in tensors(args[1])):
                self.sim.copied(x, target, False, "an index")                 # torch copies it, and waits
                return True
            written = name.endswith("_") and x is args[0]
            return x.dim() == 0 and not written and (
                torch.Tag.pointwise in func.tags or name in MIXED or name.startswith("_foreach"))
        if not all(map(allowed, found)):
            raise RuntimeError(f"Expected all tensors to be on the same device, but found at least two devices, "
                               f"{target} and cpu! (aten::{name})")
