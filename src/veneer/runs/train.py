"""A run from its options to its folder, and a run that goes on where it was.

run/  config.yaml  rows.json  environment.json  plan.json  metrics.jsonl  adapter/ (or model/)  best/
      checkpoints/step-000200/
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from veneer.data.labels import Tokens
from veneer.environment import environment
from veneer.errors import ConfigError, ModelError, TrainingError, did_you_mean
from veneer.files import atomic_folder, write_text
from veneer.frozen.layers import storage_of
from veneer.kernels.heap import own_heap
from veneer.models.source import resolve
from veneer.runs.preflight import check_disk, check_new_run, check_writable
from veneer.runs.prepare import Prepared, prepare
from veneer.threads import said
from veneer.training.batches import Batches
from veneer.training.checkpoint import (
    BEST,
    State,
    checkpoints,
    forget_lost_best,
    load_checkpoint,
    save_checkpoint,
    tidy,
)
from veneer.training.config import BASE, CONFIG_NAME, TrainConfig
from veneer.training.eight_bit import state_bytes
from veneer.training.forecast import Forecast, Foresight
from veneer.training.fused import fused_passes
from veneer.training.interrupt import stop_requests
from veneer.training.loop import Run, finished, train_loop
from veneer.training.loss import Loss, tokens_gone_through
from veneer.training.metrics import Metrics, peak_memory, read_metrics
from veneer.training.own_weights import MODEL, restore_trained, train_own_weights, trained_tensors, write_model
from veneer.training.paged_adamw import PagedAdamW
from veneer.training.progress import RunProgress
from veneer.training.recompute import recomputed
from veneer.updates.adapter_file import write_adapter
from veneer.updates.allocator import Allocator
from veneer.updates.attach import attach
from veneer.updates.base_file import save_base
from veneer.updates.config import AdaLoRA
from veneer.updates.peft_config import CONFIG_NAME as ADAPTER_CONFIG
from veneer.updates.record import active_allocator, adapters_of
from veneer.updates.trainable import trainable

ADAPTER = "adapter"
ROWS = "rows.json"
PLAN = "plan.json"
# What a resumed run may change: nothing that would make its past another run's.
RESUMABLE = (
    *("steps", "epochs", "learning_rate", "schedule", "warmup", "weight_decay", "clip", "micro_batch_size"),
    *("gradient_checkpointing", "evaluate_every", "patience", "checkpoint_every", "keep_checkpoints"),
    *("optimizer", "optimizer_memory", "memory", "check_memory"),
)


@dataclass(frozen=True)
class Result:
    """A finished run. Losses are means over held-out tokens; None without held-out rows."""

    folder: Path
    model: Any
    tokenizer: Any
    steps: int
    loss_before: float | None
    loss_after: float | None
    best_step: int
    seconds: float
    peak_memory: int  # bytes

    @property
    def written(self) -> Path:
        """The adapter; or the model, where its own weights were trained."""
        found = result_of(self.folder)
        assert found is not None
        return found


def train(
    model: Any = None, tokenizer: Any = None, *, config: TrainConfig | None = None, console: Console | None = None,
    foresight: Foresight | None = None, on_the_way: bool = True, **options: Any,
) -> Result:  # fmt: skip
    """Train an adapter; the options are `TrainConfig`'s, ``data`` and ``output`` the ones without a default.

    ``model``: a name or path, as for `load`; or a loaded model, with its tokenizer, whose active adapter is trained,
    or which gets the one that the options describe. ``foresight`` looks at a run before it starts,
    and may refuse it. ``on_the_way``: whether the held-out loss is measured before, during and after the steps; the
    rows are kept from training in any case.

    Raises VeneerError: ConfigError, ModelError, DataError and TargetError before anything is written, TrainingError
    when the run cannot go on.
    """
    console = console or Console()
    loaded = model if isinstance(model, nn.Module) else None
    if config is None:
        if loaded is not None:
            options = {**_options_of(loaded, tokenizer, options), **options}
        elif model is not None:
            options["model"] = str(model)
        config = TrainConfig(**options)
    check_new_run(Path(config.output))
    own_heap()
    if foresight is not None and loaded is None:
        foresight.before_loading(config)
    prepared = prepare(config, loaded, tokenizer)
    if loaded is not None:
        prepared.notes += _not_found_again(config.model)
    return _train(prepared, None, console, foresight, on_the_way)


def resume(
    folder: str | Path, *, console: Console | None = None, foresight: Foresight | None = None, on_the_way: bool = True,
    **over: Any,
) -> Result:  # fmt: skip
    """Go on with a run from its latest checkpoint, or from the start when it has none yet.

    It ends in the same adapter, to the last bit, as if it had never stopped. ``over`` changes options for the rest;
    ``on_the_way`` as in `train`.
    Raises TrainingError when there is no run, its rows have changed, or its checkpoint is damaged.
    """
    folder, console = Path(folder), console or Console()
    refuse_no_run(folder)
    for name in over:
        if name not in RESUMABLE:
            raise ConfigError(
                f"{name} cannot be changed when a run is resumed; these can: {', '.join(RESUMABLE)}."
                f"{did_you_mean(name, RESUMABLE)}"
            )
    config = TrainConfig.read(folder / CONFIG_NAME, output=str(folder), **over)
    check_writable(folder)
    own_heap()
    tidy(folder)
    found = checkpoints(folder)
    if foresight is not None:
        foresight.before_loading(config)
    return _train(prepare(config), found[-1] if found else None, console, foresight, on_the_way)


def refuse_no_run(folder: Path) -> None:
    """Raises TrainingError, with the nearest run's name, when ``folder`` is none."""
    if not (folder / CONFIG_NAME).is_file():
        near = [str(path.parent) for path in folder.parent.glob(f"*/{CONFIG_NAME}")]
        raise TrainingError(f"{folder} is not a run folder: it has no {CONFIG_NAME}.{did_you_mean(str(folder), near)}")


def result_of(folder: Path) -> Path | None:
    """adapter/ or model/ of a finished run; None before it has finished."""
    for path, file in ((folder / ADAPTER, ADAPTER_CONFIG), (folder / MODEL, "config.json")):
        if (path / file).is_file():
            return path
    return None


def _train(
    prepared: Prepared, checkpoint: Path | None, console: Console, foresight: Foresight | None, on_the_way: bool
) -> Result:
    config, model, folder = prepared.config, prepared.model, Path(prepared.config.output)
    tokens, report = prepared.renderer.all(prepared.train)
    held_out, held_out_report = prepared.renderer.all(prepared.held_out) if prepared.held_out else ([], None)
    torch.manual_seed(config.seed)
    batches = Batches(tokens, config.batch_size, config.seed)
    total = config.steps or max(1, math.ceil(config.epochs * batches.per_epoch))
    started_with_adapter = bool(adapters_of(model).configs)
    if config.trains_own_weights:
        train_own_weights(model, config.method)
    elif not started_with_adapter:
        begun = config.base() != config.model  # the base is changed already, and a checkpoint has A and B
        kept = {"init": "kaiming", "loftq_iterations": 1} if begun else {}
        attach(model, config.update(total).model_copy(update=kept))
    allocator = active_allocator(model)
    if allocator is not None:
        _refuse_other_schedule(allocator, total)
    table = trainable(model)
    if not table.parameters:
        raise TrainingError("The active adapter is not trainable; load it with trainable=True to train it further.")
    _refuse_unknown_tokens(model, tokens + held_out)

    folder.mkdir(parents=True, exist_ok=True)
    check_disk(
        folder, table.parameters, config.keep_checkpoints, state_bytes(table.parameters, config.optimizer_bits),
        paged=config.optimizer == "paged-adamw", allocating=allocator is not None,
        model_bytes=sum(tensor.nbytes for tensor in model.parameters()) if config.trains_own_weights else 0,
    )  # fmt: skip
    optimizer = _optimizer(config, [p for p in trained_tensors(model).values() if p.requires_grad])
    loss = Loss(
        model, prepared.renderer.pad, tokens[0], kind=prepared.renderer.kind, smoothing=config.label_smoothing
    )  # fmt: skip
    forecast = Forecast()
    if foresight is not None:
        forecast = foresight.before_training(config, model, loss, _largest_step(batches, total, config, loss), total)
    elif config.memory is not None:
        raise ConfigError("memory = … needs the planner: use veneer.train, or the command line.")
    state = State(data=_digest(tokens + held_out))
    if checkpoint is not None:
        saved = load_checkpoint(checkpoint, model, optimizer)
        if saved.data != state.data:
            raise TrainingError(
                f"The rows of {config.data} are not those that {folder} was started with, so it cannot go on as the "
                f"same run; restore them, or start a new run."
            )
        state = saved
        forget_lost_best(folder, state)
    try:
        own_base = bool(adapters_of(model).changed_base)
        if own_base:
            save_base(model, prepared.tokenizer, folder / BASE)
        if (started_with_adapter or own_base) and checkpoint is None:
            # The seed does not give this start again. Before config.yaml, which makes the folder a run to resume.
            save_checkpoint(folder, model, optimizer, state, config.keep_checkpoints)
        config.write(folder)
        write_text(folder / ROWS, json.dumps({**_rows(prepared), "steps": total}, indent=2) + "\n")
        write_text(folder / "environment.json", json.dumps(environment(torch.get_num_threads()), indent=2) + "\n")
        metrics = Metrics(folder, state.step)
        with (
            RunProgress(console, total, state.step) as progress,
            stop_requests() as stop,
            recomputed(model, None if config.gradient_checkpointing else forecast.recomputed),
            fused_passes(model),
            loss.attention(),
        ):
            _introduce(progress, prepared, str(table).splitlines()[-1], len(tokens), len(held_out), total, state)
            for sentence in (
                said()
                + prepared.notes
                + report.sentences(prepared.renderer.max_length)
                + (held_out_report.sentences(prepared.renderer.max_length) if held_out_report else [])
            ):
                progress.note(sentence)
            _tell(forecast, folder, progress)
            later = forecast.later or Forecast
            run = Run(
                config, folder, model, loss, batches, held_out if on_the_way else [], optimizer, total, metrics,
                progress, stop, allocator, lambda: _tell(later(), folder, progress),
            )  # fmt: skip
            if not finished(run, state):
                train_loop(run, state)
        _write_result(folder, prepared, state)
        metrics.close()  # the lock that says the run goes on ends with it, when all of it is there
    except OSError as error:
        last = checkpoints(folder)
        good = f"the last good checkpoint is {last[-1]}" if last else "there is no checkpoint yet"
        raise TrainingError(
            f"{folder} cannot be written to ({error.strerror or error}); {good}. Make room, then: veneer train "
            f"--resume {folder}"
        ) from None
    model.eval()
    losses = [record["held_out_loss"] for record in read_metrics(folder) if "held_out_loss" in record]
    return Result(
        folder, model, prepared.tokenizer, state.step, losses[0] if losses else None, state.best_loss, state.best_step,
        state.seconds, peak_memory(),
    )  # fmt: skip


def _tell(forecast: Forecast, folder: Path, progress: RunProgress) -> None:
    for sentence in forecast.sentences:
        progress.note(sentence)
    if forecast.record is not None:
        write_text(folder / PLAN, json.dumps(forecast.record, indent=2) + "\n")


def _largest_step(batches: Batches, total: int, config: TrainConfig, loss: Loss) -> list[Tokens]:
    """The rows of the step with the most tokens in a pass, of all epochs: each puts other rows together."""
    size = config.micro_batch_size or config.batch_size

    def largest(rows: list[Tokens]) -> int:
        passes = (rows[start : start + size] for start in range(0, len(rows), size))
        return max(tokens_gone_through(some, loss.kind, loss.how.packed) for some in passes)

    return max(map(batches.rows, range(total)), key=largest)


def _refuse_other_schedule(allocator: Allocator, total: int) -> None:
    """Raises ConfigError for an attached AdaLoRA adapter whose ranks would be taken over other steps than the run's."""
    if not allocator.fixed and (allocator.step or allocator.config.total_steps != total):
        raise ConfigError(
            f"The attached AdaLoRA adapter has taken {allocator.step} of total_steps = {allocator.config.total_steps}, "
            f"and the run takes {total} from the start; attach it with total_steps={total}, or give "
            f"steps={allocator.config.total_steps} to a new one."
        )


def _optimizer(config: TrainConfig, parameters: list[Tensor]) -> torch.optim.Optimizer:
    """Either takes the same steps, to the last bit, but for states in 8 bits."""
    rate, decay = config.learning_rate, config.weight_decay
    if config.optimizer == "paged-adamw":
        return PagedAdamW(
            parameters, rate, weight_decay=decay, folder=config.output, resident=config.optimizer_memory,
            bits=config.optimizer_bits,
        )  # fmt: skip
    return torch.optim.AdamW(parameters, rate, weight_decay=decay, fused=True)


def _write_result(folder: Path, prepared: Prepared, state: State) -> None:
    """adapter/ is the best one where held-out rows chose one, else the last; the model is left with it, too.

    So is model/, where its own weights were trained."""
    best, model = folder / BEST, prepared.model
    if prepared.config.trains_own_weights:
        if state.best_loss is not None and state.best_step != state.step:
            restore_trained(model, best)
        write_model(model, prepared.tokenizer, folder / MODEL)
        return
    if state.best_loss is None:
        write_adapter(model, folder / ADAPTER)
        return
    with atomic_folder(folder / ADAPTER) as temporary:
        shutil.copytree(best, temporary, dirs_exist_ok=True, ignore=shutil.ignore_patterns("step"))
    if state.best_step != state.step:
        restore_trained(model, best)


def _introduce(
    progress: RunProgress, prepared: Prepared, trained: str, rows: int, held_out: int, total: int, state: State
) -> None:
    progress.note(f"{prepared.config.model}, {prepared.config.storage}: {trained}")
    progress.note(f"{rows:,} rows to train on, {held_out:,} held out; {total:,} steps of {prepared.config.batch_size}")
    if state.step:
        progress.note(f"Resumed after step {state.step}.")


def _not_found_again(name: str) -> list[str]:
    """What the user should know of a model that came loaded."""
    try:
        resolve(name)
    except ModelError:
        return [f"{name} is no name that load finds, so this run can be neither resumed nor evaluated from its folder."]
    return []


def _options_of(model: nn.Module, tokenizer: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The options that a loaded model answers itself."""
    if tokenizer is None:
        raise ConfigError("train(model, tokenizer, …) needs the tokenizer, too, when the model is loaded already.")
    record = adapters_of(model)
    options: dict[str, Any] = {
        "model": getattr(model, "name_or_path", "") or type(model).__name__,
        **storage_of(model),
    }
    if record.configs:
        if len(record.active) != 1:
            raise ConfigError(f"train needs one active adapter; {len(record.active)} are. Activate one.")
        config = record.configs[record.active[0]]
        both = sorted(set(given) & set(type(config).model_fields))
        if both:
            raise ConfigError(f"The model has an adapter attached, so its options cannot be given: {', '.join(both)}.")
        options |= {name: getattr(config, name) for name in type(config).model_fields if name != "total_steps"}
        options["method"] = "adalora" if isinstance(config, AdaLoRA) else "lora"
        if isinstance(config, AdaLoRA) and config.budget is not None:
            del options["target_rank"]  # which follows from it
    return options


def _refuse_unknown_tokens(model: Any, rows: list[Tokens]) -> None:
    embedding = model.get_input_embeddings()
    row = max(rows, key=lambda row: max(row.ids))
    if max(row.ids) >= embedding.weight.shape[0]:
        raise ModelError(
            f"{row.where} holds token {max(row.ids)}, but the model's embedding has {embedding.weight.shape[0]} rows: "
            f"the tokenizer is another model's, or lacks model.resize_token_embeddings(len(tokenizer))."
        )


def _digest(rows: list[Tokens]) -> str:
    text = json.dumps([(row.ids, row.labels) for row in rows])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _rows(prepared: Prepared) -> dict[str, Any]:
    """What the rows were, so that the run's model is opened without them."""
    return {
        "shape": prepared.shape,
        "train": len(prepared.train),
        "held_out": len(prepared.held_out),
        "conversations": any(example.messages for example in prepared.train),
        "classes": list(prepared.renderer.classes),
    }
