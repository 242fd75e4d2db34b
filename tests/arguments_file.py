"""Writes src/veneer/runs/arguments.py, and that of generation, from the options: python tests/arguments_file.py. A test
compares."""

from __future__ import annotations

import textwrap
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from veneer.evaluation.config import EvaluateOptions
from veneer.generation.config import SamplingOptions
from veneer.planning.config import PlanOptions
from veneer.prediction.config import PredictOptions
from veneer.runs.train import RESUMABLE
from veneer.training.config import TrainConfig

FILE = Path(__file__).parents[1] / "src" / "veneer" / "runs" / "arguments.py"
OF_GENERATION = FILE.parents[1] / "generation" / "arguments.py"
HEAD = '''"""The options that public functions take by name, as type checkers read them. No torch here.

Written by tests/arguments_file.py from the option classes, where each option is declared; do not edit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypedDict
'''
# What an option takes in Python, where that is more than its own type.
WIDER = {
    "data": "Any",
    "output": "str | Path",
    "held_out": "float | str | Path",
    "memory": "int | str | None",
    "optimizer_memory": "int | str",
    "budget": "float | str | None",
    "class_weights": 'Literal["none", "balanced"] | dict[str, float]',
}


def text_of(kind: Any) -> str:
    """A field's type as it is written; one item where a list is meant is a list of one."""
    if get_origin(kind) is Literal:
        return f"Literal[{', '.join(repr(value) for value in get_args(kind))}]".replace("'", '"')
    if get_origin(kind) is Annotated:
        return text_of(get_args(kind)[0])
    if get_origin(kind) in (Union, types.UnionType):
        return " | ".join(text_of(part) for part in get_args(kind))
    if get_origin(kind) is list:
        (item,) = get_args(kind)
        return f"{text_of(item)} | list[{text_of(item)}]"
    if kind is type(None):
        return "None"
    return kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind).replace("typing.", "")


def type_of(name: str, field: FieldInfo) -> str:
    return WIDER.get(name) or " | ".join(dict.fromkeys(text_of(field.annotation).split(" | ")))


def _keys(fields: dict[str, FieldInfo]) -> str:
    lines = []
    for name, field in fields.items():
        line = f"    {name}: {type_of(name, field)}"
        if len(line) > 120:  # as ruff breaks it
            line = line.replace("[", "[\n        ").replace(", ", ",\n        ").replace("]", ",\n    ]")
        lines += [line]
        about = textwrap.wrap(f'"""{field.description}"""', 110)
        lines += [f"    {line}" for line in about]
    return "\n".join(lines) + "\n"


def _class(name: str, about: str, fields: dict[str, FieldInfo], base: str = "TypedDict", total: bool = False) -> str:
    head = f"class {name}({base}{'' if total else ', total=False'}):"
    return f'\n\n{head}\n    """{about}"""\n\n{_keys(fields)}'


def written() -> str:
    """The whole file."""
    run = {name: field for name, field in TrainConfig.model_fields.items() if name != "model"}
    needed = {name: field for name, field in run.items() if field.is_required()}
    free = {name: field for name, field in run.items() if not field.is_required()}
    plan = {name: field for name, field in PlanOptions.model_fields.items() if name not in ("model", "output")}
    return (
        HEAD
        + _class("Needed", "What every run needs.", needed, total=True)
        + _class("TrainArguments", "The options of `veneer.train`.", free, base="Needed")
        + _class("ResumeArguments", "The options of `veneer.resume`.", {name: run[name] for name in RESUMABLE})
        + _class("EvaluateArguments", "The options of `veneer.evaluate`.", dict(EvaluateOptions.model_fields))
        + _class("PredictArguments", "The options of `veneer.predict`.", dict(PredictOptions.model_fields))
        + _class("PlanArguments", "The options of `veneer.plan`.", plan)
    )


def written_of_generation() -> str:
    """The whole file of generation, which knows nothing of runs."""
    sampling = {name: field for name, field in SamplingOptions.model_fields.items() if name != "max_new_tokens"}
    head = HEAD.replace(
        "from pathlib import Path\nfrom typing import Any, Literal, TypedDict", "from typing import TypedDict"
    )
    about = "The options of `veneer.generate` and `veneer.stream`."
    return head + _class("SamplingArguments", about, sampling)


if __name__ == "__main__":
    FILE.write_text(written(), encoding="utf-8")
    OF_GENERATION.write_text(written_of_generation(), encoding="utf-8")
