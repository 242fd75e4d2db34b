"""Whether a run with every option at its default learns as much as one with the best learning rate.

    make defaults

Three tasks as people have them, beside those that the rule of docs/studies/learning-rate.md was made from: two labels
for SmolLM2, six labels for MiniLM by each method, questions and answers for SmolLM2. Rows and output alone are given,
and the method; then the same with rates three times as high and as low, until the best is neither end. The score is of
rows that no run saw. A finished run is a line of results/defaults.jsonl and is not run again.
"""

from __future__ import annotations

import io
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from learning_rate import MINILM, RATED, SMOLLM2, Fields, asked, distinct, money, processor, score, sentiment

RESULT = Path(__file__).parent / "results" / "defaults.jsonl"
Case = tuple[str, str, str]  # task, model, method
Runs = dict[tuple[Case, str], dict[str, Any]]  # by case and rate; "auto" is one of them
CASES: tuple[Case, ...] = (
    ("two labels", SMOLLM2, "lora"),
    *(("six labels", MINILM, method) for method in ("lora", "adalora", "head", "full", "bias")),
    ("answers", SMOLLM2, "lora"),
)
SHORT = 850  # letters of an answer: longer ones are left out
SOURCES = {
    "commonsense": ("CommonsenseQA/validation", "question"), "science": ("OpenBookQA/test", "question"),
    "practice": ("PIQA/validation", "question"), "people": ("SIQA/test", "passage"),
    "translation": ("Translation/test", "sourceString"),
}  # fmt: skip


def _six() -> list[Fields]:
    """Where a sentence is from: five collections of questions and sentences, and reviews of films."""
    by_label = {
        label: distinct([{"text": row[field], "label": label} for row in asked(name)])
        for label, (name, field) in SOURCES.items()
    }
    by_label["film"] = [{**row, "label": "film"} for row in distinct(sentiment("movieReviewSnippets"))]
    return [row for rows in by_label.values() for row in rows[:350]]


TASKS: dict[str, tuple[Callable[[], list[Fields]], int, int]] = {  # rows to train on, and unseen ones
    "two labels": (lambda: sentiment("amazonReviewSnippets"), 700, 200),
    "six labels": (_six, 1500, 600),
    "answers": (lambda: [row for row in money() if len(row["output"]) <= SHORT], 200, 60),
}


def measure(case: Case, rate: str) -> dict[str, Any]:
    """Loss and accuracy on unseen rows, before and after; None after a run that diverged."""
    from rich.console import Console

    import veneer
    from veneer.errors import DivergedError
    from veneer.runs.folder import RunFolder

    task, model, method = case
    make, count, unseen = TASKS[task]
    rows = distinct(make())
    with tempfile.TemporaryDirectory() as folder:
        held = Path(folder, "unseen.jsonl")
        held.write_text("".join(f"{json.dumps(row)}\n" for row in rows[count : count + unseen]), encoding="utf-8")
        given: dict[str, Any] = {} if rate == "auto" else {"learning_rate": float(rate)}
        given |= {} if method == "lora" else {"method": method}
        started = time.monotonic()
        try:
            veneer.train(
                model=model, data=rows[:count], output=f"{folder}/run", console=Console(file=io.StringIO()), **given
            )
        except DivergedError:
            return {"loss": None, "accuracy": None}
        seconds = time.monotonic() - started
        chosen = RunFolder(f"{folder}/run").rows()["chosen"]
        scores = veneer.evaluate(f"{folder}/run", data=str(held), examples=0)
        base, after = scores.base, scores.adapter
    return {
        "loss": after.loss, "accuracy": after.choice_accuracy, "base_loss": base.loss,
        "base_accuracy": base.choice_accuracy, "chosen": chosen, "seconds": round(seconds, 1),
    }  # fmt: skip


def rates(runs: Runs, case: Case) -> Iterator[str]:
    """auto first; then rates around it, on to either side until the best is no longer an end."""
    yield "auto"
    middle, tried = float(runs[case, "auto"]["chosen"]["learning_rate"]), [0, -1, 1]
    of = lambda step: "auto" if step == 0 else f"{middle * 3**step:.2g}"  # noqa: E731
    yield from (of(step) for step in tried[1:])
    while True:
        best = max(tried, key=lambda step: score(runs[case, of(step)]))
        if best - 1 in tried and best + 1 in tried:
            return
        tried.append(best - 1 if best - 1 not in tried else best + 1)
        yield of(tried[-1])


def table(runs: Runs) -> str:
    """For each task, model and method: before, after with all defaults, with the best rate, and what lies between."""
    lines = [
        "| rows | model | method | chosen by `auto` | untrained | all defaults | best rate tried | there | gap |",
        "|---|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for case in CASES:
        of = {rate: run for (other, rate), run in runs.items() if other == case}
        if not of:
            continue
        ours, best = of["auto"], max(of, key=lambda rate: score(of[rate]))
        if ours["accuracy"] is None:
            figures = [f"{run:.3f}" for run in (ours["base_loss"], ours["loss"], of[best]["loss"])]
            gained = ours["base_loss"] - of[best]["loss"]
            gap = f"{100 * (ours['loss'] - of[best]['loss']) / gained:.1f} % of the gain"
        else:
            figures = ["" if run is None else f"{100 * run:.1f} %" for run in (
                ours["base_accuracy"], ours["accuracy"], of[best]["accuracy"],
            )]  # fmt: skip
            gap = f"{100 * (of[best]['accuracy'] - ours['accuracy']):.1f} points"
        chosen = ours["chosen"]
        said = f"{chosen['learning_rate']:g}, {chosen['epochs']} epoch{'s' * (chosen['epochs'] > 1)}"
        task, model, method = case
        cells = (f"{TASKS[task][1]:,}, {task}", model, method, said, figures[0], figures[1], best, figures[2], gap)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def read() -> Runs:
    lines = RESULT.read_text(encoding="utf-8").splitlines() if RESULT.is_file() else []
    runs: Runs = {}
    for run in map(json.loads, lines):
        runs[(run.pop("task"), run.pop("model"), run.pop("method")), run.pop("rate")] = run
    return runs


def main() -> None:
    from veneer.threads import settle

    settle()
    assert RATED.is_file(), "make defaults brings the rows"
    runs, here = read(), processor()
    for case in CASES:
        for rate in rates(runs, case):
            if (case, rate) in runs:
                continue
            run = runs[case, rate] = measure(case, rate)
            of = dict(zip(("task", "model", "method"), case, strict=True))
            with RESULT.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**of, "rate": rate, **run, "processor": here}) + "\n")
            print(*case, rate, run, flush=True)
    print(table(runs))


if __name__ == "__main__":
    main()
