"""Runs within a memory control group: each fits, or is refused in a sentence; the system kills none.

    make groups                     60 runs, each with a limit of its own
    python tests/fuzz/groups.py 10

Needs root, and control groups of version 1. Bad is: a kill, and anything but a sentence. Each run is a process of its
own that joins the group before it imports anything: a fork of one that has would count as its own what both share.
"""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

GROUPS = Path("/sys/fs/cgroup/memory")
SMALLEST, LARGEST = 400, 900  # MB of a limit: little more than the imports take, and more than the run does


@contextmanager
def group(limit: int) -> Iterator[Path]:
    """A memory group with a limit in bytes, of memory and swap together. Raises OSError where none can be made."""
    made = GROUPS / f"veneer-{os.getpid()}"
    made.mkdir()
    try:
        (made / "memory.limit_in_bytes").write_text(str(limit))
        swap = made / "memory.memsw.limit_in_bytes"
        if swap.exists():
            swap.write_text(str(limit))
        yield made
    finally:
        _remove(made)


def _remove(made: Path, tries: int = 300) -> None:
    """A group is busy for a moment after its last process has ended."""
    for left in reversed(range(tries)):
        try:
            return made.rmdir()
        except OSError:
            if not left:
                raise
            time.sleep(0.1)


def make(room: Path) -> None:
    """A model of 13 MB, and rows whose activations take many times that."""
    import transformers as tf

    from tokens import tokenizer

    made = tokenizer()
    config = tf.LlamaConfig(
        vocab_size=len(made), hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    tf.LlamaForCausalLM(config).save_pretrained(room / "model")
    made.save_pretrained(room / "model")
    rows = [{"prompt": f"{number}:", "completion": " bat mig" * 12} for number in range(80)]
    (room / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def outcome(room: Path, limit: int, recomputed: bool) -> str:
    """ "trained", "refused", "killed" or a traceback."""
    with group(limit) as made:
        command = [sys.executable, __file__, "--run", str(made), str(room), "recomputed" if recomputed else ""]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == -signal.SIGKILL:
        return "killed"
    return done.stdout.strip() or done.stderr[-4000:]


def run(made: str, room: str, recomputed: str) -> None:
    """A run within the group ``made``, told in a word."""
    Path(made, "cgroup.procs").write_text(str(os.getpid()))
    from rich.console import Console

    import veneer

    with tempfile.TemporaryDirectory() as output:
        how = {"data": f"{room}/rows.jsonl", "output": f"{output}/run", "console": Console(file=io.StringIO())}
        sizes = {"steps": 2, "batch_size": 32, "rank": 4, "held_out": 8, "compute": "fp32"}
        try:
            veneer.train(f"{room}/model", **how, **sizes, gradient_checkpointing=bool(recomputed))
            print("trained")
        except veneer.VeneerError:
            print("refused")


def outcomes(count: int, room: Path, seed: int = 0) -> list[tuple[int, str]]:
    """Limits in bytes, and what came of each."""
    make(room)
    chance = random.Random(seed)
    limits = [chance.randint(SMALLEST * 10**6, LARGEST * 10**6) for _ in range(count)]
    return [(limit, outcome(room, limit, chance.choice((True, False)))) for limit in limits]


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--run"]:
        run(*arguments[1:])
        return 0
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = str(Path(folder) / "cache")
        found = outcomes(int(arguments[0]) if arguments else 60, Path(folder))
    said = Counter(result for _, result in found)
    good = said["trained"] + said["refused"]
    print("| limits | trained | refused in a sentence | killed | others |")
    print("|---|---|---|---|---|")
    others = len(found) - good - said["killed"]
    print(f"| {len(found)} | {said['trained']} | {said['refused']} | {said['killed']} | {others} |")
    for limit, result in sorted(found):
        if result not in ("trained", "refused"):
            print(f"{limit / 1e6:.0f} MB: {result}")
    return int(good < len(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
