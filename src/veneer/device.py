"""The one file that names devices: those that a person may ask for, the memory of one, its random state, its types,
and when its work is done.

No torch at import: commands' options name devices too.
"""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

from veneer.errors import ConfigError, did_you_mean, shown
from veneer.host_memory import peak_host_memory, usable_host_memory

if TYPE_CHECKING:
    from torch import Tensor, device, dtype, nn

CPU: Literal["cpu"] = "cpu"
CUDA: Literal["cuda"] = "cuda"
META: Literal["meta"] = "meta"  # torch's tensors without values
MPS: Literal["mps"] = "mps"
XPU: Literal["xpu"] = "xpu"
AUTO: Literal["auto"] = "auto"  # a GPU that holds what is asked, else the CPU
NAMES = (AUTO, CPU, CUDA, f"{CUDA}:N", MPS, XPU)
_GPUS = (CUDA, XPU, MPS)
_NAME = re.compile(rf"{AUTO}|{CPU}|{MPS}|{XPU}(:\d+)?|{CUDA}(:\d+)?")
_BUILDS = {CUDA: "CUDA or ROCm", XPU: "Intel's GPUs", MPS: "Apple's GPUs"}
_WITHOUT_DOUBLES = {MPS}


def known_name(value: Any) -> str:
    """A device's name as a person may write it. Raises ValueError for any other, with the nearest one."""
    name = str(value)
    if _NAME.fullmatch(name):
        return name
    near = f" Did you mean {CUDA!r}?" if name.startswith("gpu") else did_you_mean(name, NAMES)
    raise ValueError(f"device = {shown(name)} is not one of {', '.join(NAMES)}.{near}")


def is_host(name: str) -> bool:
    """Whether a name is the CPU's; ``auto``, where nobody has chosen a GPU, is."""
    return name in (CPU, AUTO)


def available(name: str) -> str:
    """The name of a device that is here: cuda:0 for cuda. Raises ConfigError for one that is not, or not known."""
    import torch

    try:
        kind, _, number = known_name(name).partition(":")
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if is_host(kind):
        return CPU
    others = gpus()
    if not any(_type(other) == kind for other in others):
        has = torch.version.cuda or torch.version.hip
        built = f"built for {has}" if kind == CUDA and has else f"not built for {_BUILDS[kind]}, or sees none"
        raise ConfigError(
            f"There is no {name} here: PyTorch {torch.__version__} is {built}. Install a build for the device and its "
            f"driver (pytorch.org/get-started), or give device {', '.join([*others, CPU])}."
        )
    found = name if number or kind == MPS else f"{kind}:0"
    if found not in others:
        raise ConfigError(f"There is no {name} here: the devices are {', '.join([*others, CPU])}.")
    return found


def gpus() -> list[str]:
    """The names of the GPUs here, in the order in which ``auto`` looks at them."""
    found: list[str] = []
    for kind in _GPUS:
        if is_present(kind):
            found += [kind] if kind == MPS else [f"{kind}:{number}" for number in range(_module(kind).device_count())]
    return found


def computes_bf16(name: str) -> bool:
    """Whether a GPU has instructions for bf16: of NVIDIA's those since sm_80. Of Apple's nothing is known here."""
    import torch

    if _type(name) == CUDA and torch.version.hip is None:
        return bool(_module(name).get_device_capability(name)[0] >= 8)
    asked = getattr(_module(name), "is_bf16_supported", None)
    return bool(asked is not None and asked())


def facts_of_device(of: device | str) -> dict[str, str]:
    """What of a device a result's last bits depend on: its name, and of a GPU which one it is."""
    import torch

    if _type(of) in (CPU, META):
        return {"device": _type(of)}
    named = getattr(_module(of), "get_device_name", lambda of: _type(of))(of)
    built = torch.version.cuda or torch.version.hip
    capability = getattr(_module(of), "get_device_capability", None)
    known = {"device": _type(of), "gpu": str(named), "cuda": built}
    if _type(of) == CUDA and capability is not None:
        known["capability"] = ".".join(map(str, capability(of)))
    return {name: value for name, value in known.items() if value}


def device_of(model: nn.Module) -> device:
    """The device of the model's first parameter."""
    return next(model.parameters()).device


def is_present(device_type: str) -> bool:
    """Whether this machine has a device of the type."""
    return device_type == CPU or bool(_module(device_type).is_available())


def has_avx512_bf16() -> bool:
    """Whether this processor has AVX-512's instructions for bf16."""
    import torch

    return bool(torch.cpu._is_avx512_bf16_supported())


def autocasts(device_type: str) -> bool:
    """Whether torch.autocast is on for a type of device; never for one that has none, such as meta."""
    import torch

    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Inside, torch.autocast is off for a type of device."""
    import torch

    return torch.autocast(device_type, enabled=False) if autocasts(device_type) else nullcontext()


def exact_dtype(of: device | str) -> dtype:
    """The type in which sums of many parts are taken on a device: fp64, or fp32 where it has no fp64."""
    import torch

    return torch.float32 if _type(of) in _WITHOUT_DOUBLES else torch.float64


def usable_memory(of: device | str) -> int:
    """Bytes that this process may have in all on a device, of which it may have some already."""
    if _type(of) == CPU:
        return usable_host_memory()
    module = _module(of)
    if _type(of) == MPS:  # whose memory is the host's
        return min(usable_host_memory(), int(module.recommended_max_memory()))
    return int(module.mem_get_info(of)[0]) + int(module.memory_reserved(of))


def peak_memory(of: device | str) -> int:
    """The most bytes that this process has had on a device so far: resident memory, or the tensors of a GPU."""
    if _type(of) == CPU:
        return peak_host_memory()
    if _type(of) == MPS:
        return int(_module(of).driver_allocated_memory())
    return int(_module(of).max_memory_allocated(of))


def synchronise(of: device | str) -> None:
    """Wait until a device has done what it was given: only then does a clock show how long that took."""
    if _type(of) != CPU:
        _module(of).synchronize(*_numbered(of))


def random_states(of: device | str) -> dict[str, Tensor]:
    """What torch draws from in work on a device: "torch", which draws seeds and shuffles everywhere, and the device's
    own generator under its type. No other device is opened."""
    import torch

    states = {"torch": torch.get_rng_state()}
    if _type(of) != CPU:
        states[_type(of)] = _module(of).get_rng_state(*_numbered(of))
    return states


def set_random_states(states: dict[str, Tensor], of: device | str) -> None:
    """Put back what `random_states` gave; a device's own is left as it is where ``states`` have none, as those of a run
    that began on another."""
    import torch

    torch.set_rng_state(states["torch"])
    if _type(of) in states:
        _module(of).set_rng_state(states[_type(of)], *_numbered(of))


def _type(of: device | str) -> str:
    return of.partition(":")[0] if isinstance(of, str) else of.type


def _numbered(of: device | str) -> tuple[device | str, ...]:
    """A device as an argument of its module's functions: Apple's have none."""
    return () if _type(of) == MPS else (of,)


def _module(of: device | str) -> Any:
    """torch's module for the type of device, such as torch.cuda."""
    import torch

    return torch.get_device_module(_type(of))
