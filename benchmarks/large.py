"""One QLoRA step over bases that are as large as memory, or larger: `veneer train` in a memory group.

    make bench

Random NF4 checkpoints of Llama's 7B and 13B shapes (12 GB of disk, for a while), a row of 256 tokens, rank 8 on all
linear layers, gradient checkpointing. The 7B run may use 7 GB, the 13B run 5 GB, less than its base; its time is
compared with that of a run without a limit. Needs root, and the memory control group of the first version.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tables import tell

TOKENS, RANK = 256, 8
GROUPS = Path("/sys/fs/cgroup/memory")
# name → (hidden, layers, heads, intermediate), limit of the group in GB
MODELS = {"7B": ((4096, 32, 32, 11008), 7), "13B": ((5120, 40, 40, 13824), 5)}
RESULT = Path(__file__).parent / "results" / "large.json"


def main() -> None:
    if os.geteuid() != 0 or not (GROUPS / "memory.limit_in_bytes").is_file():
        print("A memory group needs root and the memory control group of the first version: not measured.")
        return
    wanted = sys.argv[1:] or list(MODELS)
    result: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    for name in wanted:
        shape, limit = MODELS[name]
        with tempfile.TemporaryDirectory() as folder:
            base = _write_model(Path(folder, "base"), *shape)
            runs: dict[str, Any] = {"base_gb": base / 1e9, "limit_gb": limit}
            for label, allowed in (("limited", limit), ("unlimited", None)):
                runs[label] = _step(Path(folder), allowed)
                print(f"{name}, {label}: {runs[label]}", file=sys.stderr)
        runs["limited_over_unlimited"] = runs["limited"]["step_seconds"] / runs["unlimited"]["step_seconds"]
        result[name] = runs
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    tell("large")


def _write_model(folder: Path, hidden: int, layers: int, heads: int, intermediate: int) -> int:
    """A bitsandbytes checkpoint of random codes, a file a layer so that the writing itself stays small; its bytes."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    import veneer
    from veneer.frozen.blockwise import NESTED_BLOCK, Quantised
    from veneer.frozen.weight import QuantisedLinear
    from veneer.models.bnb_file import weight_tensors

    _, tokenizer = veneer.load("smollm2-135m-instruct")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=intermediate, dtype=torch.bfloat16, architectures=["LlamaForCausalLM"],
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    config.quantization_config = {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "float32", "bnb_4bit_quant_storage": "uint8",
    }  # fmt: skip
    config.save_pretrained(folder)
    del config.quantization_config
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    where: dict[str, str] = {}
    groups: dict[str, dict[str, torch.Size]] = {}
    for key, shape in shapes.items():
        parts = key.split(".")
        groups.setdefault(parts[2] if parts[1] == "layers" else parts[-2], {})[key] = shape
    for number, (_, members) in enumerate(groups.items()):
        tensors: dict[str, torch.Tensor] = {}
        for key, shape in members.items():
            if "_proj" in key:
                codes = torch.randint(256, (shape[0] * shape[1] // 2,), dtype=torch.uint8)
                blocks = shape[0] * shape[1] // 64
                scales = torch.randint(100, 156, (blocks,), dtype=torch.uint8)
                nested = torch.full((-(-blocks // NESTED_BLOCK),), 0.02)
                made = Quantised("nf4", 64, shape, codes, scales, nested, torch.tensor(0.05))
                tensors |= weight_tensors(QuantisedLinear(made, None, torch.bfloat16), key, torch.bfloat16)
            elif "norm" in key:
                tensors[key] = torch.ones(shape, dtype=torch.bfloat16)
            else:
                tensors[key] = torch.randn(shape, dtype=torch.bfloat16) * 0.02
        file = f"part-{number:03}.safetensors"
        save_file({key: tensor.clone() for key, tensor in tensors.items()}, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, file)
        _out_of_the_cache(folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    text = " ".join(f"The number after {i} is {i + 1}." for i in range(TOKENS))
    Path(folder.parent, "rows.jsonl").write_text(json.dumps({"text": text}) + "\n")
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _out_of_the_cache(file: Path) -> None:
    """Pages that are in the system's cache already are not charged to the group that uses them."""
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def _step(folder: Path, limit: int | None) -> dict[str, float]:
    """`veneer train` for one step, in a group of ``limit`` GB; the step's seconds and the whole command's."""
    for file in folder.glob("base/*.safetensors"):
        _out_of_the_cache(file)
    output = folder / f"run-{limit}"
    command = [
        str(Path(sys.executable).with_name("veneer")), "train", "--model", str(folder / "base"),
        "--data", str(folder / "rows.jsonl"), "--output", str(output), "--steps", "1", "--batch-size", "1",
        "--max-length", str(TOKENS), "--held-out", "0", "--rank", str(RANK), "--gradient-checkpointing",
    ]  # fmt: skip
    started = time.perf_counter()
    with _group(limit) as enter:
        done = subprocess.run(command, preexec_fn=enter, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    seconds = time.perf_counter() - started
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    step = next(line for line in lines if line.get("step") == 1)
    return {
        "step_seconds": step["tokens"] / step["tokens_per_second"],
        "command_seconds": seconds,
        "peak_gb": step["peak_memory"] / 1e9,
    }


@contextmanager
def _group(limit: int | None) -> Iterator[Any]:
    if limit is None:
        yield None
        return
    made = GROUPS / f"veneer-large-{os.getpid()}"
    made.mkdir()
    try:
        (made / "memory.limit_in_bytes").write_text(str(limit * 10**9))
        if (swap := made / "memory.memsw.limit_in_bytes").exists():
            swap.write_text(str(limit * 10**9))
        yield lambda: (made / "cgroup.procs").write_text(str(os.getpid()))
    finally:
        made.rmdir()


if __name__ == "__main__":
    main()
