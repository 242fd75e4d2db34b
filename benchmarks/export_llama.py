"""llama.cpp's side of export.py, in build/peers: its own quantiser on the fp32 file in FOLDER.

export_llama.py FOLDER STORAGE
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

import llama_cpp

TYPES = {
    "fp16": llama_cpp.LLAMA_FTYPE_MOSTLY_F16,
    "q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
}


def main(folder: str, storage: str) -> None:
    source, out = Path(folder) / "fp32.gguf", Path(folder) / f"llama-{storage}.gguf"
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = TYPES[storage], 1
    started = time.perf_counter()
    if llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), params):
        sys.exit(f"llama.cpp could not quantise {source}.")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": time.perf_counter() - started, "peak_mb": peak, "mb": out.stat().st_size / 1e6}))


if __name__ == "__main__":
    main(*sys.argv[1:3])
