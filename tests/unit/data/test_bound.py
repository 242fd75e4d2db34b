"""A chat template that runs for ever, or fills the memory, is refused in a sentence."""

from __future__ import annotations

import copy
import pickle
import threading
import time

import pytest

from tokens import tokenizer
from veneer.data import bound
from veneer.data.bound import Bound, LimitError, excess_of
from veneer.data.template import ChatTemplate
from veneer.errors import DataError

pytestmark = pytest.mark.unit
TALK = ({"role": "user", "content": "hello"},)


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(bound, "SECONDS", 0.3)


def _asked(text):
    made = tokenizer()
    made.chat_template = text
    return ChatTemplate(made).question(TALK, "row 3")


LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def test_a_template_that_loops_is_refused(short):
    with pytest.raises(DataError, match=r"row 3: the chat template refuses .*: it ran for over"):
        _asked(LOOP)


def test_a_template_that_fills_the_memory_is_refused(monkeypatch):
    monkeypatch.setattr(bound, "MEMORY", 2**26)
    step = "{% set ns.x = ns.x ~ 'x' * 100000 %}"
    grown = f"{{% set ns = namespace(x='') %}}{{% for i in range(9999) %}}{step}{{% endfor %}}"
    with pytest.raises(DataError, match="or took over"):
        _asked(grown)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{{ 'x' * 10**10 }}", "a power"),
        ("{{ 'x' * 10000000000 }}", "a number above 1,000,000"),
        ("{{ 'x' | center(10000000000) }}", "a number above 1,000,000"),
        ("{% set n = messages | length %}{{ 'x' * n }}", "a text times a number that is not known"),
    ],
)
def test_one_step_that_fills_the_memory_is_not_taken(text, said):
    with pytest.raises(DataError, match=f"it holds {said}, which can fill any memory"):
        _asked(text)


@pytest.mark.parametrize("text", ["{{ " + " + ".join("1" * 3000) + " }}", "{{ " + "(" * 3000, 7, {"default": 7}])
def test_what_cannot_be_looked_through_is_refused_by_what_renders_it(text):
    with pytest.raises(DataError, match="the chat template refuses this conversation"):
        _asked(text)


@pytest.mark.parametrize("text", ["{{ 2 * 3 }}{{ '=' * 20 }}", "{% generation %}a{% endgeneration %}", "{% if"])
def test_other_templates_hold_nothing(text):
    assert excess_of(text) is None


def test_what_ends_in_time_returns_and_raises_as_without(short):
    each = Bound()
    assert [each.run(lambda n=n: n) for n in range(1000)] == list(range(1000))
    with pytest.raises(KeyError):
        each.run(lambda: {}["a"])


def test_a_limit_reaches_none_but_the_function(short):
    """The one after it, and what is run outside, is not ended."""
    each = Bound()
    for _ in range(3):
        with pytest.raises(LimitError):
            each.run(_for_ever)
        assert each.run(lambda: 1) == 1
        ended = time.monotonic() + 0.5
        while time.monotonic() < ended:
            pass


def test_the_watching_thread_ends_and_starts_again(short, monkeypatch):
    monkeypatch.setattr(bound, "_IDLE", 0.1)
    each = Bound()
    each.run(lambda: 1)
    watching = [thread for thread in threading.enumerate() if thread.name == "veneer-bound"]
    assert watching
    for thread in watching:
        thread.join(5)
        assert not thread.is_alive()
    with pytest.raises(LimitError):
        each.run(_for_ever)


def test_it_is_copied_and_pickled():
    each = Bound()
    each.run(lambda: 1)
    for other in (copy.deepcopy(each), pickle.loads(pickle.dumps(each))):
        assert other.run(lambda: 2) == 2


def _for_ever():
    while True:
        pass
