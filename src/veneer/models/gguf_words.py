"""How a GGUF file says that text is split before its pieces are looked up, for names that transformers has not."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Regex, pre_tokenizers

from veneer.models.gguf_header import GgufHeader

# llama.cpp splits these as GPT-2 does, which transformers does with every name that it does not know. Those of the
# second line have digits apart, too; no merge of theirs joins digits, so it changes nothing.
_AS_GPT2 = {
    "default", "gpt-2", "phi-2", "mpt", "olmo", "jais", "jina-es", "jina-de", "exaone4", "trillion", "granite-docling",
    "smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b",
}  # fmt: skip
_AS_QWEN2 = {"stablelm2", "hunyuan"}
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split_as_written(tokenizer: Any, header: GgufHeader) -> list[str]:
    """Have ``tokenizer`` split text as ``header`` says. Where neither Veneer nor transformers knows how, a sentence
    about it."""
    how = header.metadata.get("tokenizer.ggml.pre", "default")
    backend = tokenizer._tokenizer
    split = json.loads(backend.to_str())["pre_tokenizer"]
    if header.metadata.get("tokenizer.ggml.model") != "gpt2" or how in _AS_GPT2 or split["type"] != "ByteLevel":
        return []
    if how not in _AS_QWEN2:
        return [
            f"{header.name} splits text as {how!r} (tokenizer.ggml.pre), which is not known here: some words may "
            f"become other tokens than in the model that the file was made of; its own tokenizer is right."
        ]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN2), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return []
