"""llama_cpp_logits.py JOB: what llama.cpp makes of GGUF files, by llama-cpp-python. JOB is a JSON object:

model: a file; adapter: another, or none; ids: tokens → "logits" after each, keys and values in fp32; greedy: how many
tokens go on from them → "greedy"; texts → "tokens" of each, special tokens read, with what llama.cpp puts before them.
"""

from __future__ import annotations

import json
import sys
from itertools import islice

import llama_cpp

F32 = 0  # ggml's number of the type


def main(job: dict) -> dict:
    ids, found = job.get("ids", []), {}
    model = llama_cpp.Llama(
        job["model"], lora_path=job.get("adapter"), n_ctx=256, n_batch=256, n_threads=1, n_threads_batch=1, type_k=F32,
        type_v=F32, logits_all=True, verbose=False,
    )  # fmt: skip
    if ids:
        model.eval(ids)
        found["logits"] = model.scores[: len(ids)].tolist()
    if "greedy" in job:
        found["greedy"] = list(islice(model.generate(ids, temp=0.0, repeat_penalty=1.0, reset=True), job["greedy"]))
    if "texts" in job:
        found["tokens"] = [model.tokenize(text.encode(), add_bos=True, special=True) for text in job["texts"]]
    return found


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
