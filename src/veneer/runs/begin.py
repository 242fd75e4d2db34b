"""The beginning of a run: a prepared model and its rows become tokens, an update, an optimizer and a loss.

All that can be refused without the planner is refused here; nothing but the empty run folder is written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from veneer.data.formats import Example
from veneer.data.known_tokens import known_pad, refuse_unknown_tokens_in
from veneer.data.pairs import sequences
from veneer.data.token_rows import Tokens, digest_of
from veneer.device import device_of
from veneer.errors import ConfigError, ModelError, TrainingError
from veneer.frozen.layers import storage_of
from veneer.models.source import resolve
from veneer.runs.folder import RunFolder
from veneer.runs.preflight import check_disk
from veneer.runs.prepare import Prepared
from veneer.runs.rows import Steps, in_steps
from veneer.training.batches import Batches
from veneer.training.config import RunConfig, TrainConfig
from veneer.training.eight_bit import state_bytes
from veneer.training.loss import Loss
from veneer.training.own_weights import train_own_weights, trained_tensors
from veneer.training.paged_adamw import PagedAdamW
from veneer.training.preference import PreferenceLoss, loss_of, preference_of
from veneer.updates.allocator import Allocator
from veneer.updates.attach import attach_noted
from veneer.updates.config import AdaLoRA
from veneer.updates.lora_plus import lora_plus
from veneer.updates.record import active_allocator, adapters_of
from veneer.updates.trainable import Trainable, trainable


@dataclass(frozen=True)
class Begun:
    """A run that is ready for its first step, with nothing of it written yet."""

    prepared: Prepared
    folder: RunFolder
    steps: Steps
    with_adapter: bool  # whether the model came with an adapter on it
    trained: Trainable
    allocator: Allocator | None
    optimizer: torch.optim.Optimizer
    loss: Loss | PreferenceLoss

    @property
    def config(self) -> RunConfig:
        """What was asked, with the numbers that auto stands for."""
        return self.steps.config

    @property
    def model(self) -> Any:
        return self.prepared.model

    @property
    def rows(self) -> Sequence[Tokens]:
        return self.steps.rows

    @property
    def held_out(self) -> Sequence[Tokens]:
        return self.steps.held_out

    @property
    def batches(self) -> Batches:
        return self.steps.batches

    @property
    def total(self) -> int:
        """Optimizer steps."""
        return self.steps.total

    def largest_step(self) -> list[Tokens]:
        """The rows of the step with the most tokens in a pass."""
        return self.steps.work(self.loss.kind, self.loss.how.packed).largest

    def digest(self) -> str:
        """Sixteen hexadecimal digits of all rows, as tokens: a run goes on only over the same ones."""
        return digest_of(self.rows, self.held_out)


def begin(
    prepared: Prepared, watched: Callable[[Sequence[Example]], Iterable[Example]] = iter
) -> Begun:  # fmt: skip
    """``watched``: hands out the rows that become tokens, and shows how far it is.

    Raises what the rows, the targets, the disk or the options make impossible, as VeneerError."""
    model, folder = prepared.model, RunFolder(prepared.config.output)
    steps = in_steps(
        prepared.renderer, prepared.train, prepared.held_out, prepared.config, model.config, folder.chosen(), watched
    )
    if prepared.config.compute == "auto":
        steps = steps.computed_in(prepared.config, prepared.computing.name)
    steps = steps.placed_on(prepared.config, str(device_of(model)))
    config, total = steps.config, steps.total
    torch.manual_seed(config.seed)
    with_adapter = bool(adapters_of(model).configs)
    if not with_adapter:
        prepared.notes += _let_train(prepared, config, total, folder)
    allocator, trained = active_allocator(model), trainable(model)
    _refuse_other_schedule(allocator, total)
    if not trained.parameters:
        raise TrainingError("The active adapter is not trainable; load it with trainable=True to train it further.")
    for side in (steps.rows, steps.held_out):
        refuse_unknown_tokens_in(model, side)
    renderer, pad = prepared.renderer, known_pad(model, prepared.renderer)
    _check_disk(folder, config, model, trained, allocator)
    optimizer = _optimizer(config, _groups(model, config))
    loss = _loss(model, pad, steps, renderer.kind)
    return Begun(prepared, folder, steps, with_adapter, trained, allocator, optimizer, loss)


def options_of(model: nn.Module, tokenizer: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The options that a loaded model answers itself: its name, its storage, and those of its adapter. What it computes
    in is looked at by `prepare`."""
    if tokenizer is None:
        raise ConfigError("train(model, tokenizer, …) needs the tokenizer, too, when the model is loaded already.")
    record = adapters_of(model)
    options: dict[str, Any] = {
        "model": getattr(model, "name_or_path", "") or type(model).__name__,
        **storage_of(model),
    }
    if record.configs:
        if len(record.active) != 1:
            raise ConfigError(f"train needs one active adapter; {len(record.active)} are active. Activate one.")
        config = record.configs[record.active[0]]
        both = sorted(set(given) & set(type(config).model_fields))
        if both:
            raise ConfigError(f"The model has an adapter attached, so its options cannot be given: {', '.join(both)}.")
        options |= {name: getattr(config, name) for name in type(config).model_fields if name != "total_steps"}
        options["method"] = "adalora" if isinstance(config, AdaLoRA) else "lora"
        if isinstance(config, AdaLoRA) and config.budget is not None:
            del options["target_rank"]  # which follows from it
    return options


def notes_on(name: str) -> list[str]:
    """What the user should know about a model that came loaded."""
    try:
        resolve(name)
    except ModelError:
        return [f"{name} is no name that load finds, so this run can be neither resumed nor evaluated from its folder."]
    return []


def _loss(model: Any, pad: int, steps: Steps, kind: str) -> Loss | PreferenceLoss:
    """The loss of the run's objective; what a preference is measured against is not computed yet."""
    config, rows = steps.config, steps.rows
    likelihood = Loss(
        model, pad, sequences(rows[0])[0], kind=kind, smoothing=config.label_smoothing, noise=config.neftune,
        class_weights=[*config.class_weights.values()],
    )  # fmt: skip
    reference = torch.full((len(rows) + len(steps.held_out), 2), math.nan, dtype=torch.float64)
    return loss_of(likelihood, preference_of(config, rows), model, reference)


def _let_train(prepared: Prepared, config: TrainConfig, total: int, folder: RunFolder) -> list[str]:
    """Let the model's own weights train, or attach the update: the one to start from, or as the options describe it.
    Returns what the user should know."""
    model = prepared.model
    if config.trains_own_weights:
        train_own_weights(model, config.method)
        return []
    if prepared.start is not None:
        prepared.start.put_on(model, config.dropout)
        return []
    # A base that LoftQ or PiSSA changed already is not changed again: the checkpoint has A and B.
    begun = folder.base_source(config) == str(folder.base)
    over = {"init": "kaiming", "loftq_iterations": 1} if begun else {}
    return attach_noted(model, config.update(total).model_copy(update=over))


def _refuse_other_schedule(allocator: Allocator | None, total: int) -> None:
    """Raises ConfigError for an attached AdaLoRA adapter whose budget schedule has other steps than the run."""
    if allocator is None or allocator.fixed:
        return
    if allocator.step or allocator.config.total_steps != total:
        raise ConfigError(
            f"The attached AdaLoRA adapter has taken {allocator.step} of total_steps = {allocator.config.total_steps}, "
            f"and the run takes {total} from the start; attach it with total_steps={total}, or give "
            f"steps={allocator.config.total_steps} to a new one."
        )


def _check_disk(
    folder: RunFolder, config: TrainConfig, model: Any, trained: Trainable, allocator: Allocator | None
) -> None:
    folder.path.mkdir(parents=True, exist_ok=True)
    check_disk(
        folder.path, trained.parameters, config.keep_checkpoints,
        state_bytes(trained.parameters, config.optimizer_bits), paged=config.optimizer == "paged-adamw",
        allocating=allocator is not None,
        model_bytes=sum(tensor.nbytes for tensor in model.parameters()) if config.trains_own_weights else 0,
    )  # fmt: skip


def _groups(model: nn.Module, config: RunConfig) -> list[Any]:
    """What is trained, as an optimizer takes it."""
    if config.lora_plus != 1:
        return lora_plus(model, config.learning_rate, config.lora_plus)
    return [tensor for tensor in trained_tensors(model).values() if tensor.requires_grad]


def _optimizer(config: RunConfig, parameters: list[Any]) -> torch.optim.Optimizer:
    """Either takes the same steps, to the last bit, except with states in 8 bits."""
    rate, decay = config.learning_rate, config.weight_decay
    if config.optimizer == "paged-adamw":
        try:
            return PagedAdamW(
                parameters, rate, weight_decay=decay, folder=config.output, resident=config.optimizer_memory,
                bits=config.optimizer_bits,
            )  # fmt: skip
        except OSError as error:
            raise TrainingError(
                f"The paged optimizer cannot keep its states in {config.output}: {error.strerror}. Make room there, or "
                f"choose another output."
            ) from None
    return torch.optim.AdamW(parameters, rate, weight_decay=decay, fused=True)
