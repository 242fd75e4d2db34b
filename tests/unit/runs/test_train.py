"""A run: what comes out, that it learns, and what is refused."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import threading
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

import veneer
from veneer.data.known_tokens import known_pad
from veneer.data.labels import Renderer, Tokens
from veneer.errors import AdapterFileError, ConfigError, DivergedError, ModelError, TrainingError
from veneer.runs import begin
from veneer.runs import train as run
from veneer.runs.begin import Begun
from veneer.runs.folder import RunFolder
from veneer.runs.rows import Steps
from veneer.training import loop
from veneer.training.config import TrainConfig
from veneer.training.interrupt import stop_requests
from veneer.training.loop import Interrupted
from veneer.training.loss import How
from veneer.training.metrics import is_written

pytestmark = pytest.mark.unit


@pytest.fixture
def options(tiny_folder, rows_file, tmp_path):
    return {
        "model": str(tiny_folder), "data": str(rows_file), "output": str(tmp_path / "run"), "steps": 12, "rank": 4,
        "batch_size": 8, "learning_rate": 1e-2, "checkpoint_every": 4, "evaluate_every": 5, "held_out": 8,
        "dropout": 0.1,
    }  # fmt: skip


def _train(options, **more):
    console = Console(file=io.StringIO())
    result = veneer.train(**{**options, **more}, console=console)
    return result, console.file.getvalue()


def _silent():
    return Console(file=io.StringIO())


def _bytes(folder):
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def test_what_a_run_leaves(options):
    result, shown = _train(options)
    folder = result.folder
    assert {p.name for p in folder.iterdir()} >= {
        "adapter", "best", "checkpoints", "config.yaml", "environment.json", "metrics.jsonl", "tensorboard",
    }  # fmt: skip
    assert [p.name for p in sorted((folder / "checkpoints").iterdir())] == ["step-000008", "step-000012"]
    assert TrainConfig.read(folder / "config.yaml") == TrainConfig(**options)
    assert json.loads((folder / "environment.json").read_text())["torch"] == torch.__version__
    records = RunFolder(folder).metrics()
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 13))
    assert [r["step"] for r in records if "held_out_loss" in r] == [0, 5, 10, 12]
    assert all(r["tokens_per_second"] > 0 and r["peak_memory"] > 0 for r in records if "loss" in r)
    assert result.loss_after < result.loss_before - 0.1
    assert result.loss_after == min(r["held_out_loss"] for r in records if "held_out_loss" in r)
    for text in (
        "parameters are trained",
        "40 rows to train on, 8 held out",
        "tokens/s",
        "GB",
        "left",
        "held-out loss",
    ):
        assert text in shown
    assert any((folder / "tensorboard").iterdir())


def test_the_same_seed_gives_the_same_bytes(options, tmp_path):
    first, _ = _train(options)
    second, _ = _train(options, output=str(tmp_path / "second"))
    other, _ = _train(options, output=str(tmp_path / "other"), seed=1)
    assert _bytes(first.folder) == _bytes(second.folder)
    assert _bytes(first.folder) != _bytes(other.folder)


def test_micro_batches_do_not_change_the_gradient(options, tmp_path, monkeypatch):
    norms = []
    for size in (8, 3, 1):
        result, _ = _train(options, output=str(tmp_path / f"run{size}"), micro_batch_size=size, dropout=0, steps=3)
        norms.append([(r["loss"], r["gradient_norm"]) for r in RunFolder(result.folder).metrics() if "loss" in r])
    for other in norms[1:]:
        for ours, wanted in zip(other, norms[0], strict=True):
            assert ours == pytest.approx(wanted, rel=1e-5)


def test_accumulated_gradients_equal_the_big_batchs(options, monkeypatch):
    gradients = {}

    def spy(run_, rows, rate):
        for size in (None, 3, 1):
            object.__setattr__(run_.config, "micro_batch_size", size)
            run_.optimizer.param_groups[0]["lr"] = 0.0
            monkeypatch.setattr(run_.optimizer, "step", lambda: None)
            original(run_, rows, rate)
            gradients[size] = [p.grad.clone() for p in run_.optimizer.param_groups[0]["params"]]
        return 0.0, 0.0

    original = loop.take_step
    monkeypatch.setattr(loop, "take_step", spy)
    _train(options, steps=1, dropout=0, clip=0)
    for size in (3, 1):
        for ours, wanted in zip(gradients[size], gradients[None], strict=True):
            torch.testing.assert_close(ours, wanted, rtol=1e-6, atol=1e-6)


def test_gradient_checkpointing_gives_the_same_adapter(options, tmp_path):
    plain, _ = _train(options, steps=4)
    less, _ = _train(options, steps=4, output=str(tmp_path / "less"), gradient_checkpointing=True)
    first, second = (r.model.model.layers[0].self_attn.q_proj.updates["default"].A for r in (plain, less))
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


def test_the_best_adapter_is_the_result(options, tmp_path):
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text('{"prompt": "bat:", "completion": " maybe"}\n')  # the more is learned, the worse
    result, _ = _train(options, steps=30, held_out=str(held_out), evaluate_every=3)
    records = [r for r in RunFolder(result.folder).metrics() if "held_out_loss" in r and r["step"]]
    best = min(records, key=lambda r: r["held_out_loss"])
    assert (result.best_step, result.loss_after) == (best["step"], best["held_out_loss"])
    assert best["step"] < 30
    assert _bytes(result.folder) == (result.folder / "best" / "adapter_model.safetensors").read_bytes()
    again, tokenizer = veneer.load(options["model"])
    veneer.load_adapter(again, result.folder / "adapter")
    ids = tokenizer("bat:", return_tensors="pt").input_ids
    assert torch.equal(again(ids).logits, result.model(ids).logits), "and what the returned model has"


def test_patience_stops_early(options):
    result, _ = _train(options, steps=60, learning_rate=1.0, schedule="constant", evaluate_every=2, patience=2)
    assert result.steps == result.best_step + 4 < 60
    with pytest.raises(TrainingError, match="holds a run already"):
        _train(options)
    assert run.resume(result.folder, console=Console(file=io.StringIO())).steps == result.steps


def test_without_held_out_rows_the_last_adapter_is_the_result(options):
    result, _ = _train(options, held_out=0, steps=3)
    assert (result.loss_before, result.loss_after) == (None, None)
    assert not (result.folder / "best").exists()
    assert _bytes(result.folder)


def test_a_held_out_file(options, tmp_path):
    path = tmp_path / "held.jsonl"
    path.write_text('{"prompt": "bet:", "completion": " yes"}\n')
    _, shown = _train(options, held_out=str(path), steps=1)
    assert "48 rows to train on, 1 held out" in shown


def test_a_loaded_model_and_its_adapter(options, tmp_path):
    model, tokenizer = veneer.load(options["model"])
    veneer.attach(model, veneer.LoRA(rank=2, targets=["q_proj"]))
    given = {name: options[name] for name in ("data", "output", "steps", "held_out")}
    with pytest.raises(ConfigError, match="so its options cannot be given: rank"):
        veneer.train(model, tokenizer, **given, rank=4)
    with pytest.raises(ConfigError, match="needs the tokenizer"):
        veneer.train(model, **given)
    result = veneer.train(model, tokenizer, **given, console=Console(file=io.StringIO()))
    assert result.model is model
    config = TrainConfig.read(result.folder / "config.yaml")
    assert (config.rank, config.targets, config.model) == (2, ["q_proj"], options["model"])
    assert (result.folder / "checkpoints" / "step-000000").is_dir(), "an adapter that came along is no seed's"
    veneer.load_adapter(model, result.folder / "adapter", name="loaded")
    with pytest.raises(TrainingError, match="is not trainable; load it with trainable=True"):
        veneer.train(model, tokenizer, **{**given, "output": str(tmp_path / "other")})


def test_an_encoder_gets_a_head_for_the_rows_classes(options, tiny_encoder):
    result, _ = _train(options, model=str(tiny_encoder), steps=30)
    assert result.model.config.id2label == {0: "no", 1: "yes"}
    assert result.loss_after < result.loss_before
    assert {"classifier"} < {row.name for row in veneer.trainable(result.model).rows}


def test_columns_and_rows_not_used_are_shown(options, tmp_path):
    path = tmp_path / "more.jsonl"
    rows = [
        {"prompt": f"{word}:", "completion": " a" if word != "dd" else "", "id": 3} for word in ("aa", "bb", "cc", "dd")
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, shown = _train(options, data=str(path), held_out=0, steps=1)
    assert "Columns not used (prompt/completion rows): id." in shown
    assert f"1 row ({path}:4) left out, because there is no answer to learn in it." in shown


def _refused(match, options, **more):
    with pytest.raises(veneer.VeneerError, match=match):
        _train(options, **more)


def test_refusals_before_the_start(options, tmp_path):
    _refused(r"Nothing can be written to /proc: ", options, output="/proc/run")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    _refused(r"photos is not empty and holds no run", options, output=str(tmp_path / "photos"))
    _refused(r"cat.jpg is a file; a run needs a folder", options, output=str(tmp_path / "photos" / "cat.jpg"))
    _refused(r"There is no file .*none.jsonl", options, data=str(tmp_path / "none.jsonl"))
    _refused(r"c_attn|'c_attn'", options, targets=["c_attn"])
    assert not os.path.exists(options["output"]), "a refusal leaves no run folder behind"


@pytest.mark.parametrize(
    ("kind", "packed", "largest"), [("seq2seq", False, 2), ("causal", False, 1), ("causal", True, 0)]
)
def test_the_largest_step_is_the_one_in_which_most_is_computed(kind, packed, largest):
    """Answers of an encoder-decoder count, and so does padding, where there is any."""
    sizes = [[(16, 1), (14, 1)], [(20, 1), (2, 1)], [(5, 40), (5, 1)]]  # tokens of rows, and of their labels
    steps = [[Tokens([1] * ids, [1] * labels, "") for ids, labels in rows] for rows in sizes]
    each = steps.__getitem__  # each epoch puts other rows together
    batches = SimpleNamespace(rows=each, lengths=each, per_epoch=1)
    loss = SimpleNamespace(kind=kind, how=How(packed, packed))
    config = SimpleNamespace(steps=3, batch_size=2, micro_batch_size=None)
    begun = SimpleNamespace(steps=Steps([], [], [], batches, config, {}), loss=loss)
    assert Begun.largest_step(begun) is steps[largest]
    begun.steps = replace(begun.steps, config=SimpleNamespace(steps=1, batch_size=2, micro_batch_size=None))
    assert Begun.largest_step(begun) is steps[0], "no other is taken"


def test_a_disk_that_is_too_small_is_found_before_training(options, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 1000))
    _refused(r"has 0\.0 MB free, but the run will write 17\.\d MB; free some", options)


def _interrupted(options, monkeypatch, at, error):
    """Run until ``error`` is raised in step ``at`` (from 0)."""
    original, count = loop.take_step, iter(range(10_000))

    def step(*args):
        if next(count) == at:
            raise error
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "take_step", step)
        with pytest.raises(type(error)) as raised:
            _train(options)
    return raised


@pytest.mark.parametrize("at", [0, 1, 4, 5, 7, 11])
def test_a_run_that_broke_off_ends_in_the_same_bytes(options, tmp_path, monkeypatch, at):
    whole, _ = _train(options, output=str(tmp_path / "whole"))
    _interrupted(options, monkeypatch, at, MemoryError())
    torch.manual_seed(1234)  # nothing of this process may leak in
    again = run.resume(options["output"], console=Console(file=io.StringIO()))
    assert _bytes(again.folder) == _bytes(whole.folder)
    assert _records(again.folder) == _records(whole.folder), "its metrics have each step once"


def _records(folder):
    measured = ("tokens_per_second", "peak_memory")
    return [{k: v for k, v in record.items() if k not in measured} for record in RunFolder(folder).metrics()]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ctrl_c_and_a_closed_terminal_save_and_say_how_to_go_on(options, tmp_path, monkeypatch, number):
    whole, _ = _train(options, output=str(tmp_path / "whole"))
    original, count = loop.take_step, iter(range(100))

    def step(*args):
        if next(count) == 5:
            os.kill(os.getpid(), number)
        return original(*args)

    handler = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    outer = signal.signal(number, handler)  # where tests run in the background, it may be ignored
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "take_step", step)
        with pytest.raises(Interrupted, match=r"Stopped after step 6 of 12; go on with: veneer train --resume .*run"):
            _train(options)
    assert signal.getsignal(number) is before
    signal.signal(number, outer)
    again = run.resume(options["output"], console=Console(file=io.StringIO()))
    assert _bytes(again.folder) == _bytes(whole.folder)


def test_a_run_that_goes_on_elsewhere_says_so_and_keeps_where_it_began(options, monkeypatch):
    _interrupted(options, monkeypatch, 5, MemoryError())
    file = RunFolder(options["output"]).environment_file
    before = json.loads(file.read_text())
    file.write_text(json.dumps({**before, "threads": 77}))
    shown = io.StringIO()
    run.resume(options["output"], console=Console(file=shown, width=500))
    said = f"The run began elsewhere (threads: 77, and now {before['threads']}), so the last bits of its result may"
    assert said in shown.getvalue()
    assert json.loads(file.read_text())["threads"] == 77


def test_a_second_run_in_another_thread_is_refused(options, tmp_path, monkeypatch):
    """Both would draw from one random state, and end in other bytes than alone; the first does not notice."""
    alone, _ = _train(options, steps=2, output=str(tmp_path / "alone"))
    original, raised = loop.take_step, []

    def step(*args):
        if not raised:
            other = threading.Thread(target=lambda: _fails(options, tmp_path, raised))
            other.start()
            other.join()
        return original(*args)

    monkeypatch.setattr(loop, "take_step", step)
    first, _ = _train(options, steps=2)
    assert "Another run trains in this process" in str(raised[0])
    assert _bytes(first.folder) == _bytes(alone.folder)
    monkeypatch.setattr(loop, "take_step", original)
    _train(options, steps=2, output=str(tmp_path / "later"))


def _fails(options, tmp_path, raised):
    try:
        _train(options, steps=2, output=str(tmp_path / "other"))
    except TrainingError as error:
        raised.append(error)


def test_a_signal_that_is_ignored_stays_so(monkeypatch):
    """As nohup has it for SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_requests() as request:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not request.asked
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_that_ends_by_an_exception_is_not_in_progress(options, monkeypatch):
    """Though the exception is kept, as a notebook keeps the last one."""
    failed = _interrupted(options, monkeypatch, 3, DivergedError("The loss is not finite."))
    assert not is_written(RunFolder(options["output"]).metrics_file)
    del failed


def test_a_loss_that_is_not_finite_names_the_rows(options, rows_file):
    model, tokenizer = veneer.load(options["model"])
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer("Z").input_ids[0]] = float("nan")
    with rows_file.open("a") as file:
        file.write('{"prompt": "Z:", "completion": " no"}\n')
    with pytest.raises(TrainingError, match=r"not finite at .*rows.jsonl:49\. .* checkpoint, step-0000\d\d, is kept"):
        _train(options, model=model, tokenizer=tokenizer, held_out=0, checkpoint_every=1, batch_size=4, steps=13)
    assert not os.path.exists(f"{options['output']}/adapter")


def test_a_rate_that_destroys_the_adapter_stops_the_run(options):
    with pytest.raises(TrainingError, match=r"not finite at .*lower learning_rate.*There is no checkpoint yet"):
        _train(options, steps=1, learning_rate=1e30, schedule="constant", warmup=0)
    assert all("NaN" not in line for line in (Path(options["output"]) / "metrics.jsonl").read_text().splitlines())
    assert not (Path(options["output"]) / "best").exists()


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 150 kB, less than a run writes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=150k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_fills_up_spoils_nothing(options, tmp_path, small_disk, monkeypatch):
    whole, _ = _train(options, output=str(tmp_path / "whole"))
    monkeypatch.setattr(begin, "check_disk", lambda *args, **options: None)  # which would have refused it at the start
    folder = small_disk / "run"
    with pytest.raises(
        TrainingError, match=r"No space left on device.*\); .*checkpoint.*Make room, then: veneer train"
    ):
        _train(options, output=str(folder))
    subprocess.run(["mount", "-o", "remount,size=10m", small_disk], check=True)
    assert _bytes(run.resume(folder, console=Console(file=io.StringIO())).folder) == _bytes(whole.folder)


def _adapted(options):
    """A loaded model with an adapter that no seed gives again, and a second one that is not trained."""
    model, tokenizer = veneer.load(options["model"])
    torch.manual_seed(5)
    veneer.attach(model, veneer.LoRA(rank=2), "idle")
    veneer.attach(model, veneer.LoRA(rank=4, dropout=0.1))
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.updates["default"].B.fill_(0.01)
    rest = {name: options[name] for name in options.keys() - {"model", "rank", "dropout"}}
    return model, tokenizer, rest


def test_a_run_from_an_attached_adapter_goes_on_from_a_kill_at_any_write(options, tmp_path, monkeypatch):
    model, tokenizer, rest = _adapted(options)
    idle = model.model.layers[0].self_attn.q_proj.updates["idle"].A.clone()
    whole = veneer.train(model, tokenizer, **{**rest, "output": str(tmp_path / "whole")}, console=_silent())
    assert torch.equal(model.model.layers[0].self_attn.q_proj.updates["idle"].A, idle), "it is not in force"

    class Killed(BaseException):
        pass

    for kill_at in (1, 2, 3, 8):
        writes = iter(range(1, 1000))
        with monkeypatch.context() as patch:
            original = os.replace

            def replace(source, goal, original=original, writes=writes, kill_at=kill_at):
                if next(writes) == kill_at:
                    raise Killed
                original(source, goal)

            patch.setattr(os, "replace", replace)
            model, tokenizer, rest = _adapted(options)
            folder = tmp_path / f"killed{kill_at}"
            with pytest.raises(Killed):
                veneer.train(model, tokenizer, **{**rest, "output": str(folder)}, console=_silent())
        if (folder / "config.yaml").exists():
            result = run.resume(folder, console=_silent())
        else:  # it had not become a run yet
            model, tokenizer, rest = _adapted(options)
            result = veneer.train(model, tokenizer, **{**rest, "output": str(folder)}, console=_silent())
        assert _bytes(result.folder) == _bytes(whole.folder), kill_at


def test_a_loaded_models_storage_is_recorded_and_its_settings_are_given_back(options, tmp_path):
    model, tokenizer = veneer.load(options["model"], storage="nf4")
    rest = {name: value for name, value in options.items() if name != "model"} | {"steps": 2}
    veneer.train(model, tokenizer, **rest, gradient_checkpointing=True, console=_silent())
    assert TrainConfig.read(Path(options["output"]) / "config.yaml").storage == "nf4"
    assert not model.is_gradient_checkpointing
    assert not any("forward" in module.__dict__ for module in model.modules())

    model, tokenizer = veneer.load(options["model"])
    model.name_or_path = ""
    console = Console(file=io.StringIO(), width=200)
    veneer.train(model, tokenizer, **{**rest, "output": tmp_path / "unnamed", "data": Path(rest["data"])},
                 console=console)  # fmt: skip
    assert "LlamaForCausalLM is no name that load finds, so this run can be neither resumed" in console.file.getvalue()


def test_a_token_beyond_the_embedding_is_refused(options):
    model, tokenizer = veneer.load(options["model"])
    tokenizer.add_tokens(["<new>"])
    with open(options["data"], "a") as file:
        file.write('{"prompt": "<new>:", "completion": " no"}\n')
    rest = {name: value for name, value in options.items() if name != "model"}
    with pytest.raises(ModelError, match=r"holds token (\d+), but the model's embedding has \1 rows: .*resize_token"):
        veneer.train(model, tokenizer, **rest, console=_silent())


def test_a_pad_token_beyond_the_embedding_is_masked_or_refused(options, tmp_path):
    rest = {name: value for name, value in options.items() if name != "model"} | {"steps": 2, "batch_size": 4}
    losses = []
    for name in ("plain", "beyond"):
        model, tokenizer = veneer.load(options["model"])
        if name == "beyond":
            tokenizer.add_special_tokens({"pad_token": "<pad>"})
            assert tokenizer.pad_token_id >= model.get_input_embeddings().weight.shape[0]
        result = veneer.train(model, tokenizer, **{**rest, "output": tmp_path / name}, console=_silent())
        losses.append((result.loss_before, result.loss_after))
    assert losses[0] == losses[1]

    message = (
        r"^The tokenizer's pad token is (\d+), but the model's embedding has \1 rows: choose another pad token, or "
    )
    with pytest.raises(ModelError, match=message):
        known_pad(model, Renderer(tokenizer, classes=("no", "yes")))


@pytest.mark.parametrize("held_out", ["nan", "inf", -5, 1.5])
def test_held_out_is_a_share_a_number_or_a_file(options, held_out):
    with pytest.raises(ConfigError, match=r"is not a share from 0 up to 1, a whole number of rows, or a file"):
        TrainConfig(**{**options, "held_out": held_out})


def test_resume_refusals(options, rows_file, tmp_path, monkeypatch):
    with pytest.raises(TrainingError, match=r"run is not a run folder: it has no config.yaml"):
        run.resume(options["output"])
    _interrupted(options, monkeypatch, 6, MemoryError())
    with pytest.raises(TrainingError, match=r"rum is not a run folder.* Did you mean '.*run'"):
        run.resume(tmp_path / "rum")
    with pytest.raises(ConfigError, match=r"rank cannot be changed when a run is resumed; these can: steps"):
        run.resume(options["output"], rank=8)
    lines = rows_file.read_text().splitlines(keepends=True)
    rows_file.write_text("".join(lines[:-1]))
    with pytest.raises(TrainingError, match=r"are not those that .* was started with"):
        run.resume(options["output"])
    rows_file.write_text("".join(lines))
    latest = f"{options['output']}/checkpoints/step-000004"
    with open(f"{latest}/optimizer.safetensors", "r+b") as file:
        file.truncate(100)
    with pytest.raises(TrainingError, match=r"step-000004 is damaged .*; delete it to go on from the one before"):
        run.resume(options["output"])


def test_a_resumed_run_may_take_other_steps(options, monkeypatch):
    _train(options)
    result = run.resume(options["output"], steps=16, learning_rate=1e-3, console=Console(file=io.StringIO()))
    assert result.steps == 16
    assert TrainConfig.read(result.folder / "config.yaml").steps == 16


def test_restore_refuses_another_adapter(options):
    result, _ = _train(options, steps=1)
    model, _ = veneer.load(options["model"])
    veneer.attach(model, veneer.LoRA(rank=2))
    from veneer.updates.adapter_file import restore

    with pytest.raises(AdapterFileError, match="does not hold this adapter: wrong shape"):
        restore(model, result.folder / "adapter")


def test_a_best_that_was_left_behind_by_a_kill_is_not_taken_for_this_runs(options, monkeypatch):
    """Killed after the best of step 5, before the next checkpoint, and resumed with a rate that finds no better one."""
    _interrupted(options, monkeypatch, 6, MemoryError())
    best = Path(options["output"]) / "best"
    assert (best / "step").read_text() == "5\n"
    result = run.resume(options["output"], learning_rate=1e-9, warmup=0, console=Console(file=io.StringIO()))
    assert (result.folder / "best" / "step").read_text() == f"{result.best_step}\n"
    assert _bytes(result.folder) == (best / "adapter_model.safetensors").read_bytes()
    assert not (result.folder / "adapter" / "step").exists()
