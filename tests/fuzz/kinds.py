"""What is damaged and who reads it: each kind of file that Veneer takes from others or finds again."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from rich.console import Console

import tiny
import veneer
from gguf_file import write_gguf
from tokens import tokenizer
from veneer.commands.inspect import InspectOptions, inspect_source
from veneer.commands.watch import screen
from veneer.data.formats import to_examples
from veneer.data.read import read_rows
from veneer.reporting.run_page import run_page
from veneer.reporting.study_page import study_page
from veneer.runs.history import RunHistory
from veneer.studies import run
from veneer.studies.config import StudyOptions
from veneer.studies.folder import read_study_rows
from veneer.studies.kinds import STUDIES
from veneer.studies.run import run_study
from veneer.studies.work import work
from veneer.training.config import TrainConfig

QUIET = Console(file=io.StringIO(), width=80)
_WORDS = [a + b for a in "bcdfgklm" for b in ("at", "ig", "op", "un", "ed", "ar")]


class Kind(NamedTuple):
    """``make`` fills a folder, once; of ``files``, patterns, one is damaged in a copy; ``read`` is given the copy."""

    make: Callable[[Path], None]
    files: tuple[str, ...]
    read: Callable[[Path], Any]


def make_model(folder: Path) -> None:
    """A tiny Llama and its tokenizer."""
    tiny.llama_folder(folder, tokenizer(merges=(("a", "t"), ("i", "g"))), layers=1, positions=64)


def _make_model_folder(folder: Path) -> None:
    make_model(folder / "model")


def _make_gguf(folder: Path) -> None:
    make_model(folder / "model")
    model, made = veneer.load(folder / "model")
    write_gguf(folder / "model.gguf", model, made)
    shutil.rmtree(folder / "model")


def _make_nf4(folder: Path) -> None:
    from veneer.commands.quantize import quantise_to

    make_model(folder / "model")
    quantise_to(folder / "model", folder / "nf4")
    shutil.rmtree(folder / "model")


def make_rows(folder: Path) -> None:
    rows = [{"prompt": f"{word}:", "completion": " yes" if word[0] < "g" else " no"} for word in _WORDS]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    talk = [
        {"messages": [{"role": "user", "content": word}, {"role": "assistant", "content": "ok"}]} for word in _WORDS
    ]
    (folder / "talk.json").write_text(json.dumps(talk[:8]))
    (folder / "rows.csv").write_text("text,label\n" + "".join(f"{word},{word[0] < 'g'}\n" for word in _WORDS))
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")


def _make_run(folder: Path) -> None:
    make_model(folder / "model")
    make_rows(folder)
    veneer.train(
        str(folder / "model"), data=str(folder / "rows.jsonl"), output=str(folder / "run"), steps=4, rank=2,
        batch_size=4, checkpoint_every=2, evaluate_every=2, learning_rate=1e-3, console=QUIET,
    )  # fmt: skip
    veneer.evaluate(folder / "run")


def _make_adapter(folder: Path) -> None:
    model = veneer.attach(tiny.build("llama"), veneer.LoRA(rank=2, targets=["q_proj", "v_proj"]))
    model.save_pretrained(folder / "adapter")


def _make_study(folder: Path) -> None:
    make_model(folder / "model")
    make_rows(folder)
    options = StudyOptions(
        model=str(folder / "model"), data=str(folder / "rows.jsonl"), output=str(folder / "study"), seeds=[0], steps=2,
        batch_size=4, held_out=16, learning_rate=1e-3, ranks=[1, 2],
    )  # fmt: skip
    with patch.object(run, "in_a_process", work):
        run_study("rank", options, lambda text: None)


def _read_model(folder: Path, **how: Any) -> None:
    path = next(path for path in (*folder.iterdir(), folder / "model.gguf") if not path.name.startswith("."))
    model, made = veneer.load(path, **how)
    ids = torch.tensor([made("bat:").input_ids])
    if not torch.isfinite(model(ids).logits).all():
        raise AssertionError("the logits are not finite")


def _read_adapter(folder: Path) -> None:
    """A refusal leaves the model as it was."""
    model = tiny.build("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        veneer.load_adapter(model, folder / "adapter")
    except veneer.VeneerError:
        after = model.state_dict()
        if before.keys() != after.keys() or not all(torch.equal(before[name], after[name]) for name in before):
            raise AssertionError("the refused adapter changed the model") from None
        raise
    if not torch.isfinite(model(torch.arange(8).view(1, 8)).logits).all():
        raise AssertionError("the logits are not finite")


def _read_run(folder: Path) -> None:
    run = folder / "run"
    Console(file=io.StringIO()).print(screen(RunHistory.read(run), 80))
    run_page(run)
    inspect_source(str(run), InspectOptions()).show(QUIET)


def _resume(folder: Path) -> None:
    shutil.rmtree(folder / "run" / "adapter")
    veneer.resume(folder / "run", steps=5, console=QUIET)


def _answer(folder: Path) -> None:
    from veneer.commands.generate import answers

    answers(str(folder / "run"), "bat:", max_new_tokens=2)


def _read_rows(folder: Path) -> None:
    for file in sorted(folder.iterdir()):
        to_examples(read_rows(file))


def _read_options(folder: Path) -> None:
    TrainConfig.read(folder / "run" / "config.yaml")


def _read_study(folder: Path) -> None:
    study = folder / "study"
    study_page(study)
    inspect_source(str(study), InspectOptions()).show(QUIET)
    read_study_rows(study, STUDIES["rank"])


_RUN_FILES = ("run/*.json", "run/*.yaml", "run/metrics.jsonl", "run/best/step", "run/adapter/*.json")
KINDS: dict[str, Kind] = {
    "rows": Kind(make_rows, ("*",), _read_rows),
    "options": Kind(_make_run, ("run/config.yaml",), _read_options),
    "adapter": Kind(_make_adapter, ("adapter/*.json", "adapter/*.safetensors"), _read_adapter),
    "run": Kind(_make_run, _RUN_FILES, _read_run),
    "study": Kind(_make_study, ("study/*.json", "study/*.csv", "study/*.png"), _read_study),
    "resumed run": Kind(_make_run, ("run/checkpoints/*/*", "run/*.json", "run/*.yaml", "run/metrics.jsonl"), _resume),
    "answer of a run": Kind(_make_run, ("run/*.json", "run/*.yaml", "run/adapter/*"), _answer),
    "model": Kind(_make_model_folder, ("model/*",), _read_model),
    "model in nf4": Kind(_make_model_folder, ("model/*",), lambda folder: _read_model(folder, storage="nf4")),
    "bitsandbytes": Kind(_make_nf4, ("nf4/*",), _read_model),
    "gguf": Kind(_make_gguf, ("*.gguf",), _read_model),
}
