"""What all launches ask: which types kernels take, and the sizes of their tiles."""

import torch
from torch import Tensor

TYPES = (torch.float32, torch.bfloat16, torch.float16)
LONGEST_ROW = 16384  # numbers of a row that one program holds in registers
EXACT = {"enable_fp_fusion": False}  # each operation rounds by itself, as in the definition


def kernels_take(*tensors: Tensor) -> bool:
    """Whether they are of one type, one that the kernels are written for, and hold anything."""
    return tensors[0].dtype in TYPES and all(
        tensor.dtype is tensors[0].dtype and tensor.numel() for tensor in tensors
    )  # fmt: skip


def power_of_two(size: int) -> int:
    """The least that is not below ``size``."""
    return 1 << max(0, size - 1).bit_length()


def warps(width: int) -> int:
    """For a program over ``width`` numbers: 16 or so for a thread."""
    return min(16, max(1, power_of_two(width) // 512))


def check_tensor(name: str, tensor: Tensor, dtype: torch.dtype, least: int, device: torch.device) -> None:
    """Nothing behind this looks again: a kernel reads from an address."""
    if tensor.dtype != dtype or tensor.device != device or not tensor.is_contiguous() or tensor.numel() < least:
        raise ValueError(
            f"{name} must be {dtype}, contiguous, on {device} and of at least {least} elements, "
            f"not {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}."
        )


def check_like(name: str, tensor: Tensor, like: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape or tensor.device != like.device:
        raise ValueError(
            f"{name} must be of shape {shape} on {like.device}, not {tuple(tensor.shape)} on {tensor.device}."
        )
