"""Which learning rate learns a preference: short runs of DPO, ORPO and KTO over a grid of rates.

    python benchmarks/preference_rate.py [TASK …]

Two tasks of the packaged headlines: which topic a headline has (the chosen answer is its topic, the rejected one
another), and which headline a topic has (a headline of it, or of another). Every finished run is a line of
results/preference-rate.jsonl and is not run again; the rates of a series go on to either side until the best held-out
loss is at neither end.
"""

from __future__ import annotations

import io
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from learning_rate import processor

RESULT = Path(__file__).parent / "results" / "preference-rate.jsonl"
MODEL = "smollm2-135m-instruct"
GRID = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
BEGIN = {"dpo": (3e-4, 1e-3), "orpo": (1e-3, 3e-3), "kto": (3e-4, 1e-3)}
STEPS, BATCH, HELD_OUT = 12, 8, 48
Job = tuple[str, str, float]  # objective, task, rate


def rows_of(task: str) -> list[dict[str, str]]:
    """Pairs, the same ones always."""
    from veneer.data.bbc import bbc_topics

    draw = random.Random(0)
    headlines = [row for row, _ in bbc_topics()]
    draw.shuffle(headlines)
    text, topic = headlines[0]
    topics = sorted({row[topic] for row in headlines})
    pairs = []
    for row in headlines[: STEPS * BATCH + HELD_OUT]:
        other = draw.choice([name for name in topics if name != row[topic]])
        if task == "topics":
            pairs.append({"prompt": row[text], "chosen": row[topic], "rejected": other})
        else:
            wrong = draw.choice([one for one in headlines if one[topic] == other])
            chosen, rejected = (" " + one[text].split("\n")[0].removeprefix("Headline: ") for one in (row, wrong))
            pairs.append({"prompt": f"A headline about{row[topic]}:", "chosen": chosen, "rejected": rejected})
    return pairs


def measure(job: Job) -> dict[str, Any]:
    """What is measured of held-out pairs before and after a run; None where it diverged."""
    from rich.console import Console

    import veneer
    from veneer.errors import DivergedError

    objective, task, rate = job
    rows, started = rows_of(task), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        try:
            veneer.train(
                MODEL, data=rows[HELD_OUT:], held_out=rows[:HELD_OUT], output=f"{folder}/run", objective=objective,
                learning_rate=rate, steps=STEPS, batch_size=BATCH, evaluate_every=STEPS, checkpoint_every=10**6,
                console=Console(file=io.StringIO()),
            )  # fmt: skip
        except DivergedError:
            return {"before": None, "loss": None}
        lines = map(json.loads, Path(folder, "run", "metrics.jsonl").read_text().splitlines())
        first, *_, last = [line for line in lines if "held_out_loss" in line]
    return {
        "before": first["held_out_loss"], "loss": last["held_out_loss"],
        "right_before": first["held_out_reward_accuracy"], "right": last["held_out_reward_accuracy"],
        "margin": last["held_out_reward_margin"], "seconds": time.monotonic() - started,
    }  # fmt: skip


def series(found: dict[Job, dict[str, Any]], objective: str, task: str) -> Iterator[Job]:
    """Rates of the grid, one after another, around the one of the lowest held-out loss."""
    tried = list(BEGIN[objective])
    yield from ((objective, task, rate) for rate in tried)
    while True:
        losses = {rate: found[objective, task, rate]["loss"] for rate in tried}
        at = GRID.index(min(tried, key=lambda rate: float("inf") if losses[rate] is None else losses[rate]))
        beside = [GRID[i] for i in (at - 1, at + 1) if 0 <= i < len(GRID) and GRID[i] not in tried]
        if not beside:
            return
        tried.append(beside[0])
        yield objective, task, beside[0]


def main(tasks: list[str]) -> None:
    from veneer.threads import settle

    settle()
    lines = RESULT.read_text().splitlines() if RESULT.is_file() else []
    found = {(run["objective"], run["task"], run["rate"]): run for run in map(json.loads, lines)}
    for task in tasks:
        for objective in BEGIN:
            for job in series(found, objective, task):
                if job in found:
                    continue
                run = {name: value and round(value, 4) for name, value in measure(job).items()}
                found[job] = {**dict(zip(("objective", "task", "rate"), job, strict=True)), **run}
                with RESULT.open("a") as file:
                    file.write(json.dumps({**found[job], "processor": processor()}) + "\n")
                print(found[job], flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or ["topics", "headlines"])
