"""Every tensor that a piece of work makes and frees, in order, and what its operations cost."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Event(NamedTuple):
    """A block of memory is taken, or freed."""

    block: int  # its number
    size: int  # bytes; 0: freed


class Operation(NamedTuple):
    """What an operation costs."""

    kind: str  # of those that take their time in different ways: one of KINDS, perhaps with SHORT behind it
    flops: float  # of its products
    moved: float  # bytes read and written
    times: float = 1.0  # that it is done


class Times:
    """How often each operation is done, one after another, with the memory of one: set by what repeats, read by the
    ledger that counts them."""

    def __init__(self) -> None:
        self.count = 1.0

    @contextmanager
    def repeated(self, count: float) -> Iterator[None]:
        """Inside, each operation stands for so many."""
        before, self.count = self.count, count
        try:
            yield
        finally:
            self.count = before


@dataclass
class Stretch:
    """A part of a step: its events, and its work."""

    name: str
    layer: int = -1  # whose forward or backward pass it is
    events: list[Event] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it, what is made of tensors that are not ``known`` is written down, by stretches."""

    def __init__(self, known: Iterable[Tensor], times: Times | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._times = times or Times()
        self.stretches: list[Stretch] = []
        self._known = [tensor.untyped_storage() for tensor in known]
        self._ignored = {id(storage) for storage in self._known}
        self._blocks: dict[int, int] = {}  # by the storage's identity
        self._count = 0

    def begin(self, name: str, layer: int = -1) -> None:
        """What follows belongs to a new stretch."""
        self.stretches.append(Stretch(name, layer))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        for tensor in made:
            self._take(tensor.untyped_storage())
        if not func.is_view:
            given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            self.stretches[-1].operations.append(cost(func, given, made, self._times.count, _rows(args)))
        return result

    def _take(self, storage: Any) -> None:
        key = id(storage)
        if key in self._blocks or key in self._ignored or not storage.nbytes():
            return
        self._count += 1
        self._blocks[key] = self._count
        self.stretches[-1].events.append(Event(self._count, storage.nbytes()))
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.stretches[-1].events.append(Event(self._blocks.pop(key), 0))


KINDS = ("products", "attention", "functions", "random", "passes")
SHORT = " in 16 bits"  # behind a kind: of numbers some of which are
_PRODUCTS = {"mm", "bmm", "addmm", "addmm_", "baddbmm", "_grouped_mm", "_linear_pointwise"}
_WITH_UPDATE = "product_with_update"  # and its gradients: x, or that of y, comes first, y, or that of x, is made first
# In these a number costs more than its way through memory: exponentials, expanded codes, products by a low rank.
_FUNCTIONS = (
    "exp", "gelu", "silu", "tanh", "softmax", "swiglu", "geglu", "rotate", "cross_entropy", "dequantise",
    "update_product",
)  # fmt: skip
_BY_ROWS = {"attention", "attention_backward"}
# Part of a name → kind.
_KIND_OF = dict.fromkeys(_FUNCTIONS, "functions") | dict.fromkeys(("bernoulli", "dropout"), "random")
# Only a panel of these arguments is read, and written into the last one.
_INTO_THE_LAST = {"dequantise"}


def cost(
    func: Any, given: list[Tensor], made: list[Tensor], times: float = 1.0, rows: list[int] | None = None
) -> Operation:
    """The cost of an operator that makes tensors of others, done so many ``times``; of attention over rows back to
    back with their lengths."""
    name = func._schema.name.partition("::")[2]
    short = SHORT if any(tensor.itemsize == 2 for tensor in (*given, *made)) else ""
    if name in _INTO_THE_LAST:
        return Operation(f"functions{short}", 0.0, 1.25 * _bytes(given[-1]), times)
    moved = sum(_bytes(tensor) for tensor in (*given, *made))
    if name in _PRODUCTS:
        left = given[-2] if "add" in name else given[0]
        return Operation(f"products{short}", 2.0 * left.numel() * made[0].shape[-1], moved, times)
    if name.startswith(_WITH_UPDATE):  # its thin side is small beside the weight
        return Operation(f"products{short}", 2.0 * given[0].numel() * made[0].shape[-1], moved, times)
    if "scaled_dot_product" in name and "math" not in name:
        backward = "backward" in name
        query, key = given[1 if backward else 0], given[2 if backward else 1]
        # Two products forward, five backward; of causal attention half of each.
        whole = 2.0 * query.numel() * key.shape[-2]
        return Operation(f"attention{short}", whole * (5 if backward else 2) / 2, moved, times)
    if name in _BY_ROWS:
        backward = "backward" in name
        query = given[1 if backward else 0]
        whole = 2.0 * query[:1].numel() * sum(length**2 for length in rows or ())
        return Operation(f"attention{short}", whole * (5 if backward else 2) / 2, moved, times)
    kind = next((kind for part, kind in _KIND_OF.items() if part in name), "passes")
    return Operation(f"{kind}{short}", 0.0, moved if made else 0.0, times)


def _rows(arguments: Any) -> list[int]:
    """The first list of numbers among an operator's arguments."""
    return next((x for x in arguments if isinstance(x, list) and all(isinstance(n, int) for n in x)), [])


def _bytes(tensor: Tensor) -> float:
    return float(tensor.numel() * tensor.element_size())
