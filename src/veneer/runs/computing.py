"""The type that a run computes in: as asked, as it began, or for auto the one that is faster on this machine."""

from __future__ import annotations

from typing import Any

from veneer.device import AUTO, CPU, available, device_of, is_host
from veneer.errors import ConfigError
from veneer.frozen.compute import Computing, computing, has_bf16
from veneer.frozen.config import COMPUTES
from veneer.frozen.layers import compute_of, name_of_type
from veneer.runs.folder import RunFolder
from veneer.training.config import TrainConfig


def computing_of(
    run: RunFolder, config: TrainConfig, storage: str, asked: str | None = None, device: str = CPU
) -> Computing:  # fmt: skip
    """What ``run`` computes in over weights kept in ``storage``; ``asked``: fp32 or bf16 for what is only measured of
    it. One that has begun stays in the type that it began in."""
    if asked not in (None, "auto"):
        return computing(str(asked), storage, device)
    if config.trains_own_weights:
        return Computing("fp32", "")
    if config.compute != "auto" or not began(run):
        return computing(config.compute, storage, device)
    chosen = run.chosen().get("compute")
    if chosen is None and storage not in ("bf16", "fp16"):  # of an earlier version, which computed all others in fp32
        return Computing("fp32", "")
    return Computing(str(chosen), "as the run began") if chosen else computing("auto", storage, device)


def began(run: RunFolder) -> bool:
    """Whether there is a run that has written how it began."""
    return run.exists and run.rows_file.is_file()


def computing_of_loaded(model: Any, config: TrainConfig) -> Computing:
    """What a model that came loaded computes in, which no option changes any more.

    Raises ConfigError where another type is asked for, or needed: own weights are trained in fp32.
    """
    refuse_other_type(model, "fp32" if config.trains_own_weights else config.compute)
    name = name_of_type(compute_of(model))
    return Computing(name if name in COMPUTES else "fp32", "as the model was loaded")


def refuse_other_type(model: Any, compute: str) -> None:
    """Raises ConfigError where a loaded ``model`` computes in another type than is asked for."""
    name = name_of_type(compute_of(model))
    if compute not in ("auto", name):
        raise ConfigError(
            f"This should compute in {compute}, and the model was loaded to compute in {name}; load it with "
            f"compute={compute!r}."
        )


def refuse_other_device(model: Any, device: str) -> None:
    """Raises ConfigError where a loaded ``model`` is on another device than is asked for."""
    here = device_of(model)
    if device == AUTO or str(here) == (asked := available(device)):
        return
    if here.type == asked and here.index is None:
        return
    raise ConfigError(f"This should be on {device}, and the model is on {here}; load it with device={device!r}.")


def said_of_computing(how: Computing) -> list[str]:
    """What is said at the start of whatever does not compute in fp32."""
    return [] if how.name == "fp32" else [f"Computing in {how}."]


def beside_this_machine(how: Computing, config: TrainConfig, storage: str, device: str = CPU) -> list[str]:
    """What a run that goes on should say where this machine would not choose its type."""
    if how.name == "bf16" and is_host(device) and not has_bf16():
        return [
            "This run computes in bf16, for which this processor has no instructions: it goes on in bf16, many times "
            "as slowly, and the last bits of its result may differ."
        ]
    if config.compute != "auto" or config.trains_own_weights:
        return []
    here = computing("auto", storage, device)
    if here.name == how.name:
        return []
    return [
        f"This run began in {how.name} and goes on in it, where a new one would compute in {here}; the last bits of "
        f"its result may differ from those of the machine that it began on."
    ]
