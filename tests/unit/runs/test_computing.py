"""What a run computes in: asked for in any face, written down, kept by what goes on with it and by what uses it."""

from __future__ import annotations

import io
import json
import shutil

import pytest
import torch
from rich.console import Console

import tiny
import veneer
from veneer.errors import ConfigError
from veneer.frozen import compute
from veneer.frozen.layers import compute_of
from veneer.runs.opened import open_named, open_run
from veneer.runs.train import resume, train

pytestmark = pytest.mark.unit

_OPTIONS = {
    "steps": 6, "batch_size": 4, "rank": 2, "held_out": 8, "evaluate_every": 3, "checkpoint_every": 2, "dropout": 0.1,
    "learning_rate": 1e-2,
}  # fmt: skip
ADAPTER = "adapter/adapter_model.safetensors"


@pytest.fixture
def measured(monkeypatch):
    """A function that sets by how much a step in bf16 was measured to take longer here; None: there are no
    instructions."""

    def as_if(ratio):
        monkeypatch.setattr(compute, "has_bf16", lambda: ratio is not None)
        monkeypatch.setattr(compute, "bf16_time", lambda kind: ratio)
        monkeypatch.setattr("veneer.runs.computing.has_bf16", lambda: ratio is not None)

    return as_if


@pytest.fixture
def run(tiny_folder, rows_file, tmp_path):
    """A function that trains a run, and what was printed."""

    def trained(name="run", model=None, **options):
        out = io.StringIO()
        result = train(
            *(model or (str(tiny_folder),)), data=str(rows_file), output=str(tmp_path / name),
            console=Console(file=out, width=200), **{**_OPTIONS, **options},
        )  # fmt: skip
        return result, out.getvalue()

    return trained


def _rows_json(folder):
    return json.loads((folder / "rows.json").read_text())


@pytest.mark.parametrize("storage", ["fp32", "bf16", "nf4"])
def test_auto_is_resolved_and_written_down(run, tmp_path, measured, storage):
    measured(0.4)
    result, printed = run(storage=storage)
    assert "Computing in bf16 (auto: a step in bf16 takes 0.4 × the time of fp32)." in printed
    assert compute_of(result.model) is torch.bfloat16
    assert "compute: auto" in (tmp_path / "run/config.yaml").read_text()
    assert _rows_json(tmp_path / "run")["chosen"]["compute"] == "bf16"
    assert json.loads((tmp_path / "run/adapter/veneer.json").read_text())["kept"]["compute"] == "bf16"
    assert {p.dtype for p in result.model.parameters() if p.requires_grad} == {torch.float32}


def test_a_run_in_fp32_says_nothing_and_is_what_it_was(run, tmp_path):
    _, printed = run()
    assert "Computing" not in printed
    assert _rows_json(tmp_path / "run")["chosen"]["compute"] == "fp32"
    assert "compute" not in json.loads((tmp_path / "run/adapter/veneer.json").read_text())["kept"]


@pytest.mark.parametrize("storage", ["fp32", "nf4"])
def test_bf16_is_another_run_and_close_to_fp32(run, tmp_path, storage):
    losses = {}
    for name in ("fp32", "bf16"):
        result, _ = run(name, compute=name, storage=storage, steps=30, evaluate_every=0)
        losses[name] = result.loss_before, result.loss_after
    assert (tmp_path / "fp32" / ADAPTER).read_bytes() != (tmp_path / "bf16" / ADAPTER).read_bytes()
    assert losses["fp32"][1] < losses["fp32"][0]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)


def test_the_option_in_yaml_and_flags(tiny_folder, rows_file, tmp_path, veneer_command, refused):
    (tmp_path / "run.yaml").write_text("compute: bf16\n")
    output = tmp_path / "run"
    given = ("--model", tiny_folder, "--data", rows_file, "--output", output, "--steps", 2, "--batch-size", 4)
    outcome = veneer_command("train", tmp_path / "run.yaml", *given)
    assert outcome.code == 0, outcome
    assert "Computing in bf16." in outcome.out + outcome.err
    assert "compute: bf16" in (output / "config.yaml").read_text()
    assert "'auto', 'fp32', 'bf16'" in refused("train", *given, "--compute", "fp16", code=2)


@pytest.mark.parametrize("storage", ["fp32", "bf16", "nf4"])
def test_a_resumed_run_goes_on_in_its_type_and_ends_in_the_same_bytes(run, tmp_path, measured, storage):
    measured(0.4)
    run("whole", storage=storage)
    run("half", storage=storage)
    half = tmp_path / "half"
    shutil.rmtree(half / "adapter")
    shutil.rmtree(half / "checkpoints/step-000006")
    measured(None)  # another machine
    out = io.StringIO()
    resume(half, console=Console(file=out, width=200))
    assert "for which this processor has no instructions" in out.getvalue()
    assert (half / ADAPTER).read_bytes() == (tmp_path / "whole" / ADAPTER).read_bytes()


def test_a_run_of_fp32_stays_in_it_where_bf16_is_faster(run, tmp_path, measured):
    measured(None)
    run("whole")
    measured(0.4)
    out = io.StringIO()
    result = resume(tmp_path / "whole", steps=7, console=Console(file=out, width=200))
    assert "This run began in fp32 and goes on in it, where a new one would compute in bf16" in out.getvalue()
    assert compute_of(result.model) is torch.float32


def test_a_run_of_an_earlier_version_was_in_fp32(run, tmp_path, measured):
    run("run")
    rows = _rows_json(tmp_path / "run")
    del rows["chosen"]["compute"]
    (tmp_path / "run/rows.json").write_text(json.dumps(rows))
    measured(0.4)
    assert compute_of(open_run(tmp_path / "run").model) is torch.float32
    assert compute_of(open_named(tmp_path / "run").model) is torch.float32


def test_the_type_cannot_be_changed_when_a_run_is_resumed(run, tmp_path):
    run()
    with pytest.raises(ConfigError, match=r"^compute cannot be changed when a run is resumed"):
        resume(tmp_path / "run", compute="bf16")


def test_what_uses_a_run_computes_as_it_did_unless_asked(run, tmp_path):
    result, _ = run(compute="bf16", steps=20)
    for source in (tmp_path / "run", tmp_path / "run/adapter"):
        assert compute_of(open_named(source).model) is torch.bfloat16
        assert compute_of(open_named(source, "fp32").model) is torch.float32
        assert compute_of(veneer.load(source)[0]) is torch.bfloat16
        assert compute_of(veneer.load(source, compute="fp32")[0]) is torch.float32
    same = veneer.evaluate(tmp_path / "run", examples=0)
    assert "Computing in bf16." in same.note
    assert same.adapter.loss == pytest.approx(result.loss_after, rel=1e-5), "by the arithmetic of training"
    other = veneer.evaluate(tmp_path / "run", examples=0, compute="fp32")
    assert other.adapter.loss == pytest.approx(same.adapter.loss, rel=0.02)
    assert other.adapter.loss != same.adapter.loss


def test_predictions_and_answers(run, tmp_path, veneer_command, rows_file):
    run(compute="bf16", steps=60, dropout=0.0, rank=8, batch_size=16)
    rows = [{"prompt": "ba:"}, {"prompt": "mo:"}]
    quiet = Console(file=io.StringIO())
    in_bf16 = veneer.predict(tmp_path / "run", data=rows, console=quiet)
    in_fp32 = veneer.predict(tmp_path / "run", data=rows, console=quiet, compute="fp32")
    assert "Computing in bf16." in in_bf16.notes
    assert "Computing in bf16." not in in_fp32.notes
    for one, other in zip(in_bf16, in_fp32, strict=True):
        assert one.probabilities != other.probabilities
        assert one.probabilities == pytest.approx(other.probabilities, abs=0.02)
    outcome = veneer_command("generate", tmp_path / "run", "ba:", "--max-new-tokens", 2)
    assert (outcome.code, outcome.err) == (0, "Computing in bf16.\n")
    plain = veneer_command("generate", tmp_path / "run", "ba:", "--max-new-tokens", 2, "--compute", "fp32")
    assert (plain.code, plain.err) == (0, "")


def test_a_loaded_model_has_its_type(run, tiny_folder, tmp_path):
    model = veneer.load(tiny_folder, compute="bf16")
    with pytest.raises(ConfigError, match="should compute in fp32, and the model was loaded to compute in bf16"):
        run(model=model, compute="fp32")
    with pytest.raises(ConfigError, match="should compute in fp32"):
        run(model=model, method="full", dropout=0.0, rank=8)
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    _, printed = run(model=model)
    assert "Computing in bf16 (as the model was loaded)." in printed
    assert _rows_json(tmp_path / "run")["chosen"]["compute"] == "bf16"
    assert compute_of(open_run(tmp_path / "run").model) is torch.bfloat16


def test_own_weights_are_trained_in_fp32(run, measured, tmp_path):
    measured(0.4)
    result, _ = run(method="full", dropout=0.0, rank=8)
    assert compute_of(result.model) is torch.float32
    with pytest.raises(ConfigError, match="trains the model's own weights, which is done in fp32"):
        run(name="other", method="full", dropout=0.0, rank=8, compute="bf16")


def test_nothing_of_the_base_is_rounded_in_what_is_written(run, tmp_path, tiny_folder):
    """A merge of a run in bf16 is the base's own values plus the update."""
    run(compute="bf16")
    merged = tmp_path / "merged"
    from veneer.commands.merge import merge_to

    merge_to(tmp_path / "run", merged)
    plain, written = tiny.state(veneer.load(tiny_folder)[0]), tiny.state(veneer.load(merged)[0])
    model, _ = veneer.load(tmp_path / "run", compute="bf16")
    veneer.merge(model, reversible=False)
    model.save_pretrained(tmp_path / "saved")
    saved = veneer.load(tiny_folder)[0]
    saved.load_state_dict({**saved.state_dict(), **model.state_dict()})
    for state in (written, tiny.state(saved)):
        for name, tensor in plain.items():
            if "norm" in name or "embed" in name:
                assert torch.equal(state[name], tensor), name
    assert all(torch.equal(written[name], tensor) for name, tensor in tiny.state(saved).items())


@pytest.mark.parametrize("storage", ["fp32", "nf4"])
def test_a_decoder_goes_on_in_fp32_after_a_prompt_in_bf16(tiny_folder, storage):
    from veneer.generation.decoder import generates_by

    kept, tokenizer = veneer.load(tiny_folder, storage=storage, compute="bf16")
    plain, _ = veneer.load(tiny_folder, storage=storage, compute="fp32")
    assert generates_by(kept) == generates_by(plain)
    prompts = ["hello", "a longer prompt of more than sixteen tokens, which the model itself reads"]
    answers = [veneer.generate(model, tokenizer, prompts, max_new_tokens=4) for model in (kept, plain)]
    assert all(map(all, answers))
