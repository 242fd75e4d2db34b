"""The demo's task over an fp32 and over an NF4 base, three seeds each: is anything lost to four bits?

    make bench

As `make demo` does it: SmolLM2-135M, headlines of BBC news, rank 8, 100 steps of 16 rows; the seed moves the split, the
order and the start of A. About three minutes a run.
"""

from __future__ import annotations

import io
import json
import statistics
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from tables import tell

from veneer.demo import demo

SEEDS, STORAGES = (0, 1, 2), ("fp32", "nf4")
RESULT = Path(__file__).parent / "results" / "demo_seeds.json"


def main() -> None:
    found: dict[str, list[tuple[float, float]]] = {storage: [] for storage in STORAGES}
    for seed in SEEDS:
        for storage in STORAGES:
            with tempfile.TemporaryDirectory() as folder:
                console = Console(file=io.StringIO())
                before, after = demo(Path(folder, "run"), console, storage=storage, seed=seed)
            found[storage].append((before, after))
            print(f"{storage}, seed {seed}: {100 * before:.1f} → {100 * after:.1f} %", file=sys.stderr)
    after = {storage: [pair[1] for pair in pairs] for storage, pairs in found.items()}
    mean = {storage: statistics.mean(values) for storage, values in after.items()}
    spread = {storage: max(values) - min(values) for storage, values in after.items()}
    RESULT.write_text(json.dumps({"runs": found, "mean_after": mean, "spread_after": spread}, indent=2) + "\n")
    tell("demo_seeds")


if __name__ == "__main__":
    main()
