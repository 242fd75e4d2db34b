"""What a prediction is asked: the options of predict. No torch here."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from veneer.data.config import RowOptions
from veneer.errors import did_you_mean
from veneer.frozen.config import UsedIn
from veneer.generation.config import SamplingOptions

SUFFIXES = (".jsonl", ".csv", ".parquet")


class PredictOptions(SamplingOptions, UsedIn, RowOptions):
    """veneer predict RUN|ADAPTER|MODEL DATA"""

    output: str | None = Field(
        default=None,
        description="File to write, in the rows' order: .jsonl, .csv or .parquet. Default: JSON lines on the terminal, "
        "or in Python no file.",
    )
    overwrite: bool = Field(default=False, description="Replace an output that exists.")
    keep: list[str] | None = Field(
        default=None, description="Columns of the rows that the output has, too; none for none. Default: all."
    )
    answer: Literal["auto", "label", "text"] = Field(
        default="auto",
        description="The likeliest label and each label's probability, or generated text; auto: labels where the model "
        "is a classifier, where the run was trained on a few, or where labels gives some.",
    )
    labels: list[str] = Field(
        default=[], description="Labels for a model that generates text. Default: those of the run's rows, if few."
    )
    template: Literal["auto", "chat", "plain"] | None = Field(
        default=None,
        description="Chat template for conversations only (auto), or for prompts, too. Default: the run's.",
    )
    system: str | None = Field(
        default=None,
        description="System message of rows that have none, in the chat template. Default: the run's; an empty one is "
        "none.",
    )
    max_length: int | None = Field(
        default=None,
        ge=2,
        description="Tokens of a prompt: the end of a longer one is kept, a classifier's beginning. Default: the "
        "run's, without a run what the model can take.",
    )
    batch_tokens: int = Field(
        default=1024, ge=1, description="Tokens in one pass, and at most; fewer where memory is short."
    )

    @field_validator("output", mode="before")
    @classmethod
    def _known_kind(cls, value: Any) -> Any:
        value = str(value) if isinstance(value, Path) else value
        if isinstance(value, str) and Path(value).suffix.lower() not in SUFFIXES:
            suffix = Path(value).suffix
            raise ValueError(
                f"The output {value} ends in {suffix or 'nothing'}; it may end in {', '.join(SUFFIXES)}."
                f"{did_you_mean(suffix, SUFFIXES)}"
            )
        return value

    @field_validator("keep")
    @classmethod
    def _none_is_none(cls, value: list[str] | None) -> list[str] | None:
        return [] if value == ["none"] else value

    @field_validator("labels")
    @classmethod
    def _several(cls, value: list[str]) -> list[str]:
        names = [label.strip() for label in value]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice or not all(names) or len(names) == 1:
            wrong = f"{twice[0]!r} twice" if twice else "one label" if len(names) == 1 else "an empty label"
            raise ValueError(f"labels has {wrong}; give two or more that differ.")
        return value
