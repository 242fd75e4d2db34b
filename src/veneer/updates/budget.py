"""AdaLoRA's budget: how many triplets all matrices have together at each step (arXiv:2303.10512, equation 12).

Where the end was given in parameters, the budget is counted in parameters: matrices differ in size, and a number of
triplets would not say how many parameters they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from veneer.errors import ConfigError
from veneer.updates.config import AdaLoRA, budget_amount


@dataclass(frozen=True)
class Schedule:
    """b(t), in triplets or in parameters of all matrices together; t counts optimizer steps from 1."""

    initial: int  # b(0)
    target: int  # b(T)
    first: int  # t_i: the last step of the initial phase
    last: int  # T − t_f: the step at which the allocation is fixed
    interval: int  # ΔT

    @classmethod
    def of(cls, config: AdaLoRA, costs: Sequence[int]) -> Schedule:
        """The schedule of a config that `resolved` has filled in; ``costs``: what a triplet of each matrix counts."""
        assert config.initial_rank is not None
        first, last = config.phases()
        target = round(config.target_rank * len(costs)) if config.budget is None else int(config.budget)
        return cls(config.initial_rank * sum(costs), target, first, last, config.delta_t)

    def budget(self, step: int) -> int:
        """b0 up to t_i, then bT + (b0 − bT)(1 − (t − t_i) / (T − t_f − t_i))³, and bT from T − t_f on."""
        if step <= self.first:
            return self.initial
        if step >= self.last:
            return self.target
        left = 1 - (step - self.first) / (self.last - self.first)
        return int((self.initial - self.target) * left**3 + self.target)

    def allocates(self, step: int) -> bool:
        """Whether triplets are chosen at this step: every ΔT steps, and at T − t_f whatever ΔT is."""
        return self.first < step <= self.last and (step % self.interval == 0 or step == self.last)


def resolved(config: AdaLoRA, shapes: Sequence[tuple[int, int]], model_parameters: int) -> AdaLoRA:
    """``config`` with both ranks, and a budget as a number of parameters, for matrices of these ``shapes`` (out, in).

    Raises ConfigError when total_steps is missing, or when the budget is no triplet at all or more than the start has.
    """
    if config.total_steps is None:
        raise ConfigError(
            "AdaLoRA needs total_steps, the number of optimizer steps of the whole training: its schedule is laid out "
            "over them. (veneer.train fills it in.)"
        )
    count, size = len(shapes), sum(sizes_of(shapes))
    least = 1
    if config.budget is not None:
        number, share = budget_amount(config.budget)
        target = int(number * model_parameters if share else number)
        mean, least, said = target / size, min(sizes_of(shapes)), f"budget = {config.budget}"
    else:
        # As written, whatever a division left in its last bits.
        target = math.floor(config.target_rank * count + 1e-6)
        mean, said = target / count, f"target_rank = {config.target_rank:g}"
    initial = config.initial_rank if config.initial_rank is not None else math.ceil(1.5 * mean)
    if target < least:
        raise ConfigError(f"{said} is less than one triplet of the {count} adapted matrices; give more.")
    if mean > initial:
        raise ConfigError(
            f"{said} is a mean rank of {mean:.3g} over the {count} adapted matrices, more than initial_rank = "
            f"{initial}; ranks are only taken away."
        )
    budget = None if config.budget is None else str(target)
    return config.model_copy(update={"initial_rank": initial, "target_rank": mean, "budget": budget})


def sizes_of(shapes: Sequence[tuple[int, int]]) -> list[int]:
    """Parameters of one triplet in a matrix of each shape (out, in): a column of P, a number of λ, a row of Q."""
    return [out + width + 1 for out, width in shapes]
