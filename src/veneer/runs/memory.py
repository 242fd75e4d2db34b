"""train and resume as a person calls them, with a look at the memory before they start.

A run that clearly cannot fit is refused, with the changes that would; what was foreseen goes into the run's folder.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from veneer.data.labels import Tokens
from veneer.errors import ModelError, TrainingError, VeneerError
from veneer.frozen.layers import DTYPES, storage_of
from veneer.frozen.weight import QuantisedLinear
from veneer.models.checkpoint import Checkpoint
from veneer.models.stream import made_anew
from veneer.planning.empty import Base
from veneer.planning.fit import predicted, short, what_would_fit
from veneer.planning.machine import (
    Machine,
    anonymous_memory,
    mapped_memory,
    remembered,
    resident_memory,
    return_memory,
    usable_memory,
)
from veneer.planning.plan import Plan, base_asked, limit_of
from veneer.runs import train as runs
from veneer.training.config import TrainConfig
from veneer.training.forecast import Forecast
from veneer.training.loss import Loss
from veneer.units import amount

_CLEARLY = 1.05  # times the limit
_SMALL = 8  # a model whose files are a smaller part of the memory than this is loaded without a look
_LOSS = 10**9  # bytes that a chunk of logits takes, and more
# Bytes that reading rows and model, the plan itself, and the kernels' first use add to what torch takes.
_AFTERWARDS = 110 * 10**6


def train(model: Any = None, tokenizer: Any = None, **options: Any) -> runs.Result:
    """`veneer.runs.train.train`, which says what it takes, with a look at the memory before it starts.

    Raises TrainingError, too, when the run clearly cannot fit (``check_memory=False``: it is tried all the same).
    """
    loaded = model if isinstance(model, torch.nn.Module) else None
    return runs.train(model, tokenizer, foresight=_Foresight(loaded), **options)


def resume(folder: str | Path, *, console: Console | None = None, **over: Any) -> runs.Result:
    """`veneer.runs.train.resume`, with the same look."""
    return runs.resume(folder, console=console, foresight=_Foresight(), **over)


class _Foresight:
    """Made before anything of the run is there but a model that came ``loaded``, so that it knows what the process
    takes without the run.

    The runtime is that of the machine as it was measured; or, if that is more, what is the process's own (no file's)
    beside the model, such as the data of a notebook, and what it will yet add. Where no machine was measured, it is all
    that the process has beside the model, the pages of its libraries, too.
    """

    def __init__(self, loaded: Any = None) -> None:
        tensors = [] if loaded is None else [*loaded.parameters(), *loaded.buffers()]
        held = sum(tensor.nbytes for tensor in tensors)
        return_memory()
        self._machine = remembered()
        self._process = resident_memory() - held + _AFTERWARDS
        self._own = anonymous_memory() - (held - mapped_memory(tensors)) + _AFTERWARDS

    def before_loading(self, config: TrainConfig) -> None:
        """Refuse a model that is itself too large, before it is fetched; a small one that is here is not looked at."""
        if not config.check_memory:
            return
        usable, size = usable_memory(), Checkpoint(config.base()).weight_bytes()
        if size and size * _SMALL < usable:
            return
        limit = limit_of(config, usable)
        least = type(config)(**{**config.changed(), "batch_size": 1, "micro_batch_size": None, "max_length": 2})
        try:
            base = base_asked(config)
            made = predicted(least, self._at(), limit, base=base)
        except ModelError:  # one that cannot be planned, or that is refused with a better reason when it is loaded
            return
        if made.needed > _CLEARLY * limit:
            raise TrainingError(self._refusal(config, made, limit, {"base": base}))

    def before_training(self, config: TrainConfig, model: Any, loss: Loss, rows: list[Tokens], steps: int) -> Forecast:
        """At once, or, where there is memory enough for anything like it, when the first step has been taken: the plan
        takes a second."""
        limit = limit_of(config, usable_memory())
        if config.memory is None and _generous(model, loss, rows) < limit / 2:
            return Forecast(later=lambda: self._forecast(config, model, loss, rows, steps, limit, begun=True))
        return self._forecast(config, model, loss, rows, steps, limit)

    def _forecast(
        self, config: TrainConfig, model: Any, loss: Loss, rows: list[Tokens], steps: int, limit: int,
        begun: bool = False,
    ) -> Forecast:  # fmt: skip
        """A run that has ``begun`` is not refused any more."""
        known: dict[str, Any] = {"rows": rows, "how": loss.how, "steps": steps}
        try:
            known["base"] = self._base_of(config, model, loss)
            with torch.random.fork_rng(devices=[]):  # a run that has begun must not notice
                made = predicted(config, self._at(), limit, **known)
        except VeneerError as error:  # a model that does what tensors without values cannot
            if config.memory is not None:
                raise TrainingError(f"What this run takes cannot be foreseen, so memory = {config.memory} cannot be "
                                    f"kept to: {short(error)}") from error  # fmt: skip
            return Forecast(sentences=(f"What this run takes is not foreseen: {short(error)}",))
        if config.check_memory and not begun and made.needed > _CLEARLY * limit:
            raise TrainingError(self._refusal(config, made, limit, known))
        return Forecast(made.recomputed, {**made.as_json(), "limit": limit}, _said(config, made, limit))

    def _base_of(self, config: TrainConfig, model: Any, loss: Loss) -> Base:
        """The base of a model that is there."""
        kept = {"block_size": config.block_size, "double_quantisation": config.double_quantisation, **storage_of(model)}
        dtype = next(parameter.dtype for parameter in model.parameters())
        return Base(
            config.model, model.config, loss.kind, kept["storage"], kept["block_size"], kept["double_quantisation"],
            dtype if dtype in DTYPES.values() else DTYPES["fp32"], _mapped(model),
        )  # fmt: skip

    def _at(self) -> Machine:
        """The machine as it was measured, and this process; without, its rates are not known, and no time is told."""
        known = self._machine or Machine({}, 0.0, self._process, self._process)
        return replace(known, runtime=max(known.runtime, self._own), loading=max(known.loading, self._own))

    def _refusal(self, config: TrainConfig, made: Plan, limit: int, known: dict[str, Any]) -> str:
        found = what_would_fit(config, self._at(), limit, made, **known)
        would = "; ".join(f"{change.said} ({amount(change.plan.needed)})" for change in found)
        then = (
            f"These would fit: {would}." if would else "No change of storage, micro batch or checkpointing would fit."
        )
        return (
            f"This run would take {amount(made.needed)} of memory, and {amount(limit)} are there. {then} Or give "
            f"check_memory: false to try it all the same. (veneer plan tells more.)"
        )


def _mapped(model: torch.nn.Module) -> tuple[str, ...]:
    """`Base.mapped` of a model that is there: the parts of the frozen weights of which most is mapped."""
    parts: dict[str, list[Tensor]] = {"codes": [], "scales": [], "dense": []}
    for module in model.modules():
        coded = isinstance(module, QuantisedLinear)
        for name, tensor in module.named_buffers(recurse=False):
            parts["dense" if not coded else "codes" if name == "codes" else "scales"].append(tensor)
    own = made_anew(model)
    parts["dense"] += [
        weight for name, weight in model.named_parameters() if name not in own and not weight.requires_grad
    ]
    return tuple(
        part for part, tensors in parts.items() if mapped_memory(tensors) > sum(tensor.nbytes for tensor in tensors) / 2
    )


def _generous(model: Any, loss: Loss, rows: list[Tokens]) -> float:
    """Bytes that no step on these rows takes, by the model's sizes alone; without a bound where they are not known.

    Of each token forty times the hidden state in each layer, where Llama's kind keeps about twelve, attention's weights
    four times, as a model would have them that forms them, and of each trained number gradient, moments and AdaLoRA's
    two averages.
    """
    sizes = (getattr(model.config, name, None) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    known = [number for number in sizes if isinstance(number, int)]
    if len(known) < 3 or not (loss.how.chunked or loss.kind == "classification"):
        return math.inf
    hidden, layers, heads = known
    longest = max(len(row.ids) for row in rows)  # to which the others may be padded
    tokens, pairs = (len(rows) * longest**power for power in (1, 2))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    numbers = layers * (40 * hidden * tokens + 4 * heads * pairs) + 5 * trained
    return float(resident_memory() + 4 * numbers + _LOSS)


def _said(config: TrainConfig, made: Plan, limit: int) -> tuple[str, ...]:
    said = [f"Foreseen: {amount(made.peak)} of memory; {amount(limit)} are there."]
    if made.peak > limit >= made.needed:
        said.append(f"{amount(made.peak - made.needed)} of it are pages of the base's file, which need not fit.")
    if made.recomputed and not config.gradient_checkpointing:
        said.append(f"Of {made.recomputed} of {made.layers} layers the activations are computed again to fit them.")
    return tuple(said)
