"""A run from its options to its folder, from top to bottom; and a run that goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, overload

import torch
from rich.console import Console
from torch import nn

from veneer.data.forms import FORMS, MODES
from veneer.data.memory import write_rows
from veneer.data.read import Row
from veneer.device import CPU, device_of, facts_of_device
from veneer.environment import changed, environment
from veneer.errors import ConfigError, TrainingError, did_you_mean
from veneer.files import atomic_file, write_text
from veneer.frozen.layers import without_codes
from veneer.options import shows
from veneer.runs.begin import Begun, begin, notes_on, options_of
from veneer.runs.finish import Result, finish, result_of
from veneer.runs.folder import RunFolder
from veneer.runs.go_on import nothing_left, patience_again
from veneer.runs.learned import HeldOutLabels, advice, write_advice
from veneer.runs.memory import Outlook, PlanAfterFirstStep, Process, look_before_loading, look_before_training
from veneer.runs.own_metrics import HeldOutMetrics
from veneer.runs.own_tokens import keep_tokenizer
from veneer.runs.placing import place_of_run
from veneer.runs.preflight import check_new_run, check_writable
from veneer.runs.prepare import Prepared, prepare, take_given
from veneer.runs.reference import compute_reference, write_reference
from veneer.runs.start_options import with_start_options
from veneer.terminal import terminal
from veneer.threads import said
from veneer.training.automatic import sentence
from veneer.training.callbacks import Callback
from veneer.training.checkpoint import forget_lost_best, load_checkpoint, save_checkpoint
from veneer.training.config import TrainConfig
from veneer.training.fused import fused_passes
from veneer.training.interrupt import stop_requests
from veneer.training.loop import Run, finished, train_loop
from veneer.training.metrics import Metrics
from veneer.training.progress import RunProgress, counted
from veneer.training.recompute import recomputed
from veneer.training.state import State
from veneer.training.trackers import refuse_missing, trackers
from veneer.updates.base_file import save_base
from veneer.updates.reached import reports
from veneer.updates.record import adapters_of, untrained

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from veneer.runs.arguments import ResumeArguments, TrainArguments

# What a resumed run may change: nothing that would make its past another run's.
RESUMABLE = (
    *("steps", "epochs", "learning_rate", "schedule", "warmup", "weight_decay", "clip", "micro_batch_size"),
    *("gradient_checkpointing", "evaluate_every", "patience", "checkpoint_every", "keep_checkpoints"),
    *("optimizer", "optimizer_memory", "memory", "check_memory", "device"),
)


_TRAINING = Lock()  # held while a run trains


@dataclass(frozen=True)
class Watchers:
    """What a run reports to while it trains, and whether held-out rows are measured on the way."""

    console: Console
    callbacks: Sequence[Callback] = ()
    on_the_way: bool = True

    def say(self, sentence: str) -> None:
        self.console.print(sentence, highlight=False, markup=False, soft_wrap=True)


@overload
def train(
    model: Any = None, tokenizer: Any = None, *, console: Console | None = None, callbacks: Sequence[Callback] = (),
    on_the_way: bool = True, **options: Unpack[TrainArguments],
) -> Result: ...  # fmt: skip
@overload
def train(
    model: Any = None, tokenizer: Any = None, *, config: TrainConfig, console: Console | None = None,
    callbacks: Sequence[Callback] = (), on_the_way: bool = True,
) -> Result: ...  # fmt: skip
@shows(TrainConfig, [name for name in TrainConfig.model_fields if name != "model"])
def train(
    model: Any = None, tokenizer: Any = None, *, config: TrainConfig | None = None, console: Console | None = None,
    callbacks: Sequence[Callback] = (), on_the_way: bool = True, **options: Any,
) -> Result:  # fmt: skip
    """Train an adapter; the options are `TrainConfig`'s, ``data`` and ``output`` the ones without a default.

    ``model``: a name or path, as for `load`; or a loaded model, with its tokenizer, whose active adapter is trained,
    or which gets the one that the options describe. ``data``: a path or name, or rows in memory: a list of dicts, a
    ``datasets.Dataset``, a pandas or polars frame, or a list of these; rows in memory are written to the run's folder,
    so that the run can be resumed and evaluated. ``callbacks`` get a record of every step and evaluation.
    ``on_the_way``: whether the held-out loss is measured before, during and after the steps; the rows are kept from
    training in any case.

    Raises VeneerError: ConfigError, ModelError, DataError and TargetError before anything is written, TrainingError
    when the run cannot fit, cannot go on, or when another process trains into the same folder.

    Example:
        >>> result = veneer.train("tiny", data="rows.jsonl", output="runs/first", steps=2, rank=4, console=quiet)
        >>> result.steps, result.written.name
        (2, 'adapter')
    """
    loaded = model if isinstance(model, nn.Module) else None
    given: dict[str, list[Row]] = {}
    if config is None:
        if loaded is not None:
            options = {**options_of(loaded, tokenizer, options), **options}
        elif model is not None:
            options["model"] = str(model)
        options, given = take_given(options)
        if loaded is not None and options.get("adapter") is not None:
            raise ConfigError(
                f"adapter = {options['adapter']} is for a model that is named; put it on the loaded one, "
                f"veneer.load_adapter(model, {str(options['adapter'])!r}, trainable=True), and train that."
            )
        config = TrainConfig(**with_start_options(options, TrainConfig))
    elif config.adapter is not None:
        config = TrainConfig(**with_start_options(config.model_dump(exclude_unset=True), TrainConfig))
    refuse_missing(config)
    folder = RunFolder(config.output)
    check_writable(folder.path)
    with folder.held(), _alone():
        check_new_run(folder)
        process = Process.now(loaded)
        device, said_of_device = (CPU, []) if loaded is not None else place_of_run(folder, config, given)
        if loaded is None:
            look_before_loading(config, process, device)
        prepared = prepare(config, loaded, tokenizer, given, device=device)
        prepared.notes += said_of_device
        if loaded is not None:
            prepared.notes += notes_on(config.model)
        return _train(prepared, None, process, Watchers(console or terminal(), callbacks, on_the_way))


@shows(TrainConfig, RESUMABLE)
def resume(
    folder: str | Path, *, console: Console | None = None, callbacks: Sequence[Callback] = (), on_the_way: bool = True,
    **over: Unpack[ResumeArguments],
) -> Result:  # fmt: skip
    """Go on with a run from its latest checkpoint, or from the start when it has none yet.

    It ends in the same adapter, to the last bit, as if it had never stopped. ``over`` changes options for the rest;
    ``callbacks`` and ``on_the_way`` as in `train`.
    Raises TrainingError when there is no run, another process trains it, its rows have changed, or its checkpoint is
    damaged.

    Example:
        >>> result = veneer.train("tiny", data="rows.jsonl", output="runs/short", steps=2, console=quiet)
        >>> veneer.resume("runs/short", steps=3, console=quiet).steps
        3
    """
    run = RunFolder(folder)
    run.refuse_missing()
    for name in over:
        if name not in RESUMABLE:
            raise ConfigError(
                f"{name} cannot be changed when a run is resumed; these can: {', '.join(RESUMABLE)}."
                f"{did_you_mean(name, RESUMABLE)}"
            )
    config = run.config(**over)
    refuse_missing(config)
    check_writable(run.path)
    with run.held(), _alone():
        run.tidy()
        process = Process.now()
        device, said_of_device = place_of_run(run, config, {})
        look_before_loading(config, process, device)
        watchers = Watchers(console or terminal(), callbacks, on_the_way)
        more = bool({"steps", "epochs"} & over.keys())
        prepared = prepare(config, device=device)
        prepared.notes += said_of_device
        return _train(prepared, run.latest_checkpoint(), process, watchers, more=more)


@contextmanager
def _alone() -> Iterator[None]:
    """Inside, no other run begins in this process: they would seed and draw from one random state, and end in other
    bytes."""
    if not _TRAINING.acquire(blocking=False):
        raise TrainingError(
            "Another run trains in this process, and both would draw from one random state; wait until it ends, or "
            "train in a process of its own."
        )
    try:
        yield
    finally:
        _TRAINING.release()


def _train(
    prepared: Prepared, checkpoint: Path | None, process: Process, watchers: Watchers, *, more: bool = False
) -> Result:  # fmt: skip
    """Begin, look at the memory, restore, take the steps, finish."""
    begun = begin(prepared, lambda rows: counted(watchers.console, rows, "tokenising rows"))
    outlook = look_before_training(begun, process)
    compute_reference(begun, watchers.say, resumed=checkpoint is not None, measures=watchers.on_the_way)
    state = _restored(begun, checkpoint, more)
    with _a_full_disk_explained(begun.folder):
        labels = HeldOutLabels(
            begun.model, prepared.renderer, prepared.train, prepared.held_out, begun.config.batch_size
        )
        measures = HeldOutMetrics(begun.model, prepared.renderer, prepared.held_out, begun.config, labels)
        _write_beginning(begun, state, labels, new=checkpoint is None)
        # Closed however the run ends, and with it the lock that says it goes on.
        with closing(Metrics(begun.folder.metrics_file, begun.folder.tensorboard, state.step)) as metrics:
            _take_steps(begun, state, metrics, outlook, process, watchers, labels, measures)
            finish(begun, state)
            records = begun.folder.metrics()
            warnings = (*untrained(begun.model),)
            if watchers.on_the_way:
                warnings += advice(begun.config, labels, records, state.best_step)
            write_advice(begun.folder, warnings)
    for note in warnings:
        watchers.say(note)
    return result_of(begun, state, warnings, labels.largest if labels.rows else None)


def _restored(begun: Begun, checkpoint: Path | None, more: bool) -> State:
    """Where the run is: at its start, or where its checkpoint was written; ``more``: steps are asked for, so that a run
    goes on that patience had ended."""
    state = State(data=begun.digest())
    if checkpoint is None:
        return state
    saved = load_checkpoint(checkpoint, begun.model, begun.optimizer)
    if saved.data != state.data:
        raise TrainingError(
            f"The rows of {begun.config.data} are not those that {begun.folder} was started with, so it cannot go on "
            f"as the same run; restore them, or start a new run."
        )
    forget_lost_best(begun.folder.best, saved)
    if patience_again(begun.config, saved, begun.total, asked=more):
        begun.prepared.notes.append(f"Patience had ended this run after step {saved.step}; it counts from there again.")
        save_checkpoint(begun.folder.checkpoints, begun.model, begun.optimizer, saved, begun.config.keep_checkpoints)
    elif said := nothing_left(begun.folder, begun.config, saved, begun.total):
        begun.prepared.notes.append(said)
    return saved


def _write_beginning(begun: Begun, state: State, labels: HeldOutLabels, *, new: bool) -> None:
    """The files of a run's beginning, those that the seed cannot give again before config.yaml makes it a run."""
    folder, model = begun.folder, begun.model
    own_base = bool(adapters_of(model).changed_base)
    if own_base:
        save_base(model, begun.prepared.tokenizer, folder.base)
    start = begun.prepared.start
    perhaps = begun.prepared.came_loaded or (start is not None and start.tokenizer() is not None)
    own_tokens = perhaps and keep_tokenizer(folder, begun.prepared.tokenizer, model.name_or_path)
    if (begun.with_adapter or own_base or own_tokens) and new:
        save_checkpoint(folder.checkpoints, model, begun.optimizer, state, begun.config.keep_checkpoints)
    if start is not None and new:
        start.keep(folder)
    for name, rows in begun.prepared.given.items():
        with atomic_file(name) as temporary:
            write_rows(rows, temporary)
    if begun.config.template not in (*MODES, *FORMS):
        write_text(folder.template_file, str(begun.prepared.tokenizer.chat_template))
    write_reference(begun)
    begun.prepared.config.write(folder.config_file)
    counted = {
        "steps": begun.total, "chosen": begun.steps.chosen, "largest_class": labels.largest if labels.rows else None,
        "tokens": model.get_input_embeddings().weight.shape[0], **folder.working_folder(),
    }  # fmt: skip
    write_text(folder.rows_file, json.dumps({**begun.prepared.facts(), **counted}, indent=2) + "\n")
    around = environment(torch.get_num_threads()) | facts_of_device(device_of(model))
    if new or not folder.environment_file.is_file():  # else it says where the run began
        write_text(folder.environment_file, json.dumps(around, indent=2) + "\n")
    begun.prepared.notes += changed(folder.environment_file, around)


def _take_steps(
    begun: Begun, state: State, metrics: Metrics, outlook: Outlook | None, process: Process, watchers: Watchers,
    labels: HeldOutLabels, measures: HeldOutMetrics,
) -> None:  # fmt: skip
    """The steps that are left; ``outlook`` is None where there is memory enough to plan after the first one."""
    config, folder, model = begun.config, begun.folder, begun.model
    again = None if config.gradient_checkpointing else outlook.recomputed if outlook else 0
    with (
        RunProgress(watchers.console, begun.total, state.step) as progress,
        stop_requests() as stop,
        recomputed(model, again),
        fused_passes(model),
        reports(adapters_of(model).reached.values(), progress.note),
        begun.loss.attention(),
        trackers(config) as tracked,
    ):
        _introduce(progress, begun, state, labels)
        for said in measures.sentences(config.best_by) if watchers.on_the_way else []:
            progress.note(said)
        callbacks: list[Callback] = [progress]
        if outlook is None:
            callbacks.append(PlanAfterFirstStep(begun, process, progress.note))
        else:
            outlook.write(folder, progress.note)
        run = Run(
            config, folder.path, folder.checkpoints, folder.best, model, begun.loss, begun.batches,
            begun.held_out if watchers.on_the_way else [], begun.optimizer, begun.total, metrics, stop,
            begun.allocator, [*callbacks, *tracked, *watchers.callbacks], accuracy=labels.accuracy,
            metrics_of=measures.measured, higher_is_better=measures.higher_is_better(config.best_by),
        )  # fmt: skip
        if not finished(run, state):
            train_loop(run, state)


def _introduce(progress: RunProgress, begun: Begun, state: State, labels: HeldOutLabels) -> None:
    config, prepared = begun.config, begun.prepared
    progress.note(f"{config.model}, {config.storage}: {begun.trained.total}")
    if begun.trained.left_out:
        progress.note(begun.trained.left_out)
    if dense := without_codes(begun.model):
        progress.note(dense)
    progress.note(begun.steps.counts())
    if chosen := sentence(prepared.config, begun.steps.chosen):
        progress.note(chosen)
    if labels.rows:
        measured = "" if len(labels.rows) == len(begun.held_out) else f", measured on {len(labels.rows)} held-out rows"
        progress.note(
            f"{len(labels.labels)} labels{measured}; the largest is {100 * labels.largest:.1f} % of the rows."
        )
    if state.step:
        progress.note(f"Resumed after step {state.step}.")
    reported = begun.steps.sentences(prepared.renderer.max_length)
    for note in said() + prepared.notes + reported:
        progress.note(note)


@contextmanager
def _a_full_disk_explained(folder: RunFolder) -> Iterator[None]:
    """Inside, a file that cannot be written ends the run with what is saved and how to go on."""
    try:
        yield
    except OSError as error:
        last = folder.latest_checkpoint()
        good = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
        raise TrainingError(
            f"{folder} cannot be written to ({error.strerror or error}); {good}. Make room, then: veneer train "
            f"--resume {folder}"
        ) from None
