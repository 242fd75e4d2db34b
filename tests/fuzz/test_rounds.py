"""A round of each thing that threads may do at once, and that a round finds what is bad."""

from __future__ import annotations

import pytest

from fuzz import rounds
from fuzz.rounds import KINDS

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rounds")
    rounds.make(folder)
    return folder


@pytest.mark.parametrize("name", KINDS)
def test_threads_get_what_one_alone_gets_or_a_sentence(name, room):
    found = rounds.rounds(name, 3, room)
    assert found["right"] + found["refused"] == 3, found
    assert not found["refused"] or name == "two trainings"


def test_an_exception_is_a_result_of_its_own(room, monkeypatch):
    def fails(number):
        raise KeyError(number)

    monkeypatch.setitem(KINDS, "fails", lambda room: fails)
    assert rounds.rounds("fails", 2, room) == {"KeyError: 0": 1, "KeyError: 1": 1}
