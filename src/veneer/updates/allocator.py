"""AdaLoRA's allocator (arXiv:2303.10512, algorithm 1): it acts inside the steps of whichever optimizer holds its
parameters, through PyTorch's hooks on every optimizer's step, so there is nothing that a training loop could forget.

Before the optimizer's step: the regulariser's gradient is added, and the importance of every triplet learns from the
weights and gradients of one and the same moment. After it: every ΔT steps the least important triplets' λ are set to
zero; at step T − t_f they are cut out, and the adapter is trained on as what it has become.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from veneer.errors import TrainingError
from veneer.notebook import html_table
from veneer.updates.budget import Schedule, sizes_of
from veneer.updates.config import AdaLoRA
from veneer.updates.cut import cut, grow
from veneer.updates.importance import LAM, Importance, Stack, most_important, orthogonality, parts_of, stacks_by_shape
from veneer.updates.layers import Triplets


class Allocator:
    """Gives the budget of one AdaLoRA adapter to its matrices while it is trained.

    ``config``: with both ranks filled in; ``triplets``: module name → its update. A step counts when it changes
    parameters: one that a loss scaler skips, or that finds no gradients, does not. ``deviation``: ‖PᵀP − I‖ and
    ‖QQᵀ − I‖ (Frobenius) on average at the latest step, (), or None before the first.
    """

    def __init__(self, config: AdaLoRA, triplets: dict[str, Triplets]) -> None:
        self.config = config
        self.triplets = triplets
        sizes = sizes_of([(len(update.P), update.Q.shape[1]) for update in triplets.values()])
        costs = [1] * len(triplets) if config.budget is None else sizes
        self.schedule = Schedule.of(config, costs)
        self._costs = torch.tensor(costs)
        self.step = 0
        self.fixed = False  # whether the triplets that remain are the final ones
        self.deviation: Tensor | None = None
        # Which of the existing triplets are in force, (matrices, initial rank); the others' λ were set to zero.
        self.kept = torch.ones(len(triplets), config.initial_rank or 0, dtype=torch.bool)
        self._stacks = stacks_by_shape(list(triplets.values()))  # as long as the ranks stay
        self._importance: Importance | None = None  # while triplets are still taken
        self._optimizer: weakref.ref[torch.optim.Optimizer] | None = None
        self._acting = False  # between the two hooks of a step that counts
        _LIVE.add(self)

    @property
    def budget(self) -> int:
        """b(t) after the latest step: triplets of all matrices together, or parameters where these were asked for."""
        return self.schedule.target if self.fixed else self.schedule.budget(self.step)

    def __repr__(self) -> str:
        return f"Allocator({self._state()})"

    def _repr_html_(self) -> str:
        ranks, importance = self.ranks(), self.importance()
        rows = [(path, rank, f"{importance[path]:.3g}" if importance else "") for path, rank in ranks.items()]
        return html_table(("module", "rank", "importance"), rows, self._state())

    def _state(self) -> str:
        ranks = self.ranks().values()
        of = "parameters" if self.config.budget is not None else "triplets"
        fixed = "final ranks" if self.fixed else f"ranks fixed at step {self.schedule.last}"
        return (
            f"step {self.step}, budget {self.budget:,} {of}, ranks {min(ranks)} to {max(ranks)} of {len(ranks)} "
            f"matrices, {fixed}"
        )

    def ranks(self) -> dict[str, int]:
        """Module name → how many of its triplets are in force.

        Example:
            >>> model = veneer.attach(model, veneer.AdaLoRA(targets=["q_proj"], target_rank=2, total_steps=100))
            >>> veneer.allocator(model).ranks()
            {'model.layers.0.self_attn.q_proj': 3, 'model.layers.1.self_attn.q_proj': 3}
        """
        if self.fixed:
            return {path: update.rank for path, update in self.triplets.items()}
        return dict(zip(self.triplets, self.kept.sum(1).tolist(), strict=True))

    def importance(self) -> dict[str, float]:
        """Module name → the sum of its triplets' scores; empty before the first step and once the ranks are fixed.

        Example:
            >>> model = veneer.attach(model, veneer.AdaLoRA(targets=["q_proj"], target_rank=2, total_steps=100))
            >>> veneer.allocator(model).importance()  # before the first step
            {}
        """
        if self._importance is None or not self.step:
            return {}
        return dict(zip(self.triplets, self._importance.scores().sum(1).tolist(), strict=True))

    def state_dict(self) -> dict[str, Tensor]:
        """All that the next step depends on, beside the adapter's parameters and the optimizer's state.

        Example:
            >>> model = veneer.attach(model, veneer.AdaLoRA(targets=["q_proj"], target_rank=2, total_steps=100))
            >>> state = veneer.allocator(model).state_dict()
            >>> veneer.allocator(model).load_state_dict(state)
        """
        numbers = [self.step, self.schedule.first, self.schedule.last, self.fixed]
        state = {"progress": torch.tensor(numbers), "kept": self.kept.to(torch.uint8)}
        if self._importance is not None:
            for number, (smooth, spread) in enumerate(
                zip(self._importance.sensitivity, self._importance.uncertainty, strict=True)
            ):
                state |= {f"sensitivity.{number}": smooth, f"uncertainty.{number}": spread}
        return state

    def load_state_dict(self, state: dict[str, Tensor], optimizer: torch.optim.Optimizer | None = None) -> None:
        """Go on from a state that `state_dict` gave, before the parameters and the optimizer's states are loaded.

        If the triplets had been cut by then, they are cut here, and out of ``optimizer``, too: so give it when it was
        made before this call. If they are cut now and were not then, they grow again, the new ones to be loaded. Raises
        TrainingError when the schedule was another one and the ranks are not fixed yet, or the matrices were others,
        ValueError for a tensor of another shape.
        """
        self.refuse_other(state)
        step, _, _, fixed = state["progress"].tolist()
        kept = state["kept"].bool().to(self.kept.device)
        if optimizer is None and self._optimizer is not None:
            optimizer = self._optimizer()
        for update, wanted in zip(self.triplets.values(), kept, strict=True):
            lacking = wanted if fixed else torch.ones_like(wanted)
            if bool((lacking & ~update.kept.to(lacking.device)).any()):
                grow(update, optimizer)
        self.step, self._acting = step, False
        if fixed:
            self.fix(kept, optimizer)
            return
        self.kept, self.fixed, self._importance = kept, False, None
        self._stacks = stacks_by_shape(list(self.triplets.values()))
        if "sensitivity.0" in state:
            self._importance = self._new_importance()
            for name in ("sensitivity", "uncertainty"):
                for number, tensor in enumerate(getattr(self._importance, name)):
                    tensor.copy_(_of_shape(state, f"{name}.{number}", tensor))

    def refuse_other(self, state: dict[str, Tensor]) -> None:
        """Raises TrainingError, with nothing changed, when `load_state_dict` could not go on from ``state``."""
        _, first, last, fixed = state["progress"].tolist()
        if state["kept"].shape != self.kept.shape:
            shapes = state["kept"].shape, self.kept.shape
            was, now = (f"{matrices} matrices of initial rank {rank}" for matrices, rank in shapes)
            raise TrainingError(
                f"AdaLoRA trained {was}, and would now train {now}; attach an adapter with the options of the run that "
                f"is resumed."
            )
        if not fixed and (first, last) != (self.schedule.first, self.schedule.last):
            raise TrainingError(
                f"AdaLoRA was taking ranks from step {first} to {last}, and would now from {self.schedule.first} to "
                f"{self.schedule.last}; go on with the same number of steps until the ranks are fixed."
            )

    def fix(self, kept: Tensor, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Cut all but ``kept`` (matrices, initial rank) out of the parameters and the optimizer; no more is taken."""
        for update, wanted in zip(self.triplets.values(), kept, strict=True):
            rows = wanted[update.kept.to(wanted.device)]
            if not bool(rows.all()):
                cut(update, rows, optimizer)
        self.kept, self.fixed, self._importance = kept, True, None
        self._stacks = stacks_by_shape(list(self.triplets.values()))

    def prepare(self) -> None:
        """Take the memory of the importance now. Later, between the first step's activations, its long-lived pieces
        would break up what the next steps' activations need."""
        self._importance = self._new_importance()

    def _new_importance(self) -> Importance:
        return Importance(list(self.triplets.values()), self._stacks, self.config.beta1, self.config.beta2)

    def _parameters(self) -> Iterator[Tensor]:
        for update in self.triplets.values():
            if update.rank:
                yield from (update.P, update.lam, update.Q)

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """What the paper does with the gradients of a step: the regulariser joins them, and importance learns."""
        again, self._acting = self._acting, False  # again: a closure that the optimizer calls more than once a step
        if not self._will_change(optimizer):
            return
        updates = list(self.triplets.values())
        weight = self.config.orthogonality
        for update in updates if weight else ():
            for parameter in (update.P, update.Q) if update.rank else ():
                if parameter.grad is None:  # of a matrix that this step's rows did not reach
                    parameter.grad = torch.zeros_like(parameter)
        # Where a loss scaler leaves unscaling to a fused optimizer, it has multiplied the gradients by this.
        scale = getattr(optimizer, "grad_scale", None)
        self._go_through(
            parts_of(updates), parts_of(updates, _gradient), scale,
            learn=not self.fixed and not again and self.config.sensitivity == "before",
        )  # fmt: skip
        self._acting = True

    def _go_through(self, weights: list[Tensor], gradients: list[Tensor], scale: Tensor | None, *, learn: bool) -> None:
        """The regulariser joins the gradients, and the importance learns, a stack after another in the cache."""
        importance = self._ready_importance() if learn else None
        norms = []
        for number, stack in enumerate(self._stacks):
            if stack.kind == LAM and importance is None:
                continue
            members = stack.of(weights)
            if stack.kind != LAM:
                norms.append(self._pull(stack, members, gradients, scale))
            if importance is not None:
                theirs = stack.of(gradients)
                importance.update(number, members, theirs if scale is None else theirs / scale)
        self.deviation = torch.cat([norm.to(norms[0].device) for norm in norms]).mean()

    def _pull(self, stack: Stack, members: Tensor, gradients: list[Tensor], scale: Tensor | None) -> Tensor:
        """Add the regulariser's gradient to those of one stack's members; their distances from orthogonal."""
        weight, form = self.config.orthogonality, self.config.orthogonality_form
        norm, pull = orthogonality(stack.kind, members, weight, form, len(self.triplets))
        if pull is not None:
            into = [gradients[part] for part in stack.numbers]
            pulls = (pull if scale is None else pull * scale).unbind()
            torch._foreach_add_(into, [one.to(to) for one, to in zip(pulls, into, strict=True)])
        return norm

    def _will_change(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether this step changes the parameters. Raises TrainingError when not all of them, or not by this one."""
        mine = list(self._parameters())
        held = _held_by(optimizer)
        stepped = [parameter for parameter in mine if id(parameter) in held]
        if all(parameter.grad is None for parameter in stepped):
            return False
        overflow = getattr(optimizer, "found_inf", None)
        if overflow is not None and bool(overflow):
            return False
        if len(stepped) < len(mine):
            raise TrainingError(
                f"The optimizer holds {len(stepped)} of the {len(mine)} parameters of an AdaLoRA adapter, whose "
                f"triplets are weighed against each other; give all of them to one optimizer, in as many groups as you "
                f"like."
            )
        if self._optimizer is None or self._optimizer() is not optimizer:
            if self._optimizer is not None and self._optimizer() is not None:
                gc.collect()  # one that nobody holds any more is no second one
                if self._optimizer() is not None:
                    raise TrainingError(
                        "A second optimizer steps the parameters of an AdaLoRA adapter, whose schedule counts the "
                        "steps of one; train with the first, or delete it before this one is used."
                    )
            self._optimizer = weakref.ref(optimizer)
        return True

    def _ready_importance(self) -> Importance:
        if self._importance is None or (not self.step and not self._importance.fits(list(self.triplets.values()))):
            self.prepare()
        assert self._importance is not None
        return self._importance

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Count the step, and take triplets when it is one of those at which some are taken."""
        if not self._acting:
            return
        self._acting = False
        self.step += 1
        if self.fixed:
            return
        if self.config.sensitivity == "after" and self.step < self.schedule.last:  # peft learns nothing at the last
            updates, importance = list(self.triplets.values()), self._ready_importance()
            weights, gradients = parts_of(updates), parts_of(updates, _gradient)
            for number, stack in enumerate(self._stacks):
                importance.update(number, stack.of(weights), stack.of(gradients))
        if self.schedule.allocates(self.step):
            assert self._importance is not None
            budget = self.schedule.budget(self.step)
            self.kept = most_important(self._importance.scores(), self._costs, budget).cpu()
            self._mask()
        if self.step >= self.schedule.last:
            self.fix(self.kept, optimizer)

    @torch.no_grad()
    def _mask(self) -> None:
        values: list[Tensor] = [update.lam for update in self.triplets.values()]
        in_force = [row[:, None].to(lam) for row, lam in zip(self.kept, values, strict=True)]
        torch._foreach_mul_(values, in_force)

    def __getstate__(self) -> dict[str, Any]:
        # A copy, of the model that holds it, has no optimizer yet.
        return {**self.__dict__, "_optimizer": None, "_acting": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _LIVE.add(self)


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


# The allocators of every adapted model there is; one goes with its model.
_LIVE: weakref.WeakSet[Allocator] = weakref.WeakSet()


def _before_step(
    optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    allocators = _concerned(optimizer)
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    for allocator in allocators:
        allocator._acting = False
        if closure is None:
            with torch.no_grad():
                allocator.before_step(optimizer)
    if closure is None or not allocators:
        return None
    # The gradients of this step come into being inside it, in the closure.
    return args[:1], {**kwargs, "closure": _then(closure, allocators, optimizer)}


def _then(
    closure: Callable[[], Any], allocators: list[Allocator], optimizer: torch.optim.Optimizer
) -> Callable[[], Any]:
    def evaluated() -> Any:
        loss = closure()
        with torch.no_grad():
            for allocator in allocators:
                allocator.before_step(optimizer)
        return loss

    return evaluated


def _after_step(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for allocator in _concerned(optimizer):
        with torch.no_grad():
            allocator.after_step(optimizer)


def _concerned(optimizer: torch.optim.Optimizer) -> list[Allocator]:
    if not _LIVE:
        return []
    held = _held_by(optimizer)
    return [allocator for allocator in _LIVE if any(id(parameter) in held for parameter in allocator._parameters())]


def _held_by(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


register_optimizer_step_pre_hook(_before_step)
register_optimizer_step_post_hook(_after_step)


def _of_shape(state: dict[str, Tensor], name: str, own: Tensor) -> Tensor:
    value = state[name]
    if value.shape != own.shape:
        raise ValueError(f"{name} is of shape {tuple(value.shape)}, not {tuple(own.shape)}")
    return value
