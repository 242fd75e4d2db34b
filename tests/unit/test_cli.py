"""The command itself: help at once, completion, exit codes, and the nearest name for a misspelt one."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

import veneer
from veneer.cli import cli
from veneer.training import loop

pytestmark = pytest.mark.unit

VERBS = [
    "plan",
    "train",
    "evaluate",
    "predict",
    "generate",
    "chat",
    "merge",
    "export",
    "combine",
    "push",
    "quantize",
    "inspect",
    "report",
    "watch",
]
VERBS += ["study", "completion"]


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["train", "--help"], ["completion", "bash"]])
def test_help_is_there_at_once_because_it_loads_no_torch(arguments):
    code = (
        "import sys; from veneer.cli import main; main(); "
        "print('LOADED', *sorted({'torch', 'transformers', 'datasets', 'numpy'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "LOADED"


def test_help_tells_the_verbs_in_the_order_of_their_use(veneer_command):
    out = veneer_command("--help").out
    assert list(cli.commands) == VERBS
    places = [out.index(f"\n  {verb} ") for verb in VERBS]
    assert places == sorted(places)
    assert veneer_command("-h").out == out
    assert veneer_command("--version").out == f"veneer, version {veneer.__version__}\n"


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_of_every_verb_is_explained(verb, veneer_command):
    done = veneer_command(verb, "--help")
    assert done.code == 0
    for parameter in cli.commands[verb].params:
        if parameter.param_type_name == "option":
            assert parameter.help, parameter.name
            assert parameter.opts[0] in done.out


def test_help_shows_defaults(veneer_command):
    words = " ".join(veneer_command("train", "--help").out.split())
    assert "--rank N Rank of the update; r(in + out) parameters for each adapted matrix. [8]" in words
    assert "--rslora / --no-rslora Scale by alpha / √rank instead of alpha / rank. [false]" in words
    assert "--storage [fp32|bf16|fp16|nf4|fp4|int4|int8]" in words
    assert "--rank-pattern NAME=VALUE,…" in words
    assert "--layers A,B,…" in words
    assert "--learning-rate X" in words
    assert words.index("--model") < words.index("--data") < words.index("--output") < words.index("--clip")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell, veneer_command):
    script = veneer_command("completion", shell).out
    assert f"_VENEER_COMPLETE={shell}_complete" in script
    if shutil.which(shell):
        subprocess.run([shell, "-n", "/dev/stdin"], input=script, text=True, check=True)


def test_a_shell_asks_for_completions():
    code = "from veneer.cli import main; main()"
    asked = {"_VENEER_COMPLETE": "bash_complete", "COMP_WORDS": "veneer train --sto", "COMP_CWORD": "2"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**asked, "PATH": "/usr/bin:/bin"}
    )
    assert done.stdout == "plain,--storage\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "There is no command 'trian'. Did you mean 'train'?"),
        (["xyz"], "There is no command 'xyz'."),
        (["train", "--stesp", "3"], "No such option '--stesp'. (Did you mean one of: '--steps', "),
        (["train", "--lora-alpha", "3"], "No such option '--lora-alpha': here it is alpha."),
        (["train", "--iters=3"], "No such option '--iters': here it is steps."),
        (["generate", "run", "hi", "--max-tokens", "3"], "No such option '--max-tokens': here it is max_new_tokens."),
        (["train", "--storage", "nf5"], "Invalid value for '--storage': 'nf5' is not one of 'fp32', 'bf16', 'fp16', "),
        (["evaluate"], "Missing argument 'RUN|ADAPTER'."),
        (["merge", "run"], "Missing argument 'OUT'."),
        (["generate", "run"], "Missing argument 'PROMPT'."),
        (["completion", "tcsh"], "Invalid value for '{bash|zsh|fish}': 'tcsh' is not one of 'bash', 'zsh', 'fish'."),
        (["inspect", "a", "b"], "Got unexpected extra argument (b)"),
        (["train", "--rank"], "Option '--rank' requires an argument."),
    ],
)
def test_a_wrong_command_line_is_exit_code_2(arguments, message, refused):
    assert refused(*arguments, code=2).startswith(message)


def test_no_command_at_all_is_the_help_and_exit_code_2(veneer_command):
    done = veneer_command()
    assert done.code == 2
    assert "Usage: veneer [OPTIONS] COMMAND" in done.err


def test_ctrl_c_is_exit_code_130(veneer_command, monkeypatch, tiny_folder):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("veneer.commands.generate.open_named", interrupted)
    done = veneer_command("generate", tiny_folder, "hello")
    assert (done.code, done.out, done.err.strip()) == (130, "", "")


def test_ctrl_c_while_it_trains_is_130_too_and_tells_how_to_go_on(
    veneer_command, monkeypatch, tiny_folder, rows_file, tmp_path
):
    original = loop.take_step

    def step(run, rows, rate):
        run.stop.asked = True
        return original(run, rows, rate)

    monkeypatch.setattr(loop, "take_step", step)
    output = tmp_path / "run"
    done = veneer_command(
        "train", "--model", tiny_folder, "--data", rows_file, "--output", output, "--steps", 5, "--held-out", 0
    )
    assert done.code == 130
    assert done.err.endswith(f"Error: Stopped after step 1 of 5; go on with: veneer train --resume {output}\n")


def test_a_reader_that_goes_away_is_told_nothing(tiny_folder):
    """As in ``veneer inspect M | head -1``."""
    code = "from veneer.cli import main; main()"
    command = [sys.executable, "-c", code, "inspect", str(tiny_folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        errors = process.stderr.read()
    assert errors == ""
    assert process.returncode == 1


def test_public_names():
    assert dir(veneer) == veneer.__all__ == sorted(veneer.__all__)
    for name in veneer.__all__:
        assert getattr(veneer, name).__name__ == name
    with pytest.raises(AttributeError, match="module 'veneer' has no attribute 'trian'"):
        _ = veneer.trian
