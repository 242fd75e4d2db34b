"""A tokenizer as a GGUF file's keys: what llama.cpp needs to make the same tokens, or a refusal by name."""

from __future__ import annotations

import json

import pytest
from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tokens import tokenizer
from veneer.errors import ModelError
from veneer.models.gguf_splits import split_name
from veneer.models.gguf_tokenizer import tokenizer_keys

pytestmark = pytest.mark.unit

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _keys(words, rows=None, **more):
    return {
        key.removeprefix("tokenizer.ggml."): said.value
        for key, said in tokenizer_keys(words, rows or len(words), None, **more).keys.items()
    }


def sentencepiece(*, prefix=True):
    """As Llama 2's: BPE over letters, bytes for all else."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abehlot", "he", "ll", "hell"]
    pieces += ["hello", "▁hello", "▁t", "▁the"]
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("▁", "t"), ("▁t", "he"), ("hell", "o"), ("▁", "hello")]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps = [normalizers.Replace(" ", "▁")]
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *steps] if prefix else steps)
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def test_byte_level_bpe():
    words = tokenizer(begin=True, merges=(("h", "e"), ("l", "l")))
    keys = _keys(words, len(words) + 2)
    assert (keys["model"], keys["pre"], keys["merges"]) == ("gpt2", "gpt-2", ["h e", "l l"])
    assert keys["tokens"][:-2] == words.convert_ids_to_tokens(range(len(words)))
    assert keys["tokens"][-2:] == [f"[PAD{len(words)}]", f"[PAD{len(words) + 1}]"]
    assert {keys["token_type"][number] for number in words.all_special_ids} == {TokenType.CONTROL}
    assert keys["token_type"][-1] == TokenType.UNUSED
    assert (keys["add_bos_token"], keys["add_eos_token"]) == (True, False)
    assert (keys["bos_token_id"], keys["eos_token_id"]) == (words.bos_token_id, words.eos_token_id)


@pytest.mark.parametrize("prefix", [True, False])
def test_bpe_with_byte_fallback(prefix):
    words = sentencepiece(prefix=prefix)
    keys = _keys(words)
    assert (keys["model"], keys["add_space_prefix"], keys["add_bos_token"]) == ("llama", prefix, True)
    kinds = dict(zip(keys["tokens"], keys["token_type"], strict=True))
    assert (kinds["<unk>"], kinds["</s>"], kinds["<0x41>"], kinds["he"]) == (
        TokenType.UNKNOWN, TokenType.CONTROL, TokenType.BYTE, TokenType.NORMAL
    )  # fmt: skip
    scores = dict(zip(keys["tokens"], keys["scores"], strict=True))
    order = sorted((token for token in scores if scores[token]), key=scores.get, reverse=True)
    assert order == ["he", "ll", "hell", "▁t", "▁the", "hello", "▁hello"], "as the merges are"


@pytest.mark.parametrize(
    ("splits", "whole_words", "name"),
    [
        ([pre_tokenizers.ByteLevel(add_prefix_space=False)], False, "gpt-2"),
        ([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)], False,
         "smollm"),
        ([pre_tokenizers.Split(Regex(LLAMA3), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)], True,
         "llama-bpe"),
        ([pre_tokenizers.Split(Regex(LLAMA3), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)], False,
         "dbrx"),
        ([pre_tokenizers.Split(Regex(LLAMA3.replace("{1,3}", "")), "isolated"),
          pre_tokenizers.ByteLevel(False, use_regex=False)], False, "qwen2"),
        ([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)], False, None),
        ([pre_tokenizers.ByteLevel(add_prefix_space=True)], False, None),
    ],
)  # fmt: skip
def test_how_text_is_split_has_llama_cpps_name(splits, whole_words, name):
    made = tokenizer(merges=(("h", "e"),))
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    rules = json.loads(made.backend_tokenizer.to_str())
    rules["model"]["ignore_merges"] = whole_words
    assert split_name(rules) == name
    if name is None:
        with pytest.raises(ModelError, match=r"splits text has no name in llama\.cpp that is known here; .* as pre\."):
            _keys(made)
        assert _keys(made, pre="qwen2")["pre"] == "qwen2"


def test_what_llama_cpp_has_no_keys_for_is_refused_by_name():
    words = tokenizer(merges=(("h", "e"),))
    with pytest.raises(ModelError, match=r"has 262 tokens, and the model rows for 200"):
        _keys(words, 200)
    words.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(ModelError, match=r"rewrites text by Lowercase, which llama\.cpp does not do"):
        _keys(words)
    with pytest.raises(ModelError, match=r"has no merges"):
        _keys(tokenizer())
    one = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram([("a", 0.0)], 0)), eos_token="a")
    with pytest.raises(ModelError, match=r"of the kind Unigram is not written as GGUF; byte-level BPE and BPE with"):
        _keys(one)
    without = tokenizer(merges=(("h", "e"),))
    without.eos_token = None
    with pytest.raises(ModelError, match=r"has no end token"):
        _keys(without)


def test_what_swallows_space_is_reported():
    words = tokenizer(merges=(("h", "e"),))
    words.add_tokens([AddedToken("<|x|>", rstrip=True, special=True)])
    notes = tokenizer_keys(words, len(words), None).notes
    assert [note[:25] for note in notes] == ["'<|x|>' swallows space be"]
