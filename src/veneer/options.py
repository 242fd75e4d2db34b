"""The base of every group of options: unknown names are refused, and each refusal is a sentence with the nearest name.

An option is declared once, as a pydantic field with a description; Python, YAML and the command line all read it
from there.
"""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from veneer.errors import ConfigError, did_you_mean


class Options(BaseModel):
    """Immutable, typed options; ``ConfigError`` instead of pydantic's report when a value is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(_explain(error, type(self))) from None


def _explain(error: ValidationError, options: type[Options]) -> str:
    """All that is wrong with the given options, one clause each."""
    needed = [str(problem["loc"][-1]) for problem in error.errors() if problem["type"] == "missing"]
    clauses = [f"Needed and not given: {', '.join(needed)}."] if needed else []
    for problem in error.errors():
        name = ".".join(str(part) for part in problem["loc"]) or options.__name__
        if problem["type"] == "extra_forbidden":
            clauses.append(
                f"{options.__name__} has no option {name!r}.{did_you_mean(name, options.model_fields)}"
                f" It has: {', '.join(options.model_fields)}."
            )
        elif problem["type"] == "value_error":
            clauses.append(f"{problem['msg'].removeprefix('Value error, ')}")
        elif problem["type"] != "missing":
            clauses.append(f"{options.__name__}: {name} = {problem['input']!r} is not valid: {problem['msg']}.")
    return " ".join(clauses)


_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def memory_size(value: int | str) -> int:
    """Bytes of "256MB", "1.5GiB" or a plain number. Raises ConfigError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(value))
    if found is None or (found[2] or "B").upper() not in _UNITS:
        raise ConfigError(f"{value!r} is not a size in memory; write a number and KB, MB, GB, KiB, MiB or GiB: 256MB.")
    return round(float(found[1]) * _UNITS[(found[2] or "B").upper()])
