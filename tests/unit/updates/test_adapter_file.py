"""Adapter folders: a damaged or foreign one is refused with the keys' names, and the model stays as it was."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForSequenceClassification

import tiny
import veneer
from veneer.errors import AdapterFileError, ConfigError, TargetError

pytestmark = pytest.mark.unit

_KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture
def saved(tmp_path):
    model = tiny.build("llama")
    veneer.attach(model, veneer.LoRA(rank=2, targets=["q_proj", "v_proj"]))
    tiny.train_steps(model, tiny.batch("llama"))
    veneer.save(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def _edit_tensors(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _edit_config(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def _refused(folder, match, name="llama"):
    model = tiny.build(name)
    before = tiny.state(model)
    random = torch.get_rng_state()
    with pytest.raises(AdapterFileError, match=match):
        veneer.load_adapter(model, folder)
    assert tiny.same_state(model, before)
    assert torch.equal(torch.get_rng_state(), random)


def test_keys_shapes_and_bytes(saved, tmp_path):
    tensors = load_file(saved / "adapter_model.safetensors")
    assert tensors[_KEY].shape == (2, 32)
    assert tensors[_KEY.replace("lora_A", "lora_B")].shape == (32, 2)
    assert len(tensors) == 2 * 2 * 2
    model = tiny.build("llama")
    veneer.load_adapter(model, saved)
    veneer.save(model, tmp_path / "again")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (saved / file).read_bytes()


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_half_precision(saved, tmp_path, dtype, torch_dtype):
    model = tiny.build("llama")
    veneer.load_adapter(model, saved)
    veneer.save(model, tmp_path / "half", dtype=dtype)
    assert load_file(tmp_path / "half" / "adapter_model.safetensors")[_KEY].dtype == torch_dtype
    other = tiny.build("llama")
    veneer.load_adapter(other, tmp_path / "half")
    update = other.model.layers[0].self_attn.q_proj.updates["default"]
    assert update.A.dtype == torch.float32
    assert torch.equal(update.A, load_file(saved / "adapter_model.safetensors")[_KEY].to(torch_dtype).float())
    with pytest.raises(ConfigError, match="'fp8' is not one of fp32, bf16, fp16"):
        veneer.save(model, tmp_path / "x", dtype="fp8")


def test_loaded_for_further_training_it_trains(saved):
    model, inputs = tiny.build("llama"), tiny.batch("llama")
    veneer.load_adapter(model, saved, trainable=True)
    assert veneer.trainable(model).parameters == 2 * 2 * 32 * 2 + 2 * 2 * (32 + 16)
    with torch.no_grad():
        first = float(model(**inputs).loss)
    assert tiny.train_steps(model, inputs) < first


def test_missing_surplus_and_misshapen_tensors(saved):
    _edit_tensors(saved, lambda t: t.pop(_KEY))
    _refused(saved, f"missing {_KEY}")
    _edit_tensors(saved, lambda t: t.update({_KEY: torch.zeros(3, 32)}))
    _refused(saved, rf"wrong shape: {_KEY} is \(3, 32\) in the file and \(2, 32\) here")
    _edit_tensors(
        saved, lambda t: t.update({_KEY: torch.zeros(2, 32), _KEY.replace("q_proj", "w_proj"): torch.ones(1)})
    )
    _refused(saved, r"no place for .*w_proj.lora_A.weight \(nearest: .*lora_A.weight\)")


def test_an_adapter_for_another_base(saved):
    _refused(saved, r"does not fit this model: .*q_proj", name="gpt2")
    tensors = load_file(saved / "adapter_model.safetensors")
    _edit_tensors(saved, lambda t: t.update({k: torch.zeros(2, 64) for k in tensors if "lora_A" in k}))
    _refused(saved, r"another base or is incomplete: wrong shape: .*\(2, 64\) in the file and \(2, 32\) here")


def test_truncated_and_corrupt_files(saved):
    weights = saved / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for broken in (whole[:100], whole[:-8], b"", b"\xff" * 64):
        weights.write_bytes(broken)
        _refused(saved, r"adapter_model.safetensors is damaged or cut short")
    weights.unlink()
    _refused(saved, r"holds no adapter_model.safetensors")
    (saved / "adapter_config.json").write_text("{")
    _refused(saved, r"adapter_config.json cannot be read as JSON")
    (saved / "adapter_config.json").write_text("[]")
    _refused(saved, r"does not hold a JSON object")


def test_a_refusal_does_not_repeat_a_long_name(saved):
    whole = (saved / "adapter_config.json").read_text()
    for fields in ({"target_modules": ["x" * 5000]}, {"target_modules": "x" * 5000}, {"peft_type": "x" * 5000}):
        _edit_config(saved, **fields)
        with pytest.raises(AdapterFileError) as refusal:
            veneer.load_adapter(tiny.build("llama"), saved)
        assert len(str(refusal.value)) < 1500
    (saved / "adapter_config.json").write_text(whole)
    _edit_tensors(saved, lambda tensors: tensors.update({"x" * 5000: torch.zeros(1)}))
    with pytest.raises(AdapterFileError) as refusal:
        veneer.load_adapter(tiny.build("llama"), saved)
    assert len(str(refusal.value)) < 1500
    header = json.dumps("x" * 5000).encode()
    (saved / "adapter_model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(AdapterFileError, match=r"is damaged or cut short and cannot be read") as refusal:
        veneer.load_adapter(tiny.build("llama"), saved)
    assert len(str(refusal.value)) < 1500


def test_configs_of_what_is_not_supported(saved):
    _edit_config(saved, bias="all")
    _refused(saved, r"sets bias = .all., which Veneer does not support")
    _edit_config(saved, bias="none", init_lora_weights="pissa")
    _refused(saved, r"init_lora_weights = 'pissa', which changes the base's weights")
    _edit_config(saved, init_lora_weights=True, r=0)
    _refused(saved, r"adapter_config.json: LoRA: rank = 0 is not valid")
    _edit_config(saved, r=2, trainable_token_indices={"a": [1], "b": [2]})
    _refused(saved, r"trains other tokens of a than of b; Veneer trains the same ones")
    _edit_config(saved, peft_type="IA3")
    _refused(saved, r"describes a IA3 adapter; only LORA")


def test_folders_that_are_none(saved, tmp_path):
    _refused(tmp_path / "adaptor", r"There is no folder .*Did you mean .*adapter\?")
    _refused(tmp_path, r"not an adapter folder.*The folder .*adapter has one")


def test_a_pickle_is_not_read(saved):
    weights = saved / "adapter_model.safetensors"
    torch.save(load_file(weights), saved / "adapter_model.bin")
    weights.unlink()
    _refused(saved, r"adapter_model.bin")


def test_saving_never_overwrites_something_else(saved, tmp_path):
    model = tiny.build("llama")
    with pytest.raises(TargetError, match="0 are active, attached are none"):
        veneer.save(model, tmp_path / "x")
    veneer.load_adapter(model, saved)
    # A folder of trl's holds a card and checkpoints beside the adapter.
    (saved / "checkpoint-500").mkdir()
    (saved / "checkpoint-500" / "optimizer.pt").write_text("state")
    wanted = (saved / "adapter_model.safetensors").read_bytes()
    (saved / "adapter_model.safetensors").write_bytes(b"old")
    (tmp_path / "link").symlink_to(saved)
    veneer.save(model, tmp_path / "link")
    assert (saved / "adapter_model.safetensors").read_bytes() == wanted
    assert (saved / "checkpoint-500" / "optimizer.pt").read_text() == "state"
    assert sorted(p.name for p in saved.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "checkpoint-500",
    ]  # fmt: skip
    file = saved / "checkpoint-500" / "optimizer.pt"
    with pytest.raises(AdapterFileError, match="is a file"):
        veneer.save(model, file)
    with pytest.raises(AdapterFileError, match=r"optimizer.pt/x cannot be written to: File exists"):
        veneer.save(model, file / "x")


def test_save_pretrained_writes_the_adapter_until_it_is_merged(tmp_path):
    """As PEFT's does; a foreign loop's checkpoint is so one that loads."""
    model = tiny.build("llama")
    veneer.attach(model, veneer.LoRA(rank=2, targets=["q_proj"]))
    copied = copy.deepcopy(model)
    tiny.train_steps(model, tiny.batch("llama"))
    model.save_pretrained(tmp_path / "adapter", safe_serialization=True, state_dict=model.state_dict())
    again = tiny.build("llama")
    veneer.load_adapter(again, tmp_path / "adapter")
    assert torch.equal(tiny.logits(again, tiny.batch("llama")), tiny.logits(model, tiny.batch("llama")))
    copied.save_pretrained(tmp_path / "copy")
    assert not load_file(tmp_path / "copy" / "adapter_model.safetensors")[_KEY.replace("A", "B")].any(), "its own"
    veneer.merge(model)
    model.save_pretrained(tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").exists()
    veneer.unmerge(model)
    veneer.remove(model)
    model.save_pretrained(tmp_path / "base")
    assert (tmp_path / "base" / "model.safetensors").exists()
    assert "save_pretrained" not in model.__dict__


def test_values_that_are_not_finite_are_neither_written_nor_loaded(saved, tmp_path):
    _edit_tensors(saved, lambda tensors: tensors[_KEY].fill_(float("nan")))
    _refused(saved, rf"adapter_model.safetensors has values that are not finite, or larger than .*, in {_KEY}")
    _edit_tensors(saved, lambda tensors: tensors[_KEY].fill_(-1e30))
    _refused(saved, rf"values that are not finite, or larger than 1e\+18, in {_KEY}")
    model = tiny.build("llama")
    veneer.attach(model, veneer.LoRA(targets=["q_proj"]))
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.updates["default"].A.fill_(1e6)
    veneer.save(model, tmp_path / "fp32")
    with pytest.raises(
        AdapterFileError, match=r"'default' as fp16 has values that are not finite, .* in .*q_proj.lora_A"
    ):
        veneer.save(model, tmp_path / "fp16", dtype="fp16")
    assert not (tmp_path / "fp16").exists()


def test_odd_config_values_are_refused(saved):
    _edit_config(saved, rank_pattern={"q_proj(": 4})
    _refused(saved, r"pattern key 'q_proj\(' is not a regular expression")
    _edit_config(saved, rank_pattern={}, trainable_token_indices=5)
    _refused(saved, "adapter_config.json: 'int' object is not iterable")


def test_a_second_adapter_that_fails_leaves_the_first_in_force(saved):
    model, inputs = tiny.build("llama"), tiny.batch("llama")
    veneer.load_adapter(model, saved, name="a")
    with_a = tiny.logits(model, inputs)
    with pytest.raises(TargetError, match="'a' is attached already"):
        veneer.load_adapter(model, saved, name="a")
    _edit_tensors(saved, lambda t: t.pop(_KEY))
    with pytest.raises(AdapterFileError, match="missing"):
        veneer.load_adapter(model, saved, name="b")
    assert torch.equal(tiny.logits(model, inputs), with_a)


def test_layers_and_excluded_modules_come_back_exactly(tmp_path):
    model, inputs = tiny.build("llama"), tiny.batch("llama")
    veneer.attach(model, veneer.LoRA(rank=2, targets=["q_proj", "k_proj"], layers=[1], exclude=["k_proj"]))
    tiny.train_steps(model, inputs)
    veneer.save(model, tmp_path / "a")
    other = tiny.build("llama")
    veneer.load_adapter(other, tmp_path / "a")
    assert torch.equal(tiny.logits(other, inputs), tiny.logits(model, inputs))
    assert [row.name for row in veneer.trainable(model).rows] == ["model.layers.1.self_attn.q_proj"]


def test_configs_that_do_not_say_what_is_needed(saved):
    _edit_config(saved, lora_alpha=None)
    _refused(saved, r"sets lora_alpha = null, so the scale is not known; write the number into it")
    _edit_config(saved, lora_alpha=4, use_rslora=None, lora_dropout=None, target_modules=None)
    model = tiny.build("llama")
    veneer.load_adapter(model, saved)
    adapted = {path.rpartition(".updates")[0] for path, _ in model.named_parameters() if ".updates." in path}
    assert adapted == {f"model.layers.{layer}.self_attn.{kind}" for layer in (0, 1) for kind in ("q_proj", "v_proj")}
    (saved / "adapter_config.json").write_text(json.dumps({"fine_tune_type": "lora", "lora_parameters": {}}))
    _refused(saved, r"is of mlx-lm, whose adapters cannot be loaded; train it here, or use mlx-lm")


def test_trained_further_what_the_file_lacks_is_trained_too(tmp_path):
    """A language model's adapter on a classifier, whose head the file cannot have."""
    tiny.build("llama").save_pretrained(tmp_path / "base")
    causal = tiny.build("llama")
    veneer.attach(causal, veneer.LoRA(rank=2, targets=["q_proj"]))
    veneer.save(causal, tmp_path / "a")
    model = LlamaForSequenceClassification.from_pretrained(tmp_path / "base")
    veneer.load_adapter(model, tmp_path / "a", trainable=True)
    assert {row.name for row in veneer.trainable(model).rows if row.rank is None} == {"score"}
    veneer.remove(model)
    veneer.load_adapter(model, tmp_path / "a")
    assert not any(p.requires_grad for p in model.parameters())
