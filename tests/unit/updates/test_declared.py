"""What an adapter's file declares is compared before the model is touched: types, ranks, scales, patterns."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import tiny
import veneer
from veneer.errors import AdapterFileError
from veneer.updates.adapter_file import adapter_tensors
from veneer.updates.expected import expected_tensors
from veneer.updates.peft_config import kept_triplets
from veneer.updates.record import adapters_of

pytestmark = pytest.mark.unit

_KEY = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A LoRA's folder and one of an AdaLoRA whose ranks are fixed."""
    path = tmp_path_factory.mktemp("saved")
    for kind, config in {
        "lora": veneer.LoRA(rank=4, targets=["q_proj", "v_proj"]),
        "adalora": veneer.AdaLoRA(initial_rank=4, target_rank=2, targets=["q_proj", "v_proj"], total_steps=6, tinit=1,
                                  tfinal=1),
    }.items():  # fmt: skip
        model = tiny.build("llama")
        veneer.attach(model, config)
        tiny.train_steps(model, tiny.batch("llama"), steps=6)
        veneer.save(model, path / kind)
    return path


@pytest.fixture
def edited(folders, tmp_path):
    """A copy of one of them with fields of its config, and tensors, changed."""

    def edit(kind="lora", tensors=None, **fields):
        out = tmp_path / "edited"
        out.mkdir(exist_ok=True)
        config = json.loads((folders / kind / "adapter_config.json").read_text()) | fields
        (out / "adapter_config.json").write_text(json.dumps(config))
        values = load_file(folders / kind / "adapter_model.safetensors") | (tensors or {})
        save_file(values, out / "adapter_model.safetensors", metadata={"format": "pt"})
        return out

    return edit


def _refused(folder, match):
    """By load_adapter with the model and the random state unchanged, also beside another adapter; and by export."""
    model = tiny.build("llama")
    veneer.attach(model, veneer.LoRA(rank=2, targets=["o_proj"]), "other")
    before, random = tiny.state(model), torch.get_rng_state()
    modules, needs = list(model.named_modules()), [p.requires_grad for p in model.parameters()]
    with pytest.raises(AdapterFileError, match=match) as refusal:
        veneer.load_adapter(model, folder)
    assert str(refusal.value).count("\n") == 0
    assert len(str(refusal.value)) < 900
    assert tiny.same_state(model, before)
    assert torch.equal(torch.get_rng_state(), random)
    assert list(model.named_modules()) == modules
    assert [p.requires_grad for p in model.parameters()] == needs
    assert adapters_of(model).active == ("other",)


def _export_refused(folder, match):
    out = folder.parent / "plain"
    with pytest.raises(AdapterFileError, match=match):
        veneer.export(folder, out)
    assert not out.exists()


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.int32, torch.complex64])
def test_tensors_that_are_no_floating_point_numbers_are_refused(edited, dtype):
    folder = edited(tensors={_KEY: torch.ones(4, 32).to(dtype)})
    name = str(dtype).removeprefix("torch.")
    said = rf"has .*layers.1.self_attn.q_proj.lora_A.weight in {name}, and an adapter's tensors are floating-point"
    _refused(folder, said)
    _export_refused(folder, said)


def test_float64_is_refused_over_a_base_that_is_not_and_loads_over_one_that_is(edited):
    folder = edited(tensors={_KEY: torch.full((4, 32), 1e300, dtype=torch.float64)})
    _refused(folder, r"wrong type: .*layers.1.self_attn.q_proj.lora_A.weight is float64 in the file and float32 here")
    model = tiny.build("llama").double()
    veneer.load_adapter(model, folder)
    assert model.model.layers[1].self_attn.q_proj.updates["default"].A.max() == 1e300


def test_eight_bit_floats_load_as_before(edited):
    values = torch.randn(4, 32).to(torch.float8_e4m3fn)
    model = tiny.build("llama")
    veneer.load_adapter(model, edited(tensors={_KEY: values}))
    assert torch.equal(model.model.layers[1].self_attn.q_proj.updates["default"].A, values.float())


def test_a_module_trained_whole_is_refused_where_its_values_overflow_here(tmp_path):
    model = tiny.build("llama")
    veneer.attach(model, veneer.LoRA(targets=["q_proj"], train_also=["lm_head"]))
    with torch.no_grad():
        model.lm_head.updates["default"].weight.fill_(1e6)
    veneer.save(model, tmp_path / "a")
    half = tiny.build("llama").half()
    before = tiny.state(half)
    with pytest.raises(AdapterFileError, match=r"values that are not finite in the type used here: .*lm_head.weight"):
        veneer.load_adapter(half, tmp_path / "a")
    assert tiny.same_state(half, before)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"lora_alpha": 1e300}, r"gives 'lora_alpha' the alpha 1e\+300, which is no scale in float32"),
        ({"alpha_pattern": {"q_proj": 1e-300}}, "gives 'q_proj' the alpha 1e-300, which is no scale"),
        ({"lora_alpha": float("nan")}, "alpha"),
        ({"r": 10**400}, "gives 'r' the rank 1000.*, which no matrix has"),
        ({"r": 1000}, "rank"),
        ({"r": 3 * 10**6}, "rank"),
        ({"r": 10**9}, "rank"),
        ({"rank_pattern": {"q_proj": 10**9}}, "rank"),
    ],
)
def test_scales_and_ranks_that_are_not_the_tensors(edited, fields, match):
    folder = edited(**fields)
    ranks = match == "rank"
    _refused(folder, r"wrong shape: .*lora_A.weight is \(4, 32\) in the file and \(\d+, 32\) here" if ranks else match)
    _export_refused(
        folder, r"gives model.layers.\d.self_attn.q_proj the rank \d+, and its tensors have another" if ranks else match
    )


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        *(({"rank_pattern": value}, "has rank_pattern = .*; AdaLoRA's gives each matrix a list of true and false")
          for value in ([1, 2], 7, "text", [[True]], {"model.layers.0.self_attn.q_proj.lora_E": 3},
                        {"model.layers.0.self_attn.q_proj.lora_E": [[True]]},
                        {"model.layers.0.self_attn.q_proj.lora_E": [1, 0, 1, 0]})),
        ({"init_r": 10**9, "rank_pattern": None}, "rank"),
        ({"init_r": 10**9}, "rank"),
        ({"rank_pattern": None}, "rank"),
        ({"lora_alpha": 1e300}, "no scale in float32"),
    ],
)  # fmt: skip
def test_an_adalora_whose_config_is_not_that_of_its_tensors(edited, fields, match):
    folder = edited("adalora", **fields)
    _refused(folder, r"wrong shape: .*lora_\w is" if match == "rank" else match)
    _export_refused(folder, r"the rank \d+, and its tensors have another" if match == "rank" else match)


@pytest.mark.parametrize(
    ("kind", "key", "tensor"),
    [
        ("lora", _KEY, torch.tensor(1.0)),
        ("lora", _KEY, torch.ones(4, 32, 1)),
        ("lora", _KEY.replace("lora_A", "lora_B"), torch.ones(32, 5)),
        ("adalora", "base_model.model.model.layers.1.self_attn.q_proj.lora_E", torch.ones(9, 1)),
        ("adalora", "base_model.model.model.layers.1.self_attn.q_proj.lora_E", torch.tensor(1.0)),
    ],
)
def test_tensors_that_do_not_fit_each_other(edited, kind, key, tensor):
    folder = edited(kind, tensors={key: tensor})
    _refused(folder, "wrong shape")
    _export_refused(folder, "its tensors have another")


def test_export_refuses_a_matrix_without_its_other_and_values_that_are_not_finite(edited):
    folder = edited(tensors={"base_model.model.model.layers.1.self_attn.k_proj.lora_A.weight": torch.ones(4, 32)})
    _export_refused(folder, "no whole LoRA adapter: of model.layers.1.self_attn.k_proj it lacks lora_B")
    _export_refused(edited(tensors={_KEY: torch.full((4, 32), torch.inf)}), "values that are not finite")


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("llama", veneer.LoRA(rank=3, rank_pattern={"q_proj": 2}, train_also=["norm"], new_tokens=[1, 5])),
        ("llama-tied", veneer.LoRA(rank=3, new_tokens=[3])),
        ("llama", veneer.LoRA(targets=["embed_tokens", "v_proj"])),
        ("gpt2", veneer.LoRA(rank=3)),
        ("gpt2", veneer.AdaLoRA(initial_rank=3, target_rank=2, total_steps=9, train_also=["ln_f"])),
        ("mixtral", veneer.LoRA(rank=2, targets=["q_proj", "gate_up_proj", "down_proj"])),
    ],
)
def test_what_is_expected_is_what_the_adapter_then_has(name, config, tmp_path):
    model: nn.Module = tiny.build(name)
    expected = expected_tensors(model, config, None, {})
    veneer.attach(model, config)
    own = adapter_tensors(model, "default")
    assert {key: (tuple(t.shape), t.dtype) for key, t in own.items()} == {
        key: (t.shape, t.dtype) for key, t in expected.items()
    }


def test_triplets_that_are_left_out_are_expected_so(folders):
    model = tiny.build("llama")
    veneer.load_adapter(model, folders / "adalora")
    kept = kept_triplets(folders / "adalora")
    assert kept
    config = adapters_of(model).configs["default"]
    expected = expected_tensors(tiny.build("llama"), config, None, kept)
    assert {key: tuple(t.shape) for key, t in adapter_tensors(model, "default").items()} == {
        key: t.shape for key, t in expected.items()
    }


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("lora_alpha", True, "has 'lora_alpha' = True, which is no number"),
        ("r", "4", "has 'r' = '4', which is no number"),
        ("alpha_pattern", {"q_proj": True}, "which is no number"),
        ("fan_in_fan_out", "x", "has fan_in_fan_out = 'x', which is neither true nor false"),
        ("use_dora", 1, "has use_dora = 1, which is neither true nor false"),
        ("init_lora_weights", "newest", "has init_lora_weights = 'newest', which is not known here"),
        ("init_lora_weights", [1], "which is not known here and may change the base's weights; known are true, false"),
        ("use_dora", True, r"missing .*lora_magnitude_vector"),
    ],
)
def test_a_field_of_another_type_or_meaning_is_refused(field, value, said, folders, tmp_path):
    shutil.copytree(folders / "lora", tmp_path / "a")
    file = tmp_path / "a/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    model = tiny.build("llama")
    before = tiny.state(model)
    with pytest.raises(AdapterFileError, match=said):
        veneer.load_adapter(model, tmp_path / "a")
    assert tiny.same_state(model, before)
    assert not adapters_of(model).configs


@pytest.mark.parametrize("shape", [(3,), (1, 32)])
def test_magnitudes_of_another_shape_are_refused(shape, tmp_path):
    model = tiny.build("llama")
    veneer.attach(model, veneer.LoRA(rank=2, targets=["q_proj"], dora=True))
    veneer.save(model, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if "magnitude" in key)
    save_file(tensors | {key: torch.ones(shape)}, file)
    with pytest.raises(AdapterFileError, match=r"wrong shape: .*lora_magnitude_vector"):
        veneer.load_adapter(tiny.build("llama"), tmp_path)
