"""What public functions are given, checked: a wrong type is refused in one sentence, as a wrong value is."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from torch import nn

from veneer.errors import ArgumentError, shown


def refuse_no_model(function: str, model: object) -> None:
    """Raises ArgumentError when ``model`` is no loaded model."""
    if isinstance(model, nn.Module):
        return
    remedy = ""
    if isinstance(model, str | os.PathLike):
        remedy = f" Load it first: model, tokenizer = veneer.load({shown(os.fspath(model))})."
    elif isinstance(model, tuple) and model and isinstance(model[0], nn.Module):
        remedy = " veneer.load gives two things: model, tokenizer = veneer.load(…)."
    raise ArgumentError(
        f"{function} takes a loaded model (a torch.nn.Module) as model, not {described(model)}.{remedy}"
    )


def refuse_no_name(function: str, name: object) -> None:
    """Raises ArgumentError when ``name`` is no text that could name an adapter."""
    if not isinstance(name, str):
        several = isinstance(name, Iterable) and not isinstance(name, bytes | dict)
        names = [item for item in name if isinstance(item, str)][:3] if isinstance(name, list | tuple) else []
        remedy = " Give one name." if several else ' Such as name="default".'
        if function == "activate" and names:
            remedy = f" Give names one after another: activate(model, {', '.join(map(repr, names))})."
        raise ArgumentError(f"{function} takes the name of an adapter as a str, not {described(name)}.{remedy}")


def folder_given(function: str, folder: object, argument: str = "folder") -> Path:
    """The path of a folder. Raises ArgumentError when ``folder`` is none."""
    if isinstance(folder, str | os.PathLike):
        path = os.fspath(folder)
        if isinstance(path, str):
            return Path(path)
    raise ArgumentError(f"{function} takes a path (str or pathlib.Path) as {argument}, not {described(folder)}.")


def texts_given(function: str, texts: str | Iterable[str], argument: str) -> list[str]:
    """One text, or several, as a list. Raises ArgumentError when one is no str."""
    if isinstance(texts, str):
        return [texts]
    given = list(texts) if isinstance(texts, Iterable) and not isinstance(texts, bytes) else [texts]
    for item in given:
        if not isinstance(item, str):
            raise ArgumentError(f"{function} takes a str, or a list of str, as {argument}, not {described(item)}.")
    return given


def described(value: object) -> str:
    """What was given, with its type: the dict {'rank': 4}."""
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return f"the {type(value).__name__} {shown(value)}"
