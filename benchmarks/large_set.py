"""How much memory a run's process grows by over a set of many tokens, and how long each part takes.

    python benchmarks/large_set.py [TOKENS]     (20,000,000 by default)
    python benchmarks/large_set.py TOKENS tokens    the storage of so many tokens alone: nothing is read or trained

Rows are made up; the model is tiny, so that the set is what takes memory. A run over a few rows comes first: what the
process grows by afterwards is the set's.
"""

from __future__ import annotations

import io
import json
import random
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console

import veneer
from veneer.host_memory import peak_host_memory

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

_ROW = 200  # characters, of which each is a token of the tiny model's


def write_rows(path: Path, tokens: int) -> None:
    """Rows of prompt and completion that all differ."""
    draw = random.Random(0)
    words = ["".join(draw.choice("abcdefgh") for _ in range(draw.randrange(2, 9))) for _ in range(3000)]
    with path.open("w") as file:
        while tokens > 0:
            text = " ".join(draw.choice(words) for _ in range(_ROW // 6))
            file.write(json.dumps({"prompt": text[:60], "completion": text[60:]}) + "\n")
            tokens -= len(text) + 1


def trained(folder: Path, name: str, tokens: int) -> tuple[int, float]:
    """The process's peak afterwards, bytes, and the seconds of a run of two steps."""
    write_rows(folder / f"{name}.jsonl", tokens)
    started = time.monotonic()
    veneer.train(
        str(folder / "tiny"), data=str(folder / f"{name}.jsonl"), output=str(folder / name), steps=2, batch_size=4,
        held_out=32, console=Console(file=io.StringIO()),
    )  # fmt: skip
    return peak_host_memory(), time.monotonic() - started


def stored(tokens: int) -> None:
    """Keep rows of made-up tokens, write them as one file, and open that."""
    from veneer.data.token_rows import TokenRows, Tokens

    ids = [random.Random(0).randrange(150_000) for _ in range(2 * _ROW)]
    before, started = peak_host_memory(), time.monotonic()
    rows, times = TokenRows(), {}
    for number in range(tokens // _ROW):
        own = ids[number % _ROW :][:_ROW]
        rows.append(Tokens(own, [*[-100] * 60, *own[60:]], f"rows.jsonl:{number + 1}"))
    times["kept"] = time.monotonic() - started
    with tempfile.TemporaryDirectory(dir=Path.home()) as place:
        path = Path(place, "tokens")
        with path.open("wb") as file:
            rows.write(file, "")
        times["written"] = time.monotonic() - started
        with path.open("rb") as file:
            TokenRows.read(file)
            times["opened"] = time.monotonic() - started
    grown = peak_host_memory() - before
    so_far = {f"{name} after": round(seconds, 1) for name, seconds in times.items()}
    print(json.dumps({"stored": tokens, "grown": grown, "bytes": rows.nbytes, **so_far}))


def main(tokens: int) -> None:
    import tiny
    from tokens import tokenizer

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        tiny.llama_folder(folder / "tiny", tokenizer(), positions=512)
        before, _ = trained(folder, "few", 20_000)
        after, seconds = trained(folder, "many", tokens)
    print(json.dumps({"tokens": tokens, "grown": after - before, "seconds": round(seconds, 1)}))


if __name__ == "__main__":
    (stored if sys.argv[2:] == ["tokens"] else main)(int(sys.argv[1]) if len(sys.argv) > 1 else 20_000_000)
