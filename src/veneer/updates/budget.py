"""AdaLoRA's budget: how many triplets all matrices have together at each step (arXiv:2303.10512, equation 12)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from veneer.errors import ConfigError
from veneer.updates.config import AdaLoRA, amount


@dataclass(frozen=True)
class Schedule:
    """b(t), in triplets of all matrices together; t counts optimizer steps from 1."""

    initial: int  # b(0)
    target: int  # b(T)
    first: int  # t_i: the last step of the initial phase
    last: int  # T − t_f: the step at which the allocation is fixed
    interval: int  # ΔT

    @classmethod
    def of(cls, config: AdaLoRA, matrices: int) -> Schedule:
        """The schedule of a config whose ranks `resolved` has filled in."""
        assert config.initial_rank is not None
        first, last = config.phases()
        return cls(config.initial_rank * matrices, round(config.target_rank * matrices), first, last, config.delta_t)

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
    """``config`` with both ranks as numbers, for matrices of these ``shapes`` (out, in) in a model of that size.

    A budget of parameters is divided by the mean size of a triplet, out + in + 1. Raises ConfigError when total_steps
    is missing, or when the budget is no triplet at all or more than the start has.
    """
    if config.total_steps is None:
        raise ConfigError(
            "AdaLoRA needs total_steps, the number of optimizer steps of the whole training: its schedule is laid out "
            "over them. (veneer.train fills it in.)"
        )
    target = config.target_rank
    if config.budget is not None:
        number, share = amount(config.budget)
        size = sum(out + width + 1 for out, width in shapes)  # of one triplet in every matrix
        target = (number * model_parameters if share else number) / size
    triplets = math.floor(target * len(shapes) + 1e-6)  # as written, whatever a division left in its last bits
    initial = config.initial_rank if config.initial_rank is not None else math.ceil(1.5 * triplets / len(shapes))
    said = f"budget = {config.budget}" if config.budget is not None else f"target_rank = {target:g}"
    if triplets < 1:
        raise ConfigError(f"{said} is less than one triplet of the {len(shapes)} adapted matrices; give more.")
    if triplets > initial * len(shapes):
        raise ConfigError(
            f"{said} is a mean rank of {target:.3g} over the {len(shapes)} adapted matrices, more than initial_rank = "
            f"{initial}; ranks are only taken away."
        )
    # The options that say the same in other words are answered: what is kept describes the adapter by its ranks.
    return config.model_copy(
        update={"initial_rank": initial, "target_rank": triplets / len(shapes), "budget": None}
    )  # fmt: skip
