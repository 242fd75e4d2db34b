"""veneer train: flags over YAML over defaults, and a sentence for every mistake."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from veneer.training.config import TrainConfig

pytestmark = pytest.mark.unit


@pytest.fixture
def flags(tiny_folder, rows_file, tmp_path):
    """A command line that trains in a moment."""
    return [
        "train", "--model", tiny_folder, "--data", rows_file, "--output", tmp_path / "run", "--steps", 2,
        "--batch-size", 4,
    ]  # fmt: skip


@pytest.fixture
def yaml_file(tiny_folder, rows_file, tmp_path):
    """A function from options to a RUN.yaml that has them beside what is needed."""

    def write(**options):
        path = tmp_path / "run.yaml"
        needed = {"model": str(tiny_folder), "data": str(rows_file), "output": str(tmp_path / "run")}
        path.write_text(yaml.safe_dump({**needed, "steps": 2, "batch_size": 4, **options}))
        return path

    return write


def test_flags_alone(flags, veneer_command, tmp_path):
    done = veneer_command(*flags, "--held-out", 8)
    assert (done.code, done.err) == (0, "")
    first, second = done.out.splitlines()[-2:]
    run = tmp_path / "run"
    assert first.startswith(f"Adapter of step 2 written to {run}/adapter. Held-out loss ")
    assert second == f"Next: veneer evaluate {run}   or   veneer chat {run} --both   or   veneer report {run}"
    assert (run / "adapter" / "adapter_model.safetensors").is_file()


def test_without_held_out_rows_no_loss_is_told(flags, veneer_command, tmp_path):
    done = veneer_command(*flags, "--held-out", 0)
    assert f"\nAdapter of step 2 written to {tmp_path}/run/adapter.\n" in done.out


def test_every_kind_of_flag_reaches_the_run(flags, veneer_command, tmp_path):
    done = veneer_command(
        *flags, "--rank", 4, "--alpha", 3.5, "--targets", "q_proj, v_proj", "--exclude", r".*layers\.1\.self_attn\.v.*",
        "--layers", "0,1", "--rank-pattern", "v_proj=2,q_proj=3", "--alpha-pattern", "q_proj=1.5", "--rslora",
        "--no-gradient-checkpointing", "--held-out", 0.25, "--schedule", "cosine", "--warmup", 1,
    )  # fmt: skip
    assert done.code == 0, done.err
    config = TrainConfig.read(tmp_path / "run" / "config.yaml")
    assert config.changed() == {
        **{name: getattr(config, name) for name in ("model", "data", "output")}, "steps": 2, "batch_size": 4,
        "rank": 4, "alpha": 3.5, "targets": ["q_proj", "v_proj"], "exclude": r".*layers\.1\.self_attn\.v.*",
        "layers": [0, 1], "rank_pattern": {"v_proj": 2, "q_proj": 3}, "alpha_pattern": {"q_proj": 1.5}, "rslora": True,
        "held_out": 0.25, "schedule": "cosine", "warmup": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "targets"),
    [("all-linear", "all-linear"), ("q_proj", ["q_proj"]), (r".*\.(q|v)_proj", r".*\.(q|v)_proj")],
)
def test_targets_are_names_or_one_regular_expression(flags, veneer_command, tmp_path, text, targets):
    assert veneer_command(*flags, "--targets", text).code == 0
    assert TrainConfig.read(tmp_path / "run" / "config.yaml").targets == targets


def test_a_flag_wins_over_yaml_and_yaml_over_the_default(yaml_file, veneer_command, tmp_path):
    path = yaml_file(rank=4, learning_rate=3e-3, rslora=True)
    assert veneer_command("train", path, "--rank", 2, "--no-rslora").code == 0
    config = TrainConfig.read(tmp_path / "run" / "config.yaml")
    assert (config.rank, config.learning_rate, config.rslora, config.seed) == (2, 3e-3, False, 0)
    # A run's own config starts another run.
    done = veneer_command("train", tmp_path / "run" / "config.yaml", "--output", tmp_path / "again")
    assert done.code == 0
    weights = [(tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("run", "again")]
    assert weights[0] == weights[1]


def test_a_run_is_resumed_with_more_steps(flags, veneer_command, refused, tmp_path):
    run = tmp_path / "run"
    assert veneer_command(*flags).code == 0
    assert refused(*flags) == (
        f"{run} holds a run already (checkpoint at step 2); go on with it by: veneer train --resume {run}, or choose "
        "another output."
    )
    done = veneer_command("train", "--resume", run, "--steps", 3)
    assert done.code == 0
    assert "Resumed after step 2." in done.out
    assert TrainConfig.read(run / "config.yaml").steps == 3
    assert refused("train", "--resume", run, "--rank", 4).startswith(
        "rank cannot be changed when a run is resumed; these can: steps, epochs, learning_rate"
    )
    assert refused("train", run / "config.yaml", "--resume", run) == (
        "Give RUN.yaml or --resume RUN, not both: a resumed run has its own config.yaml."
    )
    assert refused("train", "--resume", tmp_path / "rum") == (
        f"{tmp_path / 'rum'} is not a run folder: it has no config.yaml. Did you mean '{run}'?"
    )


def test_unknown_keys_and_values_in_yaml(yaml_file, refused):
    assert refused("train", yaml_file(learning_rat=1e-3)) == (
        "TrainConfig has no option 'learning_rat'. Did you mean 'learning_rate'?"
    )
    both = refused("train", yaml_file(rank=0, schedule="cosin"))
    assert "TrainConfig: rank = 0 is not valid: Input should be greater than or equal to 1." in both
    assert "TrainConfig: schedule = 'cosin' is not valid: Input should be 'constant', 'linear' or 'cosine'." in both


def test_yaml_files_that_are_none(refused, tmp_path):
    path = tmp_path / "run.yaml"
    assert refused("train", path) == f"There is no file {path}."
    path.write_bytes(b"\x80\x81\xff\x00")
    assert refused("train", path).startswith(f"{path} cannot be read as YAML: ")
    path.write_text("rank: 4\n  alpha: [")
    assert refused("train", path).startswith(f"{path} cannot be read as YAML: ")
    path.write_text("just text")
    assert refused("train", path) == f"{path} does not hold options as 'name: value' lines."
    assert refused("train", tmp_path).startswith(f"{tmp_path} cannot be read as YAML: ")
    path.write_text("")
    assert refused("train", path) == f"{path} does not hold options as 'name: value' lines."


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--rank", "abc"], "TrainConfig: rank = 'abc' is not valid: Input should be a valid integer"),
        (["--rank", "0"], "TrainConfig: rank = '0' is not valid: Input should be greater than or equal to 1."),
        (["--rank", "4.5"], "TrainConfig: rank = '4.5' is not valid: Input should be a valid integer"),
        (
            ["--learning-rate", "-1"],
            "TrainConfig: learning_rate = '-1' is not valid: Input should be greater than 0, or 'auto'.",
        ),
        (["--dropout", "1"], "TrainConfig: dropout = '1' is not valid: Input should be less than 1."),
        (["--rank-pattern", "q_proj"], "--rank-pattern 'q_proj' is not of the form name=value,name=value."),
        (["--rank-pattern", "q_proj=many"], "TrainConfig: rank_pattern.q_proj = 'many' is not valid: Input should be"),
        (["--layers", "first"], "TrainConfig: layers.0 = 'first' is not valid: Input should be a valid integer"),
        (["--micro-batch-size", "9"], "micro_batch_size = 9 is more than batch_size = 4"),
        (["--targets", ""], "LoRA has no targets, no train_also and no new_tokens, so nothing would be trained."),
        (["--held-out", "none.jsonl"], "There is no file none.jsonl."),
        (["--held-out", "-3"], "held_out = -3 is "),
        (["--held-out", "48"], "held_out = 48 cannot be split off 48 rows (48 that differ) with rows left to train on"),
        (["--held-out", "nan"], "held_out = nan is "),
        (["--learning-rate", "nan"], "TrainConfig: learning_rate = 'nan' is not valid: Input should be a finite"),
        (["--learning-rate", "inf"], "TrainConfig: learning_rate = 'inf' is not valid: Input should be a finite"),
        (["--model", "./nothing"], "There is no model at ./nothing."),
    ],
)  # fmt: skip
def test_values_that_make_no_sense(flags, refused, more, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert refused(*flags, *more).startswith(message)
    assert not Path(flags[6]).exists(), "nothing is written before everything is checked"


def test_needed_options_are_named(refused):
    assert refused("train") == "Needed and not given: model, data, output."


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "There is no file {path}. Did you mean '{folder}/one.jsonl'?"),
        ("one.jsonl", b"\x00\xff\xfe" * 50, "{path}:1 is not UTF-8 text; save the file as UTF-8."),
        ("two.csv", b"\x89PNG\r\n\x1a\n", "{path}:1 is not UTF-8 text; save the file as UTF-8."),
        ("a.csv", b"a\x00b,c\n1,2\n", r"{path}:2 has the columns a\x00b, c, which fit no shape."),
        ("a.parquet", b"\x00\xff" * 50, "{path} cannot be read as Parquet: "),
        ("a.json", b"\x00\x01", "{path}:1 is not JSON: "),
        ("a.jsonl", b"", "{path} holds no rows."),
        ("a.doc", b"some text", "{path} ends in .doc; data files end in .jsonl, .ndjson, .json, .csv, .tsv, "),
        ("empty", "folder", "datasets could not load '{path}': "),
    ],
)  # fmt: skip
def test_data_that_is_none(flags, refused, tmp_path, name, content, message):
    folder = tmp_path / "data"
    folder.mkdir()
    path = folder / name
    if content == "folder":
        path.mkdir()
    elif content is None:
        (folder / "one.jsonl").touch()
    else:
        path.write_bytes(content)
    flags[4] = path
    assert refused(*flags).startswith(message.format(path=path, folder=folder))


def test_an_output_that_cannot_be_a_run(flags, refused, tmp_path):
    file = tmp_path / "file"
    file.touch()
    flags[6] = file
    assert refused(*flags) == f"The output {file} is a file; a run needs a folder."
    flags[6] = file / "run"
    assert refused(*flags).startswith(f"Nothing can be written to {file}: ")
    flags[6] = tmp_path
    assert refused(*flags) == f"{tmp_path} is not empty and holds no run; choose a new folder as output."


def test_a_model_that_is_a_data_folder(flags, refused, tmp_path):
    flags[2] = tmp_path
    assert refused(*flags).startswith(f"{tmp_path} is not a model folder: it has no config.json.")


def test_resuming_what_is_damaged(finished_run, refused, tmp_path):
    run = shutil.copytree(finished_run, tmp_path / "run")
    (run / "config.yaml").write_text("\x00")
    assert refused("train", "--resume", run).startswith(f"{run}/config.yaml cannot be read as YAML: ")
