"""Calls of the libraries that read models: silent, and what they raise about a file as one sentence."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from threading import RLock
from typing import Any, TypeVar

import transformers

from veneer.errors import ModelError

_T = TypeVar("_T")
_PANIC = "PanicException"  # of libraries in Rust; it is no Exception, and no module has it by name
_LONG = 200  # characters of a name that a file may have of any length


def call_library(call: Callable[..., _T], refusal: str, *arguments: Any, **options: Any) -> _T:
    """``call(*arguments, **options)``, a function of transformers or gguf that reads a person's file.

    Raises ModelError, ``refusal`` and the reason, for whatever it raises: for a damaged file transformers, safetensors,
    gguf, tokenizers and json each raise their own, and a model's or config's code anything. So nothing of ours may run
    inside ``call``.
    """
    try:
        return call(*arguments, **options)
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != _PANIC:
            raise
        raise ModelError(f"{refusal}: {reason_of(error)}") from error


_SILENCE = RLock()
OWN_CODE = "it needs its own code (auto_map in its config files), which Veneer does not run."


def unreadable(name: str, error: Exception) -> ModelError:
    """What a damaged model is refused with."""
    return ModelError(f"{no_model(name)}: {reason_of(error)}")


def no_model(name: str) -> str:
    return f"{name} cannot be read as a model"


def reason_of(error: BaseException) -> str:
    """What a library's error says, on one line of at most 300 characters."""
    if "trust_remote_code" in str(error):  # advice to set an option that Veneer has not
        return OWN_CODE
    return " ".join(str(error).split())[:300] or type(error).__name__


def some_of(keys: list[str]) -> str:
    """The first three, and how many more there are."""
    return ", ".join(key[:_LONG] for key in keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' own bars and warnings: what matters in them is an error here.

    One thread at a time is inside, since what it silences is the process's.
    """
    with _SILENCE:
        yield from _silent()


def _silent() -> Iterator[None]:
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        # The bar of the GGUF reader asks nobody; what goes wrong is raised, not printed.
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
