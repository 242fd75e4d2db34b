"""The processor that a benchmark runs on: rows in 16 bits can be filled where it multiplies bf16.

python benchmarks/processor.py        says which rows of `make bench` this machine fills
"""

from __future__ import annotations

import datetime
from pathlib import Path

from veneer.frozen.compute import has_bf16

_TOLD = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "bf16", "i8mm")  # as Linux has them


def processor() -> dict[str, object]:
    """Its model, the instructions that matter here, and today's date."""
    told: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        told.setdefault(name.strip(), value.strip())
    flags = (told.get("flags") or told.get("Features") or "").split()
    return {
        "model": told.get("model name", "unknown"),
        "flags": [flag for flag in _TOLD if flag in flags],
        "date": datetime.date.today().isoformat(),
    }


if __name__ == "__main__":
    found = processor()
    rows = "all rows" if has_bf16() else "the rows in fp32, and none in bf16"
    print(f"{found['model']} ({', '.join(found['flags'])}): fills {rows}.")  # type: ignore[arg-type]
