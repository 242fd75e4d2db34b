"""Activations that are computed again for the backward pass instead of kept: those that are cheap, and made of what is
kept anyway."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_Recipe = Callable[[], Tensor]
# By its memory's address and place there, as long as the tensor lives and is not changed: its version then was this.
_recipes: dict[tuple[int, int], tuple[weakref.ref[Tensor], int, _Recipe]] = {}
_latest: tuple[_Recipe, Tensor] | None = None  # the queries', keys' and values' input is one


def again(y: Tensor, recipe: _Recipe) -> Tensor:
    """``y``, as it is. Within `computed_again`, whatever would keep it, whole, for a backward pass keeps ``recipe``
    instead, which gives the same bits."""
    place = place_of(y)

    def forget(reference: weakref.ref[Tensor]) -> None:
        if place in _recipes and _recipes[place][0] is reference:
            del _recipes[place]

    _recipes[place] = weakref.ref(y, forget), y._version, recipe
    return y


def again_from(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """``function`` of ``inputs``, which its own backward pass keeps, computed again wherever else it would be kept."""
    kept = [x.detach() for x in inputs]
    return again(function(*inputs), lambda: function(*kept))


def place_of(x: Tensor) -> tuple[int, int]:
    """The address of the tensor's storage and its place there; tensors without values, a plan's, have them, too."""
    return x.untyped_storage()._cdata, int(x.storage_offset())


@contextmanager
def computed_again() -> Iterator[None]:
    """Inside, graphs keep the recipes of tensors that were given to `again`; they are used wherever the graph is."""
    with torch.autograd.graph.saved_tensors_hooks(_pack, _unpack):
        yield


def _pack(kept: Tensor) -> Tensor | tuple[_Recipe, torch.Size]:
    global _latest
    _latest = None  # of a backward pass that is over
    reference, version, recipe = _recipes.get(place_of(kept), (None, 0, None))
    y = None if reference is None else reference()
    if y is None or recipe is None or y._version != version:
        return kept
    if kept.numel() != y.numel() or kept.dtype != y.dtype or not kept.is_contiguous():
        return kept
    return recipe, kept.shape


def _unpack(kept: Tensor | tuple[_Recipe, torch.Size]) -> Tensor:
    global _latest
    if isinstance(kept, Tensor):
        return kept
    recipe, shape = kept
    if _latest is None or _latest[0] is not recipe:
        _latest = None  # the last one's memory is there for this one
        with torch.no_grad():
            _latest = recipe, recipe()
    return _latest[1].view(shape)
