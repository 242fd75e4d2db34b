"""Runs of every kind, killed at random moments or given failing file operations, and resumed: to the same last bytes.

    make kills                    500 kills, and 200 failing file operations
    python tests/fuzz/kills.py 60 20
    python tests/fuzz/kills.py 500 200 full biases    these runs alone, each its share

Bad is: an adapter of other bytes than the unbroken run's, a run that cannot be resumed, a traceback, and a temporary
file that stays. Processes are forked from one that has imported everything and has a single thread.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # OpenMP's threads would not live on in a fork
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from rich.console import Console
from transformers import AutoConfig, LlamaForCausalLM

import veneer
from fuzz.forks import in_a_fork
from fuzz.kinds import make_model, make_rows
from veneer.files import TEMPORARY

_COMMON: dict[str, Any] = {
    "steps": 8, "batch_size": 4, "checkpoint_every": 1, "evaluate_every": 3, "held_out": 8, "learning_rate": 1e-2,
}  # fmt: skip
RUNS: dict[str, dict[str, Any]] = {
    "LoRA": {"rank": 2, "dropout": 0.1},
    "AdaLoRA": {"method": "adalora", "initial_rank": 3, "target_rank": 2, "tinit": 1, "tfinal": 3},
    "LoRA on nf4": {"rank": 2, "storage": "nf4"},
    "LoRA on int8": {"rank": 2, "storage": "int8"},
    "paged optimizer": {"rank": 2, "optimizer": "paged-adamw", "optimizer_memory": "1MB"},
    "8-bit optimizer": {
        "rank": 2,
        "optimizer": "paged-adamw",
        "optimizer_memory": "1MB",
        "optimizer_bits": 8,
    },
    "accumulated": {"rank": 2, "micro_batch_size": 2},
    "recomputed": {"rank": 2, "gradient_checkpointing": True},
    "embeddings trained": {"rank": 2, "train_also": ["lm_head", "embed_tokens"]},
    "full": {"method": "full"},
    "biases": {"method": "bias", "model": "biased"},
    "LoRA in bf16": {"rank": 2, "compute": "bf16", "dropout": 0.1},
    "LoRA on nf4 in bf16": {"rank": 2, "storage": "nf4", "compute": "bf16"},
}


def _train(kind: str, room: Path, output: Path) -> None:
    quiet = Console(file=io.StringIO())
    if (output / "config.yaml").exists():
        veneer.resume(output, console=quiet)
    else:
        options = {**_COMMON, **RUNS[kind]}
        veneer.train(
            str(room / options.pop("model", "model")),
            data=str(room / "rows.jsonl"),
            output=str(output),
            console=quiet,
            **options,
        )


def _make_biased(room: Path) -> None:
    """The same model with biases in its attention."""
    shutil.copytree(room / "model", room / "biased")
    config = AutoConfig.from_pretrained(room / "model", attention_bias=True)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(room / "biased")


def _failing(after: int) -> None:
    """Let the ``after``-th flush or rename of this process fail, as on a full disk."""
    left = after
    for module, name in ((os, "replace"), (os, "fsync")):
        real = getattr(module, name)

        def fails(*args: Any, real: Callable[..., Any] = real, **how: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args, **how)

        setattr(module, name, fails)


def _digest(output: Path) -> str:
    weights = next(path for path in (output / "adapter", output / "model", output) if list(path.glob("*.safetensors")))
    digest = hashlib.sha256()
    for file in sorted(weights.glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def broken(kind: str, room: Path, count: int, chance: random.Random, *, kills: bool) -> tuple[int, Counter[str]]:
    """How many kills or failures there were, and the runs by what came of them."""
    whole = room / f"whole {kind} {kills}"
    # What is measured of this machine once would make the first run the longest by far.
    in_a_fork(lambda: _train(kind, room, room / f"first {kind} {kills}"), None)
    began = time.monotonic()
    said = in_a_fork(lambda: _train(kind, room, whole), None)
    if said is not None:
        raise RuntimeError(f"{kind}: the unbroken run ended with {said}")
    took, expected = time.monotonic() - began, _digest(whole)
    names = {path.name for path in whole.iterdir()}
    done, found = 0, Counter[str]()
    for number in range(10 * count):
        if done >= count:
            break
        output = room / f"broken {kind} {kills} {number}"
        result = ""
        for _ in range(chance.randint(1, 3)):
            if kills:
                said = in_a_fork(lambda output=output: _train(kind, room, output), chance.uniform(0, took))
                done += said == "killed"
            else:
                after = chance.randint(1, 60)
                said = in_a_fork(
                    lambda output=output, after=after: (_failing(after), _train(kind, room, output))[1], None
                )
                done += said == "refused"
            if said not in (None, "killed", "refused"):
                result = f"traceback: {said}"
                break
        said = result or in_a_fork(lambda output=output: _train(kind, room, output), None)
        if said is not None:
            found[said] += 1
        elif _digest(output) != expected:
            found["other bytes"] += 1
        elif left := list(output.rglob(f"{TEMPORARY}*")):
            found[f"left {left[0].name}"] += 1
        elif names != {path.name for path in output.iterdir()}:
            found["other files"] += 1
        else:
            found["same bytes"] += 1
    return done, found


def main(arguments: list[str]) -> int:
    kills, failures = (
        int(arguments[place]) if len(arguments) > place else count for place, count in ((0, 500), (1, 200))
    )
    torch.set_num_threads(1)
    chance = random.Random(0)
    bad = 0
    print("| run | kills | failing file operations | same bytes | bad |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = str(Path(folder) / "cache")
        room = Path(folder)
        make_model(room / "model")
        _make_biased(room)
        make_rows(room)
        for kind in arguments[2:] or RUNS:
            killed, after_kills = broken(kind, room, -(-kills // len(RUNS)), chance, kills=True)
            failed, after_failures = broken(kind, room, -(-failures // len(RUNS)), chance, kills=False)
            found = after_kills + after_failures
            others = {result: count for result, count in found.items() if result != "same bytes"}
            bad += sum(others.values())
            print(f"| {kind} | {killed} | {failed} | {found['same bytes']} | {sum(others.values())} |", flush=True)
            for result, count in others.items():
                print(f"    {count} × {result}", file=sys.stderr)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
