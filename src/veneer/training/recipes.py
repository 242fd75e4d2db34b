"""Activations that are recomputed for the backward pass instead of kept: those that are cheap, and made of what is kept
anyway."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Recipe = Callable[[], Tensor]
_RECIPES = "_veneer_recipes"


class Recipes:
    """How to recompute the activations of one model while it trains."""

    def __init__(self) -> None:
        # By its memory's address and place there, as long as the tensor lives and is not changed: its version then.
        self._recipes: dict[tuple[int, int], tuple[weakref.ref[Tensor], int, Recipe]] = {}
        self._latest: tuple[Recipe, Tensor] | None = None  # the queries', keys' and values' input is one

    def add(self, y: Tensor, recipe: Recipe) -> Tensor:
        """``y``, as it is. Within `used`, a graph that would keep all of it for a backward pass keeps ``recipe``
        instead, which gives the same bits."""
        place = place_of(y)

        def forget(reference: weakref.ref[Tensor]) -> None:
            if place in self._recipes and self._recipes[place][0] is reference:
                del self._recipes[place]

        self._recipes[place] = weakref.ref(y, forget), y._version, recipe
        return y

    def made(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """``function`` of ``inputs``, which its own backward pass keeps; recomputed wherever else it would be kept."""
        kept = [x.detach() for x in inputs]
        return self.add(function(*inputs), lambda: function(*kept))

    @contextmanager
    def used(self) -> Iterator[None]:
        """Inside, the graphs of this thread keep the recipes of tensors that were added; they are used wherever the
        graph is. Tensors that were not are kept as ever, whichever model's they are."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            yield

    def _pack(self, kept: Tensor) -> Tensor | tuple[Recipe, torch.Size]:
        self._latest = None  # of a backward pass that is over
        reference, version, recipe = self._recipes.get(place_of(kept), (None, 0, None))
        y = None if reference is None else reference()
        if y is None or recipe is None or y._version != version:
            return kept
        if kept.numel() != y.numel() or kept.dtype != y.dtype or not kept.is_contiguous():
            return kept
        return recipe, kept.shape

    def _unpack(self, kept: Tensor | tuple[Recipe, torch.Size]) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        recipe, shape = kept
        if self._latest is None or self._latest[0] is not recipe:
            self._latest = None  # free the last one's memory for this one
            with torch.no_grad():
                self._latest = recipe, recipe()
        return self._latest[1].view(shape)


def place_of(x: Tensor) -> tuple[int, int]:
    """The address of the tensor's storage and its place there; tensors without values, a plan's, have them, too."""
    return x.untyped_storage()._cdata, int(x.storage_offset())


def recipes_of(model: nn.Module) -> Recipes | None:
    """The recipes of a model that trains with fused passes, kept on the model itself; else None."""
    recipes = model.__dict__.get(_RECIPES)
    return recipes if isinstance(recipes, Recipes) else None


@contextmanager
def recipes_for(model: nn.Module) -> Iterator[Recipes]:
    """Inside, ``model`` has recipes: those it has already, or new ones that go with this context."""
    before = recipes_of(model)
    if before is not None:
        yield before
        return
    recipes = Recipes()
    model.__dict__[_RECIPES] = recipes
    try:
        yield recipes
    finally:
        del model.__dict__[_RECIPES]
