"""The look at the memory: before a model is loaded, and before the first step.

A run that clearly cannot fit is refused, with the changes that would fit; the prediction goes into the run's folder.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from veneer.data.labels import Tokens
from veneer.device import CPU, device_of, usable_memory
from veneer.errors import ModelError, TrainingError, VeneerError
from veneer.files import write_text
from veneer.frozen.experts import QuantisedStack
from veneer.frozen.layers import DTYPES, compute_of, storage_of, type_kept
from veneer.frozen.text_part import text_config_of
from veneer.frozen.weight import QuantisedLinear
from veneer.host_memory import anonymous_memory, mapped_memory, resident_memory, return_memory
from veneer.models.checkpoint import Checkpoint
from veneer.models.stream import reassembled_names
from veneer.planning.empty import Base
from veneer.planning.fit import predicted, short, what_would_fit
from veneer.planning.machine import Machine, remembered
from veneer.planning.plan import Plan, base_asked, limit_of
from veneer.runs.begin import Begun
from veneer.runs.folder import RunFolder
from veneer.runs.start import planned_update
from veneer.training.callbacks import EvaluationRecord, StepRecord
from veneer.training.config import TrainConfig
from veneer.training.objective import Objective
from veneer.units import amount, compared

_CLEARLY = 1.05  # times the limit
_SMALL = 8  # a model whose files are a smaller part of the memory than this is loaded without a look
_LOSS = 10**9  # bytes that a chunk of logits takes, and more
# Bytes that reading rows and model, the plan itself, and the kernels' first use add to what torch takes.
_AFTERWARDS = 110 * 10**6


@dataclass(frozen=True)
class Process:
    """What this process takes without the run, measured before the run has made anything; a model that came loaded is
    not counted."""

    machine: Machine | None  # as it was measured, if it was
    resident: int  # bytes beside the model, with what reading rows and planning will add
    own: int  # of these, what is no file's
    rows: int = 0  # bytes that the run's rows will add

    @classmethod
    def now(cls, loaded: torch.nn.Module | None = None) -> Process:
        tensors = [] if loaded is None else [*loaded.parameters(), *loaded.buffers()]
        held = sum(tensor.nbytes for tensor in tensors)
        return_memory()
        return cls(
            remembered(),
            resident_memory() - held + _AFTERWARDS,
            anonymous_memory() - (held - mapped_memory(tensors)) + _AFTERWARDS,
        )

    def at(self) -> Machine:
        """The machine with this process's runtime.

        The runtime is the measured machine's; or the process's own memory, such as a notebook's data, if that is more.
        Where no machine was measured, it is all that the process has beside the model, pages of its libraries included,
        and no time is predicted.
        """
        known = self.machine or Machine({}, 0.0, self.resident, self.resident)
        known = replace(known, runtime=max(known.runtime, self.own), loading=max(known.loading, self.own))
        return known.beside(self.rows)


@dataclass(frozen=True)
class Outlook:
    """What is known of a run before its first step."""

    recomputed: int = 0  # layers whose activations are recomputed, so that the run fits the memory
    record: dict[str, Any] = field(default_factory=dict)  # the run folder's plan.json; empty without a plan
    sentences: tuple[str, ...] = ()

    def write(self, folder: RunFolder, say: Callable[[str], None]) -> None:
        """Print the sentences, and write the plan into the run's folder."""
        for sentence in self.sentences:
            say(sentence)
        if self.record:
            write_text(folder.plan_file, json.dumps(self.record, indent=2) + "\n")


class PlanAfterFirstStep:
    """Plans a run when its first step has been taken: planning takes a second, and nothing depends on it where there
    is memory enough for anything like the run."""

    def __init__(self, begun: Begun, process: Process, say: Callable[[str], None]) -> None:
        self._begun, self._process, self._say = begun, process, say
        self._planned = False

    def on_step(self, record: StepRecord) -> None:
        if not self._planned:
            self._planned = True
            limit = limit_of(self._begun.config, usable_memory(device_of(self._begun.model)))
            _outlook(self._begun, self._process, limit, refuse=False).write(self._begun.folder, self._say)

    def on_evaluation(self, record: EvaluationRecord) -> None:
        pass


def look_before_loading(config: TrainConfig, process: Process, device: str = CPU) -> None:
    """Refuse a model that is itself too large for the device, before it is fetched; a small one on this disk is not
    looked at."""
    if not config.check_memory:
        return
    config = config.model_copy(update={"device": device})
    usable, size = usable_memory(device), Checkpoint(RunFolder(config.output).base_source(config)).weight_bytes()
    if size and size * _SMALL < usable:
        return
    limit = limit_of(config, usable)
    least = type(config)(**{**config.changed(), "batch_size": 1, "micro_batch_size": None, "max_length": 2})
    try:
        base = base_asked(config)
        known = {"base": base, **planned_update(config)}
        plan = predicted(least, process.at(), limit, **known)
    except ModelError:  # one that cannot be planned, or that is refused with a better reason when it is loaded
        return
    if plan.needed > _CLEARLY * limit:
        raise TrainingError(refusal(config, process, plan, limit, known))


def look_before_training(begun: Begun, process: Process) -> Outlook | None:
    """The outlook of a run that has begun; None where there is memory enough for anything like it, so that the plan can
    wait until the first step has been taken.

    Raises TrainingError for a run that clearly cannot fit.
    """
    config, limit = begun.config, limit_of(begun.config, usable_memory(device_of(begun.model)))
    if config.memory is None and generous(begun.model, begun.loss, begun.largest_step()) < limit / 2:
        return None
    return _outlook(begun, process, limit, refuse=config.check_memory)


def _outlook(begun: Begun, process: Process, limit: int, *, refuse: bool) -> Outlook:
    config = begun.config
    known: dict[str, Any] = {"rows": begun.largest_step(), "how": begun.loss.how, "steps": begun.total}
    known |= planned_update(config)
    process = replace(process, rows=begun.steps.memory)
    try:
        known["base"] = _base_of(config, begun.model, begun.loss, begun.prepared.checkpoint)
        with torch.random.fork_rng(devices=[]):  # a run that has begun must not notice
            plan = predicted(config, process.at(), limit, **known)
    except VeneerError as error:  # a model that does what tensors without values cannot
        if config.memory is not None:
            raise TrainingError(
                f"The memory of this run cannot be predicted, so memory = {config.memory} cannot be kept to: "
                f"{short(error)}"
            ) from error
        return Outlook(sentences=(f"The memory of this run cannot be predicted: {short(error)}",))
    if refuse and plan.needed > _CLEARLY * limit:
        raise TrainingError(refusal(config, process, plan, limit, known))
    return Outlook(plan.recomputed, {**plan.as_json(), "limit": limit}, sentences(config, plan, limit))


def _base_of(config: TrainConfig, model: Any, loss: Objective, checkpoint: Checkpoint | None) -> Base:
    """The base of a loaded model; of the ``checkpoint`` that the run loaded it from."""
    kept = {"block_size": config.block_size, "double_quantisation": config.double_quantisation, **storage_of(model)}
    dtype = type_kept(model)
    return Base(
        config.model, model.config, loss.kind, kept["storage"], kept["block_size"], kept["double_quantisation"],
        dtype if dtype in DTYPES.values() else DTYPES["fp32"], mapped_parts(model),
        base_asked(config, checkpoint).read if checkpoint is not None else 0, compute_of(model),
    )  # fmt: skip


def refusal(config: TrainConfig, process: Process, plan: Plan, limit: int, known: dict[str, Any]) -> str:
    """Why a run is not started, and what would fit."""
    changes = what_would_fit(config, process.at(), limit, plan, **known)
    available, needed, *sizes = compared(limit, plan.needed, *(change.plan.needed for change in changes))
    fitting = "; ".join(f"{change.said} ({size})" for change, size in zip(changes, sizes, strict=True))
    then = (
        f"These would fit: {fitting}."
        if fitting
        else "No change of storage, micro batch or checkpointing would make it fit."
    )
    return (
        f"This run would take {needed} of memory, and {available} are available. {then} Or give "
        f"check_memory: false to try it all the same. (veneer plan shows each term.)"
    )


def mapped_parts(model: torch.nn.Module) -> tuple[str, ...]:
    """`Base.mapped` of a loaded model: the parts of the frozen weights of which most is mapped."""
    parts: dict[str, list[Tensor]] = {"codes": [], "scales": [], "dense": []}
    for module in model.modules():
        coded = isinstance(module, QuantisedLinear | QuantisedStack)
        for name, tensor in module.named_buffers(recurse=False):
            parts["dense" if not coded else "codes" if name == "codes" else "scales"].append(tensor)
    own = reassembled_names(model)
    parts["dense"] += [
        weight for name, weight in model.named_parameters() if name not in own and not weight.requires_grad
    ]
    return tuple(
        part for part, tensors in parts.items() if mapped_memory(tensors) > sum(tensor.nbytes for tensor in tensors) / 2
    )


def generous(model: Any, loss: Objective, rows: list[Tokens]) -> float:
    """Bytes that no step on these rows takes, by the model's sizes alone; without a bound where they are not known.

    It counts forty hidden states for each token in each layer, where Llama's kind keeps about twelve; attention's
    weights four times, as in a model that forms them; and gradient, moments and AdaLoRA's two averages for each trained
    number.
    """
    text = text_config_of(model.config)
    sizes = (getattr(text, name, None) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    known = [number for number in sizes if isinstance(number, int)]
    if len(known) < 3 or not (loss.how.chunked or loss.kind == "classification"):
        return math.inf
    hidden, layers, heads = known
    longest = max(len(row.ids) for row in rows)  # to which the others may be padded
    tokens, pairs = (len(rows) * longest**power for power in (1, 2))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    numbers = layers * (40 * hidden * tokens + 4 * heads * pairs) + 5 * trained
    return float(resident_memory() + 4 * numbers + _LOSS)


def sentences(config: TrainConfig, plan: Plan, limit: int) -> tuple[str, ...]:
    """The prediction as a run prints it."""
    available, peak, needed = compared(limit, plan.peak, plan.needed)
    lines = [f"Predicted memory: {peak} ({available} available)."]
    if plan.peak > limit >= plan.needed:
        lines.append(f"{amount(plan.peak - plan.needed)} of it are pages of the base's file, which need not fit.")
    elif plan.needed > limit:
        lines.append(f"{needed} of it must fit, which is more than is available: the run may run out of memory.")
    if plan.recomputed and not config.gradient_checkpointing:
        lines.append(
            f"Activations of {plan.recomputed} of {plan.layers} layers will be recomputed (gradient checkpointing)."
        )
    return tuple(lines)
