"""A device made of Python: its tensors' values are on the CPU, a mix of devices is an error, and each copy between
devices and each wait for a value is noted with the line of Veneer, or of transformers, that asked for it.

For a process of its own (tests/unit/test_pretended_device.py): torch has one such device for the whole process.
"""

from __future__ import annotations

import traceback
from pathlib import Path

import torch
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map

NAME = "pretend"
_PLACES = ("/src/veneer/", "/site-packages/veneer/", "/transformers/")
_MOVES = {"aten::_to_copy", "aten::copy_"}
crossings: list[tuple[str, str]] = []  # ("to device", "to host" or "wait", "file.py:function"), as they happen
without_doubles = False


class _Module(backend_registration._DummyBackendModule):
    """torch.pretend."""

    _initialized = True

    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, device=None):
        return torch.get_rng_state()

    def set_rng_state(self, state, device=None):
        pass

    def mem_get_info(self, device=None):
        return 10**10, 10**10

    def memory_reserved(self, device=None):
        return 0

    def max_memory_allocated(self, device=None):
        return 0

    def synchronize(self, device=None):
        pass

    class device:  # noqa: N801 - a context, as torch.cuda.device is
        def __init__(self, index):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *raised):
            return False


class Pretended(torch.Tensor):
    @staticmethod
    def __new__(cls, raw):
        if without_doubles and raw.dtype is torch.float64:
            raise TypeError("The pretended device has no float64.")
        made = torch.Tensor._make_wrapper_subclass(
            cls, raw.shape, strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype,
            device=f"{NAME}:0",
        )  # fmt: skip
        made.raw = raw
        return made

    def __repr__(self):
        return f"Pretended({self.raw})"

    def tolist(self):
        return self.raw.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, *args, **(kwargs or {}))


def register():
    """Once in a process."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    library = torch.library.Library("_", "IMPL")
    library.fallback(_run, "PrivateUse1")
    globals()["_library"] = library  # which takes its kernels with it
    # torch makes neither a tensor of values nor a generator on such a device.
    tensor, generator = torch.tensor, torch.Generator
    torch.tensor = lambda data, *, device=None, **more: (
        tensor(data, **more).to(device) if _is_here(device) else tensor(data, device=device, **more)
    )

    class Generator(generator):
        def __new__(cls, device="cpu"):
            return super().__new__(cls, "cpu" if _is_here(device) else device)

    torch.Generator = Generator


def _run(func, *args, **kwargs):
    name = func._schema.name
    if func.namespace == "veneer":  # by its definition, as on any device without a backend
        return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
    if name == "aten::_to_copy":
        return _copied(func, *args, **kwargs)
    if name == "aten::copy_":
        into, source = args[:2]
        _note(_is_of(source), _is_of(into))
        _raw(into).copy_(_raw(source))
        return into
    if name == "aten::_local_scalar_dense":
        _crossed("wait")
    elif any(isinstance(x, torch.Tensor) and x.dim() and not _is_of(x) for x in tree_leaves((args, kwargs))):
        raise RuntimeError(f"{name}: a tensor of the CPU among those of the pretended device")
    lowered_args, lowered = tree_map(_lowered, (args, kwargs))
    lowered.pop("pin_memory", None)
    result = func(*lowered_args, **lowered)
    own = {id(_raw(x)): x for x in tree_leaves((args, kwargs)) if _is_of(x)}  # in place, or out=
    return tree_map(lambda x: own.get(id(x)) if id(x) in own else _lifted(x), result)


def _copied(func, x, **kwargs):
    target = kwargs.get("device")
    here = _is_of(x) if target is None else _is_here(target)
    _note(_is_of(x), here)
    result = func(_raw(x), **{k: _lowered(v) for k, v in kwargs.items() if k != "pin_memory"})
    return Pretended(result) if here else result


def _note(before: bool, after: bool):
    if before != after:
        _crossed("to device" if after else "to host")


def _crossed(what: str):
    frames = [frame for frame in traceback.extract_stack() if any(place in frame.filename for place in _PLACES)]
    last = (frames or traceback.extract_stack())[-1]
    crossings.append((what, f"{Path(last.filename).name}:{last.name}"))


def _is_here(place) -> bool:
    return place is not None and torch.device(place).type == NAME


def _is_of(x) -> bool:
    return isinstance(x, Pretended)


def _raw(x):
    return x.raw if _is_of(x) else x


def _lifted(x):
    return Pretended(x) if isinstance(x, torch.Tensor) else x


def _lowered(x):
    if isinstance(x, torch.device):
        return torch.device("cpu") if x.type == NAME else x
    return _raw(x)
