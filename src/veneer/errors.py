"""The errors a user can cause, and the nearest valid name for a misspelt one.

Every message is one clear sentence or two: what was wrong, where, and what to do. The command line prints it as it is.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable

# Only the first items of a long list or mapping are formatted: a data set has many rows.
_small = reprlib.Repr()
_small.maxlist = _small.maxtuple = _small.maxset = _small.maxfrozenset = _small.maxdict = 8
_small.maxstring = _small.maxother = _small.maxlong = 100


class VeneerError(Exception):
    """Base of everything Veneer refuses; its text is written for the person who made the mistake.

    Example:
        >>> try:
        ...     veneer.attach(model, veneer.LoRA(targets=["q_prj"]))
        ... except veneer.VeneerError as error:
        ...     print(error)
        targets names 'q_prj', which matches no module of this model. Nearest here: q_proj, ...
    """

    exit_code = 1  # of the command line


class VeneerWarning(UserWarning):
    """What Veneer does, but thinks was not meant: updates that no gradient reaches, layers that are left out.

    Example:
        >>> import warnings
        >>> warnings.simplefilter("error", veneer.VeneerWarning)  # to stop there instead
    """


class SystemSupportError(VeneerError, ImportError):
    """An operating system that Veneer does not run on."""


class ConfigError(VeneerError):
    """An option that does not exist or has a value that makes no sense."""


class ArgumentError(VeneerError, TypeError):
    """Something of another type than a function takes: a dict for options, a path for a model."""


class TargetError(VeneerError):
    """A module name that matches nothing, or names a module that cannot be adapted."""


class AdapterFileError(VeneerError):
    """An adapter folder that is missing, damaged or belongs to another base."""


class ModelError(VeneerError):
    """A model that cannot be found, read or used in the way asked for."""


class DataError(VeneerError):
    """A data file, row or column that cannot be used; names file and line."""


class TrainingError(VeneerError):
    """A run that cannot start or go on."""


class DivergedError(TrainingError):
    """A run whose loss, gradient or weights are no longer finite."""


class HubError(VeneerError):
    """The Hugging Face hub cannot be reached, or does not accept what it is sent."""


def shown(value: object, longest: int = 100) -> str:
    """``value`` as a refusal repeats it: its repr in one line, cut to about ``longest`` characters."""
    text = " ".join(_small.repr(value).split())
    return text if len(text) <= longest else f"{text[:longest]}…"


def nearest(name: str, candidates: Iterable[str], count: int = 3) -> list[str]:
    """The candidates spelt most like ``name``, best first; empty when none comes close."""
    return difflib.get_close_matches(name, list(candidates), n=count, cutoff=0.5)


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` with a leading space, or nothing when no candidate comes close."""
    close = nearest(name, candidates, count=1)
    return f" Did you mean {close[0]!r}?" if close else ""
