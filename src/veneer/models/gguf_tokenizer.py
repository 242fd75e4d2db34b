"""A tokenizer → the keys by which a GGUF file says it.

Safest first: a base that came from a GGUF file gives its own keys on as they are. Else they are made of the tokenizer's
rules (tokenizer.json), and what these have that llama.cpp has not is refused by name.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from gguf import GGUFValueType, TokenType

from veneer.errors import ModelError
from veneer.models.gguf_header import GgufHeader
from veneer.models.gguf_splits import NAMES, split_name

_TOKENS, _TYPES, _SCORES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.scores"
_IDS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # transformers' name → the file's
_STRIPS = ("lstrip", "rstrip", "single_word")


@dataclass(frozen=True)
class Said:
    """A key's value and its types, None for those that follow from the value."""

    value: Any
    types: list[GGUFValueType] | None = None


@dataclass
class TokenizerKeys:
    """``keys``: by name; ``notes``: what llama.cpp does otherwise, as sentences."""

    keys: dict[str, Said] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def put(self, key: str, value: Any) -> None:
        self.keys[f"tokenizer.ggml.{key}"] = Said(value)


def tokenizer_keys(tokenizer: Any, rows: int, base: GgufHeader | None, *, pre: str | None = None) -> TokenizerKeys:
    """The keys of ``tokenizer`` for a model with so many ``rows`` of embeddings. ``base``: the header of the GGUF file
    that it came from; ``pre``: llama.cpp's name of how it splits text, where that is not known here.

    Raises ModelError for a tokenizer that llama.cpp has no keys for.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(f"{tokenizer.name_or_path} has no tokenizer.json, which the keys of a GGUF file are made of.")
    if pre is not None and pre not in NAMES:
        raise ModelError(f"pre = {pre!r} is not one of {', '.join(NAMES)}.")
    if base is not None and (made := _taken_over(tokenizer, rows, base)) is not None:
        return made
    if len(tokenizer) > rows:
        raise ModelError(f"{tokenizer.name_or_path} has {len(tokenizer):,} tokens, and the model rows for {rows:,}.")
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    made = _byte_level(tokenizer, rules, rows, pre) if _is_byte_level(rules) else _with_scores(tokenizer, rules, rows)
    _put_ends(made, tokenizer)
    stripping = [token["content"] for token in rules["added_tokens"] if any(token.get(flag) for flag in _STRIPS)]
    if stripping:
        made.notes.append(
            f"{', '.join(map(repr, stripping[:3]))} swallows space beside it or is a word of its own, for which GGUF "
            f"has no key: text with such space may become other tokens."
        )
    return made


def _taken_over(tokenizer: Any, rows: int, base: GgufHeader) -> TokenizerKeys | None:
    """A GGUF file's own keys, with the tokens that were added since; None where the tokenizer is another one."""
    names = [key for key in base.metadata if key.startswith("tokenizer.") and key != "tokenizer.chat_template"]
    keys = {key: Said(*base.stored_as(key)) for key in names}
    if _TOKENS not in keys:
        return None
    words = list(keys[_TOKENS].value)
    types: list[int] = keys[_TYPES].value if _TYPES in keys else [TokenType.NORMAL] * len(words)
    vocabulary = tokenizer.convert_ids_to_tokens(range(min(len(words), len(tokenizer))))
    # transformers spells special tokens in its own way.
    plain = [number for number in range(len(vocabulary)) if types[number] == TokenType.NORMAL]
    if len(words) > rows or any(vocabulary[number] != words[number] for number in plain):
        return None
    if len(words) < rows:
        new, kinds = _tokens(tokenizer, rows)
        filled: dict[str, list[Any]] = {_TOKENS: new, _TYPES: kinds, _SCORES: [0.0] * rows}
        for key in filled.keys() & keys.keys():
            said = keys[key]
            keys[key] = Said([*said.value, *filled[key][len(words) :]], said.types)
    return TokenizerKeys(keys)


def _tokens(tokenizer: Any, rows: int) -> tuple[list[str], list[int]]:
    """The word and the type of each row; rows without a token are filled up."""
    words = {number: word for word, number in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    named, types = [], []
    for number in range(rows):
        word = words.get(number)
        kind = TokenType.UNUSED if word is None else TokenType.NORMAL
        if number in added:
            kind = TokenType.CONTROL if added[number].special else TokenType.USER_DEFINED
        named.append(f"[PAD{number}]" if word is None else word)
        types.append(int(kind))
    return named, types


def _is_byte_level(rules: dict[str, Any]) -> bool:
    model = rules["model"]
    if model["type"] != "BPE":
        raise ModelError(
            f"A tokenizer of the kind {model['type']} is not written as GGUF; byte-level BPE and BPE with byte "
            f"fallback are."
        )
    if model.get("dropout") or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise ModelError(
            "The tokenizer's BPE has dropout, or marks parts or ends of words, which GGUF has no keys for."
        )
    return not model.get("byte_fallback")


def _byte_level(tokenizer: Any, rules: dict[str, Any], rows: int, pre: str | None) -> TokenizerKeys:
    normalizer = (rules.get("normalizer") or {"type": "NFC"})["type"]
    if normalizer != "NFC":
        raise ModelError(f"The tokenizer rewrites text by {normalizer}, which llama.cpp does not do.")
    name = pre or split_name(rules)
    if name is None:
        raise ModelError(
            f"How {tokenizer.name_or_path} splits text has no name in llama.cpp that is known here; if its converter "
            f"calls it one of {', '.join(NAMES)}, give that name as pre."
        )
    made = TokenizerKeys()
    words, types = _tokens(tokenizer, rows)
    made.put("model", "gpt2")
    made.put("pre", name)
    made.put("tokens", words)
    made.put("token_type", types)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in rules["model"]["merges"]]
    if not merges:
        raise ModelError(f"{tokenizer.name_or_path} has no merges, and llama.cpp no form without them.")
    made.put("merges", merges)
    return made


def _with_scores(tokenizer: Any, rules: dict[str, Any], rows: int) -> TokenizerKeys:
    """BPE of SentencePiece: llama.cpp joins what has the best score, and merges are in the order of their scores."""
    words, types = _tokens(tokenizer, rows)
    scores = [0.0] * rows
    numbers = {word: number for number, word in enumerate(words)}
    for rank, merge in enumerate(rules["model"]["merges"]):
        number = numbers["".join(merge.split(" ") if isinstance(merge, str) else merge)]
        scores[number] = scores[number] or -1.0 - rank
    for number, word in enumerate(words):
        if types[number] == TokenType.NORMAL and len(word) == 6 and word.startswith("<0x") and word.endswith(">"):
            types[number] = int(TokenType.BYTE)
        if types[number] == TokenType.USER_DEFINED:
            words[number] = word.replace("▁", " ")
    if tokenizer.unk_token_id is not None:
        types[tokenizer.unk_token_id] = int(TokenType.UNKNOWN)
    made = TokenizerKeys()
    made.put("model", "llama")
    made.put("pre", "default")
    made.put("tokens", words)
    made.put("scores", scores)
    made.put("token_type", types)
    prefix = _prefix(rules)
    made.put("add_space_prefix", prefix != "never")
    if prefix == "first":
        made.notes.append("llama.cpp puts a space after special tokens, too, before a word that follows them directly.")
    return made


def _prefix(rules: dict[str, Any]) -> str:
    """Where a space is put before text: always, first or never. Raises ModelError for other rules than
    SentencePiece's."""
    normalizers = _parts(rules.get("normalizer"), "normalizers")
    splits = _parts(rules.get("pre_tokenizer"), "pretokenizers")
    found = "never"
    for step in [*normalizers, *splits]:
        kind = step["type"]
        if kind == "Prepend" and step["prepend"] == "▁":
            found = "always"
        elif kind == "Metaspace" and step["replacement"] == "▁":
            found = step.get("prepend_scheme", "always")
        elif not _of_spaces(step):
            raise ModelError(f"The tokenizer rewrites or splits text by {kind}, which llama.cpp does not do.")
    return found


def _of_spaces(step: dict[str, Any]) -> bool:
    """A space becomes ▁, after which a split at spaces finds none."""
    at_spaces = step.get("pattern") == {"String": " "}
    return at_spaces and (step["type"] == "Split" or (step["type"] == "Replace" and step["content"] == "▁"))


def _parts(rule: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    if rule is None:
        return []
    return list(rule[name]) if rule["type"] == "Sequence" else [rule]


def _put_ends(made: TokenizerKeys, tokenizer: Any) -> None:
    """The special tokens by their roles, and which the tokenizer puts around a text: what it does, not what its flags
    say."""
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{tokenizer.name_or_path} has no end token, so llama.cpp would make up one.")
    for role, name in _IDS.items():
        number = getattr(tokenizer, f"{role}_token_id")
        if number is not None:
            made.put(f"{name}_token_id", number)
    inner, whole = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
    start = next(i for i in range(len(whole)) if whole[i : i + len(inner)] == inner)
    before, after = whole[:start], whole[start + len(inner) :]
    for around, role in ((before, "bos"), (after, "eos")):
        if around not in ([], [getattr(tokenizer, f"{role}_token_id")]):
            named = tokenizer.convert_ids_to_tokens(around)
            raise ModelError(f"The tokenizer puts {named} around a text, and GGUF has a key for {role} alone.")
        made.put(f"add_{role}_token", bool(around))
