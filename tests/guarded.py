"""Tensors beside a page that nobody may touch: what reads or writes beyond them is killed, or found out."""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_NO_ACCESS = 0  # PROT_NONE
_PAGE = mmap.PAGESIZE
_MARK = 0x7E  # of bytes that are no tensor's; as numbers in fp32 and bf16 they are huge, and show in a sum


def guarded(tensor: Tensor, *, at_start: bool = False) -> Tensor:
    """A copy of ``tensor`` with its strides that ends where such a page begins, or begins where one ends."""
    return Guarded(tensor, at_start=at_start).copy


class Guarded:
    """Such a copy, and the bytes beside and within it that are none of it."""

    def __init__(self, tensor: Tensor, *, at_start: bool = False) -> None:
        of = zip(tensor.shape, tensor.stride(), strict=True)
        extent = 1 + sum((n - 1) * stride for n, stride in of) if tensor.numel() else 0
        size = extent * tensor.element_size()
        pages = max(1, -(-size // _PAGE))
        room = mmap.mmap(-1, (pages + 1) * _PAGE)
        flat = torch.frombuffer(room, dtype=torch.uint8)
        self._open = flat[_PAGE:] if at_start else flat[: pages * _PAGE]
        forbidden = flat.data_ptr() if at_start else flat.data_ptr() + pages * _PAGE
        failed = ctypes.CDLL(None, use_errno=True).mprotect(
            ctypes.c_void_p(forbidden), ctypes.c_size_t(_PAGE), _NO_ACCESS
        )
        assert not failed, ctypes.get_errno()
        self._open.fill_(_MARK)
        first = 0 if at_start else len(self._open) - size
        self._part = self._open[first : first + size], tensor.dtype, tensor.shape, tensor.stride()
        self.copy = self._view(*self._part).copy_(tensor)
        mine = torch.zeros(extent, dtype=torch.bool).as_strided(tensor.shape, tensor.stride())
        mine.fill_(True)
        self._others = torch.ones(len(self._open), dtype=torch.bool)
        within = ~mine.as_strided((extent,), (1,)) if extent else mine.view(0)
        self._others[first : first + size] = within.repeat_interleave(tensor.element_size())

    @staticmethod
    def _view(part: Tensor, dtype: torch.dtype, shape: torch.Size, strides: tuple[int, ...]) -> Tensor:
        return part.view(dtype).as_strided(shape, strides) if part.numel() else torch.empty(shape, dtype=dtype)

    def intact(self) -> bool:
        """Whether nothing was written to the bytes that are no element's."""
        return bool((self._open[self._others] == _MARK).all())


class GuardedResults(TorchDispatchMode):
    """Inside, what is made for results and copies is guarded as well, and full of marks."""

    _MADE = (
        torch.ops.aten.empty.memory_format, torch.ops.aten.new_empty.default, torch.ops.aten.empty_like.default,
        torch.ops.aten.clone.default, torch.ops.aten._to_copy.default,
    )  # fmt: skip

    def __init__(self, *, at_start: bool = False) -> None:
        super().__init__()
        self._at_start = at_start
        self.made: list[Guarded] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func not in self._MADE:
            return out
        if func in self._MADE[:3]:
            out.untyped_storage().fill_(_MARK)
        self.made.append(Guarded(out, at_start=self._at_start))
        return self.made[-1].copy
