"""The memory that `train` predicts for runs on real rows, of another length in each step, against what they take.

    make bench

The packaged model on the packaged headlines, with the default options except what is compared: the peak of plan.json
beside the largest memory the system has seen of the process by its first, its 20th and its last step (metrics.jsonl).
Every 20 steps the held-out rows are measured. benchmarks/plan.py has rows of one length; here a process has the chance
to grow.
"""

from __future__ import annotations

import io
import json
import tempfile
from pathlib import Path
from typing import Any

from common import in_a_process, main_or_run, versions
from tables import tell

STEPS = 80
RUNS: dict[str, dict[str, Any]] = {
    "LoRA, fp32": {},
    "AdaLoRA, fp32": {"method": "adalora", "learning_rate": 4e-3},
    "QLoRA, nf4": {"storage": "nf4"},
}
RESULT = Path(__file__).parent / "results" / "plan_rows.json"


def main() -> None:
    runs = {name: in_a_process(__file__, "--run", name) for name in RUNS}
    RESULT.write_text(json.dumps({"steps": STEPS, "versions": versions(), "runs": runs}, indent=2) + "\n")
    tell("plan_rows")


def _measure(name: str) -> dict[str, int]:
    from rich.console import Console

    from veneer.runs.folder import RunFolder
    from veneer.runs.train import train

    with tempfile.TemporaryDirectory() as place:
        result = train(
            model="smollm2-135m-instruct", data="bbc-topics", output=str(Path(place, "run")), steps=STEPS,
            evaluate_every=20, console=Console(file=io.StringIO()), **RUNS[name],
        )  # fmt: skip
        peaks = [record["peak_memory"] for record in RunFolder(result.folder).metrics() if "peak_memory" in record]
        predicted = json.loads((result.folder / "plan.json").read_text(encoding="utf-8"))["peak"]
    return {"first": peaks[0], "later": peaks[19], "last": peaks[-1], "foreseen": predicted}


if __name__ == "__main__":
    main_or_run(main, _measure)
