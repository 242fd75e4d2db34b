"""One declaration of an option serves Python, YAML and flags."""

from __future__ import annotations

from typing import Literal

import click
import pytest
from click.testing import CliRunner
from pydantic import Field

from veneer.commands.flags import flags, given
from veneer.options import Options

pytestmark = pytest.mark.unit


class _Options(Options):
    size: int = Field(3, ge=1, description="How large.")
    share: float | None = Field(None, description="How much.")
    names: list[str] = Field([], description="Which.")
    ranks: dict[str, int] = Field({}, description="How many of each.")
    kind: Literal["a", "b"] = Field("a", description="Of what kind.")
    loud: bool = Field(False, description="Whether it is heard.")
    text: str = Field("x", description="What. Default: a letter.")


def _run(*arguments, **how):
    found = {}

    @click.command()
    @flags(_Options, **how)
    def command(**options):
        found.update(options)
        found["made"] = _Options(**given(options))

    return CliRunner().invoke(command, arguments, catch_exceptions=False), found


def test_what_is_not_given_is_not_passed():
    _, found = _run("--share", "0.5", "--loud")
    assert given({name: value for name, value in found.items() if name != "made"}) == {"share": "0.5", "loud": True}
    assert found["made"] == _Options(share=0.5, loud=True)


def test_texts_become_what_the_option_is():
    _, found = _run("--size", "5", "--names", "a, b", "--ranks", "a=1,b.c=2", "--kind", "b", "--no-loud")
    made = found["made"]
    assert (made.size, made.names, made.ranks, made.kind, made.loud) == (5, ["a", "b"], {"a": 1, "b.c": 2}, "b", False)


def test_a_pattern_may_hold_an_equals_sign_of_its_own():
    assert _run("--ranks", "a(?=b)=4")[1]["made"].ranks == {"a(?=b)": 4}


def test_help_names_the_kind_of_value_and_the_default_unless_the_text_does():
    text = _run("--help")[0].output
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert [line for line in lines if line.startswith("--") and "--help" not in line] == [
        "--size N How large. [3]",
        "--share X How much.",
        "--names A,B,… Which.",
        "--ranks NAME=VALUE,… How many of each.",
        "--kind [a|b] Of what kind. [a]",
        "--loud / --no-loud Whether it is heard. [false]",
        "--text TEXT What. Default: a letter.",
    ]


def test_order():
    text = _run("--help", first=("text", "loud"))[0].output
    shown = [line.split()[0] for line in text.splitlines() if line.strip().startswith("--")]
    assert shown == ["--text", "--loud", "--size", "--share", "--names", "--ranks", "--kind", "--help"]
