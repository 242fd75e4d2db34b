"""What is in a model, an adapter, a run, a folder of runs, or rows."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from itertools import chain, groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from veneer.commands.config import InspectOptions
from veneer.commands.inspect_runs import holds_nothing_known, listed, refusal_of_no_runs, runs_in
from veneer.data.bad import BadRows
from veneer.data.bbc import BBC_TOPICS
from veneer.data.classes import counted_classes, spread_of_numbers
from veneer.data.columns import NUMBERS, Reading
from veneer.data.files import kind_of
from veneer.data.folders import is_data_file
from veneer.data.formats import Example, Examples, class_of, labels_in
from veneer.data.kept import Kept
from veneer.data.labels import IGNORE, Renderer, Tokens
from veneer.data.problems import number_of
from veneer.data.sources import sources_of
from veneer.errors import ConfigError, DataError
from veneer.frozen.compute import computing
from veneer.generation.decoder import generates_by
from veneer.generation.likelihood import choices_of
from veneer.kernels.serving import serving, serving_line
from veneer.models.composite import left_out_of
from veneer.models.load import load
from veneer.models.packaged import PACKAGED_MODELS
from veneer.reporting.heatmap import RankMap, ranks_of
from veneer.reporting.study_page import read_study
from veneer.reporting.table import JSON_NAME as STUDY
from veneer.runs.facts import Facts, read_facts
from veneer.runs.folder import RunFolder
from veneer.runs.prepare import renderer_of, tokenizer_of_rows
from veneer.runs.rows import read_examples
from veneer.training.fused import fused_types
from veneer.training.state import checkpoints_in
from veneer.updates.adapter_file import read_tensors
from veneer.updates.config import AdaLoRA
from veneer.updates.peft_config import CONFIG_NAME as ADAPTER_CONFIG
from veneer.updates.peft_config import from_peft, read_fields
from veneer.updates.select import adaptable_kinds, head_names, modules_of


@dataclass(frozen=True)
class Inspected:
    """What the command shows of a source, as JSON values, and as lines for a person."""

    values: dict[str, Any]
    lines: list[Text | str]

    def as_json(self) -> dict[str, Any]:
        return self.values

    def show(self, console: Console) -> None:
        for line in self.lines:
            console.print(line, highlight=False, markup=False, soft_wrap=True)


def inspect_source(source: str, options: InspectOptions) -> Inspected:
    """Look at ``source`` by what it is: a run, an adapter folder, a study, a folder of runs, rows, else a model."""
    path = Path(source)
    if options.png is not None and not (path / ADAPTER_CONFIG).is_file():
        raise ConfigError(f"--png draws the ranks of an adapter, and {source} is no adapter folder.")
    if RunFolder(path).exists:
        return _run(path)
    if (path / ADAPTER_CONFIG).is_file():
        return _adapter(path, options.png)
    if (path / STUDY).is_file():
        return _study(path)
    if options.model is None and path.is_dir() and runs_in(path):
        values, lines = listed(path)
        return Inspected(values, [*lines])
    if holds_nothing_known(path):
        raise DataError(refusal_of_no_runs(path))
    if kind_of(path) or source == BBC_TOPICS or (path.is_dir() and _holds_rows(path)) or len(sources_of(source)) > 1:
        return _rows(source, options)
    if options.model is not None and source not in PACKAGED_MODELS:
        return _rows(source, options)
    return _model(source)


def _holds_rows(path: Path) -> bool:
    known = ("state.json", "dataset_dict.json")
    return any((path / name).is_file() for name in known) or (
        not (path / "config.json").is_file() and any(map(is_data_file, path.iterdir()))
    )


def _study(path: Path) -> Inspected:
    study = read_study(path)
    done = f"{len(study.get('runs', []))} runs, {'finished' if study.get('finished') else 'not finished'}"
    lines: list[Text | str] = [f"{'study':<24}{path}: {done}; veneer report {path}"]
    lines += [f"{name:<24}{study[name]}" for name in ("title", "model", "data", "date", "findings") if study.get(name)]
    return Inspected({"kind": "study", **study}, lines)


def _run(path: Path) -> Inspected:
    run = RunFolder(path)
    config, records = run.config(), run.metrics()
    steps = [record for record in records if "loss" in record]
    held_out = [(record["step"], record["held_out_loss"]) for record in records if "held_out_loss" in record]
    done = steps[-1]["step"] if steps else 0
    finished = run.result() is not None
    changed = config.changed()
    values = {
        "kind": "run", "model": config.model, "data": config.data, "steps": done, "finished": finished,
        "options": changed, "held_out_loss": held_out, "checkpoints": [p.name for p in checkpoints_in(run.checkpoints)],
    }  # fmt: skip
    lines: list[Text | str] = [
        f"{'run':<24}{path}: {done} steps, {'finished' if finished else f'not finished: veneer train --resume {path}'}",
        *(f"{name:<24}{value}" for name, value in changed.items()),
        *(f"held-out loss after step {step}: {loss:.4f}" for step, loss in held_out),
    ]
    return Inspected(values, lines)


def _adapter(path: Path, png: str | None) -> Inspected:
    config, tensors = from_peft(path), read_tensors(path)
    shapes = {key: tuple(tensor.shape) for key, tensor in sorted(tensors.items())}
    ranks = ranks_of(shapes, config)
    if isinstance(config, AdaLoRA):
        rank = config.initial_rank
        said = f"AdaLoRA, {sum(ranks.values())} of {rank} × {len(ranks)} triplets"
    else:
        rank, said = config.rank, f"rank {config.rank}"
    base = read_fields(path).get("base_model_name_or_path")
    count = sum(tensor.numel() for tensor in tensors.values())
    facts = read_facts(path)
    values = {
        "kind": "adapter", "base": base, "rank": rank, "alpha": config.alpha, "parameters": count, "ranks": ranks,
        "tensors": {key: list(shape) for key, shape in shapes.items()},
        "trained": facts.as_json() if facts else None,
    }  # fmt: skip
    lines: list[Text | str] = [
        f"adapter {path} for {base}: {said}, alpha {config.alpha:g}, {count:,} parameters",
        *(_trained(facts) if facts else []),
        *(f"{key}  {' × '.join(map(str, shape))}" for key, shape in shapes.items()),
    ]
    if ranks:
        drawn = RankMap.of(ranks)
        lines += ["ranks:", *drawn.lines()]
        if png is not None:
            drawn.write_png(png, said)
            lines.append(f"heat map written to {png}")
    return Inspected(values, lines)


def _trained(facts: Facts) -> list[str]:
    """What veneer.json says of how the adapter was trained and is asked."""
    base, rows, prompts = facts.base, facts.rows, facts.prompts
    asked = "classes: " + ", ".join(facts.classes) if facts.classes else (
        f"questions are asked {'in the chat template' if prompts.chat else 'as they are'}"
    )  # fmt: skip
    return [
        f"trained over {base.name} ({base.kind}, {base.parameters:,} parameters) in {facts.kept['storage']}",
        f"on {rows.train:,} rows of the shape {rows.shape}, {facts.steps:,} steps of method {facts.method}",
        asked,
        *([f"system message: {prompts.system}"] if prompts.system else []),
        *(f"{name} of held-out rows: {before:.4g} → {after:.4g}" for name, (before, after) in facts.scores.items()
          if before is not None and after is not None),
    ]  # fmt: skip


_LIKE = {"fp32": "fp32", "bf16": "16 bits", "nf4": "codes"}  # a storage → all that compute alike


def _model(source: str) -> Inspected:
    model, tokenizer = load(source, compute="fp32")
    modules = modules_of(model)
    heads = sorted(head_names(model, modules))
    kinds = adaptable_kinds(modules)
    count = model.num_parameters()
    computed = {storage: computing("auto", storage) for storage in _LIKE}
    values = {
        "kind": "model", "class": type(model).__name__, "parameters": count, "targets": kinds, "head": heads,
        "chat_template": bool(tokenizer.chat_template), "end_token": tokenizer.eos_token, "kernels": serving(),
        "compute": {storage: how.name for storage, how in computed.items()}, "fused": (fused := fused_types(model)),
        "generates_by": (by := generates_by(model)),
    }  # fmt: skip
    parts = left_out_of(model)
    lines: list[Text | str] = [
        f"{source}: {type(model).__name__}, {count:,} parameters",
        "modules that can be adapted (targets), and how many of each:",
        *(f"  {name:<24}{number}" for name, number in kinds.items()),
        *([f"not loaded, for text does not pass through them: {', '.join(parts)}"] if parts else []),
        f"head, left out of all-linear: {', '.join(heads) or 'none'}",
        f"chat template: {'yes' if tokenizer.chat_template else 'no'}; end token: {tokenizer.eos_token}",
        f"4-bit kernels on this CPU: {serving_line()}",
        *(f"compute: auto, for a base kept in {_LIKE[storage]}: {how}" for storage, how in computed.items()),
        f"fused while it trains: {', '.join(f'{number} {name}' for name, number in fused.items()) or 'nothing'}",
        f"generates by {by}",
    ]
    return Inspected(values, lines)


def _rows(source: str, options: InspectOptions) -> Inspected:
    bad = BadRows()
    examples = read_examples(source, Reading.of(options), bad)
    rows = len(examples.items) + len(examples.unlabelled)
    values: dict[str, Any] = {
        "kind": "rows", "rows": rows, "shape": examples.shape, "unused_columns": examples.unused,
        "columns": examples.columns,
    }  # fmt: skip
    lines: list[Text | str] = [f"{source}: {rows:,} rows of the shape {examples.shape}"]
    lines += [examples.read_as] * bool(examples.read_as)
    if examples.unused:
        lines.append(f"columns not used: {', '.join(examples.unused)}")
    lines += examples.left_out()
    if NUMBERS in examples.shape:
        lines.append(spread_of_numbers([*map(number_of, examples.items)]))
    elif labels := _labels(examples):
        values["labels"] = labels
        lines.append(f"labels: {counted_classes(labels)}")
    if "text/labels" in examples.shape:
        values["without_labels"] = none = sum(not labels_in(example) for example in examples.items)
        lines.append(f"a row may have several of these labels; {none:,} have none")
    if options.model is None:
        values["bad"] = bad.as_json()
        lines += _bad(bad)
        lines.append("Give --model M to see its tokens, and which of them are learned.")
        return Inspected(values, lines)
    model, tokenizer = load(options.model, compute="fp32")
    if type(model).__name__.endswith("ForSequenceClassification"):
        raise DataError(f"{options.model} is a classifier: of a row it learns the label, and no token.")
    tokenizer, notes = tokenizer_of_rows(tokenizer, options, examples.shape, model.config)
    lines += notes
    marked, row_lines = _marked(examples, renderer_of(model, tokenizer, options), options.rows, bad)
    return Inspected({**values, **marked, "bad": bad.as_json()}, [*lines, *_bad(bad), *row_lines])


def _bad(bad: BadRows) -> list[str]:
    """The bad rows: how many, why and where."""
    if not bad:
        return []
    rows = "bad row stops" if len(bad) == 1 else "bad rows stop"
    return [f"{len(bad):,} {rows} a run, unless bad_rows: leave-out:", *bad.lines()]


def _labels(examples: Examples) -> dict[str, int]:
    """Label → rows, where answers are labels: few, or in a column of that name."""
    if "text/labels" in examples.shape:
        return dict(Counter(sorted(chain.from_iterable(map(labels_in, examples.items)))))
    few = examples.shape == "text/label" or choices_of(examples.items)
    return dict(Counter(sorted(map(class_of, examples.items)))) if few else {}


def _answers(example: Example) -> list[Example]:
    """The answers of a row, one by one; of a row with a preference each with what it is."""
    if not example.is_judged:
        return [example]
    sides = [("good" if example.desirable else "bad", example)]
    if example.rejected is not None:
        sides = [("chosen", example), ("rejected", example.rejected)]
    return [replace(answer, where=f"{answer.where}, {what}", rejected=None) for what, answer in sides]


def _marked(
    examples: Examples, renderer: Renderer, rows: int, bad: BadRows
) -> tuple[dict[str, Any], list[Text | str]]:  # fmt: skip
    """The first rows with the learned part marked, and what becomes of all rows."""
    kept, report = renderer.all(Kept(answer for example in examples.items for answer in _answers(example)), bad=bad)
    longest = max(len(row.ids) for row in kept)
    values: dict[str, Any] = {
        "learned_tokens": report.learned, "longest": longest, "cut": report.cut,
        "left_out": report.left_out + report.dropped,
    }  # fmt: skip
    lines: list[Text | str] = [
        f"{report.learned:,} tokens are learned (marked ⟦…⟧); the longest row has {longest} tokens",
        *report.sentences(renderer.max_length),
    ]
    shown = []
    for row in kept[:rows]:
        pieces = [(renderer.tokenizer.decode(ids), learned) for ids, learned in _pieces(row, renderer.seq2seq)]
        shown.append({"where": row.where, "pieces": [{"text": text, "learned": learned} for text, learned in pieces]})
        line = Text(f"\n{row.where}\n", style="dim")
        for text, learned in pieces:
            line.append(f"⟦{text}⟧" if learned else text, style="bold green" if learned else "not dim")
        lines.append(line)
    return {**values, "examples": shown}, lines


def _pieces(row: Tokens, seq2seq: bool) -> list[tuple[list[int], bool]]:
    """Runs of tokens that are learned, or not."""
    if seq2seq:
        return [(row.ids, False), (row.labels, True)]
    pairs = zip(row.ids, row.labels, strict=True)
    runs = groupby(pairs, key=lambda pair: pair[1] != IGNORE)
    return [([token for token, _ in run], learned) for learned, run in runs]
