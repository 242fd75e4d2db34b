"""What the JSON files of a run's folder, and of a study's, hold, and of which types. No torch here."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

_T = TypeVar("_T")
_AND_MORE = ConfigDict(extra="allow")  # another version's


@with_config(_AND_MORE)
class RowsRecord(TypedDict, total=False):
    """rows.json: what the rows were, and how many steps they make."""

    classes: list[str]  # of a classifier
    problem: str  # what it is asked, where that is not one class of several: multi-label or regression
    conversations: bool  # whether any row is one
    shape: str
    columns: dict[str, str]  # name in the shape → the rows' own, where they differ
    train: int
    held_out: int
    own_validation: bool  # whether data sets' own validation rows were looked for
    choices: list[str]  # the few answers that there are
    date: str | None
    system: str | None
    commit: str
    steps: int
    chosen: dict[str, int | float | str | dict[str, float]]  # for options that are auto; class_weights: class → weight
    largest_class: float | None
    tokens: int
    folder: str  # the working folder
    folder_from_run: str  # and its place relative to the run


@with_config(_AND_MORE)
class ScoresRecord(TypedDict, total=False):
    """What evaluation.json says of one side."""

    loss: float | None
    perplexity: float | None
    choice_accuracy: float | None
    exact_match: float | None
    macro_f1: float | None
    preferred: float | None
    micro_f1: float | None
    metrics: dict[str, float]  # asked for, of answers
    numbers: dict[str, float | None] | None  # of a model that gives numbers: mse, mae, r2, pearson, spearman


@with_config(_AND_MORE)
class ExampleRecord(TypedDict):
    """A row of evaluation.json, with the answers of both sides."""

    where: str
    prompt: str
    expected: str
    base: str
    adapter: str


@with_config(_AND_MORE)
class EvaluationRecord(TypedDict, total=False):
    """evaluation.json."""

    rows: int
    data: str | None
    base: ScoresRecord
    adapter: ScoresRecord
    examples: list[ExampleRecord]
    lower_is_better: list[str]  # of the metrics


@with_config(_AND_MORE)
class PlanRecord(TypedDict, total=False):
    """plan.json: bytes."""

    peak: int
    terms: dict[str, int]


@with_config(_AND_MORE)
class StudyRecord(TypedDict, total=False):
    """study.json; `veneer.studies.folder` says what each means."""

    name: str
    title: str
    model: str
    data: str
    options: dict[str, Any]
    finished: bool
    columns: dict[str, str]
    runs: list[str]
    findings: str
    plots: list[str]
    environment: dict[str, Any]
    date: str


def checked(values: Any, kind: type[_T]) -> _T:
    """``values`` of a file, as they are. Raises ValueError, with the first place that is wrong, where they are none of
    this ``kind``."""
    try:
        TypeAdapter(kind).validate_python(values, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{where[:100]}: {first['msg']}" if where else first["msg"]) from None
    found: _T = values
    return found
