"""Whether a run learned: its held-out accuracy on the way, and what there is to say at its end.

Labels are a classifier's classes, or answers that are few. Measuring draws no random number and changes no weight.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from veneer.data.formats import Example, class_of
from veneer.data.labels import Renderer
from veneer.files import write_text
from veneer.generation.generate import continuations
from veneer.generation.likelihood import accuracy, choices_of, likeliest
from veneer.runs.folder import RunFolder
from veneer.training.config import RunConfig
from veneer.training.curve import above_largest, still_falling
from veneer.training.packing import attention_by_mask_in

ROWS = 200  # held-out rows that are measured on the way, at most: about as long as a few steps take
ANSWERED = 16  # held-out rows that are answered at the end
_HALF = 0.5  # of its first value: a training loss below it has been learned


class HeldOutLabels:
    """The held-out rows of a task of labels, spread evenly where they are many. A row that may have several labels is
    right where all of them are."""

    def __init__(
        self, model: Any, renderer: Renderer, train: Sequence[Example], held_out: Sequence[Example], size: int
    ) -> None:
        self._model, self._renderer, self._size = model, renderer, size
        self.labels = list(renderer.classes) or choices_of(train, held_out)
        if renderer.problem == "regression":
            self.labels = []
        self.rows = held_out[:: math.ceil(len(held_out) / ROWS)] if len(held_out) and self.labels else []
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


def advice(
    config: RunConfig, labels: HeldOutLabels, metrics: Sequence[dict[str, Any]], best_step: int
) -> tuple[str, ...]:
    """Sentences about a finished run that learned too little; none about one that did well.

    ``metrics``: the records of the run's folder; ``best_step``: whose weights are the result, 0 for the last.
    """
    losses = [record["loss"] for record in metrics if "loss" in record]
    said = [not_learned(config, labels.largest, metrics, losses, best_step)]
    strange, answers = labels.strange_answers()
    if strange:
        verb = "is" if strange == 1 else "are"
        said.append(
            f"{strange} of {answers} answers to held-out rows {verb} none of the {len(labels.labels)} labels: more "
            f"steps, or more rows, would help; veneer predict --answer label chooses among the labels."
        )
    if config.adapter is not None:
        said.append(not_better(config, metrics))
    rose = best_step and best_step < len(losses)  # then more steps would not help the held-out rows
    if not rose:
        said.append(more_steps(config, losses))
    return tuple(sentence for sentence in said if sentence)


def write_advice(folder: RunFolder, sentences: Sequence[str]) -> None:
    """Write advice.json, which reports read. Raises OSError."""
    write_text(folder.advice_file, json.dumps({"advice": list(sentences)}, indent=2, ensure_ascii=False) + "\n")


def not_learned(
    config: RunConfig, largest: float, metrics: Sequence[dict[str, Any]], losses: Sequence[float], best_step: int
) -> str:
    """A sentence where the accuracy of what is kept is not above the share of the ``largest`` class, and what to try:
    that depends on what the training losses did. Nothing where accuracy was not measured."""
    measured = {record["step"]: record["held_out_accuracy"] for record in metrics if "held_out_accuracy" in record}
    best_step = best_step or max(measured, default=0)
    reached = measured.get(best_step)
    if reached is None or not losses or above_largest(reached, largest):
        return ""
    few, rate = max(1, len(losses) // 10), config.learning_rate
    before, after = statistics.fmean(losses[:few]), statistics.fmean(losses[-few:])
    if after < _HALF * before:
        todo = (
            "The training loss fell all the same, so what was learned does not hold for other rows: look at the rows "
            "with veneer inspect, and give more of them" + (", or take fewer steps" if best_step < len(losses) else "")
        )
    elif after < before:
        more = f"more steps or a higher rate, --learning-rate {3 * rate:.2g}"
        todo = f"Look at the rows with veneer inspect, and take {more}"
    else:
        todo = f"The training loss did not fall: take a lower rate, --learning-rate {rate / 3:.2g}"
    return (
        f"It has not learned the labels: {100 * reached:.0f} % of the held-out rows are right, and always answering "
        f"the largest class would be right in {100 * largest:.0f} %. {todo}."
    )


def not_better(config: RunConfig, metrics: Sequence[dict[str, Any]]) -> str:
    """A sentence where a run that started from an adapter has no lower held-out loss than that one."""
    losses = [record["held_out_loss"] for record in metrics if "held_out_loss" in record]
    if len(losses) < 2 or min(losses[1:]) < losses[0]:
        return ""
    return (
        f"The held-out loss is never lower than that of the adapter it started from, {config.adapter}: "
        f"{losses[0]:.3f} before, {min(losses[1:]):.3f} at best. Use that one for such rows, or take a lower rate, "
        f"--learning-rate {config.learning_rate / 3:.2g}."
    )


def more_steps(config: RunConfig, losses: Sequence[float]) -> str:
    """A sentence where the training loss fell steeply to the end, and twice as many steps."""
    fall = still_falling(losses)
    if fall is None:
        return ""
    more = f"--steps {2 * len(losses)}" if config.steps else f"--epochs {2 * config.epochs:g}"
    return (
        f"The loss was still falling at the end, from {fall.first:.3g} to {fall.last:.3g} over the last {fall.steps:,} "
        f"of {len(losses):,} steps: more steps would help, {more}."
    )
