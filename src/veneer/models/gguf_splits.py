"""A tokenizer.json's rules of splitting text → what llama.cpp calls them (tokenizer.ggml.pre)."""

from __future__ import annotations

from typing import Any

_GPT2 = "gpt-2"  # the expression that ByteLevel has in itself
_DIGIT = r"\p{N}"
_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_THREE_DIGITS = rf"{_ENGLISH}|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORD = r"[^\r\n\p{L}\p{N}]?"
_REST_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# (the expressions, in turn; whether a word of the vocabulary is taken without its merges) → llama.cpp's name.
_NAMES: dict[tuple[tuple[str, ...], bool], str] = {
    ((_GPT2,), False): "gpt-2",
    ((_DIGIT, _GPT2), False): "smollm",
    ((_THREE_DIGITS,), True): "llama-bpe",
    ((_THREE_DIGITS,), False): "dbrx",
    ((rf"{_ENGLISH}|{_LETTERS}|\p{{N}}|{_REST}",), False): "qwen2",
    ((
        rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|"
        r"\s*[\r\n]+|\s+(?!\S)|\s+",
    ), False): "qwen35",
    ((
        rf"{_WORD}{_UPPER}*{_LOWER}+{_ENGLISH}?|{_WORD}{_UPPER}+{_LOWER}*{_ENGLISH}?|\p{{N}}{{1,3}}|{_REST_SLASH}",
    ), False): "gpt-4o",
    ((rf"{_WORD}{_UPPER}*{_LOWER}+|{_WORD}{_UPPER}+{_LOWER}*|\p{{N}}|{_REST_SLASH}",), True): "tekken",
}  # fmt: skip
NAMES = tuple(_NAMES.values())


def split_name(rules: dict[str, Any]) -> str | None:
    """llama.cpp's name of how a byte-level BPE tokenizer with these ``rules`` (tokenizer.json) splits text; None where
    it has none that is known here."""
    steps = _steps(rules.get("pre_tokenizer"))
    whole_words = bool(rules["model"].get("ignore_merges"))
    return None if steps is None else _NAMES.get((steps, whole_words))


def _steps(splits: dict[str, Any] | None) -> tuple[str, ...] | None:
    if splits is None:
        return None
    if splits["type"] == "Sequence":
        parts = [_steps(part) for part in splits["pretokenizers"]]
        return None if None in parts else tuple(step for part in parts for step in part or ())
    if splits["type"] == "ByteLevel":
        spaced = splits.get("add_prefix_space")
        return None if spaced else (_GPT2,) if splits.get("use_regex", True) else ()
    if splits["type"] == "Digits" and splits.get("individual_digits"):
        return (_DIGIT,)
    if splits["type"] == "Split" and splits["behavior"] == "Isolated" and not splits["invert"]:
        expression = splits["pattern"].get("Regex")
        return None if expression is None else (expression,)
    return None
