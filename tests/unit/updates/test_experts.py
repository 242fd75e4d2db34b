"""LoRA on a mixture's experts: what is chosen, computed, merged and refused. peft's own is in tests/interop."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as tf
from torch import nn

import tiny
import veneer
from tokens import tokenizer
from veneer.errors import AdapterFileError, ConfigError, ModelError, TargetError
from veneer.frozen.experts import DenseStack, QuantisedStack
from veneer.frozen.layers import compute_in, quantise_linear_layers
from veneer.models.load import load
from veneer.updates.experts import AdaptedStack, ExpertPairs
from veneer.updates.peft_config import name_and_rank
from veneer.updates.record import row_adapters, updates_of

pytestmark = pytest.mark.unit
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
INPUTS = tiny.batch("qwen3-moe")


def _coded(name="qwen3-moe"):
    model = tiny.build(name)
    quantise_linear_layers(model, storage="nf4", block_size=32, double_quantisation=True)
    return model


def _adapted(model, name="default"):
    return {path.partition("layers.0.")[2] for path in updates_of(model, name) if "layers.0." in path}


def _stack(kind, transposed):
    own = torch.randn(3, 6, 5, dtype=torch.float64)  # (experts, out, in)
    if kind == "codes":
        coded = QuantisedStack.of(own.float(), "w", torch.float64, False, storage="nf4", block_size=32)
        return coded, coded.dense()
    laid_out = own.transpose(1, 2).contiguous() if transposed else own
    return DenseStack(nn.Parameter(laid_out, requires_grad=False), transposed), own


@pytest.mark.parametrize(("kind", "transposed"), [("dense", False), ("dense", True), ("codes", False)])
@pytest.mark.parametrize("updates", [1, 2])
def test_gradcheck(kind, transposed, updates):
    torch.manual_seed(0)
    stack, weights = _stack(kind, transposed)
    x, bias = torch.randn(4, 5, dtype=torch.float64, requires_grad=True), torch.randn(3, 6, dtype=torch.float64)
    layer, factors = AdaptedStack(stack), []
    for number in range(updates):
        rank, scale = 2 + number, 0.5 + number
        pair = torch.randn(3 * rank, 5, dtype=torch.float64), torch.randn(6, rank * 3, dtype=torch.float64)
        layer.updates[f"u{number}"] = ExpertPairs(*pair, scale, experts=3)
        factors += [parameter.detach().requires_grad_(True) for parameter in pair]
    layer.chosen = tuple(layer.updates)

    def product(x, *factors):
        for update, A, B in zip(layer.updates.values(), factors[::2], factors[1::2], strict=True):
            del update.A, update.B
            update.A, update.B = A, B
        products = layer.products(bias)
        return torch.stack([products(expert, x) for expert in (0, 2)])  # and the second gets no token

    def formula(x, *factors):
        rows = []
        for expert in (0, 2):
            y = x @ weights[expert].t() + bias[expert]
            for number, (A, B) in enumerate(zip(factors[::2], factors[1::2], strict=True)):
                rank = 2 + number
                own = A[expert * rank : (expert + 1) * rank], B[:, [r * 3 + expert for r in range(rank)]]
                y = y + (0.5 + number) * (x @ own[0].t()) @ own[1].t()
            rows.append(y)
        return torch.stack(rows)

    for update in layer.updates.values():
        update._parameters.clear()
        update.A = update.B = torch.zeros(0)
    assert torch.allclose(product(x, *factors), formula(x, *factors), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(product, (x, *factors))


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ({"targets": ["gate_up_proj"]}, {"mlp.experts.gate_up_proj"}),
        ({"targets": r".*(q_proj|experts\.down_proj)"}, {"self_attn.q_proj"}),  # a regex is of modules first, as peft's
        ({"targets": r".*experts.*"}, None),
        ({"targets": r".*_up_proj"}, {"mlp.experts.gate_up_proj"}),
        ({"targets": [], "target_parameters": ["down_proj"]}, {"mlp.experts.down_proj"}),
        ({"targets": ["q_proj", "down_proj"]}, {"self_attn.q_proj", "mlp.experts.down_proj"}),
        (
            {"target_parameters": BOTH, "exclude": ["q_proj", "gate_up_proj"]},
            {"self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.experts.down_proj"},
        ),
        ({"targets": ["gate_up_proj"], "layers": [1]}, set()),
    ],
)
@pytest.mark.parametrize("made", [tiny.build, _coded])
def test_targets_that_match_no_module_find_experts(made, options, chosen):
    model = made("qwen3-moe")
    if chosen is None:
        with pytest.raises(TargetError, match="It holds gate_up_proj, down_proj: name those"):
            veneer.attach(model, veneer.LoRA(**options))
        return
    veneer.attach(model, veneer.LoRA(**options))
    assert _adapted(model) == chosen


def test_a_module_of_the_name_comes_before_experts():
    config = tf.Qwen2MoeConfig(
        num_experts=4, moe_intermediate_size=48, shared_expert_intermediate_size=40, **tiny._EXPERTS
    )
    model = tf.Qwen2MoeForCausalLM(config)
    veneer.attach(model, veneer.LoRA(targets=["down_proj"]))
    assert _adapted(model) == {"mlp.shared_expert.down_proj"}
    veneer.attach(model, veneer.LoRA(targets=["down_proj"], target_parameters=["experts.down_proj"]), "b")
    assert _adapted(model, "b") == {"mlp.shared_expert.down_proj", "mlp.experts.down_proj"}


@pytest.mark.parametrize("made", [tiny.build, _coded])
def test_what_of_experts_is_adapted_and_what_is_left_out_is_said(made):
    model = made("qwen3-moe")
    left = "36,864 parameters of experts.gate_up_proj, experts.down_proj are not adapted; "
    veneer.attach(model, veneer.LoRA())
    assert veneer.trainable(model).left_out == f"{left}to adapt them, name them in target_parameters."
    assert str(veneer.trainable(model)).endswith("target_parameters.")
    assert veneer.trainable(model).base_parameters == 47_552
    veneer.remove(model)
    veneer.attach(model, veneer.AdaLoRA(total_steps=100))
    assert veneer.trainable(model).left_out == f"{left}AdaLoRA adapts no experts, LoRA does."
    veneer.remove(model)
    veneer.attach(model, veneer.LoRA(rank=2, targets=["down_proj"]))
    shown = str(veneer.trainable(model))
    assert "model.layers.*.mlp.experts.down_proj (×2)  4 × 32 × 48     2       1,280" in shown
    assert "24,576 parameters of experts.gate_up_proj are not adapted" in shown
    veneer.remove(model)
    veneer.attach(model, veneer.LoRA(target_parameters=BOTH))
    assert veneer.trainable(model).left_out == ""


def test_experts_of_an_unknown_class_are_said_to_be_left_out():
    class Strange(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.zeros(2, 3, 4))

    model = veneer.attach(nn.Sequential(nn.Linear(3, 3), Strange()), veneer.LoRA())
    assert veneer.trainable(model).left_out == (
        "24 parameters of Strange are not adapted, as these are no linear layers of a known kind."
    )


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {"targets": ["down_proj"], "dropout": 0.1},
            r"experts\.down_proj is a parameter of experts, whose updates have no dropout in PEFT, which "
            r"could not load the adapter; use dropout = 0, or leave the experts out\.",
        ),
        (
            {"targets": ["down_proj"], "init": "loftq"},
            r"experts\.down_proj is a parameter of experts, whose updates do not start from their weights; use "
            r"init = 'kaiming', or leave the experts out\.",
        ),
        (
            {"target_parameters": ["experts.up_proj"]},
            r"target_parameters names 'experts\.up_proj', which matches no parameter of experts of this model; it has "
            r"experts\.gate_up_proj, experts\.down_proj\. Layers are named in targets\.",
        ),
        (
            {"targets": ["w1"]},
            r"targets names 'w1', which matches no module of this model\. Nearest here: gate_up_proj\.",
        ),
        (
            {"targets": ["experts"]},
            r"Qwen3MoeExperts, which cannot be adapted; .* It holds gate_up_proj, down_proj: name",
        ),
        (
            {"targets": [], "target_parameters": ["down_proj"], "exclude": ["down_proj"]},
            r"targets = \[\] and target_parameters = \['down_proj'\] chose no module once exclude had been applied",
        ),
        (
            {"train_also": ["down_proj"]},
            r"train_also names .*down_proj, which is a parameter of model\.layers\.0\.mlp\.exp",
        ),
        ({"targets": ["gate_up_proj"], "train_also": ["experts"]}, r"is in both targets and train_also"),
        (
            {"targets": ["gate_up_proj"], "rank_pattern": {"q_proj": 2}},
            r"rank_pattern has the key 'q_proj', which matches none of the adapted modules",
        ),
    ],
)
def test_refusals_leave_the_model_as_it_was(config, said):
    model = tiny.build("qwen3-moe")
    before, kinds = tiny.state(model), [type(module) for module in model.modules()]
    with pytest.raises(TargetError, match=said):
        veneer.attach(model, veneer.LoRA(**config))
    assert tiny.same_state(model, before)
    assert [type(module) for module in model.modules()] == kinds


def test_adalora_on_experts_is_refused_by_name(tmp_path):
    model = tiny.build("qwen3-moe")
    said = (
        r"model\.layers\.0\.mlp\.experts\.down_proj is a parameter of experts, which AdaLoRA does not adapt; use LoRA\."
    )
    with pytest.raises(TargetError, match=said):
        veneer.attach(model, veneer.AdaLoRA(targets=["q_proj", "down_proj"], total_steps=100))
    with pytest.raises(ConfigError, match="AdaLoRA has no option 'target_parameters'"):
        veneer.AdaLoRA(target_parameters=BOTH)
    veneer.attach(model, veneer.AdaLoRA(targets=["q_proj"], total_steps=100))
    veneer.save(model, tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "target_parameters": BOTH}))
    with pytest.raises(AdapterFileError, match="sets target_parameters, which AdaLoRA does not have here"):
        veneer.load_adapter(tiny.build("qwen3-moe"), tmp_path / "a")


def test_a_model_without_experts_has_no_such_parameters():
    with pytest.raises(TargetError, match="of experts of this model; it has no experts of a known kind"):
        veneer.attach(tiny.build("llama"), veneer.LoRA(target_parameters=["experts.down_proj"]))


def test_experts_in_codes_cannot_be_trained_whole():
    with pytest.raises(TargetError, match=r"train_also names .*experts, which is kept in codes and cannot be trained"):
        veneer.attach(_coded(), veneer.LoRA(targets=["q_proj"], train_also=["experts"]))


def _edited(folder, model, **fields):
    veneer.save(model, folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    return folder


def test_a_files_parameters_of_other_architectures_are_passed_over_and_a_known_one_is_refused(tmp_path):
    model = veneer.attach(tiny.build("qwen3-moe"), veneer.LoRA(targets=[], target_parameters=BOTH))
    more = _edited(tmp_path / "more", model, target_parameters=[*BOTH, "experts.w1"], target_modules=["w2"])
    veneer.load_adapter(tiny.build("qwen3-moe"), more)
    router = _edited(tmp_path / "router", model, target_parameters=[*BOTH, "gate.weight"])
    other = tiny.build("qwen3-moe")
    before = tiny.state(other)
    with pytest.raises(AdapterFileError, match=r"names 'gate\.weight', which matches no parameter of experts"):
        veneer.load_adapter(other, router)
    assert tiny.same_state(other, before)
    with pytest.raises(
        AdapterFileError, match=r"target_parameters names 'experts\.gate_up_proj', which matches no param"
    ):
        veneer.load_adapter(tiny.build("llama"), more)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["qwen3-moe", "gpt-oss"])
def test_the_last_adapter_leaves_the_base_as_it_was(name, dtype):
    model = tiny.build(name).to(dtype)
    if dtype is not torch.float32:
        compute_in(model, torch.float32)
    before, kinds, logits = tiny.state(model), [type(m) for m in model.modules()], tiny.logits(model, INPUTS)
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    veneer.attach(model, veneer.LoRA(targets=["gate_up_proj"]), "a")
    veneer.attach(model, veneer.LoRA(targets=["gate_up_proj", "down_proj"]), "b")
    tiny.train_steps(model, INPUTS)
    with veneer.disabled(model):
        assert torch.equal(tiny.logits(model, INPUTS), logits)
    veneer.remove(model, "b")
    assert torch.equal(tiny.logits(model, INPUTS), logits)  # a was not trained
    veneer.remove(model, "a")
    assert tiny.same_state(model, before)
    assert [type(module) for module in model.modules()] == kinds
    assert {key for key, parameter in model.named_parameters() if parameter.requires_grad} == trained


@pytest.mark.parametrize("made", [tiny.build, _coded])
def test_recomputed_layers_give_the_same_gradients(made):
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = veneer.attach(made("mixtral"), veneer.LoRA(target_parameters=BOTH))
        if recompute:
            model.gradient_checkpointing_enable()
        tiny.train_steps(model, INPUTS, steps=2)
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradient, gradients[1][key]) for key, gradient in gradients[0].items())


@pytest.mark.parametrize("storage", ["fp32", "bf16", "nf4"])
@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_a_merged_mixture_is_one_that_transformers_reads(name, storage, tmp_path):
    tiny.build(name).save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    model = load(tmp_path / "base", storage)[0]
    veneer.attach(model, veneer.LoRA(targets=["down_proj", "q_proj"]))
    tiny.train_steps(model, INPUTS)
    apart, state = tiny.logits(model, INPUTS).float(), tiny.state(model)
    veneer.merge(model)
    veneer.unmerge(model)
    assert tiny.same_state(model, state)
    veneer.merge(model, reversible=False)
    merged = tiny.logits(model, INPUTS).float()
    model.save_pretrained(tmp_path / "merged")
    read = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    if storage == "bf16":  # rounded once, where the update is added
        assert (merged - apart).norm() < 0.02 * apart.norm()
        assert (tiny.logits(read, INPUTS) - merged).norm() < 0.02 * merged.norm()
    else:
        torch.testing.assert_close(merged, apart, rtol=0, atol=1e-5)
        torch.testing.assert_close(tiny.logits(read, INPUTS), merged, rtol=0, atol=1e-5)


def test_rows_cannot_have_adapters_of_their_own_where_these_adapt_experts():
    model = tiny.build("mixtral")
    for name in ("a", "b"):
        veneer.attach(model, veneer.LoRA(targets=["down_proj"]), name)
    rows, width = INPUTS["input_ids"].shape
    with row_adapters(model, [("a",)] * rows, width):
        tiny.logits(model, INPUTS)
    said = "experts of this model are adapted, and they compute tokens of all rows together"
    with row_adapters(model, [("a",), ("b",), ()], width), pytest.raises(ModelError, match=said):
        tiny.logits(model, INPUTS)


def test_a_changed_base_with_dense_experts_is_saved_without_what_is_around_them(tmp_path):
    tiny.build("qwen3-moe").save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    model, made = load(tmp_path / "base", "nf4", experts=False)
    before = tiny.logits(model, INPUTS)
    veneer.attach(model, veneer.LoRA(targets=["q_proj", "down_proj"]))
    tiny.train_steps(model, INPUTS)
    trained = tiny.logits(model, INPUTS)
    veneer.save_base(model, made, tmp_path / "saved")
    assert torch.equal(tiny.logits(model, INPUTS), trained)
    assert torch.equal(tiny.logits(load(tmp_path / "saved")[0], INPUTS), before)


def test_what_a_file_calls_experts_is_their_parameter_with_its_rank():
    both = veneer.LoRA(rank=8, targets=["q_proj"], target_parameters=BOTH, rank_pattern={"experts.down_proj": 2})
    path = "model.layers.0.mlp.experts"
    assert name_and_rank(path, 8, both) == (f"{path}.down_proj", 2)  # of four experts
    assert name_and_rank(f"{path}.base_layer", 32, both) == (f"{path}.gate_up_proj", 8)
    assert name_and_rank("model.layers.0.self_attn.q_proj", 8, both) == ("model.layers.0.self_attn.q_proj", 8)
    one = veneer.LoRA(rank=8, targets=["q_proj"], target_parameters=["gate_up_proj"])  # as peft may name it
    assert name_and_rank(path, 32, one) == (f"{path}.gate_up_proj", 8)
    assert name_and_rank("model.layers.0.self_attn.q_proj", 8, one) == ("model.layers.0.self_attn.q_proj", 8)
    assert name_and_rank(path, 5, None) == (path, 5)


def test_no_plain_lora_carries_experts(tmp_path):
    model = veneer.attach(tiny.build("mixtral"), veneer.LoRA(targets=["down_proj"]))
    veneer.save(model, tmp_path / "a")
    with pytest.raises(
        AdapterFileError, match=r"adapts parameters of experts \(experts\.down_proj\), which no plain LoRA"
    ):
        veneer.export(tmp_path / "a", tmp_path / "out")
    assert not (tmp_path / "out").exists()
