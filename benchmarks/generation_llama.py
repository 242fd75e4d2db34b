"""llama.cpp's side of generation.py, in build/peers: greedy tokens a second of the same model in Q4_0.

generation_llama.py MODEL.gguf FOLDER PROMPT TOKENS REPEATS
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from itertools import islice
from pathlib import Path

import llama_cpp


def quantised(source: str, folder: str) -> str:
    """The model in Q4_0, made once in ``folder``; its tied head is what llama.cpp makes of it, Q6_K or Q8_0."""
    out = Path(folder) / "q4_0.gguf"
    if not out.exists():
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.allow_requantize = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, True
        if llama_cpp.llama_model_quantize(source.encode(), str(out).encode(), params):
            sys.exit(f"llama.cpp could not quantise {source}.")
    return str(out)


def main(source: str, folder: str, prompt: str, tokens: int, repeats: int) -> None:
    threads = len(os.sched_getaffinity(0))
    model = llama_cpp.Llama(
        quantised(source, folder), n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False
    )
    ids = model.tokenize(prompt.encode())

    def generate(count: int) -> float:
        model.reset()
        started = time.perf_counter()
        said = list(islice(model.generate(ids, temp=0.0, repeat_penalty=1.0, reset=True), count))
        assert len(said) == count
        return count / (time.perf_counter() - started)

    generate(4)
    print(json.dumps({"tokens_per_second": statistics.median(generate(tokens) for _ in range(repeats))}))


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]), int(sys.argv[5]))
