"""A set of rows takes the disk's room and not the memory's, from the file to the steps."""

from __future__ import annotations

import io
import json
import random
import tracemalloc
from types import SimpleNamespace

import pytest
import transformers as tf
from rich.console import Console

import veneer
from tokens import tokenizer
from veneer.data import kept, token_rows
from veneer.data.formats import to_examples
from veneer.data.labels import Renderer
from veneer.data.read import read_rows
from veneer.data.split import split
from veneer.data.token_rows import Tokens
from veneer.generation.likelihood import choices_of
from veneer.planning.machine import Machine
from veneer.runs.memory import Process
from veneer.runs.rows import Steps, in_steps, read_split
from veneer.training import progress
from veneer.training.batches import Batches
from veneer.training.config import TrainConfig

pytestmark = pytest.mark.unit


@pytest.fixture
def _everything_on_the_disk(monkeypatch):
    monkeypatch.setattr(kept, "_IN_MEMORY", 2**14)
    monkeypatch.setattr(token_rows, "_PART", 2**14)


def _write(path, count, length):
    draw = random.Random(0)
    with path.open("w") as file:
        for number in range(count):
            text = "".join(draw.choices("abcdefgh ", k=length))
            file.write(json.dumps({"prompt": f"{number} {text}", "completion": text[::-1]}) + "\n")
    return path


@pytest.mark.usefixtures("_everything_on_the_disk")
def test_from_file_to_steps_in_a_few_bytes_a_token(tmp_path):
    """Rows, examples and tokens as Python's objects took about 80 bytes a token."""
    made = tokenizer()
    renderer, model = Renderer(made), tf.LlamaConfig(vocab_size=len(made), hidden_size=32)

    def passed(count):
        data = str(_write(tmp_path / f"{count}.jsonl", count, 200))
        config = TrainConfig(model="m", data=data, output="o", held_out=count // 10, steps=10)
        rows = read_split(config, {})
        steps = in_steps(renderer, rows.train, rows.held_out, config, model, {})
        return steps, steps.work("causal", packed=True)

    passed(40)  # what is imported then is no rows'
    tracemalloc.start()
    steps, work = passed(300)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    tokens = sum(len(row.ids) for row in steps.rows) + sum(len(row.ids) for row in steps.held_out)
    assert (len(steps.rows), len(steps.held_out), tokens > 120_000) == (270, 30, True)
    assert peak < 5 * tokens, "of 80"
    assert work.largest == steps.batches.rows(
        max(range(10), key=lambda s: sum(len(r.ids) for r in steps.batches.rows(s)))
    )


@pytest.mark.usefixtures("_everything_on_the_disk")
@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_pairs_take_a_few_bytes_a_token(objective, tmp_path):
    made = tokenizer()
    renderer, model = Renderer(made), tf.LlamaConfig(vocab_size=len(made), hidden_size=32)

    def passed(count):
        file, draw = tmp_path / f"{count}.jsonl", random.Random(0)
        with file.open("w") as opened:
            for number in range(count):
                one, other = ("".join(draw.choices("abcdefgh ", k=200)) for _ in range(2))
                opened.write(json.dumps({"prompt": f"{number}:", "chosen": one, "rejected": other}) + "\n")
        config = TrainConfig(model="m", data=str(file), output="o", held_out=count // 10, objective=objective, steps=5)
        rows = read_split(config, {})
        return in_steps(renderer, rows.train, rows.held_out, config, model, {})

    passed(40)
    tracemalloc.start()
    steps = passed(200)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    tokens = sum(len(row.ids) for row in steps.rows) + sum(len(row.ids) for row in steps.held_out)
    assert (len(steps.rows), tokens > 70_000) == (360 if objective == "kto" else 180, True)
    assert [row.number for row in steps.held_out] == list(range(len(steps.rows), len(steps.rows) + len(steps.held_out)))
    assert peak < 5 * tokens, "of 80"


def test_rows_on_the_disk_train_as_rows_in_memory(tiny_folder, rows_file, tmp_path, monkeypatch):
    def adapter(name):
        output = tmp_path / name
        veneer.train(
            str(tiny_folder), data=str(rows_file), output=str(output), steps=2, held_out=8, on_the_way=False,
            console=Console(file=io.StringIO()),
        )  # fmt: skip
        return (output / "adapter" / "adapter_model.safetensors").read_bytes()

    wanted = adapter("in-memory")
    monkeypatch.setattr(kept, "_IN_MEMORY", 16)
    assert adapter("on-the-disk") == wanted


@pytest.mark.usefixtures("_everything_on_the_disk")
@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_a_file_is_read_in_passes(suffix, tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / f"rows.{suffix}"
    rows = [{"prompt": f"q{number}", "completion": f"a{number % 3}\nb"} for number in range(300)]
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif suffix == "csv":
        path.write_text("prompt,completion\n" + "".join(f'{r["prompt"]},"{r["completion"]}"\n' for r in rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = read_rows(path)
    assert [row.fields for row in read] == rows
    examples = to_examples(read).items
    assert choices_of(examples[:50], examples[50:]) == ["a0\nb", "a1\nb", "a2\nb"]
    sides = split(examples, 0.1, 0)
    in_memory = split(list(examples), 0.1, 0)
    assert [list(side) for side in sides[:2]] == [list(side) for side in in_memory[:2]]


def test_the_plan_counts_the_rows():
    machine = Machine({}, 0.0, 100, 60)
    assert Process(machine, 90, 80, rows=7).at() == Machine({}, 0.0, 107, 87)
    row = Tokens([1], [1], "")
    batches = Batches([row], 1, 0)
    steps = Steps([row] * 900, [row] * 100, [], batches, TrainConfig(model="m", data="d", output="o"), {}, [])
    assert steps.memory == 300_000


def test_what_takes_long_says_how_far_it_is(monkeypatch):
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    console = Console(file=io.StringIO())
    assert list(progress.counted(console, range(1000), "tokenising rows")) == list(range(1000))
    assert console.file.getvalue().splitlines() == [
        "tokenising rows: 256/1,000 · 0:58 left", "tokenising rows: 768/1,000 · 0:12 left"
    ]  # fmt: skip
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: 0.0))
    console = Console(file=io.StringIO())
    assert list(progress.counted(console, range(1000), "tokenising rows")) == list(range(1000))
    assert console.file.getvalue() == ""
