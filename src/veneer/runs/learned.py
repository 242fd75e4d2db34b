"""Whether a run learned: its held-out accuracy on the way, and what there is to say at its end.

Labels are a classifier's classes, or answers that are few. Measuring draws no random number and changes no weight.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from veneer.data.formats import Example, class_of
from veneer.data.labels import Renderer
from veneer.generation.generate import continuations
from veneer.generation.likelihood import accuracy, choices_of, likeliest
from veneer.training.config import RunConfig
from veneer.training.packing import attention_by_mask_in

ROWS = 200  # held-out rows that are measured on the way, at most: about as long as a few steps take
ANSWERED = 16  # held-out rows that are answered at the end
_FEWEST = 12  # steps whose losses say whether they still fall
_STEEP = 0.1  # share of the loss that the last quarter of the steps takes off
_LEAST = 0.005  # and share of the first quarter's loss: from 0.002 to 0.001 there is nothing left to learn
_ERRORS = 2.0  # standard errors that the fall is larger than


class HeldOutLabels:
    """The held-out rows of a task of labels, spread evenly where they are many."""

    def __init__(
        self, model: Any, renderer: Renderer, train: list[Example], held_out: list[Example], size: int
    ) -> None:
        self._model, self._renderer, self._size = model, renderer, size
        self.labels = list(renderer.classes) or choices_of([*train, *held_out])
        self.rows = held_out[:: math.ceil(len(held_out) / ROWS)] if held_out and self.labels else []
        self.largest = largest_class(self.rows) if self.rows else 0.0

    def accuracy(self) -> float | None:
        """The share of the rows whose label the model finds the likeliest; None where the task is none of labels."""
        if not self.rows:
            return None
        training = self._model.training
        self._model.eval()
        try:
            with attention_by_mask_in(self._model):
                chosen = likeliest(self._model, self._renderer, self.rows, self.labels, self._size)
            return accuracy(chosen, self.rows)
        finally:
            self._model.train(training)

    def strange_answers(self) -> tuple[int, int]:
        """(answers that are none of the labels, answers) of a few rows; none of a classifier, which has no others."""
        rows = self.rows[:: math.ceil(len(self.rows) / ANSWERED)] if self.rows and not self._renderer.classes else []
        if not rows:
            return 0, 0
        longest = max(len(self._renderer.tokenizer(label).input_ids) for label in self.labels)
        prompts = [self._renderer.prompt(row) for row in rows]
        answers = continuations(self._model, self._renderer, prompts, max_new_tokens=longest + 1)
        known = {label.strip() for label in self.labels}
        return sum(answer.strip() not in known for answer in answers), len(answers)


def largest_class(rows: Sequence[Example]) -> float:
    """The share of the most frequent label: what answering it always would reach."""
    return max(Counter(class_of(row) for row in rows).values()) / len(rows)


def still_falls(losses: Sequence[float]) -> bool:
    """Whether the training loss fell steeply up to the end: its last quarter's mean is below the one before by a tenth,
    and by two standard errors of that difference, so that the noise of batches is no fall."""
    quarter = len(losses) // 4
    if len(losses) < _FEWEST:
        return False
    before, last = losses[-2 * quarter : -quarter], losses[-quarter:]
    fall = statistics.mean(before) - statistics.mean(last)
    error = math.sqrt((statistics.variance(before) + statistics.variance(last)) / quarter)
    least = max(_STEEP * statistics.mean(before), _LEAST * statistics.mean(losses[:quarter]), _ERRORS * error)
    return fall > least


def advice(
    config: RunConfig, labels: HeldOutLabels, metrics: Sequence[dict[str, Any]], best_step: int
) -> tuple[str, ...]:
    """Sentences about a finished run that learned too little; none about one that did well.

    ``metrics``: the records of the run's folder; ``best_step``: whose weights are the result, 0 for the last.
    """
    said: list[str] = []
    measured = {record["step"]: record["held_out_accuracy"] for record in metrics if "held_out_accuracy" in record}
    reached = measured.get(best_step or max(measured, default=0))
    above = reached is None or reached > labels.largest
    if reached is not None and not above:
        said.append(
            f"It has not learned the labels: {100 * reached:.0f} % of the held-out rows are right, and "
            f"always answering the largest class would be right in {100 * labels.largest:.0f} %. Look at the rows with "
            f"veneer inspect, or take more steps."
        )
    strange, answers = labels.strange_answers()
    if strange:
        said.append(
            f"{strange} of {answers} answers to held-out rows are none of the {len(labels.labels)} labels: more steps, "
            f"or more rows, would help; veneer predict --answer label chooses among the labels."
        )
    losses = [record["loss"] for record in metrics if "loss" in record]
    rose = best_step and best_step < len(losses)  # then more steps would not help the held-out rows
    if still_falls(losses) and not rose:
        more = f"--steps {2 * len(losses)}" if config.steps else f"--epochs {math.ceil(2 * config.epochs)}"
        said.append(f"The loss was still falling at the end: more steps would help, {more}.")
    return tuple(said)
