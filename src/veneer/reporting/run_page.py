"""The page of a run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open

from veneer.errors import AdapterFileError
from veneer.evaluation.classes import HEAD, Classes
from veneer.reporting.charts import displayed, gigabytes, run_charts
from veneer.reporting.heatmap import NO_LAYER, RankMap, ranks_of
from veneer.reporting.loading import recipes
from veneer.reporting.page import render
from veneer.runs.facts import Began
from veneer.runs.history import RunHistory
from veneer.runs.start import started_from
from veneer.training.progress import clock
from veneer.updates.config import AdaLoRA, LoRA
from veneer.updates.peft_config import from_peft

_SHADES = 10  # the darkest one's number in page.css
_MEASURES = {
    "loss": "loss (mean of a learned token, nats)", "perplexity": "perplexity",
    "choice_accuracy": "choice accuracy", "exact_match": "exact match",
    "preferred": "chosen likelier than rejected", "micro_f1": "F1 over all rows and labels (micro)",
    "macro_f1": "mean F1 of the labels (macro)",
}  # fmt: skip
_NUMBERS = {
    "mse": "mean squared error", "mae": "mean absolute error", "r2": "R²", "pearson": "Pearson correlation",
    "spearman": "Spearman correlation",
}  # fmt: skip
_SHARES = ("choice_accuracy", "exact_match", "preferred", "micro_f1", "macro_f1")


@dataclass(frozen=True)
class Heat:
    """A rank map as the template's table has it: rows of (layer, rank of each kind)."""

    kinds: list[str]
    layers: list[int]
    rows: list[tuple[str, list[int | None]]]
    largest: int
    count: int
    uniform: bool

    @classmethod
    def of(cls, ranks: dict[str, int]) -> Heat:
        drawn = RankMap.of(ranks)
        rows: list[tuple[str, list[int | None]]] = [
            ("–" if layer == NO_LAYER else str(layer), [drawn.cells.get((layer, kind)) for kind in drawn.kinds])
            for layer in drawn.layers
        ]
        return cls(drawn.kinds, drawn.layers, rows, drawn.largest, len(ranks), len(set(ranks.values())) == 1)

    def shade(self, rank: int) -> int:
        return round(_SHADES * rank / max(self.largest, 1))


def run_page(path: Path) -> str:
    """The HTML of the run in ``path``, whatever there is of it. Raises ConfigError for a damaged config.yaml."""
    run = RunHistory.read(path)
    shapes = _shapes(run)
    config = _adapter_config(run) if shapes else None
    ranks = ranks_of(shapes, config) or run.ranks
    return render(
        "run.html", run_charts(run), run=run, state=_state(run), began=_began(run), tiles=_tiles(run, shapes),
        changed=_pairs(run.config.changed()), options=_pairs(run.config.model_dump()),
        machine=_pairs(run.environment), rows=_rows(run),
        memory=_memory(run), heat=Heat.of(ranks) if ranks else None, rank_note=_rank_note(run, ranks, bool(shapes)),
        scores=_scores(run.evaluation), trained=_trained(run), evaluate=f"veneer evaluate {run.folder}",
        **_by_label(run.evaluation, run.notes), **_examples(run.evaluation), measured_on=_measured_on(run.evaluation),
        recipes=recipes(run, ranks) if config else [], no_recipes=_no_recipes(run),
    )  # fmt: skip


def _shapes(run: RunHistory) -> dict[str, tuple[int, ...]]:
    """Tensor → shape of the run's adapter; only the file's head is read. Empty while there is none."""
    file = run.folder.adapter / "adapter_model.safetensors"
    if not run.has_adapter:
        return {}
    try:
        with safe_open(file, framework="numpy") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        run.notes.append(f"{file} could not be read ({error}).")
        return {}


def _adapter_config(run: RunHistory) -> LoRA | AdaLoRA | None:
    try:
        return from_peft(run.folder.adapter)
    except AdapterFileError as error:
        run.notes.append(str(error))
        return None


def _pairs(values: dict[str, Any]) -> list[tuple[str, str]]:
    return [(name, option_text(value)) for name, value in values.items()]


def _rows(run: RunHistory) -> list[tuple[str, str]]:
    titles = {
        "shape": "shape", "train": "trained on", "held_out": "held out", "problem": "asked for", "classes": "classes"
    }  # fmt: skip
    if run.rows.get("problem") == "regression":
        del titles["classes"]
    return [(title, displayed(run.rows[name])) for name, title in titles.items() if run.rows.get(name)]


def option_text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, dict)):
        return json.dumps(value, ensure_ascii=False) if value else "none"
    return str(value)


def _state(run: RunHistory) -> str:
    of = f" of {run.total:,}" if run.total is not None else ""
    where = f"after {run.step:,}{of} steps"
    return {
        "starting": "Starting: no step was measured yet.",
        "running": f"In progress, {where}. Make this page again to see more.",
        "stopped": f"Not finished: stopped {where}. Go on with: veneer train --resume {run.folder}",
        "finished": f"Finished {where}.",
    }[run.phase]


def _began(run: RunHistory) -> str:
    """The adapters that it started from, the first one first; nothing where there is none."""
    try:
        began = TypeAdapter(list[Began]).validate_python(run.rows.get("began", []))
    except ValidationError:
        run.notes.append("What rows.json says of the adapter that the run started from could not be read.")
        return ""
    return ", then ".join(map(started_from, began))


def _tiles(run: RunHistory, shapes: dict[str, tuple[int, ...]]) -> list[tuple[str, str, str]]:
    """(name, value, what to add) of the numbers that come first."""
    tiles = []
    if run.held_out:
        first, best = run.held_out[0], run.best()
        last = best or run.held_out[-1]
        more = f"the {_trained(run)} of step {best['step']:,} is kept" if best else f"at step {last['step']:,}"
        before = f"{first['held_out_loss']:.3f} → " if first["step"] == 0 and last is not first else ""
        tiles.append(("Held-out loss", f"{before}{last['held_out_loss']:.3f}", more))
    if run.accuracies:
        kept = next((record for record in run.accuracies if record is run.best()), run.accuracies[-1])
        largest = "" if run.largest_class is None else f", the largest class is {100 * run.largest_class:.1f} %"
        share = f"{100 * kept['held_out_accuracy']:.1f} %"
        tiles.append(("Held-out accuracy", share, f"at step {kept['step']:,}{largest}"))
    for name, value in _metrics(run).items():
        tiles.append((f"Held-out {name}", displayed(value), f"at step {(run.best() or run.held_out[-1])['step']:,}"))
    if run.rewards:
        kept = next((record for record in run.rewards if record is run.best()), run.rewards[-1])
        margin = kept.get("held_out_reward_margin")
        more = f"at step {kept['step']:,}" + ("" if margin is None else f", margin {margin:.3f}")
        tiles.append(("Rewards right", f"{100 * kept['held_out_reward_accuracy']:.1f} %", more))
    if shapes:
        count = sum(_size(shape) for shape in shapes.values())
        tiles.append(("Trained parameters", f"{count:,}", f"in {len(shapes):,} tensors"))
    if run.steps:
        tiles.append(("Time in steps", clock(sum(run.seconds())), f"{run.steps[-1]['tokens']:,} tokens"))
    if run.tokens_per_second is not None:
        tiles.append(("Tokens a second", f"{run.tokens_per_second:,.0f}", "median of the steps"))
    if run.peak_memory is not None:
        tiles.append(("Peak memory", gigabytes(run.peak_memory), "of the whole process"))
    return tiles


def _metrics(run: RunHistory) -> dict[str, float]:
    """Metric → its value of what is kept, or the latest."""
    if not run.held_out:
        return {}
    measured = (run.best() or run.held_out[-1]).get("held_out_metrics")
    return measured if isinstance(measured, dict) else {}


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def _memory(run: RunHistory) -> list[tuple[str, str]]:
    predicted, measured = run.predicted_peak, run.peak_memory
    absent = "not there: the run's folder holds no plan"
    rows = [
        ("predicted before the run", absent if predicted is None else gigabytes(predicted)),
        *((f"of it {name}", gigabytes(size)) for name, size in run.plan.get("terms", {}).items()),
        ("measured", "nothing yet" if measured is None else gigabytes(measured)),
    ]
    if predicted is not None and measured is not None:
        rows.append(("predicted over measured", f"{100 * (predicted / measured - 1):+.1f} %"))
    return rows


def _rank_note(run: RunHistory, ranks: dict[str, int], whole: bool) -> str:
    if not ranks:
        return "No ranks are known before the first evaluation, or the end of the run."
    if run.config.method == "adalora":
        given = f"AdaLoRA gave out {sum(ranks.values()):,} triplets among {len(ranks)} matrices"
        return f"{given}, as its adapter has them." if whole else f"{given}, at its latest evaluation."
    return ""


def _trained(run: RunHistory) -> str:
    return "trained model" if run.config.trains_own_weights else "adapter"


def _scores(evaluation: dict[str, Any]) -> list[list[str]]:
    if not evaluation:
        return []
    rows = []
    sides = [evaluation.get(side, {}) for side in ("base", "adapter")]
    for name, title in _MEASURES.items():
        if name == "macro_f1" and sides[1].get("micro_f1") is None:  # else it stands among the labels
            continue
        values = [side.get(name) for side in sides]
        if name == "loss" and sides[1].get("perplexity") is None:  # of no tokens
            title = "loss"
        if None not in values:
            rows.append([title, *(f"{100 * value:.1f} %" if name in _SHARES else displayed(value) for value in values)])
    for name, after in (sides[1].get("metrics") or {}).items():
        title = f"{name} (lower is better)" if name in evaluation.get("lower_is_better", []) else name
        rows.append([title, displayed((sides[0].get("metrics") or {}).get(name)), displayed(after)])
    for name, title in _NUMBERS.items():
        values = [(side.get("numbers") or {}).get(name) for side in sides]
        if values != [None, None]:
            rows.append([title, *("–" if value is None else displayed(value) for value in values)])
    return rows


def _by_label(evaluation: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """What was trained, label by label, and its confusion matrix; empty where the answers are no labels. What cannot be
    read is left out with a note."""
    nothing: dict[str, Any] = {"labels": [], "labels_head": [], "confusion": [], "confusion_head": []}
    values = evaluation.get("adapter", {}).get("classes")
    if not values:
        return nothing
    try:
        classes = TypeAdapter(Classes).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "all of them"
        notes.append(f"The scores of the labels in evaluation.json could not be read ({where}: {first['msg']}).")
        return nothing
    names = [score.label.strip() for score in classes.scores]
    return {
        "labels": classes.lines(), "labels_head": list(HEAD), "confusion": classes.confusion_lines(),
        "confusion_head": ["right", *names],
    }  # fmt: skip


def _measured_on(evaluation: dict[str, Any]) -> str:
    rows = f"{evaluation.get('rows', 0):,}"
    return f"{rows} rows of {evaluation['data']}" if evaluation.get("data") else f"{rows} held-out rows"


def _examples(evaluation: dict[str, Any]) -> dict[str, Any]:
    examples = evaluation.get("examples") or []
    how = (
        "Both answer as classifiers: with a class, labels or a number."
        if examples and examples[0].get("chosen")
        else "Both answer greedily; a long answer is cut."
    )
    nothing = (
        "These rows have no prompt to answer, so there are no examples."
        if "examples" in evaluation
        else "This evaluation kept no examples; measure again to have some."
    )
    return {"examples": examples, "how_answered": how, "no_examples": nothing}


def _no_recipes(run: RunHistory) -> str:
    if run.has_model:
        return f"This run trained the model's own weights: {run.folder.model} is a transformers folder."
    return f"There is no {_trained(run)} yet; the run writes it when it ends."
