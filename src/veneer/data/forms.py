"""The chat template that rows are put in, where it is not the tokenizer's own: a named form, or a file. No torch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal

from veneer.documents import parsed_yaml
from veneer.errors import DataError, did_you_mean

Template = Literal["auto", "chat", "plain"]
MODES: tuple[Template, ...] = ("auto", "chat", "plain")
_END = "END"  # of a turn: <|im_end|> where the tokenizer has it as a token, else its end token

_GIVEN = {"messages", "conversation", "tools", "add_generation_prompt", "tokenize", "chat_template"}

FORMS = {
    "alpaca": (
        "{% if messages[0].role != 'system' %}Below is an instruction that describes a task. Write a response that "
        "appropriately completes the request.\n\n{% endif %}{% for m in messages %}{% if m.role == 'system' %}"
        "{{ m.content }}\n\n{% elif m.role == 'assistant' %}### Response:\n{{ m.content }}{{ eos_token or '' }}\n\n"
        "{% else %}### Instruction:\n{{ m.content }}\n\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}### Response:\n{% endif %}"
    ),
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}" + _END + "\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
}


def check_template(value: str) -> str:
    """``value``, if it is auto, chat, plain, the name of a form, or looks like a file's. Raises ValueError for another
    word."""
    known = (*MODES, *FORMS)
    if value not in known and not Path(value).suffix and "/" not in value and not Path(value).is_file():
        raise ValueError(
            f"template = {value!r} is none of {', '.join(known)}, and no file.{did_you_mean(value, known)}"
        )
    return value


def typed_arguments(value: Any) -> Any:
    """The arguments of a chat template, values that came as text read as YAML reads them: false, 3. Raises ValueError
    for one that is Veneer's to give."""
    if not isinstance(value, dict):
        return value
    own = sorted(_GIVEN & value.keys())
    if own:
        raise ValueError(f"template_arguments names {', '.join(own)}, which the rows and Veneer give.")
    return {name: _typed(text) if isinstance(text, str) else text for name, text in value.items()}


def _typed(text: str) -> Any:
    try:
        value = parsed_yaml(text)
    except ValueError:
        return text
    return value if isinstance(value, bool | int | float | list | dict) else text


def template_mode(value: str) -> Template:
    """auto, chat or plain; of a form or a file: chat, for then rows of all shapes are to be in it."""
    return next((mode for mode in MODES if mode == value), "chat")


def in_form(tokenizer: Any, template: str, shape: str = "") -> tuple[Any, list[str]]:
    """The tokenizer, or a copy of it that has the chat template which ``template`` names; and what to say of it.

    Instructions (by the rows' ``shape``) get the form alpaca where the tokenizer has no template. Raises DataError for
    a file that cannot be read.
    """
    notes = []
    if template in MODES:
        if tokenizer.chat_template or "instruction/output" not in shape:
            return tokenizer, []
        template = "alpaca"
        notes = [
            f"The tokenizer of {tokenizer.name_or_path} has no chat template, so instructions are put in the form "
            f"alpaca (### Instruction: …); template: chatml, or a file, chooses another."
        ]
    text = FORMS.get(template) or _read(Path(template))
    made = copy.copy(tokenizer)
    own_end = "<|im_end|>" in tokenizer.get_vocab()
    made.chat_template = text.replace(_END, "<|im_end|>" if own_end else "{{ eos_token or '' }}")
    return made, notes


def _read(file: Path) -> str:
    try:
        return file.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise DataError(f"The chat template {file} cannot be read: {reason}.") from None


def refuse_unknown_arguments(tokenizer: Any, arguments: dict[str, Any]) -> None:
    """Raises DataError for an argument whose name is nowhere in the chat template, which would do nothing."""
    text = str(tokenizer.chat_template or "")
    for name in arguments:
        if name not in text:
            raise DataError(
                f"template_arguments names {name!r}, which the chat template of {tokenizer.name_or_path} does not have."
            )
