"""``make demo [STORAGE=nf4]``: a real language model learns a real task on this machine, in a few minutes."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from veneer.data.bbc import BBC_TOPICS
from veneer.errors import VeneerError
from veneer.terminal import terminal
from veneer.threads import settle
from veneer.training.config import TrainConfig

MODEL = "smollm2-135m-instruct"
_OPTIONS: dict[str, Any] = {
    "model": MODEL, "data": BBC_TOPICS, "held_out": 400, "steps": 100, "batch_size": 16, "rank": 8,
    "evaluate_every": 0,
}  # fmt: skip
_SHOWN = 3


def demo(output: Path, console: Console, **options: Any) -> tuple[float, float]:
    """Teach the packaged model the topics of BBC headlines; the held-out accuracy before and after, as shares.

    ``options``: any of a run's, over the demo's own.
    """
    from veneer.evaluation.compare import measure
    from veneer.generation.generate import answer_of, continuations
    from veneer.generation.likelihood import choices_of
    from veneer.kernels.heap import own_heap
    from veneer.runs.prepare import prepare
    from veneer.runs.train import train
    from veneer.updates.record import disabled

    own_heap()
    started = time.monotonic()
    config = TrainConfig(**{**_OPTIONS, "output": str(output), **options})
    _say(console, f"Loading {MODEL}, a real language model that comes inside a Python package, "
                  f"in {config.storage} …")  # fmt: skip
    prepared = prepare(config)
    model, renderer, rows = prepared.model, prepared.renderer, prepared.held_out
    choices = choices_of(rows)
    _say(console, f"The task: the topic of a BBC headline, one of{','.join(choices)}.")
    _say(console, f"Measuring the model as it is on {len(rows)} headlines that it will not be trained on …")
    before = measure(model, renderer, rows, choices, False, 32).choice_accuracy or 0.0
    _say(console, f"accuracy before: {100 * before:.1f} %\n")

    result = train(model, prepared.tokenizer, config=config, console=console)
    after = measure(model, renderer, rows, choices, False, 32).choice_accuracy or 0.0
    _say(console, f"\naccuracy before: {100 * before:.1f} %   after: {100 * after:.1f} %\n")

    # One headline of each of three topics.
    shown = list({answer_of(row): row for row in rows}.values())[:_SHOWN]
    prompts = [renderer.prompt(row) for row in shown]
    with disabled(model):
        base = continuations(model, renderer, prompts, max_new_tokens=8)
    adapted = continuations(model, renderer, prompts, max_new_tokens=8)
    table = Table("asked", "base says", "adapter says", title="Three held-out headlines", title_justify="left")
    for row, one, other in zip(shown, base, adapted, strict=True):
        table.add_row((row.prompt or "").strip(), " ".join(one.split()), " ".join(other.split()))
    console.print(table)

    minutes = (time.monotonic() - started) / 60
    size = sum(file.stat().st_size for file in (result.folder / "adapter").iterdir()) / 1e6
    _say(console, f"\nDone in {minutes:.1f} minutes. The adapter, a {size:.0f} MB folder that peft loads, is in "
                  f"{result.folder / 'adapter'}. What next:")  # fmt: skip
    for command in (
        f"veneer chat {output} --both             talk to base and adapter side by side",
        f"veneer evaluate {output}                all the numbers, base and adapter",
        f"veneer merge {output} merged/           a plain model without adapter",
        f"veneer inspect {BBC_TOPICS} --model {MODEL}   what of a row is learned",
        f"veneer train --model {MODEL} --data YOUR.jsonl --output runs/mine",
    ):
        _say(console, f"  .venv/bin/{command}")
    return before, after


def free_folder(wanted: Path) -> Path:
    """``wanted``, or the first of wanted-2, wanted-3, … that is not there: no run is ever overwritten."""
    names = [wanted, *(wanted.with_name(f"{wanted.name}-{number}") for number in range(2, 1000))]
    return next(path for path in names if not path.exists())


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    settle()
    try:
        storage = dict(zip(["storage"], sys.argv[1:], strict=False))
        demo(free_folder(Path("runs/demo")), terminal(), **storage)
    except VeneerError as error:
        sys.exit(f"Error: {error}")
