"""llama.cpp's side of export.py, in build/peers: its own quantiser on the fp32 file in FOLDER.

export_llama.py FOLDER STORAGE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import llama_cpp
from common import Cost

TYPES = {
    "fp16": llama_cpp.LLAMA_FTYPE_MOSTLY_F16,
    "q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
}


def main(folder: str, storage: str) -> None:
    source, out = Path(folder) / "fp32.gguf", Path(folder) / f"llama-{storage}.gguf"
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = TYPES[storage], 1
    with Cost() as cost:
        if llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), params):
            sys.exit(f"llama.cpp could not quantise {source}.")
    print(json.dumps(
        {"cpu_seconds": cost.seconds, "peak_mb": cost.bytes / 1e6, "mb": out.stat().st_size / 1e6}
    ))  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:3])
