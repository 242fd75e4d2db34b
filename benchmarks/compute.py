"""A training step in bf16 and in fp32 against peft's in its best setting on this machine; and torch.mm's share of it.

    make bench

The packaged SmolLM2-135M, rank 8 on all linear layers, every token learned, as in step.py. Each peer is tried in every
setting that a user would try: fp32, a model in bf16, bf16 by autocast; its fastest is measured again beside Veneer, in
turn. Run it on an idle machine; where the processor does not multiply bf16, only the row in fp32 is measured.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import step
from common import in_a_process, save_model, versions
from processor import processor
from share import products_of, time_of
from tables import tell

from veneer.frozen.compute import has_bf16

ROUNDS = 2
RESULT = Path(__file__).parent / "results" / "compute.json"


class Case(NamedTuple):
    storage: str
    compute: str
    rows: int
    length: int
    peers: tuple[str, ...]  # settings that are tried


_DENSE = ("bf16", "autocast")
_NF4 = ("nf4", "nf4 bf16", "nf4 autocast")
CASES = {
    "fp32": Case("fp32", "fp32", 8, 128, ("fp32",)),
    "fp32 in bf16": Case("fp32", "bf16", 8, 128, _DENSE),
    "bf16": Case("bf16", "bf16", 8, 128, _DENSE),
    "nf4": Case("nf4", "bf16", 8, 128, _NF4),
    "long": Case("nf4", "bf16", 2, 1024, _NF4),
}


def main() -> None:
    load_before = os.getloadavg()[0]
    wanted = sys.argv[1:] or [name for name, case in CASES.items() if case.compute == "fp32" or has_bf16()]
    result: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.is_file() and sys.argv[1:] else {"cases": {}}
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder)
        for name in wanted:
            result["cases"][name] = _measured(name, folder)
        result["products"] = {kind: in_a_process(__file__, "--products", kind, folder) for kind in ("fp32", "bf16")}
    for name, found in result["cases"].items():
        products = result["products"]["fp32" if CASES[name].compute == "fp32" else "bf16"]
        if CASES[name].length == step.LENGTH:
            seconds = step.ROWS * step.LENGTH / found["veneer"]["tokens_per_second"]
            found["share_of_mm"] = products["seconds"] / seconds
    result |= {"processor": processor(), "load_before": load_before, "versions": versions("peft", "bitsandbytes")}
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    tell("compute")


def _measured(name: str, folder: str) -> dict[str, Any]:
    case = CASES[name]
    tried = {setting: _run("peft", name, setting, folder) for setting in case.peers}
    best = max(tried, key=lambda setting: tried[setting]["tokens_per_second"])
    ours, theirs = [], [tried[best]]
    for number in range(ROUNDS):
        ours.append(_run("veneer", name, "", folder))
        if number:
            theirs.append(_run("peft", name, best, folder))
    found: dict[str, Any] = {"veneer": _middle(ours), "peft": _middle(theirs), "setting": best, "tried": tried}
    for what in ("tokens_per_second", "peak_gb"):
        found[f"{what}_ratio"] = found["veneer"][what] / found["peft"][what]
    return found


def _run(who: str, name: str, setting: str, folder: str) -> dict[str, Any]:
    found = in_a_process(__file__, "--run", who, name, setting, folder)
    speed, peak = found["tokens_per_second"], found["peak_gb"]
    print(f"{name}: {who} {setting} {speed:.0f} tokens/s, {peak:.2f} GB", file=sys.stderr)
    return found


def _middle(runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {what: statistics.median(run[what] for run in runs) for what in ("tokens_per_second", "peak_gb")}


def _peer(setting: str, folder: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    short = setting in ("bf16", "nf4 bf16")
    dtype = torch.bfloat16 if short else torch.float32
    how = None
    if setting.startswith("nf4"):
        how = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32 if setting == "nf4" else torch.bfloat16,
        )  # fmt: skip
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=how)


def _steps(who: str, name: str, setting: str, folder: str) -> dict[str, Any]:
    import torch

    torch.manual_seed(0)
    case = CASES[name]
    of_step = step.batches(folder, case.rows, case.length)
    autocast: Any = nullcontext()
    passes = ExitStack()
    if who == "veneer":  # as the command does
        import veneer
        from veneer.data.labels import IGNORE, Tokens
        from veneer.kernels.heap import use_heap
        from veneer.training.fused import fused_passes
        from veneer.training.loss import Loss

        use_heap()
        model = veneer.load(folder, storage=case.storage, compute=case.compute)[0]
        veneer.attach(model, veneer.LoRA(rank=step.RANK, alpha=2 * step.RANK))
        rows = [[Tokens(ids, [IGNORE, *ids[1:]], "") for ids in batch] for batch in of_step]
        loss_of = Loss(model, 0, rows[0][0], kind="causal")
        passes.enter_context(fused_passes(model))
        passes.enter_context(loss_of.attention())

        def loss(number: int) -> torch.Tensor:
            return loss_of(rows[number]) / (case.rows * (case.length - 1))
    else:
        import peft

        config = peft.LoraConfig(
            r=step.RANK, lora_alpha=2 * step.RANK, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        model = peft.get_peft_model(_peer(setting, folder), config)
        if setting.endswith("autocast"):
            autocast = torch.autocast("cpu", dtype=torch.bfloat16)

        def loss(number: int) -> torch.Tensor:
            ids = torch.tensor(of_step[number])
            with autocast:
                found: torch.Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
            return found

    with passes:
        return step.timed_steps(model, loss, case.rows * case.length)


def _products(kind: str, folder: str) -> dict[str, float]:
    """Seconds that a step's products take by torch.mm alone."""
    import torch

    import veneer

    model = veneer.load(folder, storage="bf16", compute="bf16")[0]
    veneer.attach(model, veneer.LoRA(rank=step.RANK))
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    products = products_of(model, step.ROWS * step.LENGTH)
    seconds = sum(count * time_of(torch, shape, dtype) for shape, count in products.items())
    flop = sum(2 * m * k * n * count for (m, k, n), count in products.items())
    return {"seconds": seconds, "gflop": flop / 1e9}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        print(json.dumps(_steps(*sys.argv[2:])))
    elif sys.argv[1:2] == ["--products"]:
        print(json.dumps(_products(*sys.argv[2:])))
    else:
        main()
