"""K-quants where llama.cpp is not installed, dies, or refuses: a sentence, and nothing is left on the disk. What it
writes is in tests/interop/test_k_quants.py."""

from __future__ import annotations

import importlib.util
import sys

import pytest

import tiny
from tokens import tokenizer
from veneer.commands.merge import merge_to
from veneer.errors import ConfigError, ModelError
from veneer.models import gguf_k_quants
from veneer.models.gguf_k_quants import K_QUANTS, refuse_without_llama_cpp

pytestmark = pytest.mark.unit

ROWS = '{"prompt": "he", "completion": "ll"}\n'


@pytest.fixture
def merged(tmp_path, monkeypatch):
    """A function that merges a tiny model into a K-quant, by a program in the place of llama.cpp's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tiny.llama_folder(tmp_path / "base", tokenizer(merges=(("h", "e"), ("l", "l"))))
    (tmp_path / "rows.jsonl").write_text(ROWS)

    def merge(program, **more):
        monkeypatch.setattr(gguf_k_quants, "_PROGRAM", program)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
        options = {"format": "gguf", "storage": "q4_k_m", "check": str(tmp_path / "rows.jsonl"), **more}
        return merge_to(tmp_path / "base", tmp_path / "m.gguf", **options)

    return merge


@pytest.mark.parametrize("storage", K_QUANTS)
def test_without_the_library_the_line_that_installs_it_is_given(storage, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ModelError, match=rf"^{storage} is rounded by llama\.cpp.*: pip install llama-cpp-python \(.*q8_0"
    ):
        refuse_without_llama_cpp(storage)
    with pytest.raises(ModelError, match=r"pip install llama-cpp-python"):
        merge_to(tmp_path / "nothing", tmp_path / "m.gguf", format="gguf", storage=storage)


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "its process ended by SIGSEGV"),
        ("import sys; print('loading\\nno room left.', file=sys.stderr); sys.exit(1)", "no room left"),
        ("import sys; sys.exit(3)", "it returned 3"),
    ],
)
def test_a_process_that_ends_otherwise_is_a_sentence(program, why, merged, tmp_path):
    with pytest.raises(ModelError) as refused:
        merged(program)
    assert str(refused.value) == f"llama.cpp did not write q4_k_m: {why}. q8_0 and q4_0 do not need it."
    assert sorted(place.name for place in tmp_path.iterdir() if place.name != "cache") == ["base", "rows.jsonl"]


def test_the_file_that_it_is_given_is_the_exact_one_and_goes(merged, tmp_path):
    """A program that copies stands for llama.cpp: what it wrote is measured, and moves nothing."""
    made = merged("import shutil, sys; shutil.copy(*sys.argv[1:3])")
    assert (made.moved.tokens, made.moved.kl) == (2, pytest.approx(0, abs=1e-9))
    assert "so llama.cpp keeps them in types of more bits than q4_k_m: 16 in F32." in made.notes[-1]
    assert sorted(place.name for place in tmp_path.iterdir() if place.name != "cache") == [
        "base",
        "m.gguf",
        "rows.jsonl",
    ]


def test_a_folder_has_no_k_quants(tmp_path):
    with pytest.raises(ConfigError, match=r"keeps weights in fp32, bf16, fp16, nf4, fp4, and not in q4_k_m"):
        merge_to(tmp_path, tmp_path / "out", storage="q4_k_m")
