"""A few arguments of every kernel beside guard pages, other ones than `make guards` has; and what it finds."""

from __future__ import annotations

import ctypes

import pytest
import torch

from definitions import definitions
from fuzz import guards
from fuzz.guard_cases import CASES
from guarded import guarded
from veneer.kernels.coded import CodedWeight
from veneer.kernels.operations import adapted, attention, gates
from veneer.kernels.operations.products import dequantise

pytestmark = pytest.mark.unit


def _or_end(variant, name, number):
    if variant != "ends":
        return guards.outcome(variant, name, number)
    tensor = guarded(torch.zeros(5))
    ctypes.memset(tensor.data_ptr() + tensor.nbytes, 0, 1)
    return "right"


def test_kernels_read_and_write_nothing_beyond_their_tensors_and_one_that_does_is_found():
    questions = [("ends", "a kernel", 0), *guards.questions(5, first=1_000_000)]
    (_, ended), *found = guards.outcomes(questions, _or_end)
    assert ended.startswith("ended")
    assert [question for question, _ in found] == questions[1:]
    assert [case for case in found if case[1] != "right"] == []


def test_the_cases_of_kernels_that_not_every_machine_has_are_their_definitions(monkeypatch):
    """Else they would be tried where there are tiles alone."""
    of_tiles = definitions(adapted, attention)
    names = [name for name in CASES if hasattr(of_tiles, name.removeprefix("veneer::"))]
    known = {name: getattr(torch.ops.veneer, name.removeprefix("veneer::")).default for name in names}
    monkeypatch.setattr(guards, "kernels_of", lambda variant: known)
    for name in known:
        assert {guards.outcome("definition", name, number) for number in range(5)} == {"right"}


@pytest.mark.parametrize(
    ("planted", "result"),
    [
        (lambda gate, up: gates.swiglu.definition(gate, up) * 1.1, "wrong"),
        (lambda gate, up: torch.empty_like(gate), "wrong"),
        (lambda gate, up: gates.swiglu.definition(gate, up)[:, 1:], "wrong"),
        (lambda gate, up: gates.swiglu.definition(gate.add_(1), up), "written beside"),
        (lambda gate, up: 1 / 0, "exception"),
    ],
)
def test_what_is_bad_is_found(planted, result, monkeypatch):
    monkeypatch.setattr(guards, "kernels_of", lambda variant: {gates.swiglu.name: planted})
    found = {guards.outcome("planted", gates.swiglu.name, number).partition(":")[0] for number in range(10)}
    assert found - {"right"} == {result}


def test_a_byte_beside_a_result_is_found(monkeypatch):
    def planted(*arguments):
        *weight, first, out = arguments
        out_of = CodedWeight(*weight)
        dequantise.definition(out_of, first, out)
        if out.numel():
            ctypes.memset(out.data_ptr() + out.nbytes if beyond else out.data_ptr() - 1, 0, 1)

    name = dequantise.name
    monkeypatch.setattr(guards, "kernels_of", lambda variant: {name: planted})
    kept = []
    for number in range(40):  # those where the byte is on a page that may be touched
        draw = guards.Draw(f"{name} {number}")
        out = CASES[name].arguments(draw)[2]
        beyond = draw.yes()  # it lies at the start of its page
        if out.numel() and out.is_contiguous() and out.nbytes % 4096:
            kept.append(guards.outcome("planted", name, number))
    assert set(kept) == {"written beside"}
