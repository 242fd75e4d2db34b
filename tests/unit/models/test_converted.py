"""A GGUF file's second load is from the cache, with the same bits; and whatever is wrong with the cache, it loads."""

from __future__ import annotations

import os

import gguf
import pytest
import torch
import transformers as tf

import veneer
from gguf_file import write_gguf
from tokens import tokenizer
from veneer.files import TEMPORARY, cache_folder

pytestmark = pytest.mark.unit


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = tokenizer(merges=(("h", "e"), ("l", "l")))
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=len(made), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, eos_token_id=made.eos_token_id, tie_word_embeddings=True,
    )  # fmt: skip
    write_gguf(tmp_path / "tiny.gguf", tf.LlamaForCausalLM(config), made, gguf.GGMLQuantizationType.Q8_0)
    return tmp_path / "tiny.gguf"


def _reading(monkeypatch):
    """How many GGUF files have been opened since."""
    opened, real = [], gguf.GGUFReader.__init__
    monkeypatch.setattr(
        gguf.GGUFReader, "__init__", lambda self, *args, **kwargs: (opened.append(args), real(self, *args, **kwargs))[1]
    )
    return opened


def _same(first, second):
    assert first[0].state_dict().keys() == second[0].state_dict().keys()
    for name, tensor in first[0].state_dict().items():
        assert torch.equal(tensor, second[0].state_dict()[name])
    for part in (0, 1):
        assert first[part].name_or_path == second[part].name_or_path
    configs = [model.config.to_diff_dict() for model, _ in (first, second)]
    for config in configs:
        config.pop("architectures", None)  # which saving adds
    assert configs[0] == configs[1]
    assert first[0].generation_config.to_diff_dict() == second[0].generation_config.to_diff_dict()
    text = "One, two  three:\nfour é €"
    assert first[1](text).input_ids == second[1](text).input_ids
    assert first[1].chat_template == second[1].chat_template
    assert first[1].special_tokens_map == second[1].special_tokens_map


def test_the_second_load_opens_no_gguf_and_has_the_same_bits(file, monkeypatch):
    first = veneer.load(file)
    opened = _reading(monkeypatch)
    _same(first, veneer.load(file))
    codes = veneer.load(file, "nf4")[0]
    assert not opened
    monkeypatch.setenv("XDG_CACHE_HOME", str(file.parent / "another"))
    wanted = veneer.load(file, "nf4")[0]
    assert opened
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(tensor, codes.state_dict()[name])
    assert not (cache_folder() / "gguf").exists(), "a quantised load, which may be of a large model, keeps nothing"


def test_a_file_that_has_changed_is_read_anew(file, monkeypatch):
    veneer.load(file)
    os.utime(file, ns=(1, 1))
    opened = _reading(monkeypatch)
    veneer.load(file)
    assert opened
    assert len(list((cache_folder() / "gguf").iterdir())) == 1, "the copy of the file as it was is deleted"


def test_a_cache_that_cannot_be_written_or_a_full_disk_is_no_error(file, monkeypatch):
    (file.parent / "cache").write_text("a file where a folder should be")
    first = veneer.load(file)
    monkeypatch.setenv("XDG_CACHE_HOME", str(file.parent / "full"))
    monkeypatch.setattr("veneer.models.converted.shutil.disk_usage", lambda _: _Full)
    _same(first, veneer.load(file))
    assert not list((cache_folder() / "gguf").iterdir())


def test_copies_that_nobody_can_use_or_has_used_for_a_month_are_deleted(file, monkeypatch):
    veneer.load(file)
    cache = cache_folder() / "gguf"
    [kept] = cache.iterdir()
    source = (kept / "veneer-source.json").read_text()
    (cache / "of-the-first-version").mkdir()
    for name, said in {
        "gone": source.replace("tiny", "gone"),
        "damaged": "{",
        "unused": source,
        "used": source,
    }.items():
        (cache / name).mkdir()
        (cache / name / "veneer-source.json").write_text(said)
    os.utime(cache / "unused" / "veneer-source.json", (0, 0))
    os.utime(kept / "veneer-source.json", (0, 0))
    veneer.load(file)  # from the copy, which is used now
    other = file.with_name("other.gguf")
    other.write_bytes(file.read_bytes())
    veneer.load(other)
    assert {path.name.rpartition("-")[0] or path.name for path in cache.iterdir()} == {"tiny", "other", "used"}


def test_a_copy_is_of_one_version_of_veneer(file, monkeypatch):
    veneer.load(file)
    monkeypatch.setattr("veneer.models.converted.__version__", "99")
    opened = _reading(monkeypatch)
    veneer.load(file)
    assert opened


class _Full:
    free = 1000


def test_what_was_written_in_half_is_not_there(file, monkeypatch):
    def half(self, folder, **_):
        (folder / "config.json").write_text("{")
        raise OSError("the disk is full after all")

    with monkeypatch.context() as patch:
        patch.setattr(tf.LlamaForCausalLM, "save_pretrained", half)
        first = veneer.load(file)
    assert not list((cache_folder() / "gguf").iterdir())
    _same(first, veneer.load(file))


def test_what_a_killed_write_left_goes_with_the_next_one_and_not_what_is_being_written(file):
    cache = cache_folder() / "gguf"
    for number in (1, 2):
        (cache / f"{TEMPORARY}{number}-tiny").mkdir(parents=True)
    os.utime(cache / f"{TEMPORARY}1-tiny", (0, 0))
    veneer.load(file)
    kept, made = sorted(path.name for path in cache.iterdir())
    assert kept == f"{TEMPORARY}2-tiny"
    assert made.startswith("tiny-")


def _cut(copy):
    os.truncate(copy / "model.safetensors", 100)


def _emptied(copy):
    for path in copy.iterdir():
        path.unlink()


def _linked(copy):
    os.rename(copy, copy.parent.parent / "another")
    copy.symlink_to(copy.parent.parent / "another")


def _part_linked(copy):
    os.rename(copy / "config.json", copy.parent.parent / "config.json")
    (copy / "config.json").symlink_to(copy.parent.parent / "config.json")


DAMAGES = {
    "a file is lost": lambda copy: (copy / "config.json").unlink(),
    "a file is cut": _cut,
    "a file is another": lambda copy: (copy / "config.json").write_text("{}"),
    "a file more": lambda copy: (copy / "chat_template.jinja").write_text("{{ 'x' }}"),
    "nothing in it": _emptied,
    "a link to another": _linked,
    "a link in it": _part_linked,
    "a file": lambda copy: (_emptied(copy), copy.rmdir(), copy.write_text("")),
    "open to others": lambda copy: copy.chmod(0o777),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_copy_that_is_not_as_it_was_written_is_made_again(file, damage, monkeypatch):
    first = veneer.load(file)
    [copy] = (cache_folder() / "gguf").iterdir()
    DAMAGES[damage](copy)
    opened = _reading(monkeypatch)
    _same(first, veneer.load(file))
    assert opened
    opened.clear()
    _same(first, veneer.load(file))
    assert not opened, "the copy is whole again"


def test_a_copy_is_the_users_alone_whatever_the_umask(file, monkeypatch):
    old = os.umask(0)
    try:
        veneer.load(file)
    finally:
        os.umask(old)
    [copy] = (cache_folder() / "gguf").iterdir()
    assert {path.stat().st_mode & 0o777 for path in (copy, copy.parent)} == {0o700}
    opened = _reading(monkeypatch)
    veneer.load(file)
    assert not opened
