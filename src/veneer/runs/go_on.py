"""A resumed run that has nothing left to do: what to say, and when its patience starts again."""

from __future__ import annotations

from veneer.runs.folder import RunFolder
from veneer.training.config import RunConfig
from veneer.training.state import State


def ended_by_patience(config: RunConfig, state: State, total: int) -> bool:
    """Whether steps remain and patience has ended the run all the same."""
    return state.step < total and 0 < config.patience <= state.worse


def patience_again(config: RunConfig, state: State, total: int, *, asked: bool) -> bool:
    """Start counting again where patience ended the run and more steps are ``asked`` for; whether that is so."""
    again = asked and ended_by_patience(config, state, total)
    if again:
        state.worse = 0
    return again


def nothing_left(folder: RunFolder, config: RunConfig, state: State, total: int) -> str:
    """A sentence where a resumed run takes no step, with how to go on; else nothing."""
    command = f"veneer train --resume {folder}"
    if ended_by_patience(config, state, total):
        value = state.best_loss if state.best_value is None else state.best_value
        best = "" if value is None else f" than {value:.3f} at step {state.best_step}"
        count = "1 evaluation" if state.worse == 1 else f"{state.worse} evaluations in a row"
        return (
            f"Patience ended this run after step {state.step} of {total}: {count} had no better held-out "
            f"{config.best_by}{best}. To go on: {command} --patience {state.worse + config.patience} (0: to the last "
            f"step)."
        )
    if state.step >= total:
        more = f"--steps {2 * total}" if config.steps else f"--epochs {2 * config.epochs:g}"
        return f"All {total} steps of this run are taken. To go on: {command} {more}"
    return ""
