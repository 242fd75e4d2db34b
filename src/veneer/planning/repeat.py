"""Five of many equal layers in a row are run; what the middle one does is repeated for those left out."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from torch import nn

from veneer.planning.ledger import Event, Stretch

SHOWN = 5  # of a run of equal layers: the first and last two, and one whose neighbours have equal ones beside them, too


@dataclass(frozen=True)
class Kinds:
    """Which layers are run, and behind which of them, the i-th, ``left_out[i]`` more are left out."""

    shown: list[Any]
    left_out: dict[int, int]

    @classmethod
    def of(cls, layers: Sequence[nn.Module], key: Callable[[nn.Module], Hashable], whole: bool = False) -> Kinds:
        """Layers are equal when types, shapes of tensors, and ``key`` are. ``whole``: none is left out."""
        shown: list[nn.Module] = []
        left_out: dict[int, int] = {}
        for _, same in groupby(layers, key=lambda layer: (key(layer), *_signature(layer))):
            run = list(same)
            if len(run) > SHOWN and not whole:
                left_out[len(shown) + 2] = len(run) - SHOWN
                run = [*run[:3], *run[-2:]]
            shown += run
        return cls(shown, left_out)

    def places(self) -> list[int]:
        """The place of each of the layers that are shown among all."""
        places, place = [], 0
        for number in range(len(self.shown)):
            places.append(place)
            place += 1 + self.left_out.get(number, 0)
        return places


def _signature(layer: nn.Module) -> tuple[Any, ...]:
    tensors = [(name, tensor.shape, tensor.dtype, tensor.requires_grad) for name, tensor in layer.named_parameters()]
    tensors += [(name, tensor.shape, tensor.dtype, False) for name, tensor in layer.named_buffers()]
    return type(layer), getattr(layer, "attention_type", None), tuple(tensors)


def repeated(stretches: Sequence[Stretch], kinds: Kinds) -> list[Stretch]:
    """The stretches of all layers, from those of the layers that are shown; blocks get new numbers.

    A block is freed by its own layer or an adjacent one, so a skipped layer can copy what its representative does to
    its neighbours.
    """
    if not kinds.left_out:  # copies: when the model goes, its gradients' end would still be written down
        return [replace(stretch, events=list(stretch.events)) for stretch in stretches]
    return list(_Repeater(stretches, kinds).all())


class _Repeater:
    def __init__(self, stretches: Sequence[Stretch], kinds: Kinds) -> None:
        self._stretches, self._kinds, self._places = stretches, kinds, kinds.places()
        self._homes: dict[int, tuple[int, int]] = {}  # block → its stretch, and its place among that one's
        for number, stretch in enumerate(stretches):
            own = [event.block for event in stretch.events if event.size]
            self._homes |= {block: (number, place) for place, block in enumerate(own)}
        self._numbers: dict[Hashable, int] = {}

    def all(self) -> Iterator[Stretch]:
        for stretch in self._stretches:
            place = self._places[stretch.layer] if stretch.layer >= 0 else -1
            others = range(place + 1, place + 1 + self._kinds.left_out.get(stretch.layer, 0))
            # The passes of layers left out come after the forward pass of their representative, and before its
            # backward pass.
            if stretch.name == "backward":
                yield from (self._placed(stretch, other, original=False) for other in reversed(others))
            yield self._placed(stretch, place, original=True)
            if stretch.name == "forward":
                yield from (self._placed(stretch, other, original=False) for other in others)

    def _placed(self, stretch: Stretch, place: int, original: bool) -> Stretch:
        events = []
        for event in stretch.events:
            number = self._number(event, stretch, place, original)
            if number is not None:
                events.append(Event(number, event.size))
        return replace(stretch, layer=place, events=events)

    def _number(self, event: Event, stretch: Stretch, place: int, original: bool) -> int | None:
        home, ordinal = self._homes[event.block]
        owner = self._stretches[home]
        distance = owner.layer - stretch.layer
        if stretch.layer >= 0 and owner.layer >= 0 and abs(distance) <= 1:
            key: Hashable = owner.name, place + distance, ordinal
        elif not original:
            return None  # one of all the layers frees it
        elif owner.layer >= 0:
            key = owner.name, self._places[owner.layer], ordinal
        else:
            key = home, ordinal
        return self._numbers.setdefault(key, len(self._numbers) + 1)
