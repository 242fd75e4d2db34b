"""The date that a chat template prints: of the run, on every later day."""

from __future__ import annotations

from datetime import datetime

import pytest

from tokens import CHAT, tokenizer
from veneer.data import dates
from veneer.data.formats import Example
from veneer.data.labels import Renderer

pytestmark = pytest.mark.unit

TALK = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"})


@pytest.mark.parametrize("form", ["%d %b %Y", "%B %-d, %Y (%A)", "%Y-%m-%dT%H:%M:%S", "%j %y %p %I"])
def test_a_pinned_date_is_printed_as_the_system_formats_it(form):
    made = tokenizer(chat=f"{{{{ strftime_now({form!r}) }}}}|{CHAT}")
    dates.pin_date(made, "2024-07-04")
    text = made.decode(Renderer(made).one(Example("row", messages=TALK)).ids)
    assert text.startswith(f"{datetime(2024, 7, 4).strftime(form)}|<|user|>hi<|end|>")
    asked = made.decode(Renderer(made).turn(TALK[:1]))
    assert text.startswith(asked)


def test_without_a_pinned_date_it_is_today():
    made = tokenizer(chat="{{ strftime_now('%Y') }}" + CHAT)
    assert dates.pinned_date(made) is None
    assert made.decode(Renderer(made).turn(TALK[:1])).startswith(str(datetime.now().year))


def test_a_template_without_a_date_is_used_as_it_is():
    made = tokenizer()
    dates.pin_date(made, dates.today())
    assert not dates.prints_date(made)
    assert dates.date_arguments(made) == {}
    with pytest.raises(ValueError, match="Invalid isoformat string"):
        dates.pin_date(made, "yesterday")
