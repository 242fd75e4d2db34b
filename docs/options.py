"""docs/options.md: every option of an update and of a run, from the fields that declare them.

    python docs/options.py        writes the page (`make docs-options`)

A test asks that the committed page is the one that this makes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from veneer import AdaLoRA, LoRA
from veneer.data.config import RowOptions
from veneer.frozen.config import BaseOptions, BlockwiseOptions, OnDevice, UsedIn
from veneer.generation.config import GenerateOptions, SamplingOptions
from veneer.options import Options
from veneer.training.config import TrainConfig
from veneer.updates.config import AllocationOptions, UpdateOptions

PAGE = Path(__file__).with_name("options.md")

# Heading, the classes that declare the options below it, and what a reader needs to know first.
SECTIONS: tuple[tuple[str, tuple[type[Options], ...], str], ...] = (
    (
        "LoRA and AdaLoRA",
        (UpdateOptions,),
        "Both methods take these. How to choose modules: [lora.md](lora.md#choosing-options).",
    ),
    ("LoRA only", (LoRA,), "What they trade off: [lora.md](lora.md#choosing-options)."),
    (
        "AdaLoRA only",
        (AllocationOptions, AdaLoRA),
        "The schedule and its symbols: [adalora.md](adalora.md#the-budget). `total_steps` is not an option of a run: "
        "`veneer train` fills it in.",
    ),
    (
        "A quantised base",
        (OnDevice, BlockwiseOptions, BaseOptions),
        "What each storage costs: [qlora.md](qlora.md#bits-of-a-parameter).",
    ),
    (
        "Rows",
        (RowOptions,),
        "`veneer evaluate`, `predict` and `inspect` take these, too. What rows may be: [data.md](data.md#shapes).",
    ),
    ("A run", (TrainConfig,), "What a step does with them: [training.md](training.md#what-a-step-does)."),
    (
        "An answer",
        (SamplingOptions,),
        "`veneer generate`, `chat` and `predict` take these, and so do `veneer.generate` and `veneer.stream`, whose "
        "`max_new_tokens` is 64. What they do: [answers.md](answers.md#what-decides-an-answer).",
    ),
    (
        "An answer of a command",
        (OnDevice, UsedIn, GenerateOptions),
        "`veneer generate` and `veneer chat` take these, too.",
    ),
)

INTRODUCTION = """\
# Options

<!-- Made by docs/options.py from the fields in src/veneer. Do not edit; run: make docs-options -->

`veneer train` takes all of these except the last two sections', as flags with `-` for `_`, in a YAML file and in
Python. A flag wins over the file, and the file over the default. `veneer.LoRA` and `veneer.AdaLoRA` take those of their
sections. An unknown name is an error that names the nearest known one.
"""


def page() -> str:
    """The whole page."""
    return "\n".join([INTRODUCTION, *(_section(*section) for section in SECTIONS)])


def _section(heading: str, classes: tuple[type[Options], ...], text: str) -> str:
    rows = [_row(name, field) for each in classes for name, field in declared(each).items()]
    return "\n".join([f"## {heading}", "", text, "", "| option | default | what it does |", "|---|---|---|", *rows, ""])


def declared(options: type[Options]) -> dict[str, FieldInfo]:
    """Name → field of the options that a class declares itself, in order."""
    inherited = {name for base in options.__bases__ for name in getattr(base, "model_fields", {})}
    return {name: field for name, field in options.model_fields.items() if name not in inherited}


def _row(name: str, field: FieldInfo) -> str:
    text = (field.description or "").removeprefix("AdaLoRA: ").replace("|", r"\|")
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    values = f" Values: {', '.join(f'`{choice}`' for choice in choices)}." if choices else ""
    return f"| `{name}` | {_default(field)} | {text[:1].upper()}{text[1:]}{values} |"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    return f"`{'none' if default is None else str(default).lower() if isinstance(default, bool) else default}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"Written: {PAGE}")
