"""A training step of Veneer and of peft on the same batches, in turn, each in its own process; and what merging costs.

    make bench

The packaged SmolLM2-135M over fp32 and over NF4 (peft's by bitsandbytes), rank 8 on all linear layers, 8 × 128 tokens
of BBC articles, and over fp32 2 × 1024; every token learned. Run it on an idle machine: a second torch process on the
same cores slows both by up to ten times.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from common import articles, in_a_process, peak_memory, save_model, versions
from tables import tell

ROWS, LENGTH, RANK = 8, 128, 8
WARM, TIMED, ROUNDS = 1, 4, 3
LONG_ROWS, LONG = 2, 1024
SIDES = ("veneer", "peft")
# What is measured → base, rows, and tokens of a row.
RUNS = {"fp32": ("fp32", ROWS, LENGTH), "nf4": ("nf4", ROWS, LENGTH), "long": ("fp32", LONG_ROWS, LONG)}
RESULT = Path(__file__).parent / "results" / "step.json"


def main() -> None:
    load_before = os.getloadavg()[0]
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {(who, what): [] for what in RUNS for who in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder)
        for number in range(ROUNDS):
            for who, what in runs if number % 2 == 0 else reversed(runs):
                runs[who, what].append(in_a_process(__file__, who, what, folder))
                print(f"{who:<8} {what} {runs[who, what][-1]['tokens_per_second']:7.1f} tokens/s", file=sys.stderr)
        merged = in_a_process(__file__, "merged", "fp32", folder)
    result: dict[str, Any] = {
        what: {
            who: {
                "tokens_per_second": statistics.median(run["tokens_per_second"] for run in runs[who, what]),
                "peak_gb": statistics.median(run["peak_gb"] for run in runs[who, what]),
                "loss": runs[who, what][0]["losses"],
            }
            for who in SIDES
        }
        for what in RUNS
    }
    for found in result.values():
        found["speed_ratio"] = found["veneer"]["tokens_per_second"] / found["peft"]["tokens_per_second"]
        found["memory_ratio"] = found["veneer"]["peak_gb"] / found["peft"]["peak_gb"]
        found["largest_loss_difference"] = _largest_difference(found["veneer"]["loss"], found["peft"]["loss"])
    ours = {what: result[what]["veneer"]["tokens_per_second"] for what in RUNS}
    result["nf4_speed_over_fp32"] = ours["nf4"] / ours["fp32"]
    result["merged_forward_over_base"] = merged["ratio"]
    result["load_before"] = load_before
    result["versions"] = versions("peft", "bitsandbytes")
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")

    tell("step")
    for what in RUNS:
        print(f"\nOf {what} the two losses differ by at most {result[what]['largest_loss_difference']:.1e}.")
    print(f"A step over nf4 runs at {result['nf4_speed_over_fp32']:.2f} × the speed of one over fp32.")
    print(f"A forward pass of the merged model takes {merged['ratio']:.3f} × the base's.")
    print(f"Load before the run: {load_before:.2f}.")


def _largest_difference(ours: list[float], theirs: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True))


def batches(folder: str, rows: int = ROWS, length: int = LENGTH) -> list[list[list[int]]]:
    """Steps of ``rows`` of exactly ``length`` tokens, cut from the articles."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)("\n\n".join(articles()[:100])).input_ids
    cut = [ids[i : i + length] for i in range(0, len(ids) - length, length)]
    return [cut[i : i + rows] for i in range(0, (WARM + TIMED) * rows, rows)]


def _model(who: str, kept: str, folder: str) -> Any:
    """The base as each side loads it: fp32 in the same way, NF4 by its own quantisation."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if kept == "fp32":
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if who == "veneer":
        import veneer

        return veneer.load(folder, storage=kept, compute="fp32")[0]
    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kept,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=how)


def _measure_steps(who: str, what: str, folder: str) -> dict[str, Any]:
    import torch

    torch.manual_seed(0)
    kept, in_a_step, length = RUNS[what]
    of_step = batches(folder, in_a_step, length)
    if who == "veneer":  # as the command does
        from veneer.kernels.heap import use_heap

        use_heap()
    model = _model(who, kept, folder)
    passes = ExitStack()
    if who == "veneer":
        import veneer
        from veneer.data.labels import IGNORE, Tokens
        from veneer.training.fused import fused_passes
        from veneer.training.loss import Loss

        veneer.attach(model, veneer.LoRA(rank=RANK, alpha=2 * RANK))
        rows = [[Tokens(ids, [IGNORE, *ids[1:]], "") for ids in batch] for batch in of_step]
        loss_of = Loss(model, 0, rows[0][0], kind="causal")
        passes.enter_context(fused_passes(model))
        passes.enter_context(loss_of.attention())

        def loss(number: int) -> torch.Tensor:
            return loss_of(rows[number]) / (in_a_step * (length - 1))
    else:
        import peft

        config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, config)

        def loss(number: int) -> torch.Tensor:
            ids = torch.tensor(of_step[number])
            found: torch.Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
            return found

    with passes:
        return timed_steps(model, loss, in_a_step * length)


def timed_steps(model: Any, loss: Callable[[int], Any], tokens: int) -> dict[str, Any]:
    """Steps of ``tokens`` each: their speed, the process's peak, and the first loss; later ones depend on the random
    start of A, which the two sides draw differently."""
    import torch

    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses, seconds = [], 0.0
    for number in range(WARM + TIMED):
        started = time.perf_counter()
        optimizer.zero_grad()
        value = loss(number)
        value.backward()
        optimizer.step()
        losses.append(value.item())
        del value  # its graph, kept alive, would be in memory between the next step's activations (both sides)
        if number >= WARM:
            seconds += time.perf_counter() - started
    return {"tokens_per_second": TIMED * tokens / seconds, "peak_gb": peak_memory() / 1e9, "losses": losses[:1]}


def _measure_merged(folder: str) -> dict[str, Any]:
    """Forward passes of the base and of the merged model in turn; the ratio of the medians."""
    import torch
    from transformers import AutoModelForCausalLM

    import veneer

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    veneer.attach(merged, veneer.LoRA(rank=RANK))
    veneer.merge(merged, reversible=False)
    ids = torch.tensor(batches(folder)[0])
    times: dict[str, list[float]] = {"base": [], "merged": []}
    with torch.no_grad():
        for number in range(21):
            pair = (("base", base), ("merged", merged))
            for name, model in pair if number % 2 else pair[::-1]:
                started = time.perf_counter()
                model(ids)
                times[name].append(time.perf_counter() - started)
    return {"ratio": statistics.median(times["merged"][1:]) / statistics.median(times["base"][1:])}


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        job, measured, model_folder = sys.argv[1:]
        merging = job == "merged"
        print(json.dumps(_measure_merged(model_folder) if merging else _measure_steps(job, measured, model_folder)))
