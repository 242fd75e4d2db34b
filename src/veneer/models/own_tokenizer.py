"""A tokenizer that is not its base's own: another template, more tokens. A run's and an adapter's folder then hold its
files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from veneer.errors import VeneerError
from veneer.models.checkpoint import Checkpoint
from veneer.models.library import call_library, quiet
from veneer.models.own_code import refuse_own_tokenizer

_OF_A_CALL = ("padding", "truncation")  # what the last call asked for, which a fast tokenizer keeps


def is_changed(tokenizer: Any, base: str) -> bool:
    """Whether it is another tokenizer than the one of the model called ``base``, or that one cannot be found."""
    try:
        original = Checkpoint(base).tokenizer()
    except VeneerError:
        return True
    pad_with_end(original)
    return _form(tokenizer) != _form(original)


def pad_with_end(tokenizer: Any) -> None:
    """Let a tokenizer without a padding token pad with its end token."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


def _form(tokenizer: Any) -> tuple[Any, ...]:
    """All by which a text becomes tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = {} if backend is None else json.loads(backend.to_str())
    return (
        {name: rule for name, rule in rules.items() if name not in _OF_A_CALL}, tokenizer.get_vocab(),
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()}, tokenizer.chat_template,
    )  # fmt: skip


def tokenizer_in(folder: Path) -> Any:
    """The tokenizer whose files a folder holds. Raises ModelError where they are damaged or missing."""
    refusal = f"{folder} lacks the tokenizer that was trained with, or it is damaged; copy the whole folder"
    refuse_own_tokenizer(folder, str(folder))
    with quiet():
        tokenizer = call_library(AutoTokenizer.from_pretrained, refusal, folder, trust_remote_code=False)
        call_library(tokenizer, refusal, "a")  # what its files set wrongly is only found in use
    pad_with_end(tokenizer)
    return tokenizer
