"""A run that starts from an adapter: what it takes over, what is refused, and that it stands alone."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers as tf
from rich.console import Console

import veneer
from tokens import tokenizer
from veneer.errors import AdapterFileError, ConfigError, DataError, ModelError, TrainingError
from veneer.reporting.run_page import run_page
from veneer.runs.facts import read_facts
from veneer.runs.folder import RunFolder
from veneer.runs.rows import read_split
from veneer.training.config import TrainConfig
from veneer.updates.record import active_allocator, updates_of

pytestmark = pytest.mark.unit

QUIET = Console(file=io.StringIO())


@pytest.fixture
def more(tmp_path) -> Path:
    """Other questions, of the same two answers."""
    words = [a + b for a in "prstvwzj" for b in ("em", "is", "ob")]
    rows = [{"prompt": f"{word}:", "completion": " yes" if word[0] < "t" else " no"} for word in words]
    path = tmp_path / "more.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def options(more, tmp_path):
    return {
        "data": str(more), "output": str(tmp_path / "second"), "steps": 4, "batch_size": 8, "held_out": 8,
        "learning_rate": 1e-2, "checkpoint_every": 2, "console": QUIET,
    }  # fmt: skip


@pytest.fixture(scope="module")
def allocated(tiny_folder, finished_run, tmp_path_factory) -> Path:
    """An AdaLoRA run, whose ranks are pruned."""
    output = tmp_path_factory.mktemp("allocated") / "run"
    veneer.train(
        str(tiny_folder), data=str(finished_run.parent / "rows.jsonl"), output=str(output), steps=12, method="adalora",
        target_rank=2, initial_rank=4, learning_rate=1e-2, held_out=8, batch_size=8, console=QUIET,
    )  # fmt: skip
    return output


def _losses(run) -> list[float]:
    return [record["held_out_loss"] for record in RunFolder(run).metrics() if "held_out_loss" in record]


def _bytes(run) -> bytes:
    return (Path(run) / "adapter" / "adapter_model.safetensors").read_bytes()


def test_it_begins_where_the_adapter_ended(finished_run, options, tmp_path):
    shown = Console(file=io.StringIO())
    result = veneer.train(adapter=finished_run, **{**options, "console": shown})
    held_out = tmp_path / "held_out.jsonl"
    rows = (tmp_path / "more.jsonl").read_text().splitlines()
    config = RunFolder(result.folder).config()
    assert (config.method, config.rank, config.model) == ("lora", 8, RunFolder(finished_run).config().model)
    assert config.train_also == ["lm_head", "embed_tokens"]
    facts = read_facts(finished_run / "adapter")
    text = " ".join(shown.file.getvalue().split())
    assert f"Starts from {finished_run} ({facts.steps} steps on 32 rows): method lora, rank 8." in text
    split = read_split(config, {})
    held_out.write_text("".join(rows[int(example.where.rpartition(":")[2]) - 1] + "\n" for example in split.held_out))
    before = veneer.evaluate(finished_run / "adapter", data=str(held_out), examples=0).adapter.loss
    assert _losses(result.folder)[0] == pytest.approx(before, rel=1e-5)
    began = read_facts(result.folder / "adapter").began
    assert [one.model_dump() for one in began] == [{"adapter": "run", "steps": facts.steps, "rows": 32}]
    assert RunFolder(result.folder).rows()["began"] == [began[0].model_dump()]
    card = (result.folder / "adapter" / "README.md").read_text()
    assert f"- Began from the adapter run ({facts.steps} steps on 32 rows).\n" in card
    assert str(finished_run) not in card
    page = run_page(result.folder)
    assert f"It started from the adapter run ({facts.steps} steps on 32 rows)." in page
    assert "| loss (mean of a learned token, nats) | – |" in card, "what was first was no base"


def test_its_folder_does_without_the_one_it_started_from(finished_run, options, tmp_path):
    source = shutil.copytree(finished_run, tmp_path / "source")
    whole = veneer.train(adapter=source, **{**options, "dropout": 0.1}).folder
    shutil.rmtree(source)
    stopped = shutil.copytree(whole, tmp_path / "elsewhere" / "stopped")
    for later in ("adapter", "best", "checkpoints/step-000004"):
        shutil.rmtree(stopped / later)
    veneer.resume(stopped, console=QUIET)
    assert _bytes(stopped) == _bytes(whole)
    for later in ("adapter", "best", "checkpoints"):  # killed before its first checkpoint
        shutil.rmtree(stopped / later)
    veneer.resume(stopped, console=QUIET)
    assert _bytes(stopped) == _bytes(whole)
    assert veneer.evaluate(stopped, examples=0).adapter.loss == pytest.approx(min(_losses(whole)), rel=1e-5)
    assert read_facts(stopped / "adapter").began == read_facts(whole / "adapter").began
    third = veneer.train(adapter=stopped, **{**options, "output": str(tmp_path / "third")})
    assert [one.adapter for one in read_facts(third.written).began] == ["source", "stopped"]


def test_an_adapter_folder_of_peft_is_a_start_too(finished_run, tiny_folder, options, tmp_path):
    plain = shutil.copytree(finished_run / "adapter", tmp_path / "plain")
    (plain / "veneer.json").unlink()
    result = veneer.train(adapter=plain, **options)
    assert _losses(result.folder)[0] < 2
    assert read_facts(result.written).began[0].model_dump() == {"adapter": "plain", "steps": None, "rows": None}
    assert (result.folder / "start" / "adapter_model.safetensors").is_file()


def test_options_of_the_adapter_may_be_repeated_and_training_options_changed(finished_run, options, veneer_command):
    config = TrainConfig.read(finished_run / "config.yaml")
    for given in ({"rank": 8, "alpha": 16, "train_also": "embed_tokens,lm_head", "targets": "all-linear"}, {}):
        shutil.rmtree(options["output"], ignore_errors=True)
        result = veneer.train(config.model, adapter=str(finished_run), dropout=0.2, **options, **given)
    updates = updates_of(result.model, "default")
    assert updates["model.layers.0.self_attn.q_proj"].dropout == 0.2
    assert json.loads((result.written / "adapter_config.json").read_text())["lora_dropout"] == 0.2
    shutil.rmtree(options["output"])
    given = ("--data", options["data"], "--output", options["output"], "--steps", 2)
    done = veneer_command("train", finished_run / "config.yaml", "--adapter", finished_run, *given)
    assert done.code == 0, done.err
    assert TrainConfig.read(Path(options["output"]) / "config.yaml").adapter == str(finished_run)


@pytest.mark.parametrize(
    ("given", "said", "has"),
    [
        ({"rank": 4}, "rank = 4 contradicts", "rank = 8; leave it out"),
        ({"method": "adalora"}, "method = 'adalora' contradicts", "method = 'lora'; leave it out"),
        ({"method": "full"}, "method = 'full' contradicts", "method = 'lora'; leave it out"),
        ({"alpha": 8.0, "targets": ["q_proj"]}, "alpha = 8.0 and targets = ['q_proj'] contradict", "alpha = None and "
         "targets = 'all-linear'; leave them out"),
        ({"init": "gaussian"}, "init = 'gaussian' contradicts", "init = 'kaiming'; leave it out"),
    ],
)  # fmt: skip
def test_an_option_that_contradicts_the_adapter_is_refused_by_name(finished_run, options, given, said, has):
    with pytest.raises(ConfigError) as error:
        veneer.train(adapter=finished_run, **options, **given)
    one = "it" if "leave it" in has else "them"
    assert str(error.value) == (
        f"{said} the adapter {finished_run}, which has {has.partition(';')[0]}; leave {one} out, or train a new "
        f"adapter, without adapter: {finished_run}."
    )
    assert not Path(options["output"]).exists()


def test_another_base_is_refused(finished_run, tiny_folder, options, tmp_path):
    copy = shutil.copytree(tiny_folder, tmp_path / "copy")
    with pytest.raises(ConfigError) as error:
        veneer.train(str(copy), adapter=finished_run, **options)
    assert str(error.value) == (
        f"model = {copy} is not the base of the adapter {finished_run}, which is {tiny_folder}; leave model out to "
        f"have that one, or train a new adapter over {copy}, without adapter: {finished_run}."
    )
    alone = shutil.copytree(finished_run / "adapter", tmp_path / "alone")
    config = alone / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "/no/such/base"}))
    with pytest.raises(AdapterFileError, match=r"The base of .*alone is not at /no/such/base .*write where it is"):
        veneer.train(adapter=alone, **options)
    made = tf.LlamaConfig(
        vocab_size=len(tokenizer()), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    wider = tmp_path / "wider"
    tf.LlamaForCausalLM(made).save_pretrained(wider)
    tokenizer().save_pretrained(wider)
    with pytest.raises(ModelError) as wrong:
        veneer.train(str(wider), adapter=alone, **options)
    assert str(wrong.value).startswith(f"{wider} is a LlamaForCausalLM of ")
    assert str(wrong.value).endswith("; give that one as model.")
    assert not Path(options["output"]).exists()
    shown = Console(file=io.StringIO(), width=500)
    assert veneer.train(str(copy), adapter=alone, **{**options, "console": shown}).steps == 4
    said = f"Its base, /no/such/base, is not here; {copy} is of the same shapes, and is used instead."
    assert said in shown.file.getvalue()


def test_what_is_no_adapter_is_refused(finished_run, tiny_folder, options, tmp_path, run_folder):
    with pytest.raises(AdapterFileError, match=r"There is no folder .*/rum\. Did you mean .*/run\?"):
        veneer.train(adapter=finished_run.parent / "rum", **options)
    with pytest.raises(AdapterFileError, match=r"is not an adapter folder: it holds no adapter_config\.json"):
        veneer.train(adapter=tiny_folder, **options)
    with pytest.raises(TrainingError, match=r"has no adapter yet; finish the run: veneer train --resume"):
        veneer.train(adapter=run_folder(), **options)
    own = run_folder(name="own", method="full")
    with pytest.raises(ModelError) as error:
        veneer.train(adapter=own, **options)
    assert str(error.value) == (
        f"{own} trained the model's own weights, so it has no adapter to start from; train its model: --model "
        f"{own}/model"
    )
    model, made = veneer.load(tiny_folder)
    with pytest.raises(ConfigError, match=r"is for a model that is named; put it on the loaded one, veneer\.load_ada"):
        veneer.train(model, made, adapter=str(finished_run), **options)
    with pytest.raises(ConfigError, match="adapter cannot be changed when a run is resumed"):
        veneer.resume(finished_run, adapter="x")  # type: ignore[call-arg]


def test_it_says_where_it_is_no_better_than_what_it_started_from(finished_run, options):
    result = veneer.train(adapter=finished_run, **{**options, "learning_rate": 0.5})
    losses = _losses(result.folder)
    said = (
        f"The held-out loss is never lower than that of the adapter it started from, {finished_run}: {losses[0]:.3f} "
        f"before, {min(losses[1:]):.3f} at best. Use that one for such rows, or take a lower rate, --learning-rate "
        f"0.17."
    )
    assert said in result.advice
    assert not any("it started from" in said for said in veneer.train(
        adapter=finished_run, **{**options, "output": options["output"] + "2", "data": str(finished_run.parent /
        "rows.jsonl"), "steps": 20, "seed": 2},
    ).advice)  # fmt: skip


def test_adalora_goes_on_with_the_ranks_it_has(allocated, options, tmp_path):
    result = veneer.train(adapter=allocated, **options)
    held_out = read_split(RunFolder(result.folder).config(), {}).held_out
    lines, numbers = Path(options["data"]).read_text().splitlines(), [int(e.where.rpartition(":")[2]) for e in held_out]
    rows = tmp_path / "held_out.jsonl"
    rows.write_text("".join(lines[number - 1] + "\n" for number in numbers))
    before = veneer.evaluate(allocated, data=str(rows), examples=0).adapter.loss
    assert _losses(result.folder)[0] == pytest.approx(before, rel=1e-5)
    before = json.loads((allocated / "adapter" / "adapter_config.json").read_text())["rank_pattern"]
    after = json.loads((result.written / "adapter_config.json").read_text())["rank_pattern"]
    assert after == before
    assert any(not all(kept) for kept in before.values()), "some are pruned"
    assert active_allocator(result.model).fixed
    stopped = shutil.copytree(result.folder, tmp_path / "stopped")
    for later in ("adapter", "best", "checkpoints/step-000004"):
        shutil.rmtree(stopped / later)
    veneer.resume(stopped, console=QUIET)
    assert _bytes(stopped) == _bytes(result.folder)
    with pytest.raises(ConfigError, match=r"target_rank = 3\.0 contradicts the adapter .*, which has target_rank = 2"):
        veneer.train(adapter=allocated, target_rank=3, **{**options, "output": str(tmp_path / "other")})
    with pytest.raises(ConfigError, match="rank is an option of method: lora, and the method is adalora"):
        veneer.train(adapter=allocated, rank=4, **{**options, "output": str(tmp_path / "other")})


def test_adalora_whose_ranks_were_not_given_out_is_refused(tiny_folder, options, tmp_path):
    model, _ = veneer.load(tiny_folder)
    veneer.attach(model, veneer.AdaLoRA(target_rank=2, initial_rank=4, total_steps=100))
    veneer.save(model, tmp_path / "early")
    with pytest.raises(AdapterFileError) as error:
        veneer.train(adapter=tmp_path / "early", **options)
    assert str(error.value) == (
        f"The ranks of {tmp_path}/early, an AdaLoRA adapter, were not given out before it was saved, and a new run "
        f"cannot go on within their schedule; make a plain LoRA of it, veneer export {tmp_path}/early PLAIN, and start "
        f"from that."
    )
    model, _ = veneer.load(tiny_folder)
    veneer.attach(model, veneer.AdaLoRA(target_rank=4, initial_rank=4, total_steps=100))
    veneer.save(model, tmp_path / "all")
    result = veneer.train(adapter=tmp_path / "all", **options)
    assert active_allocator(result.model).fixed


def test_a_classifier_keeps_its_classes(finished_classifier, options, more, tmp_path):
    one = tmp_path / "one.jsonl"
    one.write_text("".join(line + "\n" for line in more.read_text().splitlines() if " yes" in line))
    result = veneer.train(adapter=finished_classifier, **{**options, "data": str(one), "held_out": 2})
    assert read_facts(result.written).classes == ["no", "yes"]
    assert veneer.evaluate(result.folder, examples=0).adapter.loss == pytest.approx(min(_losses(result.folder)[1:]))
    other = tmp_path / "other.jsonl"
    other.write_text(more.read_text().replace(" no", " nay"))
    with pytest.raises(DataError) as error:
        veneer.train(adapter=finished_classifier, **{**options, "data": str(other), "output": str(tmp_path / "third")})
    assert str(error.value) == (
        f"{other}:10 has the label 'nay', and the classes of {finished_classifier} are no, yes; leave such rows out, "
        f"or train a new adapter, without this one, on all of them."
    )
    unnamed = shutil.copytree(finished_classifier / "adapter", tmp_path / "unnamed")
    (unnamed / "veneer.json").unlink()
    with pytest.raises(DataError) as error:
        veneer.train(adapter=unnamed, **{**options, "output": str(tmp_path / "third")})
    assert "are LABEL_0, LABEL_1; it does not say what they are called, so number the rows' labels like that." in str(
        error.value
    )


def test_another_seed_has_the_same_head_under_an_update_of_it(tiny_encoder, options, finished_classifier, tmp_path):
    rows = {**options, "data": str(finished_classifier.parent / "rows.jsonl")}
    first = veneer.train(
        str(tiny_encoder), targets=["classifier", "query"], **{**rows, "output": str(tmp_path / "first")}
    )
    second = veneer.train(adapter=first.folder, seed=3, **{**rows, "data": str(options["data"])})
    loss = min(_losses(second.folder)[1:])
    assert veneer.evaluate(second.folder, examples=0).adapter.loss == pytest.approx(loss, rel=1e-5)
    assert read_facts(second.written).seed == 0
    with torch.no_grad():
        again, made = veneer.load(second.written)
        ids = made("bet:", return_tensors="pt").input_ids
        assert torch.equal(again(ids).logits, second.model(ids).logits)


def test_a_plan_takes_it_too(finished_run, allocated, options, veneer_command, tiny_folder, more):
    # Of memory only: no machine is measured.
    asked = {name: options[name] for name in ("data", "batch_size", "held_out", "steps")}
    asked |= {"device": "cuda", "memory": "8GB"}
    answer = veneer.plan(adapter=str(finished_run), **asked)
    same = RunFolder(finished_run).config()
    plain = veneer.plan(same.model, rank=8, train_also=same.train_also, **asked)
    assert answer.plan.parameters == plain.plan.parameters
    flags = json.loads((allocated / "adapter" / "adapter_config.json").read_text())["rank_pattern"]
    given = ("--data", more, "--batch-size", 8, "--steps", 2, "--device", "cuda", "--memory", "8GB", "--json")
    done = veneer_command("plan", "--adapter", allocated, *given)
    assert done.code == 0, done.err
    kept = sum(map(sum, flags.values()))
    assert 0 < kept < 4 * len(flags)
    trained = veneer.load(tiny_folder)[0]
    veneer.load_adapter(trained, allocated / "adapter", trainable=True)
    difference = veneer.trainable(trained).parameters - json.loads(done.out)["parameters"]
    assert difference == kept, "a λ for each triplet"
    assert veneer.plan(adapter=str(finished_run), memory="8GB", device="cuda").fits, "without rows"
    with pytest.raises(ConfigError, match="rank = 2 contradicts the adapter"):
        veneer.plan(adapter=str(finished_run), rank=2)
