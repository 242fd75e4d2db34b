"""Writing GGUF files of the packaged SmolLM2: CPU time, peak memory and size, against llama.cpp's own quantiser.

    build/peers/bin/python is needed (make bench makes it); python benchmarks/export.py

Veneer writes each type from the loaded model. llama.cpp reads Veneer's fp32 file and quantises it (llama-quantize's
function), which is the second half of its way: its converter, the first half, writes such a file, and needs a checkout.
Each side in its own process, in turn, on one thread; CPU time, so that what else runs on the machine changes it little.
"""

from __future__ import annotations

import json
import sys
import tempfile
from datetime import date
from pathlib import Path

from common import PEERS, Cost, in_a_process, need_peers

MODEL = "smollm2-135m-instruct"
STORAGES = ("fp32", "fp16", "q8_0", "q4_0")
RESULT = Path(__file__).parent / "results" / "export.json"
_PEER = str(Path(__file__).with_name("export_llama.py"))
_ONE = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def main() -> None:
    need_peers()
    found: dict[str, dict[str, dict[str, float]]] = {"veneer": {}, "llama.cpp": {}}
    with tempfile.TemporaryDirectory() as folder:
        for storage in STORAGES:
            found["veneer"][storage] = in_a_process(__file__, storage, folder, settings=_ONE)
            if storage != "fp32":
                found["llama.cpp"][storage] = in_a_process(_PEER, folder, storage, settings=_ONE, python=str(PEERS))
            print(storage, {side: its.get(storage) for side, its in found.items()}, file=sys.stderr)
    from veneer.environment import environment

    RESULT.parent.mkdir(exist_ok=True)
    result = {"date": str(date.today()), "machine": environment(1), **found}
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _write(storage: str, folder: str) -> dict[str, float]:
    """The writing alone: what both sides start from is loaded before."""
    from veneer.commands.gguf import draft_of
    from veneer.runs.opened import open_named

    opened = open_named(MODEL)
    file = Path(folder) / f"{storage}.gguf"
    with Cost() as cost:
        draft_of(opened.model, opened.renderer, storage).write(file)
    return {"cpu_seconds": cost.seconds, "peak_mb": cost.bytes / 1e6, "mb": file.stat().st_size / 1e6}


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        print(json.dumps(_write(*sys.argv[1:3])))
