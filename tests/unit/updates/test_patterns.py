"""Regular expressions over names: Python's meaning, and an end."""

from __future__ import annotations

import re

import pytest

import tiny
import veneer
from veneer.errors import TargetError
from veneer.updates.patterns import whole_name
from veneer.updates.select import key_matches

pytestmark = pytest.mark.unit

_NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.11.mlp.down_proj", "lm_head", "x{e}", "a.b{e<=1}"]


@pytest.mark.parametrize(
    "pattern", [r".*\.(q|k)_proj", r"model\.layers\.\d{1,2}\..*", "(?i)LM_HEAD", r".*(?<!q)_proj", "x{e}", "a.b{e<=1}"]
)
def test_they_mean_what_they_mean_in_python(pattern):
    found = [name for name in _NAMES if whole_name(pattern, name, "targets")]
    assert found == [name for name in _NAMES if re.fullmatch(pattern, name)]
    assert found


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (
            r"(\w|[a-z]|[._a-z]|.)+(?<=X)",
            "takes too long to compare with model.*; write it without repeats inside of repeats",
        ),
        ("((a{100}){100}){100}", "counts more repeats than a module's name has letters"),
        ("a{99999999999999999999999999999999}", "counts more repeats"),
        ("(" * 5000 + "a" + ")" * 5000, "not a regular expression: it is nested too deeply"),
        ("q_proj(", "not a regular expression: missing"),
    ],
)
def test_no_expression_runs_for_ever(pattern, message):
    for option in ("targets", "exclude"):
        with pytest.raises(TargetError, match=f"{option} = .*({message})"):
            veneer.attach(tiny.build("llama"), veneer.LoRA(**{"targets": ".*_proj"} | {option: pattern}))
    with pytest.raises(TargetError, match=f"The pattern key .*({message})"):
        key_matches(pattern, "model.layers.0.self_attn.q_projections")


def test_the_pattern_that_took_four_times_as_long_for_two_letters_more_matches_nothing():
    with pytest.raises(TargetError, match="matches none of the model's modules"):
        veneer.attach(tiny.build("llama"), veneer.LoRA(targets="(([a-z0-9._])+)+X"))
