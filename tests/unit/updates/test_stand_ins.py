"""What other libraries call on a model with adapters: transformers' own keywords are used, or refused by name."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import transformers as tf
from torch import nn

import tiny
import veneer
from veneer.errors import AdapterFileError, ArgumentError, TargetError

pytestmark = pytest.mark.unit


def _lora(name="llama", **options):
    model = veneer.attach(tiny.build(name), veneer.LoRA(**{"rank": 2, **options}))
    tiny.train_steps(model, tiny.batch(name), steps=1)
    return model


def _reloaded(folder, name="llama"):
    model = tiny.build(name)
    veneer.load_adapter(model, folder)
    return tiny.logits(model, tiny.batch(name))


@pytest.mark.parametrize("how", ["positional", "keyword", "all"])
def test_save_pretrained_takes_what_transformers_does(how, tmp_path):
    model = _lora()
    if how == "positional":
        model.save_pretrained(tmp_path / "a", True, None, False)
    elif how == "keyword":
        model.save_pretrained(save_directory=tmp_path / "a")
    else:
        model.save_pretrained(
            str(tmp_path / "a"), is_main_process=True, state_dict=model.state_dict(), push_to_hub=False, token=None,
            max_shard_size="1GB", variant=None, safe_serialization=True, save_peft_format=True,
            save_original_format=True, distributed_checkpoint=False,
        )  # fmt: skip
    assert torch.equal(_reloaded(tmp_path / "a"), tiny.logits(model, tiny.batch("llama")))


def test_other_processes_write_nothing(tmp_path):
    _lora().save_pretrained(tmp_path / "a", is_main_process=False)
    assert not (tmp_path / "a").exists()


def test_the_state_dict_given_is_what_is_written(tmp_path):
    model = _lora(new_tokens=[3], train_also=["lm_head"])
    kept, logits = copy.deepcopy(model.state_dict()), tiny.logits(model, tiny.batch("llama"))
    tiny.train_steps(model, tiny.batch("llama"))
    model.save_pretrained(tmp_path / "checkpoint-3", state_dict=kept)
    assert torch.equal(_reloaded(tmp_path / "checkpoint-3"), logits)
    key = "model.layers.0.self_attn.q_proj.updates.default.A"
    with pytest.raises(AdapterFileError, match=rf"The state_dict given lacks {key} in the shape \(2, 32\)"):
        model.save_pretrained(tmp_path / "b", state_dict={name: kept[name] for name in kept if name != key})


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"safe_serialization": False}, "safe_serialization = False: an adapter is written as safetensors only"),
        ({"push_to_hub": True}, r"push_to_hub = True: write the folder, then veneer.push\(folder, repo\)"),
        ({"token": "x"}, "token = 'x': write the folder"),
        ({"variant": "fp16"}, "variant = 'fp16': an adapter's files have one name each"),
        ({"save_peft_format": False}, "save_peft_format = False: an adapter is written in PEFT's format"),
        ({"distributed_checkpoint": True}, "distributed_checkpoint = True: an adapter is one file"),
        ({"max_shard_size": "1KB"}, "max_shard_size = '1KB': the adapter has .* bytes and is written as one file"),
        ({"varient": "fp16"}, "takes no 'varient'. Did you mean 'variant'"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(keywords, message, tmp_path):
    with pytest.raises(ArgumentError, match=message):
        _lora().save_pretrained(tmp_path / "a", **keywords)
    assert not (tmp_path / "a").exists()


def test_two_active_adapters_are_written_into_folders_of_their_names(tmp_path):
    model = _lora()
    veneer.attach(model, veneer.LoRA(rank=3), "other")
    tiny.train_steps(model, tiny.batch("llama"), steps=1)
    veneer.activate(model, "default", "other")
    model.save_pretrained(tmp_path)
    again = tiny.build("llama")
    for name in ("default", "other"):
        veneer.load_adapter(again, tmp_path / name, name=name)
    veneer.activate(again, "default", "other")
    assert torch.equal(tiny.logits(again, tiny.batch("llama")), tiny.logits(model, tiny.batch("llama")))
    veneer.activate(model)
    with pytest.raises(TargetError, match="No adapter is active, so save_pretrained has nothing to write; activate"):
        model.save_pretrained(tmp_path / "none")


def test_a_pickled_model_saves_and_trains_its_adapter(tmp_path):
    model = veneer.attach(tiny.build("llama"), veneer.AdaLoRA(target_rank=2, total_steps=8, tinit=1, tfinal=2))
    tiny.train_steps(model, tiny.batch("llama"))
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for other in (torch.load(stream, weights_only=False), pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert other.save_pretrained.model is other
        other.save_pretrained(tmp_path / "a")
        assert torch.equal(_reloaded(tmp_path / "a"), tiny.logits(model, tiny.batch("llama")))
        assert veneer.allocator(other).step == 3
        tiny.train_steps(other, tiny.batch("llama"), steps=1)
        assert (veneer.allocator(other).step, veneer.allocator(model).step) == (4, 3)
        other.load_state_dict(model.state_dict())
        assert veneer.allocator(other).step == 3
        veneer.remove(other)
        assert set(other.state_dict()) == set(tiny.build("llama").state_dict())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama-tied", {"targets": ["lm_head"]}),
        ("llama-tied", {"targets": ["embed_tokens", "q_proj"]}),
        ("llama-tied", {"new_tokens": [3, 4]}),
        ("llama-tied", {"train_also": ["lm_head"]}),
        ("llama-tied", {"train_also": ["embed_tokens"]}),
        ("t5", {"targets": ["encoder.embed_tokens", "lm_head"]}),
        ("llama", {"train_also": ["lm_head"]}),
    ],
)
def test_tie_weights_changes_nothing_under_adapters(name, options):
    model = _lora(name, **options)
    inputs = tiny.batch(name)
    before, state, logits = [*model.named_parameters()], tiny.state(model), tiny.logits(model, inputs)
    model.tie_weights()
    assert tiny.same_state(model, state)
    assert [(key, id(parameter)) for key, parameter in before] == [(k, id(p)) for k, p in model.named_parameters()]
    assert torch.equal(tiny.logits(model, inputs), logits)
    tiny.train_steps(model, inputs, steps=1)
    veneer.remove(model)
    assert tiny.same_state(model, tiny.state(tiny.build(name)))


def test_tie_weights_ties_a_base_that_came_apart():
    model = _lora("llama-tied", new_tokens=[3])
    head, embedding = model.lm_head.base, model.model.embed_tokens.base
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    model.tie_weights()
    assert head.weight is embedding.weight


def test_resizing_under_adapters_is_refused(tmp_path):
    model = _lora()
    state = tiny.state(model)
    for wanted in (lambda: model.resize_token_embeddings(70), lambda: model.resize_token_embeddings(60, 100)):
        with pytest.raises(
            TargetError, match=r"resize_token_embeddings\((70|100)\) would change the base \(64 tokens\) "
        ):
            wanted()
    assert tiny.same_state(model, state)
    assert model.resize_token_embeddings(64) is model.resize_token_embeddings() is model.get_input_embeddings()
    assert model.resize_token_embeddings(60, pad_to_multiple_of=64) is model.get_input_embeddings()
    veneer.merge(model, reversible=False)
    assert model.resize_token_embeddings(70).weight.shape == (70, 32)
    model.save_pretrained(tmp_path)
    assert tf.AutoModelForCausalLM.from_pretrained(tmp_path).lm_head.weight.shape == (70, 32)
