"""The options of the small verbs; training's are in veneer/training/config.py."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from veneer.frozen.config import BlockwiseOptions
from veneer.options import Options


class EvaluateOptions(Options):
    """veneer evaluate RUN"""

    data: str | None = Field(None, description="Other rows to measure on. Default: the run's held-out rows.")
    exact_match: bool = Field(
        False, description="Also compare greedy answers with the right ones, letter by letter; slow."
    )
    batch_size: int = Field(16, ge=1, description="Rows in one pass.")
    examples: int = Field(8, ge=0, description="Keep what base and adapter answer to this many of the rows; 0: none.")


class GenerateOptions(Options):
    """veneer generate and veneer chat"""

    max_new_tokens: int = Field(128, ge=1, description="Longest answer, in tokens.")
    temperature: float = Field(0.0, ge=0, description="0 is greedy; higher is more varied.")
    seed: int = Field(0, ge=0, description="Seed of sampling.")
    template: Literal["auto", "chat", "plain"] = Field(
        "auto", description="Put the prompt into the model's chat template, or not; auto does as the run was trained."
    )
    activations: Literal["fp32", "int8"] = Field(
        "fp32", description="What a base in 4 bits multiplies, a token at a time: int8 is faster and not exact."
    )
    base: bool = Field(False, description="The base's answer, without the adapter.")
    both: bool = Field(False, description="Base and adapter side by side.")


class MergeOptions(BlockwiseOptions):
    """veneer merge RUN OUT"""

    storage: Literal["fp32", "bf16", "fp16", "nf4", "fp4"] = Field(
        "fp32", description="How the merged weights are kept on disk."
    )
    check: str | None = Field(
        None, description="Rows on which to measure what nf4 or fp4 changes. Default: the run's held-out rows."
    )


class QuantizeOptions(BlockwiseOptions):
    """veneer quantize MODEL OUT"""

    storage: Literal["nf4", "fp4"] = Field("nf4", description="How the linear layers are kept.")


class ExportOptions(Options):
    """veneer export RUN OUT"""

    padded: bool = Field(
        True, description="One rank for all modules, filled with zeros; or each its own, which PEFT alone reads."
    )


class ReportOptions(Options):
    """veneer report RUN|STUDY"""

    output: str | None = Field(None, description="The page's file. Default: report.html in the folder itself.")


class InspectOptions(Options):
    """veneer inspect X"""

    png: str | None = Field(None, description="For an adapter: write the heat map of its ranks to this file, too.")

    model: str | None = Field(None, description="For rows: the model whose tokens and template show what is learned.")
    rows: int = Field(3, ge=1, description="For rows: how many to print.")
    template: Literal["auto", "chat", "plain"] = Field("auto", description="For rows: as in train.")
    learn: Literal["answer", "all"] = Field("answer", description="For rows: as in train.")
    max_length: int = Field(1024, ge=2, description="For rows: as in train.")


class StudyOptions(Options):
    """veneer study KIND"""

    model: str = Field("smollm2-135m-instruct", description="Model to study: as in train.")
    data: str = Field("bbc-topics", description="Rows: as in train.")
    output: str | None = Field(
        None, description="The study's folder; trained runs are shared with others in runs beside it. Default: "
        "studies/KIND."
    )  # fmt: skip
    seeds: list[int] = Field([0, 1, 2], min_length=1, description="A run of each kind for each of these seeds.")
    steps: int = Field(100, ge=1, description="Optimizer steps of a run.")
    batch_size: int = Field(16, ge=1, description="Rows in an optimizer step.")
    held_out: int = Field(400, ge=1, description="Rows kept from training to measure on.")
    learning_rate: float = Field(
        1e-3, gt=0, description="Highest learning rate of LoRA; other methods have it times a factor of their own."
    )
    rates: list[float] = Field(
        [], description="budget: learning rates to choose from, for each method and budget, on a seed of its own."
    )
    ranks: list[int] = Field(
        [], description="Ranks to compare. Default: 1,2,4,8,16,32; of budget: 1,2,4; of spectrum: LoRA's, 4,16."
    )
    rank: int = Field(8, ge=1, description="LoRA's rank where ranks are not what is compared.")
    ray: str | None = Field(
        None, description="Spread the runs over this Ray cluster: its address, auto, or local for a new one here."
    )

    @field_validator("seeds", "ranks", "rates")
    @classmethod
    def _each_once(cls, values: list[Any]) -> list[Any]:
        if any(value < 0 for value in values) or len(set(values)) < len(values):
            raise ValueError(f"{values} holds a value twice, or one below zero.")
        return values

    @field_validator("ranks")
    @classmethod
    def _ranks_are_positive(cls, values: list[int]) -> list[int]:
        if 0 in values:
            raise ValueError("ranks holds 0; a rank is at least 1.")
        return sorted(values)
