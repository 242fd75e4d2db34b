"""What Tab completes: files and folders where a path is meant, names where there are some."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import click
import pytest
from click.shell_completion import ShellComplete

from veneer.cli import cli
from veneer.commands.completion import BY_NAME
from veneer.models.packaged import PACKAGED_MODELS
from veneer.studies.config import KINDS
from veneer.studies.kinds import STUDIES

pytestmark = pytest.mark.unit

PATHS, FOLDERS = ("file", ""), ("dir", "")
MODELS = [("plain", name) for name, packaged in PACKAGED_MODELS.items() if packaged.path()]
ROWS = ("plain", "bbc-topics")
# Options that are text and of which nothing is known before it is typed.
FREE = {
    *("targets", "exclude", "train_also", "rank_pattern", "alpha_pattern", "new_tokens", "layers", "labels", "keep"),
    *("budget", "memory", "optimizer_memory", "ray", "rates", "seeds", "ranks", "budgets"),
    *("template_arguments", "stop", "target_parameters", "columns", "layers_pattern", "system", "weights"),
    *("metrics", "best_by"),
}


def completed(line: str) -> list[tuple[str, str]]:
    """The kind and the text of each completion of a command line, whose last word is incomplete, perhaps empty."""
    *before, last = line.split(" ")
    return [(item.type, item.value) for item in ShellComplete(cli, {}, "veneer", "_X").get_completions(before, last)]


@pytest.mark.parametrize(
    "line",
    ["train --output ", "predict run rows --output ", "inspect a --png ", "report run --output ", "train --held-out ",
     "merge run ", "export run ", "quantize model ", "train ", "plan model "],
)  # fmt: skip
def test_files_and_folders_where_a_path_is_meant(line):
    assert completed(line) == [PATHS]
    assert completed(line + "runs/fi") == [("file", "runs/fi")]


@pytest.mark.parametrize(
    "line", ["evaluate ", "merge ", "export ", "push ", "report ", "watch ", "train --resume "]
)  # fmt: skip
def test_folders_where_a_run_is_meant(line):
    assert completed(line) == [FOLDERS]


@pytest.mark.parametrize(
    "line",
    ["plan ", "chat ", "generate ", "predict ", "quantize ", "train --model ", "study rank --model ",
     "inspect rows.jsonl --model "],
)  # fmt: skip
def test_the_packaged_models_beside_files_where_a_model_is_meant(line):
    assert completed(line) == [PATHS, *MODELS]
    assert completed(f"{line}smol") == [("file", "smol"), ("plain", "smollm2-135m-instruct")]
    assert completed(f"{line}x") == [("file", "x")]


def test_a_packaged_model_that_is_not_installed_is_not_offered(monkeypatch):
    monkeypatch.setattr("veneer.models.packaged.find_spec", lambda name: None)
    assert completed("chat ") == [PATHS]


@pytest.mark.parametrize("line", ["train --data ", "plan m --data ", "evaluate run --data ", "merge r o --check ",
                                  "predict run "])  # fmt: skip
def test_the_packaged_rows_beside_files_where_rows_are_meant(line):
    assert completed(line) == [PATHS, ROWS]


def test_inspect_takes_any_of_them():
    assert completed("inspect ") == [PATHS, *MODELS, ROWS]


def test_the_kinds_of_studies():
    assert [value for _, value in completed("study ")] == list(KINDS) == list(STUDIES)
    assert completed("study s") == [("plain", "storage"), ("plain", "spectrum")]


@pytest.mark.parametrize(
    ("line", "values"),
    [
        ("train --method ", ["lora", "adalora", "full", "bias", "head"]),
        ("train --storage n", ["nf4"]),
        ("merge run out --storage f", ["fp32", "fp16", "fp4"]),
        ("merge run out --pre q", ["qwen2", "qwen35"]),
        ("predict run rows --template ", ["auto", "chat", "plain"]),  # which may also be left to the run
        ("train --learning-rate ", ["auto"]),
        ("train --log-to ", ["mlflow", "wandb"]),
        ("study learning-rate --methods lora,", ["lora,adalora", "lora,full", "lora,bias", "lora,head"]),
        ("study learning-rate --methods lora,f", ["lora,full"]),
        ("study learning-rate --methods lora,lo", []),
        ("completion ", ["bash", "zsh", "fish"]),
        ("stu", ["study"]),
        ("train --stora", ["--storage"]),
        ("train --targets ", []),
        ("generate run ", []),
    ],
)
def test_choices(line, values):
    assert completed(line) == [("plain", value) for value in values]


def test_every_option_of_text_completes_something_or_is_known_to_be_free():
    texts = {
        parameter.name
        for command in cli.commands.values()
        for parameter in command.params
        if isinstance(parameter, click.Option) and parameter.metavar in ("TEXT", "A,B,…", "NAME=VALUE,…")
        if parameter.name in BY_NAME or not parameter._custom_shell_complete
    }
    assert texts - FREE == BY_NAME.keys() - {"held_out"}, "held_out, a number or a file, is no text to click"


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_offers_names_beside_files(tmp_path):
    """The script as bash runs it, for three lines. Tab's own command, compopt, exists only inside a completion."""
    (tmp_path / "my runs").mkdir()
    (tmp_path / "small.gguf").touch()
    command = tmp_path / "veneer"
    command.write_text(f"#!/bin/sh\nexec {sys.executable} -m veneer\n")
    command.chmod(0o755)
    script = """
    compopt() { :; }
    eval "$(env _VENEER_COMPLETE=bash_source veneer)"
    tab() {
        COMP_WORDS=(veneer "$@"); COMP_CWORD=$#; COMPREPLY=()
        _veneer_completion veneer; printf '%s|' "${COMPREPLY[@]}"; echo
    }
    tab chat sm; tab chat my; tab train --method ad
    """
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "--norc", "-c", script], cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PATH": path}
    )
    smol = "|smollm2-135m-instruct" if ("plain", "smollm2-135m-instruct") in MODELS else ""
    assert done.stdout.splitlines() == [f"small.gguf{smol}|", "my runs|", "adalora|"], done.stderr


def test_templates_are_completed_by_name_and_as_files():
    assert completed("train --template ch") == [("file", "ch"), ("plain", "chat"), ("plain", "chatml")]
