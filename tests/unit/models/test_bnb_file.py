"""bitsandbytes checkpoints without bitsandbytes: what is written is read again, and what is damaged is named."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from tokens import tokenizer
from veneer.commands.quantize import quantise_to
from veneer.errors import ConfigError, ModelError
from veneer.frozen.codebook import dynamic8
from veneer.frozen.layers import storage_of
from veneer.models import bnb_file
from veneer.models.load import load

pytestmark = pytest.mark.unit

INPUTS = {"input_ids": torch.tensor([[72, 69, 76, 76, 79]])}
NAME = "model.layers.0.mlp.up_proj.weight"
STATE = f"{NAME}.quant_state.bitsandbytes__nf4"


@pytest.fixture(scope="module")
def written(tiny_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("bnb") / "out"
    quantise_to(str(tiny_folder), out)
    return out


@pytest.fixture
def damaged(written, tmp_path):
    """A function from a change of the tensors to the sentence with which the folder is refused."""

    def load_with(change) -> str:
        folder = shutil.copytree(written, tmp_path / "damaged")
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError) as refused:
            load(folder)
        return str(refused.value).replace(str(folder), "FOLDER")

    return load_with


def _state(tensors, **changed):
    state = json.loads(bytes(tensors[STATE].tolist())) | changed
    tensors[STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def test_what_is_written_is_read_again(tiny_folder, written):
    ours, _ = load(written)
    wanted, _ = load(tiny_folder, "nf4")
    assert torch.equal(tiny.logits(ours, INPUTS), tiny.logits(wanted, INPUTS))
    assert not hasattr(ours.config, "quantization_config"), "what is saved of it later is a plain model"


def test_a_large_model_is_written_in_several_files(tiny_folder, written, tmp_path, monkeypatch):
    monkeypatch.setattr(bnb_file, "_SHARD", 20_000)
    quantise_to(str(tiny_folder), tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    ours, _ = load(tmp_path / "out")
    assert torch.equal(tiny.logits(ours, INPUTS), tiny.logits(load(written)[0], INPUTS))


def test_another_table_of_scales_is_kept_exactly(written, tmp_path):
    """bitsandbytes has had others; what they stand for is kept in floats."""
    folder = shutil.copytree(written, tmp_path / "other")
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{NAME}.nested_quant_map"] *= 1.01
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    q = load(folder)[0].get_submodule(NAME.removesuffix(".weight")).quantised
    assert q.nested_scales is None
    offset = json.loads(bytes(tensors[STATE].tolist()))["nested_offset"]
    wanted = (dynamic8() * 1.01)[tensors[f"{NAME}.absmax"].int()] * tensors[f"{NAME}.nested_absmax"] + offset
    torch.testing.assert_close(q.scales, wanted, rtol=1e-6, atol=0)


def test_a_storage_that_it_has_not_is_refused(written):
    with pytest.raises(ConfigError, match=(
        r"^.*out is kept as nf4 in blocks of 64 with double quantisation, and cannot be loaded as int4 in blocks of 64 "
        r"with double quantisation; leave storage out to load it as it is\.$"
    )):  # fmt: skip
        load(written, "int4")
    assert storage_of(load(written, "nf4")[0])["storage"] == "nf4"
    half, _ = load(written, "bf16")
    assert half.lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("part", ["absmax", "quant_map", "nested_absmax", "nested_quant_map"])
def test_a_missing_part_is_named(damaged, part):
    assert damaged(lambda tensors: tensors.pop(f"{NAME}.{part}")) == (
        f"{NAME} is kept as nf4, but the checkpoint lacks {NAME}.{part}."
    )


def test_a_missing_description_and_an_unknown_type(damaged):
    assert damaged(lambda tensors: tensors.pop(STATE)) == (
        f"{NAME} is kept in codes, but the checkpoint has no quant_state.bitsandbytes__nf4 (or fp4) that describes it."
    )


def test_an_unknown_type(damaged):
    def change(tensors):
        tensors[STATE.replace("nf4", "af4")] = tensors.pop(STATE)

    assert damaged(change) == f"{NAME} is kept as 'af4'; of bitsandbytes' types nf4 and fp4 can be read."


@pytest.mark.parametrize(("changed", "told"), [
    ({"quant_type": "fp4"}, f"{STATE} says that it is of the type 'fp4'."),
    ({"blocksize": 48}, f"{NAME} has blocks of 48, not of one of 32, 64, 128, 256, 512, 1024, 2048, 4096."),
    ({"blocksize": 128}, f"{NAME}.absmax has 24 bytes or scales where its shape and block size need 12."),
    ({"shape": [48, 33]}, f"{NAME} has 768 bytes or codes where its shape and block size need 792."),
    ({"shape": [32, 48]}, f"{NAME} of FOLDER is (32, 48), where its config.json says (48, 32)."),
    ({"shape": None}, f"{STATE} cannot be read: TypeError cannot unpack non-iterable NoneType object."),
])  # fmt: skip
def test_a_description_that_does_not_fit_is_named(damaged, changed, told):
    assert damaged(lambda tensors: _state(tensors, **changed)) == told


def test_other_damage_is_named(damaged):
    def table(tensors):
        tensors[f"{NAME}.quant_map"] = torch.zeros(16)

    assert damaged(table) == f"{NAME}.quant_map is not the table of nf4: its codes stand for unknown values."


def test_a_weight_that_is_missing_or_has_no_place(damaged):
    def change(tensors):
        del tensors["model.norm.weight"]
        tensors["model.other.weight"] = torch.zeros(3)

    assert damaged(change) == "The checkpoint of FOLDER lacks model.norm.weight."


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_that_are_not_finite(damaged, value):
    def change(tensors):
        tensors[f"{NAME}.nested_absmax"][0] = value

    assert damaged(change) == f"{NAME}.nested_absmax holds a scale that is not finite: its weights are unknown."


def test_an_offset_that_is_not_finite(damaged):
    assert damaged(lambda tensors: _state(tensors, nested_offset=float("nan"))) == (
        f"{NAME}.quant_state has a nested_offset that is not finite: its weights are unknown."
    )


def test_scales_of_another_type_than_the_description_has(damaged):
    def change(tensors):
        tensors[f"{NAME}.absmax"] = tensors[f"{NAME}.absmax"].float()

    assert damaged(change) == (
        f"{NAME}.absmax is of the type float32; with nested scales it is uint8, and else a float."
    )


def test_nested_blocks_of_nothing(damaged):
    assert damaged(lambda tensors: _state(tensors, nested_blocksize=0)) == (
        f"{STATE} has nested scales in blocks of 0."
    )


def test_a_weight_without_a_place(damaged):
    def change(tensors):
        tensors["model.other.weight"] = torch.zeros(3)

    assert damaged(change) == (
        "The checkpoint of FOLDER holds what its model has no place for: model.other.weight; it belongs to another "
        "config.json, or is in a form that cannot be read."
    )


def test_a_weight_of_another_shape(damaged):
    def change(tensors):
        tensors["model.norm.weight"] = torch.zeros(3)

    assert damaged(change) == "model.norm.weight of FOLDER is (3,), where its config.json says (32,)."


def test_a_file_that_was_cut_short(written, tmp_path):
    folder = shutil.copytree(written, tmp_path / "cut")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ModelError, match=r"^.*cut cannot be read as a model: "):
        load(folder)


def test_eight_bits_are_refused(written, tmp_path):
    folder = shutil.copytree(written, tmp_path / "eight")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= {"load_in_4bit": False, "_load_in_4bit": False, "load_in_8bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"eight is a bitsandbytes checkpoint in 8 bits; those in 4 bits \(nf4, fp4\)"):
        load(folder)


def test_the_verb(tiny_folder, veneer_command, refused, tmp_path):
    out = tmp_path / "out"
    done = veneer_command("quantize", tiny_folder, out, "--storage", "fp4", "--block-size", "32",
                          "--no-double-quantisation")  # fmt: skip
    assert done == (0, f"Quantised model written to {out}. Next: veneer train --model {out}\n", "")
    assert storage_of(load(out)[0]) == {"storage": "fp4", "block_size": 32, "double_quantisation": False}
    assert refused("quantize", tiny_folder, out) == f"{out} exists and is not an empty folder; choose a new one."
    assert refused("quantize", tiny_folder, tmp_path / "b", "--block-size", "48") == (
        "block_size = 48 is not one of 32, 64, 128, 256, 512, 1024, 2048, 4096."
    )


def test_a_model_of_which_transformers_would_leave_out_codes(tmp_path):
    tiny.build("t5").save_pretrained(tmp_path / "t5")
    tokenizer().save_pretrained(tmp_path / "t5")
    with pytest.raises(ModelError, match=(
        r"^transformers keeps wo of a T5ForConditionalGeneration in fp32, so that it would not find their codes; load "
        r"it with storage='nf4' instead\.$"
    )):  # fmt: skip
        quantise_to(str(tmp_path / "t5"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_classifier_gets_a_new_head_where_the_checkpoint_has_none_that_fits(tmp_path):
    """One for other classes, and that of a language model; the rest is the checkpoint's codes."""
    for name, labels in (("bert", ["a", "b"]), ("llama", ["a", "b", "c"])):
        tiny.build(name).save_pretrained(tmp_path / name)
        tokenizer().save_pretrained(tmp_path / name)
        quantise_to(str(tmp_path / name), tmp_path / f"{name}-nf4")
        models = []
        for _ in range(2):
            torch.manual_seed(0)
            models.append(load(tmp_path / f"{name}-nf4", labels=labels)[0])
        wanted, _ = load(tmp_path / name, "nf4", labels=labels)
        own, other = models[0].state_dict(), wanted.state_dict()
        head = {key for key in own if key.startswith(("classifier.", "score."))}
        assert [key for key in own if not torch.equal(own[key], other[key])] == sorted(
            head & {"classifier.weight", "score.weight"}
        )
        inputs = {"input_ids": tiny.batch(name)["input_ids"]}
        assert tiny.logits(models[0], inputs).shape == (3, len(labels))
        assert torch.equal(tiny.logits(models[0], inputs), tiny.logits(models[1], inputs))
        assert 0.01 < float(models[0].state_dict()[max(head)].std()) < 0.04, "as the model's class begins"


def test_a_classifiers_own_head_is_kept(tmp_path):
    tiny.build("bert").save_pretrained(tmp_path / "bert")
    tokenizer().save_pretrained(tmp_path / "bert")
    quantise_to(str(tmp_path / "bert"), tmp_path / "nf4")
    for labels in (None, ["a", "b", "c"]):
        model, _ = load(tmp_path / "nf4", labels=labels)
        assert torch.equal(model.classifier.weight, tiny.build("bert").classifier.weight)
