"""What a config says beside what the weights are, what a person asks for beside a default, and a missing tokenizer."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

import tiny
import veneer
from veneer.commands.quantize import quantise_to
from veneer.errors import ConfigError, ModelError
from veneer.frozen.blockwise import dense, quantise
from veneer.frozen.layers import storage_of
from veneer.models.checkpoint import Checkpoint
from veneer.models.load import load

pytestmark = pytest.mark.unit

IDS = {"input_ids": torch.tensor([[72, 69, 76, 76, 79]])}


@pytest.fixture
def copy(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "copy")


@pytest.fixture(scope="module")
def without_double(tiny_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("bnb") / "out"
    quantise_to(tiny_folder, out, double_quantisation=False)
    return out


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
@pytest.mark.parametrize("storage", ["fp32", "nf4"])
def test_plain_weights_whose_config_kept_bitsandbytes(copy, tiny_folder, storage, bits):
    """As a merged model has it."""
    said = json.loads((copy / "config.json").read_text())
    said["quantization_config"] = {"quant_method": "bitsandbytes", bits: True}
    (copy / "config.json").write_text(json.dumps(said))
    assert not Checkpoint(copy).is_bitsandbytes
    model, _ = load(copy, storage)
    assert torch.equal(tiny.logits(model, IDS), tiny.logits(load(tiny_folder, storage)[0], IDS))
    assert not hasattr(model.config, "quantization_config")


def test_a_default_is_no_wish(without_double):
    checkpoint = Checkpoint(without_double)
    model, _ = load(checkpoint, "nf4")
    assert storage_of(model) == {"storage": "nf4", "block_size": 64, "double_quantisation": False}
    assert checkpoint.notes == [
        f"{without_double} is kept as nf4 in blocks of 64 without double quantisation, and is loaded as it is."
    ]
    for wish in ({"storage": "fp4"}, {"block_size": 128}):
        with pytest.raises(ConfigError, match=r"^.* is kept as nf4 in blocks of 64 without .* cannot be loaded as "):
            load(without_double, **({"storage": "nf4"} | wish))


def test_a_run_over_it_needs_no_other_options(without_double, tmp_path, veneer_command):
    rows = [json.dumps({"prompt": f"{letter}:", "completion": "b"}) for letter in "abcdefghijklmnopqrst"]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    outcome = veneer_command(
        "train", "--model", without_double, "--storage", "nf4", "--data", tmp_path / "rows.jsonl", "--steps", 1,
        "--output", tmp_path / "run",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert "without double quantisation, and is loaded as it is." in " ".join(outcome.out.split())


def test_quantising_needs_no_tokenizer(copy, tmp_path):
    for file in copy.glob("tokenizer*"):
        file.unlink()
    quantise_to(copy, tmp_path / "out")
    assert list((tmp_path / "out").glob("tokenizer*")) == []
    model, none = veneer.load(tmp_path / "out", with_tokenizer=False)
    assert none is None
    assert storage_of(model)["storage"] == "nf4"
    with pytest.raises(ModelError, match="has no tokenizer"):
        veneer.load(copy)


def test_a_damaged_tokenizer_is_refused_all_the_same(copy, tmp_path):
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="has no tokenizer that can be read"):
        quantise_to(copy, tmp_path / "out")


@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_a_strided_weight(storage):
    whole = torch.randn(6, 128, generator=torch.Generator().manual_seed(0))
    for strided in (whole[:, ::2], whole[::2], whole.t()):
        made, wanted = quantise(strided, storage=storage), quantise(strided.clone().contiguous(), storage=storage)
        assert torch.equal(dense(made), dense(wanted))
