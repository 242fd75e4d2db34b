"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.data.labels import Tokens
from veneer.device import device_of, peak_memory, synchronise
from veneer.errors import DivergedError, TrainingError
from veneer.training.batches import Batches
from veneer.training.callbacks import Callback, EvaluationRecord, StepRecord
from veneer.training.checkpoint import save_best, save_checkpoint
from veneer.training.config import RunConfig
from veneer.training.interrupt import StopRequest
from veneer.training.metrics import Metrics
from veneer.training.objective import Objective
from veneer.training.schedule import learning_rate
from veneer.training.state import State, checkpoints_in
from veneer.training.world import OneProcess, World
from veneer.updates.allocator import Allocator
from veneer.updates.lora_plus import FACTOR


class Interrupted(TrainingError):
    """The user stopped the run; everything was saved."""

    exit_code = 130


@dataclass
class Run:
    """The parts of a run, put together."""

    config: RunConfig
    folder: Path  # the run's, named in messages
    checkpoints: Path
    best: Path
    model: Any
    loss: Objective
    batches: Batches
    held_out: Sequence[Tokens]
    optimizer: torch.optim.Optimizer
    total: int  # optimizer steps
    metrics: Metrics
    stop: StopRequest
    allocator: Allocator | None = None  # of an AdaLoRA adapter
    callbacks: Sequence[Callback] = ()
    world: World = field(default_factory=OneProcess)
    accuracy: Callable[[], float | None] = lambda: None  # of held-out labels; None where the task is none of labels
    metrics_of: Callable[[], dict[str, float]] = dict  # of answers to held-out rows, by name
    higher_is_better: bool = False  # of what config.best_by names


def train_loop(run: Run, state: State) -> None:
    """Take the steps from ``state`` to the end, or until patience ends; ``state`` says where the run is.

    Raises Interrupted, after saving, when the user asked to stop; DivergedError when a loss is not finite.
    """
    config = run.config
    if state.step == 0 and run.held_out:
        evaluate_held_out(run, state)
    run.model.train()
    while not finished(run, state):
        _timed_step(run, state)
        last = state.step == run.total
        if run.held_out and (last or (config.evaluate_every and state.step % config.evaluate_every == 0)):
            evaluate_held_out(run, state)
        due = run.stop.asked or finished(run, state) or state.step % config.checkpoint_every == 0
        if due and run.world.writes:
            save_checkpoint(run.checkpoints, run.model, run.optimizer, state, config.keep_checkpoints)
        if run.stop.asked and not finished(run, state):
            raise Interrupted(
                f"Stopped after step {state.step} of {run.total}; go on with: veneer train --resume {run.folder}"
            )


def _timed_step(run: Run, state: State) -> None:
    """The next step, timed, written down and reported."""
    started, config = time.monotonic(), run.config
    rows = run.batches.rows(state.step)
    rate = learning_rate(state.step, run.total, config.learning_rate, config.schedule, config.warmup)
    device = device_of(run.model)
    loss, norm = take_step(run, rows, rate)
    synchronise(device)
    seconds, tokens = time.monotonic() - started, sum(len(row.ids) for row in rows)
    state.step, state.tokens, state.seconds = state.step + 1, state.tokens + tokens, state.seconds + seconds
    peak = peak_memory(device)
    record = StepRecord(state.step, run.total, loss, rate, norm, state.tokens, tokens / seconds, peak)
    fields = {name: value for name, value in asdict(record).items() if name != "total"}
    run.metrics.write(**fields, **_allocation(run))
    for callback in run.callbacks:
        callback.on_step(record)


def take_step(run: Run, rows: list[Tokens], rate: float) -> tuple[float, float]:
    """One optimizer step on ``rows``; the mean loss of a learned token (or a row with preferences), and the gradient's
    norm before clipping.

    Rows go through the model in parts of micro_batch_size; each part's summed loss is divided by the learned tokens
    of the whole step, so the gradient is that of one large batch. Each process of the run's world takes its own parts.
    """
    size = run.config.micro_batch_size or len(rows)
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    share = run.loss.of_step(parts)
    parameters = [parameter for group in run.optimizer.param_groups for parameter in group["params"]]
    run.optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), dtype=torch.float64)
    for part in run.world.mine(parts):
        total += _add_gradient(run, part, share)
    run.world.sum([total, *(parameter.grad for parameter in parameters if parameter.grad is not None)])
    norm = float(nn.utils.clip_grad_norm_(parameters, run.config.clip or math.inf))
    if not math.isfinite(norm):
        raise DivergedError(_not_finite(run, rows))
    for group in run.optimizer.param_groups:
        group["lr"] = rate * group.get(FACTOR, 1.0)
    run.optimizer.step()
    # One norm over all parameters (one by one took 1 % of a step): the largest value, since a sum could overflow.
    filled = [parameter for parameter in parameters if parameter.numel()]  # AdaLoRA may leave a matrix none
    if not math.isfinite(float(nn.utils.get_total_norm(filled, math.inf))):
        raise DivergedError(_not_finite(run, rows))
    return float(total), norm


def _add_gradient(run: Run, rows: list[Tokens], share: Callable[[list[Tokens]], Tensor]) -> float:
    """Add the gradient of the rows' share of the step's loss; returns that share.

    The graph is freed on return, before the next part's activations need memory."""
    loss = share(rows)
    if not math.isfinite(loss.item()):
        raise DivergedError(_not_finite(run, rows))
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.item()


def finished(run: Run, state: State) -> bool:
    """Whether all steps are taken, or the held-out loss has not improved for long enough."""
    return state.step >= run.total or 0 < run.config.patience <= state.worse


def _allocation(run: Run) -> dict[str, float]:
    """AdaLoRA's part of a step's metrics."""
    allocator = run.allocator
    if allocator is None or allocator.deviation is None:
        return {}
    return {"budget": allocator.budget, "orthogonality_deviation": float(allocator.deviation)}


def evaluate_held_out(run: Run, state: State) -> None:
    """Measure the held-out rows; what is trained is kept in best/ when the loss is the lowest so far, or what
    ``best_by`` names the best, and of equal ones when its loss is the lowest.

    An AdaLoRA adapter is not kept before its ranks are fixed: it is larger than was asked for.
    """
    measured = run.loss.held_out(run.held_out, run.config.micro_batch_size or run.config.batch_size)
    loss = measured.loss
    if not math.isfinite(loss):
        raise DivergedError(_not_finite(run, run.held_out))
    counts = state.step > 0 and (run.allocator is None or run.allocator.fixed)
    accuracy, metrics = run.accuracy(), run.metrics_of()
    by = run.config.best_by
    value = None if by == "loss" else accuracy if by == "accuracy" else metrics[by]
    better = counts and _is_better(run, state, loss, value)
    if better:
        state.best_loss, state.best_step, state.best_value, state.worse = loss, state.step, value, 0
        if run.world.writes:
            save_best(run.best, run.model, state.step)
    elif counts:
        state.worse += 1
    numbers = {
        "held_out_perplexity": math.exp(min(loss, 700)) if measured.reward_accuracy is None else None,
        "held_out_accuracy": accuracy,
        "held_out_reward_accuracy": measured.reward_accuracy,
        "held_out_reward_margin": measured.reward_margin,
    }
    given: dict[str, Any] = {name: number for name, number in numbers.items() if number is not None}
    given |= {"held_out_metrics": metrics} if metrics else {}
    run.metrics.write(step=state.step, held_out_loss=loss, **given)
    if run.allocator is not None:
        run.metrics.write(step=state.step, ranks=run.allocator.ranks(), importance=run.allocator.importance())
    for callback in run.callbacks:
        callback.on_evaluation(EvaluationRecord(state.step, loss, better, accuracy, *measured[1:], metrics))


def _is_better(run: Run, state: State, loss: float, value: float | None) -> bool:
    """Whether this evaluation is the best so far; ``value``: of what decides, None where it is the loss."""
    if state.best_loss is None:
        return True
    if value is None or state.best_value is None or value == state.best_value:
        return loss < state.best_loss
    return value > state.best_value if run.higher_is_better else value < state.best_value


def _not_finite(run: Run, rows: Sequence[Tokens]) -> str:
    """Name the rows whose own loss is not finite, or all of them when it is their gradient."""
    with torch.no_grad():
        losses = [float(run.loss.of_step([[row]])([row])) for row in rows]
    bad = [row.where for row, loss in zip(rows, losses, strict=True) if not math.isfinite(loss)]
    bad = bad or [row.where for row in rows]
    shown = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
    kept = checkpoints_in(run.checkpoints)
    if kept:
        then = (
            f"The last good checkpoint, {kept[-1].name}, is kept: veneer train --resume {run.folder} (or delete it to "
            f"go on from the one before, should its first step fail as well)."
        )
    else:
        then = "There is no checkpoint yet; start again with a new output."
    return (
        f"The loss is not finite at {shown}. Look at these rows, lower learning_rate (now "
        f"{run.config.learning_rate:g}), or set clip. {then}"
    )
