"""What a classifier is asked of a text: one class of several, all the labels that it has, or a number."""

from __future__ import annotations

from typing import Any, Literal, get_args

Problem = Literal["classification", "multi-label", "regression"]
PROBLEMS: tuple[str, ...] = get_args(Problem)
ONE_NUMBER = ("LABEL_0",)  # the one output of a regression, as transformers calls it
# transformers' problem_type of a config.
TYPES: dict[str, Problem] = {
    "single_label_classification": "classification",
    "multi_label_classification": "multi-label",
    "regression": "regression",
}


def problem_of(config: Any) -> Problem:
    """What a sequence classifier is asked, by transformers' ``config`` of it: one that says nothing, and has one
    output, gives a number there, too."""
    said = TYPES.get(getattr(config, "problem_type", None) or "")
    return said or ("regression" if len(config.id2label) == 1 else "classification")
