"""The one file that names devices: the memory of one, its random state, and when its work is done.

No torch at import: commands' options name devices too.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

from veneer.host_memory import peak_host_memory, usable_host_memory

if TYPE_CHECKING:
    from torch import Tensor, device, dtype, nn

CPU: Literal["cpu"] = "cpu"
CUDA: Literal["cuda"] = "cuda"
META: Literal["meta"] = "meta"  # torch's tensors without values
MPS: Literal["mps"] = "mps"
_WITHOUT_DOUBLES = {MPS}
Planned = Literal["cpu", "cuda"]  # types of device that a run can be planned for


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
    return int(module.mem_get_info(of)[0]) + int(module.memory_reserved(of))


def peak_memory(of: device | str) -> int:
    """The most bytes that this process has had on a device so far: resident memory, or the tensors of a GPU."""
    return peak_host_memory() if _type(of) == CPU else int(_module(of).max_memory_allocated(of))


def synchronise(of: device | str) -> None:
    """Wait until a device has done what it was given: only then does a clock show how long that took."""
    if _type(of) != CPU:
        _module(of).synchronize(of)


def random_states(of: device | str) -> dict[str, Tensor]:
    """What torch draws from in work on a device: "torch", which draws seeds and shuffles everywhere, and the device's
    own generator under its type. No other device is opened."""
    import torch

    states = {"torch": torch.get_rng_state()}
    if _type(of) != CPU:
        states[_type(of)] = _module(of).get_rng_state(of)
    return states


def set_random_states(states: dict[str, Tensor], of: device | str) -> None:
    """Put back what `random_states` gave; a device's own is left as it is where ``states`` have none, as those of a run
    that began on another."""
    import torch

    torch.set_rng_state(states["torch"])
    if _type(of) in states:
        _module(of).set_rng_state(states[_type(of)], of)


def _type(of: device | str) -> str:
    return of.partition(":")[0] if isinstance(of, str) else of.type


def _module(of: device | str) -> Any:
    """torch's module for the type of device, such as torch.cuda."""
    import torch

    return torch.get_device_module(_type(of))
