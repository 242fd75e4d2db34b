"""Stop texts: an answer ends before the first, and a stream prints no part of one."""

from __future__ import annotations

import pytest

from tokens import tokenizer
from veneer.generation.text import Text, answer_text

pytestmark = pytest.mark.unit
MADE = tokenizer()


def _streamed(said, *stops):
    """The pieces, up to where it stopped, and what comes at the end."""
    text, pieces = Text(MADE, stops), []
    for token in MADE(said).input_ids:
        pieces.append(text.put(token))
        if text.stopped:
            break
    return pieces, text.end(), text.stopped


def test_what_may_begin_a_stop_text_waits_until_it_is_none():
    assert _streamed("ab<c<en<end>x", "<end>") == (["a", "b", "", "<c", "", "", "", "<en", "", "", "", ""], "", True)
    assert _streamed("ab<en", "<end>") == (["a", "b", "", "", ""], "<en", False), "what remains comes at the end"


def test_the_first_of_several_ends_it():
    assert "".join(_streamed("one\nUser: two###", "###", "\nUser:")[0]) == "one"
    assert "".join(_streamed("aab", "aab")[0]) == ""
    assert "".join(_streamed("xaaab", "aab")[0]) == "xa"


@pytest.mark.parametrize("said", ["one two\n\nthree", "a\n", "é€\n\nb", "aaab", "x<en", "", "\n\n", "no stop"])
@pytest.mark.parametrize("stops", [("\n\n",), ("aab", "<end>"), ("€",), ("wo", "two")])
def test_a_stream_is_the_text_of_the_whole(said, stops):
    pieces, rest, stopped = _streamed(said, *stops)
    ends = [said.find(stop) for stop in stops if stop in said]
    wanted = said[: min(ends)] if ends else said
    assert ("".join(pieces) + rest, stopped) == (wanted, bool(ends))
    assert answer_text(MADE, MADE(said).input_ids, stops) == wanted
