"""Models that take images or sound beside text, of transformers' own classes, with the text part alone in memory.

Text passes through no other part, so these are left out: not read, not adapted, not quantised. Every name is that of
the whole model, and so is what is saved: the parts that were left out are read from the checkpoint again when the model
is written.
"""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from veneer.device import CPU
from veneer.errors import ModelError
from veneer.frozen.text_part import beside_text, is_composite, say_tied
from veneer.models.checkpoint import CLASSES, Checkpoint
from veneer.models.library import OWN_CODE, call_library, no_model, quiet, some_of

_ALL_INPUTS = getattr(transformers, "AutoModelForMultimodalLM", transformers.AutoModelForImageTextToText)
# Parts that tokens of text do pass through, though they belong to others.
_NEEDED = {"gemma3n": ("embed_vision", "embed_audio")}
_PROCESSOR = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
              "chat_template.json")  # fmt: skip
_WHAT = {"causal": "causal language model", "seq2seq": "encoder-decoder", "classification": "classifier"}


class NotLoadedError(ModelError, AttributeError):
    """An image or a sound was given to a model of which the text part alone is loaded."""


class LeftOut(nn.Module):
    """In the place of a part that is not loaded."""

    device = torch.device(CPU)  # Qwen2-Audio asks for it, whatever its input

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            raise self._refusal() from None

    def forward(self, *arguments: Any, **options: Any) -> Any:
        raise self._refusal()

    def _refusal(self) -> NotLoadedError:
        return NotLoadedError(
            f"{self.__dict__.get('name')} is not loaded, since veneer.load reads the text part alone; for images and "
            f"sound put the adapter on transformers' model by peft."
        )


def class_for(kind: str, config: Any, name: str) -> Any:
    """What makes the model of transformers' ``config`` by ``from_config`` and ``from_pretrained``; ``kind``: of
    `CLASSES`. A composite model's is its text part.

    Raises ModelError for the model ``name`` of a kind that transformers has not, or that takes no text alone.
    """
    own = CLASSES[kind]._model_mapping
    if not is_composite(config):
        if type(config) not in own:
            raise ModelError(_no_class(kind, config, name))
        return CLASSES[kind]
    made = _first(own[type(config)]) if type(config) in own else None
    others = _ALL_INPUTS._model_mapping
    named = config.architectures if isinstance(config.architectures, list) else []
    asked = made is not None and made.__name__ in named
    if kind == "causal" and type(config) in others and not asked:
        made = _first(others[type(config)])
    if made is None:
        raise ModelError(_no_class(kind, config, name))
    takes = signature(made.forward).parameters
    needed = [
        key for key, one in takes.items()
        if one.kind is one.POSITIONAL_OR_KEYWORD and one.default is one.empty and key not in ("self", "input_ids")
    ]  # fmt: skip
    if "input_ids" not in takes or needed:
        raise ModelError(
            f"{name} is a {made.__name__}, which reads no text alone: it also needs {some_of(needed) or 'other input'}."
        )
    return _TextOnly(made)


def _no_class(kind: str, config: Any, name: str) -> str:
    if getattr(config, "auto_map", None):
        return f"{no_model(name)}: {OWN_CODE}"
    return f"{name} is of the type {config.model_type!r}, of which transformers has no {_WHAT[kind]}."


def _first(classes: Any) -> Any:
    return classes[0] if isinstance(classes, tuple) else classes


class _TextOnly:
    """As transformers' auto classes."""

    def __init__(self, made: Any) -> None:
        self._class: Any = text_only(made)

    def from_config(self, config: Any, *, trust_remote_code: bool = False, **options: Any) -> Any:
        with _no_initial_values():
            model = self._class._from_config(config, **options)
        model.tie_weights()
        return model

    def from_pretrained(self, pretrained_model_name_or_path: Any, *, trust_remote_code: bool, **options: Any) -> Any:
        return self._class.from_pretrained(pretrained_model_name_or_path, trust_remote_code=False, **options)


@contextmanager
def _no_initial_values() -> Iterator[None]:
    """Inside, a model that is made gets no initial values, which some vision towers compute from values."""
    original = transformers.PreTrainedModel.init_weights
    transformers.PreTrainedModel.init_weights = lambda self, *arguments, **options: None
    try:
        yield
    finally:
        transformers.PreTrainedModel.init_weights = original


@cache
def text_only(made: Any) -> Any:
    """A subclass under the same name that has the text part alone, and saves the whole model."""

    def init(self: Any, config: Any, *arguments: Any, **options: Any) -> None:
        made.__init__(self, config, *arguments, **options)
        needed = _NEEDED.get(config.model_type, ())
        _leave_out(self, [name for name in beside_text(self) if name.rpartition(".")[2] not in needed])

    def save_pretrained(self: Any, *arguments: Any, **options: Any) -> Any:
        with whole(self):
            return made.save_pretrained(self, *arguments, **options)

    return _subclass(made, init, save_pretrained=save_pretrained)


@cache
def _others_only(made: Any, names: tuple[str, ...]) -> Any:
    """A subclass under the same name that has the parts of these names alone."""

    def init(self: Any, config: Any, *arguments: Any, **options: Any) -> None:
        made.__init__(self, config, *arguments, **options)
        _leave_out(self, list(_all_but(self, "", names)))

    return _subclass(made, init, tie_weights=lambda self, *arguments, **options: None)


def _all_but(module: nn.Module, path: str, names: tuple[str, ...]) -> Iterator[str]:
    for name, child in module.named_children():
        here = f"{path}{name}"
        if any(kept.startswith(f"{here}.") for kept in names):
            yield from _all_but(child, f"{here}.", names)
        elif here not in names:
            yield here


def _subclass(made: Any, init: Any, **more: Any) -> Any:
    home = {"__module__": made.__module__, "__qualname__": made.__qualname__}
    return type(made.__name__, (made,), {"__init__": init, **home, **more})


def _leave_out(model: Any, names: list[str]) -> None:
    for name in names:
        model.set_submodule(name, LeftOut(name))
    known = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    model._keys_to_ignore_on_load_unexpected = {*known, *(rf"^{re.escape(name)}\." for name in names)}


def left_out_of(model: nn.Module) -> list[str]:
    """The names of the parts of a model that are not loaded."""
    return [name for name, module in model.named_modules() if isinstance(module, LeftOut)]


@contextmanager
def whole(model: Any) -> Iterator[None]:
    """Inside, the parts that were left out are in their places, in the model's type, read from where it was loaded.

    Raises ModelError where they cannot be read any more.
    """
    names = left_out_of(model)
    if not names:
        yield
        return
    others = _read_others(model, tuple(names))
    for name in names:
        model.set_submodule(name, others.get_submodule(name))
    try:
        yield
    finally:
        for name in names:
            model.set_submodule(name, LeftOut(name))


def _read_others(model: Any, names: tuple[str, ...]) -> Any:
    checkpoint = Checkpoint(model.name_or_path)
    config = copy.deepcopy(checkpoint.config)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    say_tied(config, False)  # of the two that are tied neither is read
    made = type(model).__mro__[1]
    refusal = f"{', '.join(names)} of {checkpoint.name}, which the whole model needs, cannot be read"
    with quiet():
        others, differences = call_library(
            _others_only(made, names).from_pretrained, refusal, output_loading_info=True, ignore_mismatched_sizes=True,
            trust_remote_code=False, dtype=model.dtype, config=config, **checkpoint.pretrained(),
        )  # fmt: skip
    wrong = sorted([*differences["missing_keys"], *(str(key[0]) for key in differences["mismatched_keys"])])
    if wrong:
        raise ModelError(f"{refusal}: the checkpoint lacks {some_of(wrong)}, or keeps it in codes.")
    return others


def copy_processor(model: Any, folder: Path) -> None:
    """The files by which transformers prepares images and sound, from where a composite ``model`` was loaded."""
    if not left_out_of(model):
        return
    source = Checkpoint(model.name_or_path).path
    for name in _PROCESSOR:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
