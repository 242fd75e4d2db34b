"""Training on real rows: `veneer.train` and trl's SFTTrainer over peft, each in a process of its own, in turn.

    make bench

The demo's task (BBC headlines, prompts masked) and model (SmolLM2-135M), rank 8 on all linear layers, 16 rows a step,
every side the same rows once. trl runs with its defaults (checkpointed layers, bf16), on the first of the rows, for
where bf16 is slow a step takes most of a minute; and tuned: fp32, nothing checkpointed, in parts of the size that is
fastest here. It has an environment of its own, build/peers. Veneer's seconds are those of its steps; trl's are from a
step's end to the next one's. Run it on an idle machine.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import PEERS, in_a_process, need_peers, peak_memory, resident_memory, save_model, versions
from tables import tell

STEPS, ROWS, WARM, RANK, ROUNDS = 18, 16, 2, 8, 2
AS_IT_COMES_STEPS = 4
PARTS = (16, 8, 4)  # rows that trl takes at once, of a step's
TRL = "rows_trl.py"
STORAGES = ("fp32", "nf4")
MEASURED = ("rows_per_second", "resident_gb", "peak_gb")
RESULT = Path(__file__).parent / "results" / "rows.json"


def main() -> None:
    need_peers()
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder)
        data = _write_rows(Path(folder) / "rows.jsonl")
        plain = _trl(folder, data, "fp32", "defaults", ROWS, AS_IT_COMES_STEPS)
        _say("trl, defaults", plain)
        found: dict[str, dict[str, Any]] = {}
        for kept in STORAGES:
            tried = {part: _trl(folder, data, kept, "tuned", part, STEPS) for part in PARTS}
            for part, run in tried.items():
                _say(f"trl, {kept}, {part} rows at once, tried", run)
            best = max(tried, key=lambda part: tried[part]["rows_per_second"])
            theirs: list[dict[str, Any]] = []
            ours: list[dict[str, Any]] = []
            for _ in range(ROUNDS):
                ours.append(in_a_process(__file__, folder, data, kept))
                theirs.append(_trl(folder, data, kept, "tuned", best, STEPS))
                _say(f"Veneer, {kept}", ours[-1])
                _say(f"trl, {kept}, {best} rows at once", theirs[-1])
            found[kept] = {
                "veneer": _mean(ours), "trl": _mean(theirs), "trl_rows_at_once": best,
                "trl_tried": {part: {name: run[name] for name in MEASURED} for part, run in tried.items()},
            }  # fmt: skip
    for of in found.values():
        of["speed_ratio"] = of["veneer"]["rows_per_second"] / of["trl"]["rows_per_second"]
        of["memory_ratio"] = _above(of["veneer"]) / _above(of["trl"])
    result: dict[str, Any] = {"runs": found, "trl_defaults": plain}
    result["speed_ratio_defaults"] = found["fp32"]["veneer"]["rows_per_second"] / plain["rows_per_second"]
    result["load_before"], result["versions"] = load_before, versions()
    result["peers"] = Path(__file__).with_name("peers.txt").read_text().splitlines()[1:]
    RESULT.write_text(json.dumps(result, indent=2) + "\n")

    tell("rows")
    print(f"Load before the run: {load_before:.2f}.")


def _write_rows(path: Path) -> str:
    from veneer.data.bbc import bbc_topics

    rows = [fields for fields, _ in bbc_topics()]
    random.Random(0).shuffle(rows)  # the topics stand one after another
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[: STEPS * ROWS]), encoding="utf-8")
    return str(path)


def _trl(folder: str, data: str, kept: str, how: str, part: int, steps: int) -> dict[str, Any]:
    arguments = (folder, data, kept, how, str(part), str(steps), str(ROWS), str(WARM), str(RANK))
    return in_a_process(str(Path(__file__).with_name(TRL)), *arguments, python=str(PEERS))


def _veneer(folder: str, data: str, kept: str) -> dict[str, Any]:
    import io

    from rich.console import Console

    from veneer.threads import settle

    settle()  # as the command does
    import veneer

    model, tokenizer = veneer.load(folder, storage=kept, compute="fp32")
    before = resident_memory(model)
    with tempfile.TemporaryDirectory() as output:
        veneer.train(
            model, tokenizer, data=data, output=str(Path(output) / "run"), epochs=1, batch_size=ROWS, held_out=0,
            rank=RANK, learning_rate=1e-3, checkpoint_every=STEPS, console=Console(file=io.StringIO()),
        )  # fmt: skip
        lines = (Path(output) / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [step for step in map(json.loads, lines) if "loss" in step]
    tokens = [0, *(step["tokens"] for step in steps)]
    seconds = [
        (tokens[i + 1] - tokens[i]) / step["tokens_per_second"] for i, step in enumerate(steps)
    ]  # fmt: skip
    return {
        "rows_per_second": ROWS * (len(steps) - WARM) / sum(seconds[WARM:]), "resident_gb": before / 1e9,
        "peak_gb": peak_memory() / 1e9, "losses": [steps[0]["loss"], steps[-1]["loss"]],
    }  # fmt: skip


def _mean(runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: statistics.mean(run[name] for run in runs) for name in MEASURED} | {"losses": runs[0]["losses"]}


def _above(run: dict[str, Any]) -> float:
    return float(run["peak_gb"] - run["resident_gb"])


def _say(who: str, run: dict[str, Any]) -> None:
    print(f"{who}: {run['rows_per_second']:.2f} rows/s, {_above(run):.2f} GB", file=sys.stderr)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        print(json.dumps(_veneer(*sys.argv[1:])))
