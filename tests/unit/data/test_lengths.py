"""Rows of too many tokens: cut at either end, left out, or in pieces; and the share of the tokens that is lost."""

from __future__ import annotations

import itertools

import pytest

from tokens import tokenizer
from veneer.data.formats import Example
from veneer.data.labels import IGNORE, Renderer
from veneer.data.lengths import in_pieces
from veneer.errors import DataError

pytestmark = pytest.mark.unit

BOOK = Example("book.txt", answer="abcdefghijk")  # 11 tokens and the end
ASKED = Example("d:1", prompt="0123456789", answer=" yes")  # 15 tokens with the end
SHORT = Example("d:2", prompt="0", answer=" no")


def _rows(example, how="auto", limit=5, begin=False, **options):
    renderer = Renderer(tokenizer(begin=begin), max_length=limit, long_rows=how, **options)
    rows, report = renderer.all([example, SHORT if example.prompt else Example("d:2", answer="xy")])
    text = renderer.tokenizer.decode
    return [(text(row.ids), sum(label != IGNORE for label in row.labels)) for row in rows], report


def test_a_plain_text_is_learned_in_pieces():
    for how in ("auto", "split"):
        rows, report = _rows(BOOK, how)
        assert rows == [("abcde", 4), ("fghij", 4), ("k<|end|>", 1), ("xy<|end|>", 2)]
        assert report.sentences(5) == ["1 row (book.txt) longer than max_length = 5 tokens: learned in 3 pieces."]
        assert (report.tokens, report.lost, report.learned) == (15, 0, 11)


def test_pieces_hold_each_token_once_and_each_learns():
    for length, limit in itertools.product(range(2, 40), (3, 4, 7)):
        pieces = in_pieces(list(range(length)), list(range(length)), limit)
        assert [token for ids, _ in pieces for token in ids] == list(range(length))
        assert all(ids == labels and 2 <= len(ids) <= limit for ids, labels in pieces)


@pytest.mark.parametrize(
    ("example", "how", "row", "said", "lost"),
    [
        (BOOK, "cut", ("abcde", 4), "cut at the end.", "46.7 %"),
        (BOOK, "cut-front", ("hijk<|end|>", 4), "cut at the front.", "46.7 %"),
        (BOOK, "drop", None, "left out.", "80.0 %"),
        (ASKED, "cut-front", (" yes<|end|>", 4), "cut at the front.", "50.0 %"),
        (ASKED, "drop", None, "left out.", "75.0 %"),
        (ASKED, "auto", None, "left out, because no token to learn remains within max_length = 5.", "75.0 %"),
    ],
)
def test_a_long_row_is_cut_or_left_out_and_what_is_lost_is_said(example, how, row, said, lost):
    rows, report = _rows(example, how)
    assert rows[:-1] == ([row] if row else [])
    sentence, share = report.sentences(5)
    assert sentence.endswith(said)
    assert share == f"{lost} of all tokens are in what was cut or left out."


def test_the_begin_token_stays_where_the_front_is_cut():
    rows, _ = _rows(ASKED, "cut-front", begin=True)
    assert rows[0] == ("<|begin|>yes<|end|>", 4)  # and not the space before yes


def test_a_conversation_has_no_pieces():
    with pytest.raises(DataError, match=r"^d:1 is longer than max_length = 5 tokens and no plain text, so it has no"):
        _rows(ASKED, "split")


def test_an_encoder_keeps_its_closing_token_and_a_classifier_its_class():
    made = tokenizer()
    made_ids = made("0123456789").input_ids
    for how, text in (("cut", "0123" + "9"), ("cut-front", "56789")):
        renderer = Renderer(made, max_length=5, long_rows=how, classes=("yes", "no"))
        (row,), report = renderer.all([Example("d:1", prompt="0123456789", answer="no")])
        assert (made.decode(row.ids), row.labels) == (text, [1])
        assert (report.tokens, report.lost) == (len(made_ids) + 1, 5)
