"""What a study runs: its options. No torch here."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from veneer.errors import shown
from veneer.frozen.config import Compute, OnDevice
from veneer.training.config import Positive

KINDS = ("learning-rate", "rank", "matrices", "methods", "storage", "budget", "spectrum")


class StudyOptions(OnDevice):
    """veneer study KIND"""

    model: str = Field(default="smollm2-135m-instruct", description="Model to study: as in train.")
    data: str = Field(default="bbc-topics", description="Rows: as in train.")
    output: str | None = Field(
        default=None, description="The study's folder; trained runs are shared with others in runs beside it. Default: "
        "studies/KIND."
    )  # fmt: skip
    seeds: list[int] = Field(default=[0, 1, 2], min_length=1, description="A run of each kind for each of these seeds.")
    steps: int = Field(default=100, ge=1, description="Optimizer steps of a run.")
    batch_size: int = Field(default=16, ge=1, description="Rows in an optimizer step.")
    held_out: int = Field(default=400, ge=1, description="Rows kept from training to measure on.")
    learning_rate: Positive | Literal["auto"] = Field(
        default="auto",
        description="Highest learning rate of LoRA; other methods have it times a factor of their own. auto: as in "
        "train.",
    )
    rates: list[float] = Field(
        default=[],
        description="budget: learning rates to choose from, for each method and budget, on a seed of its own; "
        "learning-rate: those to compare. Default: around the one that auto chooses.",
    )
    methods: list[Literal["lora", "adalora", "full", "bias", "head"]] = Field(
        default=["lora"], min_length=1, description="learning-rate: the methods whose rates are compared."
    )
    ranks: list[int] = Field(
        default=[], description="Ranks to compare. Default: 1,2,4,8,16,32; of budget: 1,2,4; of spectrum: LoRA's, 4,16."
    )
    rank: int = Field(default=8, ge=1, description="LoRA's rank where ranks are not what is compared.")
    compute: Compute = Field(default="auto", description="What the runs compute in: as in train.")
    ray: str | None = Field(
        default=None,
        description="Spread the runs over this Ray cluster: its address, auto, or local for a new one here.",
    )

    @field_validator("seeds", "ranks", "rates", "methods")
    @classmethod
    def _each_once(cls, values: list[Any]) -> list[Any]:
        if any(not isinstance(value, str) and value < 0 for value in values) or len(set(values)) < len(values):
            raise ValueError(f"{shown(values)} holds a value twice, or one below zero.")
        return values

    @field_validator("ranks")
    @classmethod
    def _ranks_are_positive(cls, values: list[int]) -> list[int]:
        if 0 in values:
            raise ValueError("ranks holds 0; a rank is at least 1.")
        return sorted(values)
