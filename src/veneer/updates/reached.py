"""Which updates training has reached, so that one that learns nothing is named.

A gradient marks an update by a hook on its parameters; torch's hook on every optimizer's step sees what is stepped.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from veneer.errors import VeneerWarning
from veneer.updates.layers import Triplets


def warn(sentence: str) -> None:
    """The sentence as a `VeneerWarning`."""
    warnings.warn(sentence, VeneerWarning, stacklevel=2)


class Reached:
    """Which updates of one adapter got a gradient since it was attached, and which an optimizer's step changed.

    ``updates``: module name → update; ``base``: the model's other parameters. ``say`` is given the sentences.
    """

    def __init__(self, name: str, updates: dict[str, nn.Module], base: Iterable[Tensor]) -> None:
        self.name, self.updates = name, updates
        self.with_gradient: set[str] = set()
        self.stepped: set[str] = set()
        self.say: Callable[[str], None] = warn
        self._base = [weakref.ref(parameter) for parameter in base]
        self._first, self._elsewhere = True, False  # whether no step is seen yet; whether one of the base's own is
        for path, parameters in self._trained().items():
            for parameter in parameters:
                _mark(parameter, path, self.with_gradient)
        _LIVE.add(self)

    def _trained(self) -> dict[str, list[nn.Parameter]]:
        """Module name → the parameters that a gradient must reach."""
        # P and Q of a triplet without a gradient get one from AdaLoRA's regulariser.
        parameters = {
            path: [update.lam] if isinstance(update, Triplets) else list(update.parameters())
            for path, update in self.updates.items()
        }
        trained = {path: [p for p in ours if p.requires_grad and p.numel()] for path, ours in parameters.items()}
        return {path: ours for path, ours in trained.items() if ours}

    def look(self) -> None:
        """Mark the updates that have a gradient now."""
        for path, parameters in self._trained().items():
            if path not in self.with_gradient and any(parameter.grad is not None for parameter in parameters):
                self.with_gradient.add(path)

    def after_step(self, held: set[int]) -> None:
        """An optimizer that holds the parameters of these ids took a step."""
        trained = self._trained()
        stepped = {path for path, ours in trained.items() if any(id(parameter) in held for parameter in ours)}
        self.look()
        if stepped:
            self.stepped |= stepped
            if self._first and self.with_gradient:  # one without any gradient changes nothing
                self._first = False
                missing = [path for path in trained if path not in self.with_gradient]
                if missing:
                    self.say(_dead(self.name, missing, len(trained), so_far=True))
        elif not self._elsewhere and self.with_gradient and any(id(ref()) in held for ref in self._base):
            self._elsewhere = True
            if not self.stepped:
                self.say(_made_before(self.name))
        if trained and trained.keys() <= self.with_gradient & self.stepped:
            _LIVE.discard(self)  # all of it is trained: no step has to look again

    def untrained(self) -> list[str]:
        """Sentences about updates that never learned anything, where the adapter was trained at all."""
        self.look()
        trained, sentences = self._trained(), []
        missing = [path for path in trained if path not in self.with_gradient]
        if missing and len(missing) < len(trained):
            sentences.append(_dead(self.name, missing, len(trained), so_far=False))
        idle = [path for path in trained if path in self.with_gradient and path not in self.stepped]
        if self._elsewhere and not self.stepped:
            sentences.append(_made_before(self.name))
        elif idle and self.stepped:
            sentences.append(
                f"{len(idle)} of the {len(trained)} updates of the adapter {self.name!r} got gradients, but no "
                f"optimizer's step changed them, so they are as they began: {_listed(idle)}. Give the optimizer all of "
                f"[p for p in model.parameters() if p.requires_grad]."
            )
        return sentences

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model has other parameters, and nobody's progress line to report on.
        return {**self.__dict__, "_base": [], "say": warn}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _LIVE.add(self)


def _mark(parameter: Tensor, path: str, reached: set[str]) -> None:
    """Add ``path`` to ``reached`` when the parameter gets its first gradient."""

    def mark(parameter: Tensor) -> None:
        reached.add(path)
        handle.remove()

    if parameter.is_leaf and parameter.requires_grad:
        handle = parameter.register_post_accumulate_grad_hook(mark)  # type: ignore[no-untyped-call]


@contextmanager
def reports(all_reached: Iterable[Reached], say: Callable[[str], None]) -> Iterator[None]:
    """Inside, what these have to say goes to ``say`` instead of Python's warnings."""
    listening = list(all_reached)
    for reached in listening:
        reached.say = say
    try:
        yield
    finally:
        for reached in listening:
            reached.say = warn


def _dead(name: str, missing: list[str], count: int, *, so_far: bool) -> str:
    when = "got no gradient in the first step" if so_far else "never got a gradient and learned nothing"
    why = (
        "Where no later step reaches these modules, they learn nothing"
        if so_far
        else "The loss does not depend on what these modules compute"
    )
    return (
        f"{len(missing)} of the {count} updates of the adapter {name!r} {when}: {_listed(missing)}. {why}; leave them "
        f"out of targets, or check the rows and the loss."
    )


def _made_before(name: str) -> str:
    return (
        f"The optimizer holds parameters of the frozen model and none of the adapter {name!r}, so its steps train "
        f"nothing: make it after attach, of [p for p in model.parameters() if p.requires_grad]."
    )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


# Those of every adapted model of which something has not been trained yet; one goes with its model.
_LIVE: weakref.WeakSet[Reached] = weakref.WeakSet()


def _after_step(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if _LIVE:
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for reached in list(_LIVE):
            reached.after_step(held)


register_optimizer_step_post_hook(_after_step)
