"""What ``auto`` stands for in a run: its learning rate, its epochs, and when it is measured and stopped. No torch here.

The numbers are measured ones: docs/studies/learning-rate.md has the runs they come from, and what they gain.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from veneer.training.config import TrainConfig

# Method → the highest learning rate, up to WIDTH and SHORT: full fine-tuning's is a tenth of LoRA's, whatever the rank.
RATES = {"lora": 3e-3, "adalora": 3e-2, "full": 3e-4, "bias": 1e-2, "head": 2e-1}
# Method → the steps up to which it is so; a run of four times as many has half the rate. All but LoRA's are a guard.
SHORT = {"lora": 40, "adalora": 100, "full": 100, "bias": 60, "head": 100}
# Objective → its rate, in parts of likelihood's. dpo's is measured on one task, whose best rate was as high as
# likelihood's; a third keeps a distance from it, as one task is few. The others are a guard, not measured.
_OF_LIKELIHOODS = {"likelihood": 1.0, "dpo": 0.3, "orpo": 0.3, "kto": 0.1}
_BIASES_IN_LONG_RUNS = 0.36  # times the rate above SHORT: at more, a task lost 5 and 20 points in two runs
WIDTH = 576  # of SmolLM2's hidden states, the widest that was measured; a wider model has a rate lower by as much
STEPS = 30  # that a run has at least, in as many epochs as that takes …
EPOCHS = 5  # … but no more than these: ten overfitted
PATIENCE = 2  # evaluations without a better held-out loss, in a run whose epochs are repeated
EVALUATE = 50  # steps between evaluations, where no epoch ends before


class Size(NamedTuple):
    """What the automatic options depend on besides the options themselves."""

    width: int  # of the model's hidden states
    per_epoch: int  # optimizer steps
    held_out: int  # rows
    kind: str = "causal"  # causal, seq2seq or classification
    objective: str = "likelihood"


def automatic(config: TrainConfig, size: Size) -> dict[str, Any]:
    """Option → its number, for each option of ``config`` that is ``auto``.

    Example:
        >>> config = TrainConfig(model="tiny", data="rows.jsonl", output="runs/first", held_out=16)
        >>> automatic(config, Size(width=576, per_epoch=12, held_out=16))
        {'learning_rate': 0.003, 'epochs': 3, 'evaluate_every': 12, 'patience': 2}
    """
    epochs = min(EPOCHS, math.ceil(STEPS / size.per_epoch)) if config.epochs == "auto" else config.epochs
    total = config.steps or epochs * size.per_epoch
    # A language model's head is often its embedding, and as large as a part of the model itself.
    method = "full" if config.method == "head" and size.kind != "classification" else config.method
    repeated = config.steps is None and config.epochs == "auto" and epochs > 1 and size.held_out > 0
    # Measuring a row takes a third of the time of training on it: at most a sixth of the run's time is measuring.
    every = max(math.ceil(2 * size.held_out / config.batch_size), min(EVALUATE, size.per_epoch))
    numbers: dict[str, Any] = {
        "learning_rate": float(f"{rate_of(method, size.width, total) * _OF_LIKELIHOODS[size.objective]:.2g}"),
        "epochs": epochs,
        "evaluate_every": every if total > size.per_epoch else max(every, EVALUATE),
        "patience": PATIENCE if repeated else 0,
    }
    return {name: number for name, number in numbers.items() if getattr(config, name) == "auto"}


def rate_of(method: str, width: int, steps: float) -> float:
    """The highest learning rate of a method, to two digits, for a model whose hidden states are ``width`` wide.

    Example:
        >>> rate_of("lora", 576, 40), rate_of("full", 576, 40), rate_of("lora", 4096, 40), rate_of("lora", 576, 160)
        (0.003, 0.0003, 0.00042, 0.0015)
    """
    length = min(1.0, (SHORT[method] / steps) ** 0.5)
    if method == "bias" and length < 1:
        length *= _BIASES_IN_LONG_RUNS
    return float(f"{RATES[method] * min(1.0, WIDTH / width) * length:.2g}")


def awaited(config: TrainConfig) -> str:
    """What ``auto`` looks at in a run whose rows are not known yet, for a plan to print; or nothing.

    Example:
        >>> awaited(TrainConfig(model="tiny", data="rows.jsonl", output="runs/first", epochs=2, patience=0))
        "learning_rate is auto: train chooses it by the method, the model's width and the number of rows."
    """
    named = ("learning_rate",) if config.steps else ("learning_rate", "epochs", "evaluate_every", "patience")
    names = [name for name in named if getattr(config, name) == "auto"]
    if config.patience != "auto" and not config.patience:
        names = [name for name in names if name != "evaluate_every"]
    if not names:
        return ""
    listed = " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
    verb, them = ("is", "it") if len(names) == 1 else ("are", "them")
    return f"{listed} {verb} auto: train chooses {them} by the method, the model's width and the number of rows."


def sentence(config: TrainConfig, chosen: dict[str, Any]) -> str:
    """What was chosen for ``config`` and changes its run, as it is printed; or nothing."""
    idle = {"compute", *({"epochs"} if config.steps else ())}  # the first has a line of its own
    idle |= set() if chosen.get("patience") else {"evaluate_every", "patience"}
    numbers = [
        f"{name} {number if isinstance(number, str) else f'{number:g}'}"
        for name, number in chosen.items()
        if name not in idle and getattr(config, name) == "auto"
    ]
    return f"Chosen by auto: {', '.join(numbers)}." if numbers else ""
