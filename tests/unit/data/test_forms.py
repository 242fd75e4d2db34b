"""Named forms and template files, for tokenizers without a chat template and for other templates than their own."""

from __future__ import annotations

import pytest

from tokens import tokenizer
from veneer.data.formats import to_examples
from veneer.data.forms import check_template, in_form, refuse_unknown_arguments, template_mode, typed_arguments
from veneer.data.labels import IGNORE, Renderer
from veneer.data.read import Row
from veneer.errors import DataError

pytestmark = pytest.mark.unit


def _learned(made, **columns):
    (example,) = to_examples([Row(columns, "d:1")]).items
    tokens = Renderer(made).one(example)
    return made.decode(tokens.ids), made.decode([label for label in tokens.labels if label != IGNORE])


def test_instructions_get_alpacas_form_where_there_is_no_template_and_it_is_said():
    base = tokenizer(chat=None)
    made, notes = in_form(base, "auto", "instruction/output")
    assert notes == [
        "The tokenizer of tiny has no chat template, so instructions are put in the form alpaca (### Instruction: …); "
        "template: chatml, or a file, chooses another."
    ]
    assert base.chat_template is None, "the given tokenizer stays as it is"
    assert _learned(made, instruction="Translate.", input="apple", output="Apfel") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nTranslate.\n\napple\n\n### Response:\nApfel<|end|>",
        "Apfel<|end|>",
    )
    assert _learned(made, instruction="c", output="d", system="S", history=[["a", "b"]]) == (
        "S\n\n### Instruction:\na\n\n### Response:\nb<|end|>\n\n### Instruction:\nc\n\n### Response:\nd<|end|>",
        "b<|end|>d<|end|>",
    )
    assert in_form(base, "auto", "messages") == (base, [])
    chat = tokenizer()
    assert in_form(chat, "auto", "instruction/output") == (chat, [])


def test_a_form_ends_a_turn_with_a_token_that_the_tokenizer_has():
    made, notes = in_form(tokenizer(), "chatml")
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert _learned(made, messages=talk) == ("<|im_start|>user\na<|end|>\n<|im_start|>assistant\nb<|end|>", "b<|end|>")
    assert notes == []
    own = tokenizer()
    own.add_special_tokens({"eos_token": "<|im_end|>"})
    assert _learned(in_form(own, "chatml")[0], messages=talk)[1] == "b<|im_end|>"


def test_a_template_of_a_file(tmp_path):
    file = tmp_path / "own.jinja"
    file.write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    made, _ = in_form(tokenizer(chat=None), str(file))
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert _learned(made, messages=talk)[0] == "[a][b]<|end|>"
    with pytest.raises(DataError, match=r"^The chat template .*none.jinja cannot be read: No such file"):
        in_form(tokenizer(), str(tmp_path / "none.jinja"))


def test_a_misspelt_template_is_refused():
    assert [check_template(value) for value in ("auto", "chatml", "a/b", "c.jinja")]
    with pytest.raises(ValueError, match=r"^template = 'alpacca' is none of .*, and no file. Did you mean 'alpaca'\?$"):
        check_template("alpacca")
    assert [template_mode(value) for value in ("auto", "plain", "chat", "alpaca", "c.jinja")] == [
        "auto", "plain", "chat", "chat", "chat",
    ]  # fmt: skip


def test_arguments_of_a_template():
    read = typed_arguments({"enable_thinking": "false", "date_string": "2026-11-28", "n": "3", "x": "[", "y": True})
    assert read == {"enable_thinking": False, "date_string": "2026-11-28", "n": 3, "x": "[", "y": True}
    with pytest.raises(ValueError, match=r"^template_arguments names tools, which the rows and Veneer give"):
        typed_arguments({"tools": "[]"})
    made = tokenizer(chat="{{ mark }}")
    refuse_unknown_arguments(made, {"mark": 1})
    with pytest.raises(DataError, match=r"^template_arguments names 'think', which the chat template of tiny does not"):
        refuse_unknown_arguments(made, {"mark": 1, "think": False})
