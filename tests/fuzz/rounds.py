"""What threads of one process do at once with Veneer, round after round: right, or refused in a sentence.

    make threads                     100 rounds of each
    python tests/fuzz/rounds.py 20

Bad is: another result than that of one thread alone, anything changed afterwards, an exception that is no sentence.
"""

from __future__ import annotations

import io
import os
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers as tf
from rich.console import Console

import veneer
from fuzz.kinds import make_model, make_rows
from veneer.errors import VeneerError

THREADS = 4
Round = Callable[[int], str]  # → "right", "refused", or what is bad
_TRAINED: dict[str, Any] = {"steps": 2, "batch_size": 4, "held_out": 8, "rank": 2, "learning_rate": 1e-2}


def _at_once(*work: Callable[[], Any]) -> list[Any]:
    """What each of them returns, or the VeneerError that it raises, begun together in threads."""
    together = threading.Barrier(len(work))

    def one(do: Callable[[], Any]) -> Any:
        together.wait()
        try:
            return do()
        except VeneerError as error:
            return error

    with ThreadPoolExecutor(len(work)) as pool:
        return list(pool.map(one, work))


def _adapted(room: Path) -> tuple[Any, Any]:
    model, tokenizer = veneer.load(room / "model")
    for name in ("one", "other"):
        veneer.attach(model, veneer.LoRA(rank=2), name)
    made = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(generator=made)
    veneer.activate(model, "one")
    return model, tokenizer


def answers(room: Path) -> Round:
    """Base and adapter asked at once, by generate and by passes of one's own."""
    model, tokenizer = _adapted(room)

    def by_pass() -> list[float]:
        with torch.no_grad():
            return list(model(torch.arange(8).view(1, 8)).logits[0, -1].tolist())

    def by_generate() -> list[str]:
        return list(veneer.generate(model, tokenizer, ["bat:", "mig:"], max_new_tokens=8))

    def of_base(ask: Callable[[], Any]) -> Any:
        with veneer.disabled(model):
            return ask()

    asked = [work for ask in (by_pass, by_generate) for work in (ask, lambda ask=ask: of_base(ask))]
    alone = [work() for work in asked]
    assert alone[0] != alone[1]
    assert alone[2] != alone[3]
    return lambda number: "right" if _at_once(*asked) == alone == [work() for work in asked] else "wrong"


def overlaps(room: Path) -> Round:
    """Blocks of `disabled` that begin and end within each other's."""
    model, _ = _adapted(room)

    @torch.no_grad()
    def answer() -> float:
        return float(model(torch.arange(8).view(1, 8)).logits.sum())

    def block() -> float:
        with veneer.disabled(model):
            return answer()

    base, adapted = block(), answer()

    def one(number: int) -> str:
        right = _at_once(*[block] * THREADS) == [base] * THREADS
        return "right" if right and answer() == adapted else "wrong"

    return one


def loads(room: Path) -> Round:
    """Models loaded at once, an adapter put on each."""

    def one(number: int) -> str:
        before = sys.stderr, sys.stdout, tf.utils.logging.get_verbosity(), torch.get_default_dtype()
        made = _at_once(*[lambda: _adapted(room)[0].state_dict()] * THREADS)
        first, *others = made
        same = all(torch.equal(first[name], other[name]) for other in others for name in first)
        after = sys.stderr, sys.stdout, tf.utils.logging.get_verbosity(), torch.get_default_dtype()
        return "right" if same and before == after else "wrong"

    return one


def trainings(room: Path) -> Round:
    """Two runs at once: one is refused, or ends in the bytes that it has alone, as the other does."""

    def train(output: Path, seed: int) -> bytes:
        quiet = Console(file=io.StringIO())
        how = {**_TRAINED, "seed": seed, "output": str(output), "console": quiet}
        veneer.train(str(room / "model"), data=str(room / "rows.jsonl"), **how)
        return (output / "adapter" / "adapter_model.safetensors").read_bytes()

    alone = [train(room / f"alone {seed}", seed) for seed in (1, 2)]

    def one(number: int) -> str:
        at = [lambda seed=seed: train(room / f"{number} {seed}", seed) for seed in (1, 2)]
        found = _at_once(*at)
        refused = [isinstance(each, VeneerError) for each in found]
        right = [each == wanted for each, wanted in zip(found, alone, strict=True)]
        if not all(one or other for one, other in zip(refused, right, strict=True)) or all(refused):
            return "wrong"
        return "refused" if any(refused) else "right"

    return one


KINDS: dict[str, Callable[[Path], Round]] = {
    "answers of base and adapter": answers,
    "overlapping blocks of disabled": overlaps,
    "models loaded": loads,
    "two trainings": trainings,
}


def rounds(name: str, count: int, room: Path) -> Counter[str]:
    """What came of so many rounds."""
    before = sys.getswitchinterval()
    one, found = KINDS[name](room), Counter[str]()
    sys.setswitchinterval(1e-5)  # threads take turns as often as can be
    try:
        for number in range(count):
            try:
                found[one(number)] += 1
            except Exception as error:
                found[f"{type(error).__name__}: {str(error)[:200]}"] += 1
    finally:
        sys.setswitchinterval(before)
    return found


def make(room: Path) -> None:
    make_model(room / "model")
    make_rows(room)


def main(arguments: list[str]) -> int:
    count = int(arguments[0]) if arguments else 100
    torch.set_num_threads(1)
    bad = 0
    print("| at once in threads | rounds | right | refused in a sentence | bad |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = str(Path(folder) / "cache")
        make(Path(folder))
        for name in arguments[1:] or KINDS:
            found = rounds(name, count, Path(folder))
            others = {result: times for result, times in found.items() if result not in ("right", "refused")}
            bad += sum(others.values())
            print(f"| {name} | {count} | {found['right']} | {found['refused']} | {sum(others.values())} |", flush=True)
            for result, times in others.items():
                print(f"    {times} × {result}", file=sys.stderr)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
