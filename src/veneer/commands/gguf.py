"""A run, an adapter or a model written as a GGUF file, and what its rounding costs, measured before it is written."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from veneer.data.dates import date_arguments
from veneer.data.formats import Example
from veneer.data.labels import Renderer
from veneer.errors import ModelError
from veneer.evaluation.moved import Moved, swap_and_measure
from veneer.evaluation.rounded import rounded_layers
from veneer.files import TEMPORARY
from veneer.models.checkpoint import Checkpoint
from veneer.models.gguf_description import architecture_of
from veneer.models.gguf_header import GgufHeader
from veneer.models.gguf_k_quants import K_QUANTS, write_k_quants
from veneer.models.gguf_tokenizer import Said, TokenizerKeys, tokenizer_keys
from veneer.models.gguf_write import Draft, GgufModel
from veneer.models.library import quiet
from veneer.models.origin import bare_name, license_of
from veneer.runs.facts import is_chat
from veneer.runs.opened import Opened
from veneer.runs.prepare import Prepared
from veneer.updates.merged import merged_tensors

MODEL, BASE, ADAPTER = "model.gguf", "base.gguf", "adapter.gguf"  # in a folder
_TEMPLATE = "tokenizer.chat_template"
# What a base's own file says of itself, and not of its making.
_NOT_TAKEN = {"architecture", "type", "file_type", "quantization_version", "alignment"}


def draft_of(model: Any, renderer: Renderer, storage: str, pre: str | None = None) -> Draft:
    """The GGUF file of ``model`` with its active adapters folded in, matrices kept as ``storage``; how ``renderer``
    renders conversations goes with it. ``pre``: see `tokenizer_keys`.

    Raises ModelError for what is no causal language model, and for what a GGUF file cannot hold.
    """
    name = str(getattr(model, "name_or_path", "") or type(model).__name__)
    if renderer.kind != "causal":
        raise ModelError(f"{name} is no causal language model, and llama.cpp's files hold no other here.")
    architecture_of(model.config, name)
    base = base_header(name)
    rows = model.get_input_embeddings().weight.shape[0]
    keys = tokenizer_keys(renderer.tokenizer, rows, base, pre=pre)
    _put_conversations(keys, renderer)
    with quiet():
        return Draft(GgufModel(name, model.config, merged_tensors(model), keys, general(name, base)), storage)


def write_draft(draft: Draft, file: Path, storage: str) -> list[str]:
    """Write the draft, rounded further where ``storage`` is one of llama.cpp's own. What a person may want to know of
    the file, as sentences."""
    if storage not in K_QUANTS:
        draft.write(file)
        return draft.notes
    with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=file.parent) as place:
        exact = Path(place) / file.name
        draft.write(exact)
        notes = write_k_quants(exact, file, storage)
    return [*draft.notes, *notes]


def measure(model: Any, draft: Draft, file: Path, renderer: Renderer, rows: Sequence[Example]) -> Moved:
    """How far ``model``, adapters and all, is moved on rows by the rounding of a ``file`` that was written of it."""
    layers = rounded_layers(model, draft, GgufHeader(file, file.name))
    own = {name: model.get_submodule(name) for name in layers}
    try:
        return swap_and_measure(model, layers, renderer, rows)
    finally:
        for name, module in own.items():
            model.set_submodule(name, module)


def base_header(name: str) -> GgufHeader | None:
    """What the GGUF file says from which the model called ``name`` was loaded; None where it came from none."""
    try:
        checkpoint = Checkpoint(name)
    except ModelError:  # gone since: its tokenizer is in memory
        return None
    return None if checkpoint.kind == "folder" else checkpoint.gguf


def general(name: str, base: GgufHeader | None) -> Mapping[str, Any]:
    """What the file says of itself: its base's name, and all else that the base's own file says of it."""
    found: dict[str, Any] = {"general.name": bare_name(name)}
    license = license_of(name)
    found |= {"general.license": license} if license else {}
    for key in base.metadata if base is not None else {}:
        part = key.removeprefix("general.")
        if base is not None and part != key and part not in _NOT_TAKEN:
            found[key] = base.stored_as(key)[0]
    return found


def _put_conversations(keys: TokenizerKeys, renderer: Renderer) -> None:
    """The chat template as it was trained with, its arguments and its date in it, and the token that ends an answer."""
    tokenizer = renderer.tokenizer
    template = date_arguments(tokenizer).get("chat_template", tokenizer.chat_template)
    if isinstance(template, dict):  # several by name, of which transformers takes this one
        template = template.get("default")
    if template:
        given = [f"{{%- set {name} = {json.dumps(value)} -%}}" for name, value in renderer.arguments.items()]
        keys.keys[_TEMPLATE] = Said("".join([*given, template]))
    if renderer.fold_turns:
        keys.notes.append(
            "Rows were rendered with fold_turns, which no template says: put a system message into the first user turn."
        )
    others = [token for token in renderer.ends() if token != tokenizer.eos_token_id]
    if others:
        keys.put("eot_token_id", others[-1])


def file_in(out: Path, name: str) -> Path:
    """Where the file goes: ``out`` itself where it ends in .gguf, else ``name`` in that folder."""
    return out if out.suffix.lower() == ".gguf" else out / name


def asked_in(opened: Opened | Prepared) -> tuple[bool, str | None]:
    """Whether questions are asked in the chat template, and the system message that all rows began with."""
    if isinstance(opened, Opened):
        return opened.chat, opened.renderer.system
    rows = opened.facts()
    return is_chat(opened.config.template, rows), opened.renderer.system or rows["system"]
