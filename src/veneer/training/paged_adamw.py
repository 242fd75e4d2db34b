"""AdamW whose moments live in pages of a scratch file, so that they need not fit in memory.

Its steps are those of ``torch.optim.AdamW``, to the last bit: each page's part of the parameters goes through torch's
own function. Only the place of the moments is different. In 8 bits they are expanded before that function and coded
again after it.

On a GPU the pages would be in unified memory (QLoRA, Dettmers et al. 2023, §3): another `Pages` with the same
``visit``, chosen in `PagedAdamW._lay_out` by the parameters' device. There is none yet: a GPU's are refused.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from veneer.device import CPU
from veneer.errors import ConfigError
from veneer.options import memory_size
from veneer.training import eight_bit
from veneer.training.pages import Pages, page_size_within

MOMENTS = ("exp_avg", "exp_avg_sq")
# By bits of a state, bytes: of this size on, a page's Python time is lost in its arithmetic.
_LARGEST_PAGE = {32: 4 * 2**20, 8: 2**20}
# Elements. torch's fused loop rounds differently in the last elements, which do not fill a vector register: a cut at a
# multiple of this, counted from the parameter's start, leaves the same elements last. And it cuts no block of codes.
_CUT = {32: 64, 8: eight_bit.BLOCK}


class Field(NamedTuple):
    """What is kept of a parameter: ``count(n)`` values for n elements."""

    name: str
    dtype: torch.dtype
    block: int = 1  # elements for a value

    def count(self, elements: int) -> int:
        return -(-elements // self.block)

    def bytes(self, elements: int) -> int:
        """Up to a full cache line."""
        return -(-self.count(elements) * self.dtype.itemsize // 64) * 64


def _fields(bits: int, dtype: torch.dtype) -> tuple[Field, ...]:
    """The fields of a parameter of ``dtype``, in their order in a page."""
    if bits == 32:
        return tuple(Field(name, dtype) for name in MOMENTS)
    kept = (("codes", torch.uint8, 1), ("scales", torch.float32, eight_bit.BLOCK))
    return tuple(Field(f"{name}.{part}", kind, block) for name in MOMENTS for part, kind, block in kept)


class _Piece(NamedTuple):
    """Elements of one parameter, in their order in memory, whose moments are in one page."""

    parameter: Tensor
    group: int  # its place in param_groups
    start: int  # elements
    stop: int
    page: int
    offset: int  # bytes into the page, where its fields follow one another
    fields: tuple[Field, ...]

    def kept(self, page: Tensor, name: str) -> Tensor:
        """The piece's own values of a field in the bytes of its page, 1-D."""
        elements, at = self.stop - self.start, self.offset
        for field in self.fields:
            if field.name == name:
                return page[at : at + field.count(elements) * field.dtype.itemsize].view(field.dtype)
            at += field.bytes(elements)
        raise KeyError(name)

    def moment(self, page: Tensor, name: str) -> Tensor:
        """A moment (stop − start,) in the parameter's type: the page itself, or expanded from 8 bits."""
        if len(self.fields) == len(MOMENTS):
            return self.kept(page, name)
        codes, scales = self.kept(page, f"{name}.codes"), self.kept(page, f"{name}.scales")
        return eight_bit.decode(codes, scales, signed=name == "exp_avg").to(self.parameter.dtype)

    def keep(self, page: Tensor, name: str, moment: Tensor) -> None:
        """Put back what `moment` gave."""
        if len(self.fields) > len(MOMENTS):
            codes, scales = self.kept(page, f"{name}.codes"), self.kept(page, f"{name}.scales")
            eight_bit.code(moment, codes, scales, signed=name == "exp_avg")


class PagedAdamW(torch.optim.Optimizer):
    """Decoupled weight decay Adam (Loshchilov & Hutter 2019) with its moments in pages on the disk.

    ``params``: parameters or groups, as for ``torch.optim.AdamW``; floating point, on the CPU, without gaps in memory.
    ``folder``: of the scratch file, which takes the moments' size, twice the parameters' bytes, and is gone when the
    optimizer is. ``resident``: bytes, or text such as "256MB", of moments in memory at a time. ``page_size``:
    bytes, a multiple of 64 KiB; by default as large as the budget allows, up to 4 MiB. ``fused``: which of torch's two
    CPU loops takes the step; it equals ``torch.optim.AdamW`` with the same ``fused``, bit for bit. ``bits``: 32, or 8
    for moments in a quarter of the room, which are then not AdamW's but near (see eight_bit.py).

    Raises ConfigError for a value that makes no sense, TrainingError for a budget too small, OSError when the disk of
    ``folder`` has no room.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 1e-2, *, folder: str | Path, resident: int | str = "256MB",
        page_size: int | None = None, fused: bool = True, bits: int = 32,
    ) -> None:  # fmt: skip
        if bits not in _CUT:
            raise ConfigError(f"bits = {bits} is not 32 or 8.")
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise ConfigError(f"{name} = {value} is negative or no number.")
        if not all(0 <= beta < 1 for beta in betas):
            raise ConfigError(f"betas = {betas} are not both from 0 up to 1.")
        self._bits = bits
        self._pages: Pages | None = None
        self._pieces: dict[Tensor, list[_Piece]] = {}
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "fused": fused}
        )  # fmt: skip
        budget = memory_size(resident)
        largest = page_size_within(budget, _LARGEST_PAGE[bits] if page_size is None else page_size)
        if page_size is not None and largest != page_size:
            raise ConfigError(
                f"page_size = {page_size} is not a power of two from 64 KiB up of which {budget} bytes hold twelve."
            )
        self._lay_out(Path(folder), largest, budget)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, while the optimizer is made. Raises ConfigError later, and for a parameter that cannot page."""
        if self._pages is not None:
            raise ConfigError("PagedAdamW has its pages laid out; give all parameter groups when it is made.")
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            _refuse_unpageable(parameter)

    def _lay_out(self, folder: Path, page_size: int, resident: int) -> None:
        """Pack the parameters into pages, in their order; a page begins where the one before is full."""
        page, used = 0, 0
        for number, group in enumerate(self.param_groups):
            for parameter in group["params"]:
                pieces, start, fields = [], 0, self.fields(parameter)
                while start < parameter.numel():
                    stop = min(start + _fitting(fields, page_size - used, _CUT[self._bits]), parameter.numel())
                    if stop == start:
                        page, used = page + 1, 0
                        continue
                    pieces.append(_Piece(parameter, number, start, stop, page, used, fields))
                    used += sum(field.bytes(stop - start) for field in fields)
                    start = stop
                self._pieces[parameter] = pieces
        self._pages = Pages(folder, page + 1 if used else page, page_size, resident)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient. Raises ConfigError for a sparse gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients = {parameter: _laid_out_as(parameter) for parameter in self._pieces if parameter.grad is not None}
        for parameter in gradients:
            if not self.state[parameter]:
                self.state[parameter]["step"] = torch.tensor(0.0)
        for bytes_, pieces in self._visit(piece for parameter in gradients for piece in self._pieces[parameter]):
            for group, together in itertools.groupby(pieces, key=lambda piece: piece.group):
                self._update(self.param_groups[group], list(together), bytes_, gradients)
        for parameter in gradients:
            self.state[parameter]["step"] += 1
        return loss

    def _update(
        self, group: dict[str, Any], pieces: list[_Piece], page: Tensor, gradients: dict[Tensor, Tensor]
    ) -> None:
        beta1, beta2 = group["betas"]
        moments = {name: [piece.moment(page, name) for piece in pieces] for name in MOMENTS}
        adamw(
            [_flat(piece.parameter)[piece.start : piece.stop] for piece in pieces],
            [_flat(gradients[piece.parameter])[piece.start : piece.stop] for piece in pieces],
            moments["exp_avg"],
            moments["exp_avg_sq"],
            [],
            # A counter for each piece: the function counts on, and a parameter of many pieces would count many times.
            [self.state[piece.parameter]["step"].clone() for piece in pieces],
            foreach=False, fused=group["fused"], beta1=beta1, beta2=beta2, lr=group["lr"],
            weight_decay=group["weight_decay"], eps=group["eps"], amsgrad=False, maximize=False,
        )  # fmt: skip
        for name, each in moments.items():
            for piece, moment in zip(pieces, each, strict=True):
                piece.keep(page, name, moment)

    def _visit(self, pieces: Iterable[_Piece]) -> Iterator[tuple[Tensor, list[_Piece]]]:
        """Pages in turn, each with those of ``pieces``, given in order, that are in it."""
        by_page = {page: list(its) for page, its in itertools.groupby(pieces, key=lambda piece: piece.page)}
        assert self._pages is not None
        for number, page in self._pages.visit(list(by_page)):
            yield page, by_page[number]

    def fields(self, parameter: Tensor) -> tuple[Field, ...]:
        """What is kept of a parameter: its two moments, or the codes and scales of them."""
        return _fields(self._bits, parameter.dtype)

    def parts(self, parameter: Tensor, name: str) -> Iterator[Tensor]:
        """A field in order, a part of at most a page at a time, each 1-D.

        The order is that of the parameter's elements; codes and scales are in the elements' order in memory. A part is
        the page itself, to be used before the next is asked for. A moment of a parameter whose elements have another
        order in memory (a transposed one) is one part, a copy of the whole.
        """
        if not self._in_order(parameter):
            yield self.moment(parameter, name).reshape(-1)
            return
        for page, pieces in self._visit(self._pieces[parameter]):
            for piece in pieces:
                yield piece.kept(page, name)

    def fill(self, parameter: Tensor, name: str, read: Callable[[Tensor], None]) -> None:
        """Set a field: ``read`` fills the 1-D tensors that it is called with, in the order of `parts`."""
        if self._in_order(parameter):
            for part in self.parts(parameter, name):
                read(part)
            return
        whole = torch.empty(parameter.numel(), dtype=parameter.dtype)
        read(whole)
        self._set(parameter, name, whole.view(parameter.shape))

    def _in_order(self, parameter: Tensor) -> bool:
        return self._bits == 8 or parameter.is_contiguous()

    def moment(self, parameter: Tensor, name: str) -> Tensor:
        """A copy of a whole moment, in the parameter's shape and strides."""
        moment = torch.empty_like(parameter, requires_grad=False)
        for page, pieces in self._visit(self._pieces[parameter]):
            for piece in pieces:
                _flat(moment)[piece.start : piece.stop] = piece.moment(page, name)
        return moment

    def _set(self, parameter: Tensor, name: str, value: Tensor) -> None:
        laid_out = torch.empty_like(parameter, requires_grad=False).copy_(value)
        for page, pieces in self._visit(self._pieces[parameter]):
            for piece in pieces:
                piece.kept(page, name).copy_(_flat(laid_out)[piece.start : piece.stop])

    def _set_coded(self, parameter: Tensor, field: Field, value: Tensor) -> None:
        whole = value.expand(field.count(parameter.numel()))
        for page, pieces in self._visit(self._pieces[parameter]):
            for piece in pieces:
                first = piece.start // field.block
                piece.kept(page, field.name).copy_(whole[first : first + field.count(piece.stop - piece.start)])

    @contextmanager
    def reshaping(self, parameter: Tensor, select: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Inside, the parameter gets fewer elements: those that ``select`` takes; its moments follow when it ends."""
        moments = {name: select(self.moment(parameter, name)) for name in MOMENTS}
        yield
        # Each piece begins where it began, so that the fused loop goes on to round as torch's does.
        self._pieces[parameter] = [
            piece._replace(stop=min(piece.stop, parameter.numel()))
            for piece in self._pieces[parameter]
            if piece.start < parameter.numel()
        ]
        for name, moment in moments.items():
            self._set(parameter, name, moment)

    def state_dict(self) -> dict[str, Any]:
        """What ``torch.optim.AdamW`` gives, and takes; of moments in 8 bits their codes and scales, which it does not.

        It gathers all of them in memory; `parts` does not.
        """
        state = super().state_dict()
        for number, parameter in enumerate(self._pieces):
            if number in state["state"]:
                kept = {field.name: self._whole(parameter, field) for field in self.fields(parameter)}
                state["state"][number] = {**state["state"][number], **kept}
        return state

    def _whole(self, parameter: Tensor, field: Field) -> Tensor:
        if field.name in MOMENTS:
            return self.moment(parameter, field.name)
        parts = [part.clone() for part in self.parts(parameter, field.name)]
        return torch.cat(parts) if parts else torch.empty(0, dtype=field.dtype)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state of a PagedAdamW, or with moments in 32 bits of a ``torch.optim.AdamW``.

        Raises ConfigError when it was made with amsgrad or maximize, which this optimizer does not have, or with other
        bits.
        """
        for name in ("amsgrad", "maximize"):
            if any(group.get(name) for group in state_dict["param_groups"]):
                raise ConfigError(f"PagedAdamW has no {name}, with which this state was made.")
        names = {name for state in state_dict["state"].values() for name in state}
        if names and (set(MOMENTS) <= names) != (self._bits == 32):
            raise ConfigError(f"This state was not kept in {self._bits} bits, which PagedAdamW was made with.")
        counters = {number: {"step": state["step"]} for number, state in state_dict["state"].items()}
        super().load_state_dict({**state_dict, "state": counters})
        for number, parameter in enumerate(self._pieces):
            state = state_dict["state"].get(number, {})
            for field in self.fields(parameter):
                value = state.get(field.name, torch.zeros((), dtype=field.dtype))
                if field.name in MOMENTS:
                    self._set(parameter, field.name, value)
                else:
                    self._set_coded(parameter, field, value)


def _refuse_unpageable(parameter: Tensor) -> None:
    what = f"A parameter of shape {tuple(parameter.shape)}"
    if parameter.device.type != CPU:
        raise ConfigError(f"{what} is on {parameter.device}, but PagedAdamW pages on the CPU only; use torch's AdamW.")
    if not parameter.is_floating_point():
        raise ConfigError(f"{what} is {parameter.dtype}; PagedAdamW updates floating-point ones.")
    if torch.empty_like(parameter).stride() != parameter.stride():
        raise ConfigError(f"{what} has gaps in memory (strides {parameter.stride()}); make it contiguous.")


def _laid_out_as(parameter: Tensor) -> Tensor:
    """The parameter's gradient with the parameter's strides: itself, as a rule."""
    gradient = parameter.grad
    assert gradient is not None
    if gradient.layout != torch.strided:
        raise ConfigError("PagedAdamW takes dense gradients; make the embedding with sparse=False.")
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


def _flat(tensor: Tensor) -> Tensor:
    """All elements of a tensor without gaps, in their order in memory, (n,)."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def _fitting(fields: tuple[Field, ...], room: int, cut: int) -> int:
    """The largest multiple of ``cut`` elements whose fields fit in ``room`` bytes."""
    elements = int(room / sum(field.dtype.itemsize / field.block for field in fields)) // cut * cut
    while elements and sum(field.bytes(elements) for field in fields) > room:
        elements -= cut
    return elements
