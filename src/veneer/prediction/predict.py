"""A prediction from opened model and rows to its file: questions, rows predicted before, the others, the output."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from veneer.data.bad import BadRows
from veneer.data.columns import Reading
from veneer.data.labels import Renderer, longest_row
from veneer.data.questions import Questions, to_questions
from veneer.data.read import Row
from veneer.errors import ConfigError, DataError
from veneer.frozen.layers import computing_said
from veneer.generation.config import SamplingOptions
from veneer.generation.own_settings import not_followed
from veneer.generation.session import refuse_no_generator
from veneer.prediction.answers import Answers, Classes, Labels, Texts
from veneer.prediction.config import PredictOptions
from veneer.prediction.identity import identity
from veneer.prediction.output import Output, kept_columns
from veneer.prediction.partial import Partial, delete_partial, partial, partial_file
from veneer.prediction.progress import PredictionProgress
from veneer.prediction.result import Prediction, Predictions
from veneer.runs.opened import Opened, labels_of
from veneer.training.fused import fused_passes
from veneer.updates.record import adapters_of

_OF_TEXT = tuple(SamplingOptions.model_fields)


def refuse_taken_output(options: PredictOptions) -> Path | None:
    """The output's path. Raises DataError where its folder is missing, or it exists and is not to be replaced."""
    if options.output is None:
        return None
    path = Path(options.output)
    if not path.parent.is_dir():
        raise DataError(f"The folder of the output {path} does not exist; make it first: mkdir -p {path.parent}")
    if path.is_dir():
        raise DataError(f"The output {path} is a folder; name a file.")
    if path.exists() and not options.overwrite:
        raise DataError(f"{path} exists; choose another output, or give --overwrite to replace it.")
    return path


def predictions(
    opened: Opened, rows: list[Row], options: PredictOptions, console: Console, reading: Reading | None = None
) -> Predictions:
    """What ``opened`` answers to each row, read as ``reading`` says, and the output written if there is to be one.

    Raises VeneerError before anything is computed: ConfigError for options that do not fit the model, DataError for
    rows or an output that do not, ModelError for a row that the memory is too small for.
    """
    path = refuse_taken_output(options)
    renderer = _renderer(opened, options)
    bad = BadRows()
    questions = to_questions(rows, labelled=bool(opened.renderer.classes), reading=reading, bad=bad)
    if options.bad_rows == "stop":
        bad.refuse()
    elif not renderer.classes:
        questions = questions.only(renderer.usable(questions.items, bad))
    rows = questions.rows
    opened.model.eval()
    if options.system and not (renderer.template == "chat" or any(item.messages for item in questions.items)):
        raise ConfigError(
            "system goes into a chat template, and the rows are asked without one; leave it out, or give template chat."
        )
    answers = _answers(opened, renderer, questions, options)
    kept = kept_columns(rows, options.keep, answers.labels)
    output = Output(path, rows, kept) if path else None
    notes = [*computing_said(opened.model), *bad.sentences(), *_notes(questions, answers, renderer)]
    if isinstance(answers, Texts) and (note := not_followed(opened.model, options)):
        notes.append(note)
    for note in [*notes, _summary(rows, answers)]:
        console.print(note, highlight=False, markup=False, soft_wrap=True)
    with _kept(opened, rows, renderer, options, answers.labels, path) as there:
        reused = len(there.done)
        try:
            _compute(opened.model, answers, len(rows), there, console)
        except KeyboardInterrupt:
            if path and there.done:
                console.print(
                    f"Interrupted: {len(there.done):,} of {len(rows):,} rows are kept in {partial_file(path)}; the "
                    f"same command goes on from there.", highlight=False, markup=False, soft_wrap=True,
                )  # fmt: skip
            raise
        ordered = [there.done[number] for number in range(len(rows))]
        if output:
            output.write(ordered)
            delete_partial(output.path)
    return Predictions(kept, ordered, answers.labels, tuple(notes), path, reused)


def _compute(model: Any, answers: Answers, total: int, there: Partial | _Memory, console: Console) -> None:
    left = [number for number in range(total) if number not in there.done]
    with PredictionProgress(console, total, total - len(left)) as progress:
        if there.done:
            were = "row was" if len(there.done) == 1 else "rows were"
            progress.note(f"{len(there.done):,} {were} predicted before the interruption, and kept.")
        # Generation by the kernels has passes of its own.
        with nullcontext() if isinstance(answers, Texts) else fused_passes(model):
            for predicted in answers.of(left):
                there.add(predicted)
                progress.add(len(predicted))


@dataclass
class _Memory:
    """Rows that are kept nowhere else."""

    done: dict[int, Prediction]

    def add(self, predicted: list[tuple[int, Prediction]]) -> None:
        self.done.update(predicted)


@contextmanager
def _kept(
    opened: Opened, rows: list[Row], renderer: Renderer, options: PredictOptions, labels: tuple[str, ...],
    path: Path | None,
) -> Iterator[Partial | _Memory]:  # fmt: skip
    """Where predicted rows are kept until all are."""
    if path is None:
        yield _Memory({})
        return
    how: dict[str, Any] = {"labels": list(labels), "template": renderer.template, "max_length": renderer.max_length}
    how |= {"system": renderer.system} if renderer.system else {}
    how |= {} if renderer.problem == "classification" else {"problem": renderer.problem}
    if not labels and not renderer.classes:
        how |= options.sampling()
    known = identity(opened.model, adapters_of(opened.model).active, rows, how)
    with partial(path, known, overwrite=options.overwrite) as there:
        try:
            yield there
        finally:
            if not there.done:  # refused, or stopped before the first rows
                delete_partial(path)


def _renderer(opened: Opened, options: PredictOptions) -> Renderer:
    renderer, config = opened.renderer, opened.model.config
    positions = longest_row(2**62, config)
    known = getattr(renderer.tokenizer, "model_max_length", None)
    most = min(positions, known) if isinstance(known, int) else positions
    if options.max_length is not None and options.max_length > most:
        raise ConfigError(f"max_length = {options.max_length} is more than the {most} tokens that the model can take.")
    own = min(most, renderer.max_length) if opened.run or most > 2**20 else most
    limit = options.max_length or own
    made = replace(renderer, max_length=limit, template=options.template or renderer.template)
    return made if options.system is None else replace(made, system=options.system)


def _answers(opened: Opened, renderer: Renderer, questions: Questions, options: PredictOptions) -> Answers:
    model, items, tokens = opened.model, questions.items, options.batch_tokens
    if renderer.classes:
        _refuse_for_a_classifier(renderer, options)
        return Classes(model, renderer, items, tokens)
    refuse_no_generator("predict", model)
    labels = _labels(opened, items, options)
    if not labels:
        return Texts(model, renderer, items, tokens, options)
    asked = [name for name in _OF_TEXT if name in options.model_fields_set]
    if asked:
        raise ConfigError(
            f"{' and '.join(asked)} {'does' if len(asked) == 1 else 'do'} nothing where labels are chosen; leave out, "
            f"or give answer text."
        )
    return Labels(model, renderer, items, labels, tokens)


def _refuse_for_a_classifier(renderer: Renderer, options: PredictOptions) -> None:
    given = [name for name in ("labels", "template", "system", *_OF_TEXT) if name in options.model_fields_set]
    if options.answer == "text" or given:
        what = "answer text" if options.answer == "text" else given[0]
        does = "gives a number" if renderer.problem == "regression" else "chooses among its own classes"
        raise ConfigError(f"The model is a classifier, to which {what} does nothing: it {does}.")


def _labels(opened: Opened, questions: Sequence[Any], options: PredictOptions) -> list[str]:
    """The labels as they follow a prompt; none where text is wanted."""
    if options.answer == "text":
        if options.labels:
            raise ConfigError("labels are given, and answer is text; leave one of them out.")
        return []
    if not options.labels:
        known = _labels_of_run(opened, options)
        if options.answer == "label" and not known:
            raise ConfigError("answer is label, and the model's labels are not known; name them with --labels a,b.")
        return known
    # As a person writes them: a space comes between a prompt and what follows it, unless it ends in one.
    spaced = not any(question.messages or (question.prompt or " ")[-1].isspace() for question in questions)
    return [f" {label}" if spaced and label == label.strip() else label for label in options.labels]


def _labels_of_run(opened: Opened, options: PredictOptions) -> list[str]:
    if opened.run is None:
        return list(opened.choices)
    try:
        return labels_of(opened.run)
    except DataError as error:
        raise DataError(
            f"{error} Without them the labels of {opened.run} are not known; name them with --labels, or give --answer "
            f"text."
        ) from None


def _notes(questions: Questions, answers: Answers, renderer: Renderer) -> list[str]:
    notes = [questions.note] if questions.note else []
    if questions.answers:
        notes.append(f"The rows have answers ({questions.answers}), which are not read.")
    if answers.cut:
        shown = ", ".join(answers.cut[:3]) + (", …" if len(answers.cut) > 3 else "")
        part = "beginning" if renderer.classes else "end"
        notes.append(
            f"{len(answers.cut)} {'prompt is' if len(answers.cut) == 1 else 'prompts are'} longer than max_length = "
            f"{renderer.max_length} tokens ({shown}): the {part} is kept."
        )
    return notes


def _summary(rows: list[Row], answers: Answers) -> str:
    shown = ", ".join(answers.labels[:8]) + (", …" if len(answers.labels) > 8 else "")
    other = "texts" if isinstance(answers, Texts) else "numbers"
    what = f"{len(answers.labels)} labels ({shown})" if answers.labels else other
    return f"{len(rows):,} {'row' if len(rows) == 1 else 'rows'}, {what}. {answers.room.sentence}"
