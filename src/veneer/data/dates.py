"""The date that a chat template prints: the run's own, wherever and whenever its rows and questions are rendered.

Llama 3's template, among others, writes today's date into each conversation, by the function ``strftime_now`` that
transformers gives to templates. A run that is resumed on another day would train on other rows, and an adapter would be
asked in another shape than the one that it learned. So a run notes the date on which it began.
"""

from __future__ import annotations

import json
from datetime import date, datetime
from typing import Any

_NOTED = "_veneer_date"
_FUNCTION = "strftime_now"
_DIRECTIVES = [f"%{flag}{letter}" for flag in ("-", "") for letter in "dmyHIMSj"]
_DIRECTIVES += [*(f"%{letter}" for letter in "aAwbBYpfUWcxXGuV"), "%%"]


def today() -> str:
    """Today as ISO text: 2026-11-28."""
    return date.today().isoformat()


def pin_date(tokenizer: Any, day: str) -> None:
    """Let Veneer render conversations with this tokenizer as on ``day``, an ISO date. Raises ValueError for another."""
    date.fromisoformat(day)
    setattr(tokenizer, _NOTED, day)


def pinned_date(tokenizer: Any) -> str | None:
    """The ISO date that conversations are rendered with; None for the date of today, whenever that is."""
    return getattr(tokenizer, _NOTED, None)


def prints_date(tokenizer: Any) -> bool:
    """Whether the tokenizer's chat template asks for the date."""
    return _FUNCTION in str(tokenizer.chat_template)


def date_arguments(tokenizer: Any) -> dict[str, str]:
    """What ``apply_chat_template`` is given, so that it prints the pinned date; nothing where it prints none."""
    day = pinned_date(tokenizer)
    if day is None or not prints_date(tokenizer):
        return {}
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several by name, of which transformers takes this one
        template = template.get("default")
    return {"chat_template": _with_date(template, datetime.fromisoformat(day))} if template else {}


def _with_date(template: str, moment: datetime) -> str:
    """The template, with a function of that name of its own, since transformers passes no functions from outside.

    It puts what ``moment`` gives for each directive in the place of that directive.
    """
    steps = "".join(
        f" | replace({json.dumps(directive)}, {json.dumps(moment.strftime(directive))})" for directive in _DIRECTIVES
    )
    return f"{{%- macro {_FUNCTION}(format) -%}}{{{{ format{steps} }}}}{{%- endmacro -%}}{template}"
