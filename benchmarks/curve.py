"""The loss of 200 steps of the demo, fused and by the model's own passes: what the passes change is rounding.

    make bench

The same seed, rows and order; the mean loss of a step's learned tokens is compared, step by step. Without fused passes
all products are those of PyTorch's own BLAS as well.
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from common import in_a_process, versions

STEPS = 200
RESULT = Path(__file__).parent / "results" / "curve.json"


def main() -> None:
    fused, plain = (in_a_process(__file__, how)["losses"] for how in ("fused", "plain"))
    differences = [abs(a - b) for a, b in zip(fused, plain, strict=True)]
    result: dict[str, Any] = {
        "largest_difference": max(differences), "at_step": 1 + differences.index(max(differences)),
        "of_the_first_100": max(differences[:100]), "losses": [fused[0], fused[-1]], "fused": fused, "plain": plain,
        "versions": versions(),
    }  # fmt: skip
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{STEPS} steps of the demo, loss {fused[0]:.3f} → {fused[-1]:.3f}")
    print(f"fused and plain differ by at most {max(differences):.1e} (step {result['at_step']})")


def _losses(how: str) -> list[float]:
    from rich.console import Console

    import veneer
    from veneer.kernels import dense
    from veneer.runs import train as trains

    if how == "plain":
        trains.fused_passes = lambda model: nullcontext()  # type: ignore[assignment]
        dense._HAVE_ONEDNN = False
    with tempfile.TemporaryDirectory() as folder:
        veneer.train(
            "smollm2-135m-instruct", data="bbc-topics", output=f"{folder}/run", steps=STEPS, batch_size=16, rank=8,
            held_out=400, learning_rate=1e-3, evaluate_every=0, checkpoint_every=STEPS,
            console=Console(file=io.StringIO()),
        )  # fmt: skip
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [step["loss"] for step in map(json.loads, lines) if "loss" in step]


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        print(json.dumps({"losses": _losses(sys.argv[1])}))
