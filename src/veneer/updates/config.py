"""What LoRA and AdaLoRA are asked to do. No torch here, so that the command line shows its help without loading it."""

from __future__ import annotations

import math
import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from veneer.errors import shown
from veneer.options import Options


class UpdateOptions(Options):
    """What every update has in common: where it goes, and what is trained beside it."""

    alpha: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Scale of the update: alpha / rank multiplies it. Default: twice the rank (AdaLoRA: the initial "
        "rank).",
    )
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="Share of the update's inputs that are dropped while training."
    )
    targets: str | list[str] = Field(
        default="all-linear",
        description="Modules to adapt: 'all-linear' (every linear layer but the output head), names matched by their "
        "ending (q_proj,v_proj), or one regular expression over whole module names.",
    )
    exclude: str | list[str] = Field(
        default=[], description="Modules not to adapt, among those that targets choose; names by ending or one regex."
    )
    layers: list[int] = Field(default=[], description="Adapt only these layers (block numbers from 0). Default: all.")
    layers_pattern: list[str] = Field(
        default=[],
        description="Lists whose numbers layers counts, where a name has several (blocks, of stages.0.blocks.1.fc). "
        "Default: the first number of a name.",
    )
    train_also: list[str] = Field(
        default=[], description="Modules trained whole beside the update, by their name's ending (a new head, say)."
    )
    new_tokens: list[int] = Field(
        default=[],
        description="Token ids whose embedding rows are trained while the rest of the vocabulary stays frozen.",
    )

    @property
    def chooses(self) -> bool:
        """Whether there is anything that low-rank updates go on."""
        return bool(self.targets or getattr(self, "target_parameters", ()))

    @field_validator("layers_pattern", mode="before")
    @classmethod
    def _one_name_is_a_list(cls, value: Any) -> Any:
        return [name.strip() for name in value.split(",")] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _layers_of_the_pattern(self) -> UpdateOptions:
        if self.layers_pattern and not self.layers:
            raise ValueError("layers_pattern says which numbers layers counts, and layers is not given.")
        return self

    @field_validator("targets", "exclude")
    @classmethod
    def _plain_name_is_a_list(cls, value: str | list[str]) -> str | list[str]:
        # A string without any regex character can only be module names: read it as what was meant.
        if isinstance(value, str) and value != "all-linear":
            names = [name.strip() for name in value.split(",")]
            if all(name.replace("_", "").replace(".", "").isalnum() for name in names):
                return names
        return value


class LoRA(UpdateOptions):
    """Low-rank adaptation (Hu et al., 2021, arXiv:2106.09685): h = W0 x + s · B A x with A (rank, in), B (out, rank).

    The scale s is alpha / rank, or alpha / √rank with ``rslora`` (Kalajdzievski, 2023, arXiv:2312.03732).

    Example:
        >>> lora = veneer.LoRA(rank=16, alpha=32, targets=["q_proj", "v_proj"], layers=[0, 1])
        >>> lora.scale(rank=16, alpha=32)
        2.0
    """

    rank: int = Field(
        default=8, ge=1, description="Rank of the update; r(in + out) parameters for each adapted matrix."
    )
    rank_pattern: dict[str, int] = Field(
        default={}, description="Other ranks for some modules: a name's ending, or a regex for it → rank."
    )
    alpha_pattern: dict[str, float] = Field(
        default={}, description="Other alphas for some modules: a name's ending, or a regex for it → alpha."
    )
    target_parameters: list[str] = Field(
        default=[],
        description="Parameters of a mixture's experts to adapt beside the targets, by their name's ending "
        "(experts.gate_up_proj). Targets that match no module find these, too.",
    )
    rslora: bool = Field(default=False, description="Scale by alpha / √rank instead of alpha / rank.")
    dora: bool = Field(
        default=False,
        description="DoRA: a magnitude for each output of an adapted module is trained beside A and B, which change "
        "its direction.",
    )
    init: Literal["kaiming", "gaussian", "loftq", "pissa"] = Field(
        default="kaiming",
        description="How A starts, B being zero: Kaiming-uniform, as most libraries do, or the paper's Gaussian. Or A "
        "and B start from what quantising the base lost (loftq), or as the weight's largest directions (pissa).",
    )
    loftq_iterations: int = Field(
        default=1,
        ge=1,
        description="Iterations of init loftq; from the second on the base's codes change, and are saved, too.",
    )

    @field_validator("rank_pattern")
    @classmethod
    def _ranks_are_positive(cls, value: dict[str, int]) -> dict[str, int]:
        for name, rank in value.items():
            if rank < 1:
                raise ValueError(f"rank_pattern gives {name!r} rank {rank}; a rank is at least 1 (or use exclude).")
        return value

    @field_validator("alpha_pattern")
    @classmethod
    def _alphas_are_positive(cls, value: dict[str, float]) -> dict[str, float]:
        for name, alpha in value.items():
            if not 0 < alpha < math.inf:
                raise ValueError(f"alpha_pattern gives {name!r} alpha {alpha:g}; an alpha is a number above 0.")
        return value

    @model_validator(mode="after")
    def _iterations_of_loftq(self) -> LoRA:
        if self.loftq_iterations > 1 and self.init != "loftq":
            raise ValueError(
                f"loftq_iterations = {self.loftq_iterations} is of init = 'loftq', and init is {self.init!r}."
            )
        return self

    @model_validator(mode="after")
    def _one_decomposition(self) -> LoRA:
        if self.dora and self.init == "pissa":
            raise ValueError(
                "dora trains the weight's directions as they are, and init = 'pissa' takes some out of it; choose one."
            )
        return self

    @model_validator(mode="after")
    def _something_is_trained(self) -> LoRA:
        if not self.targets and not self.target_parameters and not self.train_also and not self.new_tokens:
            raise ValueError("LoRA has no targets, no train_also and no new_tokens, so nothing would be trained.")
        return self

    def scale(self, rank: int, alpha: float) -> float:
        """s of the update for one module of the given rank and alpha."""
        return alpha / rank**0.5 if self.rslora else alpha / rank


class AllocationOptions(Options):
    """How AdaLoRA spends a budget of ranks over all matrices."""

    initial_rank: int | None = Field(
        default=None, ge=1, description="AdaLoRA: rank of every matrix at the start. Default: 1.5 times the target."
    )
    target_rank: float = Field(
        default=8, gt=0, allow_inf_nan=False, description="AdaLoRA: mean rank of the matrices at the end."
    )
    budget: str | None = Field(
        default=None,
        description="AdaLoRA: the end in other words than target_rank: parameters of the update (0.3M), or their share "
        "of the model's (0.1%).",
    )
    tinit: float = Field(
        default=0.1, ge=0, description="AdaLoRA: steps before ranks are taken: a share of all below 1, else a number."
    )
    tfinal: float = Field(
        default=0.5,
        ge=0,
        description="AdaLoRA: steps after the ranks are fixed: a share of all below 1, else a number.",
    )
    delta_t: int = Field(default=1, ge=1, description="AdaLoRA: steps between two allocations of the budget.")
    beta1: float = Field(default=0.85, gt=0, lt=1, description="AdaLoRA: smoothing of the sensitivity.")
    beta2: float = Field(default=0.85, gt=0, lt=1, description="AdaLoRA: smoothing of the uncertainty.")
    orthogonality: float = Field(
        default=0.1,
        ge=0,
        allow_inf_nan=False,
        description="AdaLoRA: weight of the pull of P and Q towards orthogonality.",
    )
    orthogonality_form: Literal["squared", "mean-norm"] = Field(
        default="squared",
        description="AdaLoRA: the sum of squared norms, as in the paper, or the mean of norms, as in peft.",
    )
    sensitivity: Literal["before", "after"] = Field(
        default="before",
        description="AdaLoRA: the gradient is multiplied by the weights of before the optimizer's step, as in the "
        "paper, or of after it, as in peft.",
    )

    @field_validator("budget", mode="before")
    @classmethod
    def _budget_is_an_amount(cls, value: Any) -> str | None:
        if value is not None:
            budget_amount(str(value))
        return None if value is None else str(value)

    @model_validator(mode="after")
    def _one_target(self) -> AllocationOptions:
        if self.budget is not None and self.target_rank != AllocationOptions.model_fields["target_rank"].default:
            raise ValueError("target_rank and budget say the same thing in two ways; give one of them.")
        return self

    def refuse_rising_ranks(self) -> None:
        """Raises ValueError when the initial rank is below the target, where both are given as ranks."""
        if self.initial_rank is not None and self.budget is None and self.initial_rank < self.target_rank:
            raise ValueError(
                f"initial_rank = {self.initial_rank} is less than target_rank = {self.target_rank:g}; ranks are only "
                f"taken away."
            )


class AdaLoRA(AllocationOptions, UpdateOptions):
    """Adaptive budget allocation (Zhang et al., 2023, arXiv:2303.10512): ΔW = s · P diag(λ) Q.

    P (out, rank), λ (rank, 1), Q (rank, in); triplets are taken away where they matter least. s is alpha / initial rank
    from the first step to the last.

    Example:
        >>> veneer.AdaLoRA(target_rank=4, total_steps=100).phases()  # 10 steps before ranks are taken, 50 after
        (10, 50)
    """

    total_steps: int | None = Field(
        default=None, ge=1, description="Optimizer steps of the whole training, which the schedule is laid out over."
    )

    @model_validator(mode="after")
    def _makes_sense(self) -> AdaLoRA:
        self.refuse_rising_ranks()
        if not self.targets:
            raise ValueError("AdaLoRA has no targets, so there are no ranks to allocate.")
        return self

    @model_validator(mode="after")
    def _schedule_has_room(self) -> AdaLoRA:
        if self.total_steps is not None:
            first, last = self.phases()
            if first >= last:
                raise ValueError(
                    f"tinit = {self.tinit:g} and tfinal = {self.tfinal:g} leave none of the {self.total_steps} steps "
                    f"in which ranks could be taken; lower one of them."
                )
        return self

    def phases(self) -> tuple[int, int]:
        """The last step of the initial phase, and the one at which the ranks are fixed (from 1). Needs total_steps."""
        assert self.total_steps is not None
        first, final = (
            round(value * self.total_steps) if value < 1 else round(value) for value in (self.tinit, self.tfinal)
        )
        return first, self.total_steps - final


class CombineOptions(Options):
    """How several adapters become one."""

    how: Literal["cat", "svd", "linear", "ties", "dare_linear", "dare_ties"] = Field(
        default="cat",
        description="cat: the exact weighted sum, at the sum of the ranks; svd: the nearest to it at one rank; linear: "
        "A and B added, as peft does; ties, dare_linear, dare_ties: what the adapters agree on, or a random share.",
    )
    rank: int | None = Field(
        default=None, ge=1, description="Rank of svd, ties and dare. Default: the largest of the adapters' in a module."
    )
    density: float = Field(
        default=0.5, gt=0, le=1, description="Share of each update's values that ties and dare keep."
    )
    seed: int = Field(default=0, ge=0, description="Seed of the shares that dare draws.")
    padded: bool = Field(default=True, description="One rank for all modules, filled with zeros, as in export.")

    @model_validator(mode="after")
    def _options_of_one_way(self) -> CombineOptions:
        for name, ways in (("rank", ("svd", *_SHARES)), ("density", _SHARES), ("seed", _SHARES[1:])):
            if name in self.model_dump(exclude_defaults=True) and self.how not in ways:
                raise ValueError(f"{name} is an option of how = {' or '.join(ways)}, and how is {self.how!r}.")
        return self


_SHARES = ("ties", "dare_linear", "dare_ties")


def budget_amount(text: str) -> tuple[float, bool]:
    """A number and whether it is a share: "0.3M" → (300000, False), "0.1%" or "0.001" → (0.001, True).

    Raises ValueError for anything else.
    """
    units = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "%": 0.01}
    parts = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([kKmMbB%]?)\s*", text)
    number = float(parts[1]) * units[parts[2].upper()] if parts else 0.0
    share = parts is not None and (parts[2] == "%" or (not parts[2] and number < 1))
    if not number or (share and number >= 1):
        raise ValueError(
            f"budget = {shown(text)} is neither a number of parameters (300000, 0.3M) nor a share of the model's "
            f"(0.1%)."
        )
    return number, share
