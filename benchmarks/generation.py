"""Greedy generation over an NF4 base: Veneer, exact and in 8 bits, against transformers with bitsandbytes, and against
llama.cpp with the same model in Q4_0.

    make bench

The packaged SmolLM2-135M, the same prompt, number of tokens and threads, each side in its own process, in turn;
llama.cpp, compiled for this machine, has an environment of its own, build/peers. And what rounding costs: perplexity of
BBC articles read eight tokens at a time, and how often the next greedy token is the same. Run it on an idle machine.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

from common import PEERS, articles, in_a_process, need_peers, save_model, versions
from tables import tell

from veneer.models.packaged import packaged_path

PROMPT, TOKENS, REPEATS, ROUNDS = "The history of the steam engine begins", 128, 3, 3
TEXTS, LENGTH = 8, 256
SIDES = ("int8", "exact", "llama.cpp", "bitsandbytes")  # Veneer's own two ways, and peers
LLAMA = str(Path(__file__).with_name("generation_llama.py"))
RESULT = Path(__file__).parent / "results" / "generation.json"


def main() -> None:
    need_peers()
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder)
        speeds: dict[str, list[float]] = {side: [] for side in SIDES}
        for number in range(ROUNDS):
            for side in SIDES if number % 2 == 0 else reversed(SIDES):
                speeds[side].append(_of(side, folder)["tokens_per_second"])
                print(f"{side:<12} {speeds[side][-1]:6.1f} tokens/s", file=sys.stderr)
        cost = in_a_process(__file__, "cost", folder)
    found = {side: statistics.median(all_of_it) for side, all_of_it in speeds.items()}
    result = {
        "tokens_per_second": found,
        "ratios": {f"{side} / {peer}": found[side] / found[peer] for side in SIDES[:2] for peer in SIDES[2:]},
        "cost_of_8_bits": cost,
        "load_before": load_before,
        "versions": versions("bitsandbytes"),
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")

    tell("generation")
    print(
        f"\nPerplexity {cost['perplexity_exact']:.3f} exact, {cost['perplexity_int8']:.3f} in 8 bits; the next greedy"
    )
    print(f"token is the same after {cost['same_greedy_token']:.2%} of {cost['positions']} positions.")
    print(f"Load before the run: {load_before:.2f}.")


def _of(side: str, folder: str) -> dict[str, float]:
    if side != "llama.cpp":
        return in_a_process(__file__, side, folder)
    model = str(packaged_path("smollm2-135m-instruct"))
    return in_a_process(LLAMA, model, folder, PROMPT, str(TOKENS), str(REPEATS), python=str(PEERS))


def _measure_speed(side: str, folder: str) -> dict[str, float]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import veneer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if side == "bitsandbytes":
        from transformers import BitsAndBytesConfig

        how = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=how).eval()
    else:
        model, _ = veneer.load(folder, storage="nf4", compute="fp32")
    inputs = tokenizer(PROMPT, return_tensors="pt")

    def generate(count: int) -> float:
        started = time.perf_counter()
        if side == "bitsandbytes":
            model.generate(
                **inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False,
                pad_token_id=tokenizer.eos_token_id,
            )  # fmt: skip
        else:
            (text,) = veneer.generate(model, tokenizer, [PROMPT], max_new_tokens=count)
            assert len(tokenizer(text).input_ids) >= count - 1, "it did not stop before"
        return count / (time.perf_counter() - started)

    with veneer.int8_activations(model) if side == "int8" else nullcontext():
        generate(4)
        return {"tokens_per_second": statistics.median(generate(TOKENS) for _ in range(REPEATS))}


def _measure_cost(folder: str) -> dict[str, float]:
    """Of articles read eight tokens at a time by the decoder, so that every product is one of few tokens."""
    import torch

    import veneer
    from veneer.generation.decoder import Decoder

    model, tokenizer = veneer.load(folder, storage="nf4", compute="fp32")
    losses: dict[str, list[torch.Tensor]] = {"exact": [], "int8": []}
    tokens: dict[str, list[torch.Tensor]] = {"exact": [], "int8": []}
    for text in articles()[:: 2000 // TEXTS][:TEXTS]:
        ids = tokenizer(text, return_tensors="pt").input_ids[0, :LENGTH]
        for side in losses:
            with torch.no_grad(), veneer.int8_activations(model) if side == "int8" else nullcontext():
                decoder = Decoder(model, 1, LENGTH)
                logits = torch.cat([decoder.step(part.tolist(), [0] * len(part)).clone() for part in ids.split(8)])
            losses[side].append(torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none"))
            tokens[side].append(logits.argmax(dim=-1))
    same = torch.cat(tokens["exact"]) == torch.cat(tokens["int8"])
    return {
        **{f"perplexity_{side}": float(torch.cat(found).mean().exp()) for side, found in losses.items()},
        "same_greedy_token": float(same.float().mean()),
        "positions": same.numel(),
    }


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # bitsandbytes warns at its import of GPU kernels that are not here
    if len(sys.argv) == 1:
        main()
    else:
        job, model_folder = sys.argv[1:]
        print(json.dumps(_measure_cost(model_folder) if job == "cost" else _measure_speed(job, model_folder)))
