"""What LoRA is asked to do. No torch here, so that the command line can show its help without loading it."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, field_validator, model_validator

from veneer.options import Options


class LoRA(Options):
    """Low-rank adaptation (Hu et al., 2021, arXiv:2106.09685): h = W0 x + s · B A x with A (rank, in), B (out, rank).

    The scale s is alpha / rank, or alpha / √rank with ``rslora`` (Kalajdzievski, 2023, arXiv:2312.03732).
    """

    rank: int = Field(8, ge=1, description="Rank of the update; r(in + out) parameters for each adapted matrix.")
    alpha: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Scale of the update: alpha / rank multiplies it. Default: twice the rank.",
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Share of the update's inputs that are dropped while training.")
    targets: str | list[str] = Field(
        "all-linear",
        description="Modules to adapt: 'all-linear' (every linear layer but the output head), names matched by their "
        "ending (q_proj,v_proj), or one regular expression over whole module names.",
    )
    exclude: str | list[str] = Field(
        [], description="Modules not to adapt, among those that targets choose; names by ending or one regex."
    )
    layers: list[int] = Field([], description="Adapt only these layers (block numbers from 0). Default: all.")
    rank_pattern: dict[str, int] = Field(
        {}, description="Other ranks for some modules: a name's ending, or a regex for it → rank."
    )
    alpha_pattern: dict[str, float] = Field(
        {}, description="Other alphas for some modules: a name's ending, or a regex for it → alpha."
    )
    rslora: bool = Field(False, description="Scale by alpha / √rank instead of alpha / rank.")
    init: Literal["kaiming", "gaussian", "loftq"] = Field(
        "kaiming",
        description="How A starts, B being zero: Kaiming-uniform, as most libraries do, or the paper's Gaussian. Or "
        "loftq: A and B start from what quantising the base lost.",
    )
    loftq_iterations: int = Field(
        1, ge=1, description="Iterations of init loftq; from the second on the base's codes change, and are saved, too."
    )
    train_also: list[str] = Field(
        [], description="Modules trained whole beside the update, by their name's ending (a new head, say)."
    )
    new_tokens: list[int] = Field(
        [], description="Token ids whose embedding rows are trained while the rest of the vocabulary stays frozen."
    )

    @field_validator("targets", "exclude")
    @classmethod
    def _plain_name_is_a_list(cls, value: str | list[str]) -> str | list[str]:
        # A string without any regex character can only be module names: read it as what was meant.
        if isinstance(value, str) and value != "all-linear":
            names = [name.strip() for name in value.split(",")]
            if all(name.replace("_", "").replace(".", "").isalnum() for name in names):
                return names
        return value

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
    def _something_is_trained(self) -> LoRA:
        if not self.targets and not self.train_also and not self.new_tokens:
            raise ValueError("LoRA has no targets, no train_also and no new_tokens, so nothing would be trained.")
        return self

    def scale(self, rank: int, alpha: float) -> float:
        """s of the update for one module of the given rank and alpha."""
        return alpha / rank**0.5 if self.rslora else alpha / rank
