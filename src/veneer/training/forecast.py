"""What may be known of a run before it starts. Whoever knows is asked twice: before the model is loaded, and before the
first step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from veneer.data.labels import Tokens
from veneer.training.config import TrainConfig
from veneer.training.loss import Loss


@dataclass(frozen=True)
class Forecast:
    """What is known of a run before its first step."""

    recomputed: int = 0  # layers whose activations are computed again, so that the run fits the memory
    record: dict[str, Any] | None = None  # the run folder's plan.json
    sentences: tuple[str, ...] = ()
    later: Callable[[], Forecast] | None = None  # what is not known yet, and can be found out when the run has begun


class Foresight(Protocol):
    """Foresees a run; either method raises TrainingError for one that cannot fit the memory."""

    def before_loading(self, config: TrainConfig) -> None:
        """The model that ``config`` names is about to be loaded."""
        ...

    def before_training(self, config: TrainConfig, model: Any, loss: Loss, rows: list[Tokens], steps: int) -> Forecast:
        """``rows``: those of the step with the most tokens in a pass through the model; ``steps``: of the run."""
        ...
