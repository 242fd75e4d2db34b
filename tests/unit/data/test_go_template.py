"""A chat template in Ollama's language renders conversations as the template itself does, or is refused."""

from __future__ import annotations

import pytest

from tokens import tokenizer
from veneer.data.forms import FORMS
from veneer.data.go_template import rendered_by_go, written
from veneer.data.template import ChatTemplate
from veneer.errors import DataError

pytestmark = pytest.mark.unit

_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "chatml": _CHATML,
    "a default system message": (
        "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are \"helpful\".<|im_end|>\n{% endif %}" + _CHATML
    ),
    "system in the user's turn": (
        "{% set first = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}{% for m in messages %}"
        "{% if m.role != 'system' %}<start>{{ 'model' if m.role == 'assistant' else 'user' }}\n"
        "{{ first if loop.index0 == (1 if first else 0) else '' }}{{ m.content }}<end>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<start>model\n{% endif %}"
    ),
    "alpaca": FORMS["alpaca"],
    "no system message": (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
    ),
}  # fmt: skip
TALKS = [
    [("user", "Hi")], [("system", "Short."), ("user", "Hi")], [("user", "a"), ("assistant", "b"), ("user", "c")],
    [("system", "s"), ("user", "{{ .Role }}"), ("assistant", 'b"\n'), ("user", "c"), ("assistant", "d"), ("user", "e")],
]  # fmt: skip


def _ask(template):
    words = tokenizer(chat=template)
    return lambda messages: ChatTemplate(words).question(tuple(messages), "a test")


@pytest.mark.parametrize("name", TEMPLATES)
def test_both_render_the_same(name):
    ask = _ask(TEMPLATES[name])
    text, takes_system = written(ask)
    assert takes_system == (name != "no system message")
    for talk in TALKS:
        messages = [{"role": role, "content": content} for role, content in talk]
        if takes_system or talk[0][0] != "system":
            assert rendered_by_go(text, messages) == ask(messages)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "it does not write each message once"),
        ("{% for m in messages %}{{ loop.index }}: {{ m.content }}\n{% endfor %}", "depends on more than roles"),
        ("{% for m in messages %}<{{ m.content | length }}>{{ m.content }}{% endfor %}", "depends on more than roles"),
        ("{{ messages[-1].content }}", "it does not write each message once"),
    ],
)  # fmt: skip
def test_a_template_that_depends_on_more_is_refused(template, reason):
    with pytest.raises(DataError, match=reason):
        written(_ask(template))


def test_what_is_not_of_that_part_of_go_is_refused():
    for template in (
        "{{ .Suffix }}",
        "{{ if eq .Role }}",
        "{{ end }}",
        "{{ range .Messages",
        '{{ printf "%s" .Role }}',
    ):
        with pytest.raises((DataError, ValueError)):
            rendered_by_go(template, [])
