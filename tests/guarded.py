"""Tensors whose last byte stands before a page that nobody may touch: what reads or writes beyond the end is killed."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

_NO_ACCESS = 0  # PROT_NONE
_PAGE = mmap.PAGESIZE


def guarded(tensor: Tensor) -> Tensor:
    """A contiguous copy of ``tensor`` that ends where such a page begins."""
    size = tensor.numel() * tensor.element_size()
    pages = -(-size // _PAGE)
    room = mmap.mmap(-1, (pages + 1) * _PAGE)
    flat = torch.frombuffer(room, dtype=torch.uint8)
    failed = ctypes.CDLL(None, use_errno=True).mprotect(
        ctypes.c_void_p(flat.data_ptr() + pages * _PAGE), ctypes.c_size_t(_PAGE), _NO_ACCESS
    )
    assert not failed, ctypes.get_errno()
    if not size:
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    copy = flat[pages * _PAGE - size : pages * _PAGE].view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)
