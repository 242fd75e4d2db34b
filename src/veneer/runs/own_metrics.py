"""What a run measures of its held-out rows beside their loss, and by which of these numbers its best adapter is chosen.

Measuring draws no random number and changes no weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from veneer.data.formats import Example
from veneer.data.labels import Renderer
from veneer.data.metrics import Metric, metric_of
from veneer.errors import ConfigError
from veneer.generation.answers import measured_answers
from veneer.runs.learned import HeldOutLabels
from veneer.training.config import RunConfig
from veneer.training.packing import attention_by_mask_in

ROWS = 64  # held-out rows that are answered at each evaluation, at most: an answer takes longer than a loss


class HeldOutMetrics:
    """The metrics of a run, and the held-out rows that they are measured on, spread evenly where they are many."""

    def __init__(
        self, model: Any, renderer: Renderer, held_out: Sequence[Example], config: RunConfig, labels: HeldOutLabels
    ) -> None:
        """Raises ConfigError for a metric that cannot be used, or a ``best_by`` that is not measured."""
        names = [*config.metrics]
        if config.best_by not in ("loss", "accuracy", *names):
            names.append(config.best_by)
        self.metrics: list[Metric] = [metric_of(name) for name in names]
        self.rows = held_out[:: math.ceil(len(held_out) / ROWS)] if len(held_out) and names else []
        self._model, self._renderer, self._size = model, renderer, config.batch_size
        if config.best_by != "loss" and not len(held_out):
            raise ConfigError(f"best_by: {config.best_by} is measured on held-out rows, and held_out keeps none.")
        if config.best_by == "accuracy" and not labels.rows:
            raise ConfigError(
                "best_by: accuracy is of rows whose answers are a few labels, and these have others; take loss, or a "
                "metric."
            )

    def measured(self) -> dict[str, float]:
        """Metric → its value now. Raises VeneerError as `measured_answers` does."""
        if not self.rows:
            return {}
        training = self._model.training
        self._model.eval()
        try:
            with attention_by_mask_in(self._model):
                return measured_answers(self.metrics, self._model, self._renderer, self.rows, self._size)
        finally:
            self._model.train(training)

    def higher_is_better(self, best_by: str) -> bool:
        """Whether the best adapter has the highest value of what ``best_by`` names."""
        if best_by in ("loss", "accuracy"):
            return best_by == "accuracy"
        return next(metric.higher_is_better for metric in self.metrics if metric.name == best_by)

    def sentences(self, best_by: str) -> list[str]:
        """What is measured, and what decides."""
        said = []
        if self.rows:
            shown = ", ".join(
                f"{one.name} ({'higher' if one.higher_is_better else 'lower'} is better)" for one in self.metrics
            )
            said.append(f"Measured on {len(self.rows)} held-out rows, each answered: {shown}.")
        if best_by != "loss":
            direction = "highest" if self.higher_is_better(best_by) else "lowest"
            said.append(f"The adapter with the {direction} {best_by} is kept; of equal ones that with the lowest loss.")
        return said
