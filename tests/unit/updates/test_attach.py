"""Attaching: what is frozen, what is refused and in which words, several adapters, and giving the base back."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import tiny
import veneer
from veneer.errors import ConfigError, TargetError
from veneer.updates.layers import AdaptedEmbedding, AdaptedLinear
from veneer.updates.record import adapters_of

pytestmark = pytest.mark.unit


def _names(model):
    return {row.name for row in veneer.trainable(model).rows}


def _refused(match, model, **options):
    before = tiny.state(model)
    with pytest.raises(TargetError, match=match):
        veneer.attach(model, veneer.LoRA(**options))
    assert tiny.same_state(model, before), "a refusal leaves the model as it was"
    assert all(p.requires_grad for p in model.parameters())


def test_all_linear_leaves_the_head_out():
    model = tiny.build("llama")
    veneer.attach(model, veneer.LoRA())
    kinds = {name.rsplit(".", 1)[-1] for name in _names(model)}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert not isinstance(model.lm_head, AdaptedLinear)


def test_targets_by_suffix_regex_layers_and_exclude():
    def chosen(**options):
        model = tiny.build("llama")
        veneer.attach(model, veneer.LoRA(**options))
        return _names(model)

    assert chosen(targets=["q_proj"]) == {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)}
    assert chosen(targets="q_proj") == chosen(targets=["q_proj"])
    assert chosen(targets=["self_attn.v_proj"], layers=[1]) == {"model.layers.1.self_attn.v_proj"}
    assert chosen(targets=r".*\.0\..*(q|k)_proj") == {f"model.layers.0.self_attn.{x}_proj" for x in "qk"}
    assert chosen(targets=["q_proj", "k_proj"], exclude=["layers.0.self_attn.k_proj"]) == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.k_proj",
    }
    assert "lm_head" in chosen(targets=["lm_head"]), "named, the head is adapted"


def test_q_proj_on_gpt2_answers_c_attn():
    _refused(r"'q_proj'.*c_attn", tiny.build("gpt2"), targets=["q_proj", "v_proj"])


def test_each_name_that_matches_nothing_is_refused_also_when_others_match():
    _refused(r"'q_prj'.*q_proj", tiny.build("llama"), targets=["k_proj", "q_prj"])
    _refused(r"exclude.*'vproj'.*v_proj", tiny.build("llama"), exclude=["vproj"])
    _refused(r"'nothing\.\*'", tiny.build("llama"), targets="nothing.*")
    _refused(r"layers names 7.*0 to 1", tiny.build("llama"), layers=[0, 7])
    _refused(r"chose no module once exclude had been applied", tiny.build("llama"), targets="q_proj", exclude="q_proj")
    _refused(r"rank_pattern has the key 'qproj'.*q_proj", tiny.build("llama"), rank_pattern={"qproj": 4})
    _refused(
        r"alpha_pattern has the key 'v_proj', which matches none",
        tiny.build("llama"), targets=["q_proj"], alpha_pattern={"q_proj": 4, "v_proj": 4},
    )  # fmt: skip
    _refused(r"train_also.*'scorer'", tiny.build("llama"), train_also=["scorer"])


def test_a_regex_inside_a_list_is_refused():
    _refused(r"one string|regular expression", tiny.build("llama"), targets=[".*q_proj"])


def test_a_broken_regex_is_refused():
    _refused(r"not a regular expression", tiny.build("llama"), targets="q_proj(")
    _refused(r"not a regular expression", tiny.build("llama"), rank_pattern={"q_proj(": 4})


def test_a_module_that_cannot_be_adapted_is_refused():
    _refused(
        r"self_attn is a LlamaAttention, which cannot be adapted.*q_proj", tiny.build("llama"), targets="self_attn"
    )
    _refused(r"norm is a LlamaRMSNorm", tiny.build("llama"), targets=["model.norm"])
    model = nn.Sequential(nn.Embedding(4, 3, max_norm=1.0))
    _refused(r"max_norm", model, targets=["0"])


def test_a_second_attach_under_the_same_name_is_refused():
    model = tiny.build("llama")
    veneer.attach(model, veneer.LoRA())
    with pytest.raises(TargetError, match=r"named 'default' is attached already.*another name"):
        veneer.attach(model, veneer.LoRA())
    with pytest.raises(TargetError, match="cannot name an adapter"):
        veneer.attach(model, veneer.LoRA(), "a.b")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rnak": 4}, r"LoRA has no option 'rnak'. Did you mean 'rank'"),
        ({"rank": 0}, r"rank = 0 is not valid"),
        ({"dropout": 1.0}, r"dropout = 1.0"),
        ({"targets": []}, r"nothing would be trained"),
        ({"rank_pattern": {"q": 0}}, r"gives 'q' rank 0"),
        ({"init": "zeros"}, r"'kaiming', 'gaussian', 'loftq' or 'pissa'"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(options, match):
    with pytest.raises(ConfigError, match=match):
        veneer.LoRA(**options)


def test_patterns_and_rslora_scale_each_module():
    model = tiny.build("llama")
    config = veneer.LoRA(
        rank=4,
        alpha=8,
        targets=["q_proj", "v_proj"],
        rank_pattern={"v_proj": 2},
        alpha_pattern={"0.self_attn.v_proj": 6},
    )
    veneer.attach(model, config)
    scales = {row.name: model.get_submodule(row.name).updates["default"].scale for row in veneer.trainable(model).rows}
    assert scales["model.layers.0.self_attn.q_proj"] == 2.0
    assert scales["model.layers.0.self_attn.v_proj"] == 3.0
    assert scales["model.layers.1.self_attn.v_proj"] == 4.0
    other = tiny.build("llama")
    veneer.attach(other, veneer.LoRA(rank=4, alpha=8, rslora=True, targets=["q_proj"]))
    assert other.model.layers[0].self_attn.q_proj.updates["default"].scale == 4.0


@pytest.mark.parametrize(("init", "std"), [("kaiming", (1 / 3 / 400) ** 0.5), ("gaussian", 1 / 64)])
def test_initial_values(init, std):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(400, 50))
    veneer.attach(model, veneer.LoRA(rank=64, init=init, targets=["0"]))
    update = model[0].updates["default"]
    assert not update.B.any()
    assert float(update.A.detach().std()) == pytest.approx(std, rel=0.03)


def test_several_adapters_on_one_base():
    model, inputs = tiny.build("llama"), tiny.batch("llama")
    before, base = tiny.state(model), tiny.logits(model, inputs)
    veneer.attach(model, veneer.LoRA(rank=2), "a")
    tiny.train_steps(model, inputs)
    with_a = tiny.logits(model, inputs)
    veneer.attach(model, veneer.LoRA(rank=3, targets=["q_proj"]), "b")
    assert torch.equal(tiny.logits(model, inputs), base), "a new adapter starts as the base, and is the active one"
    tiny.train_steps(model, inputs)
    with_b = tiny.logits(model, inputs)
    veneer.activate(model, "a")
    assert torch.equal(tiny.logits(model, inputs), with_a), "training b left a alone"
    veneer.activate(model, "a", "b")
    both = tiny.logits(model, inputs)
    assert not torch.equal(both, with_a)
    assert not torch.equal(both, with_b)
    with veneer.disabled(model):
        assert torch.equal(tiny.logits(model, inputs), base)
    assert torch.equal(tiny.logits(model, inputs), both)
    copied = copy.deepcopy(model)
    veneer.remove(model, "a")
    assert torch.equal(tiny.logits(model, inputs), with_b)
    assert torch.equal(tiny.logits(copied, inputs), both), "a copy has its own adapters"
    veneer.remove(model, "b")
    assert tiny.same_state(model, before)
    with pytest.raises(TargetError, match=r"No adapter named 'b'.*None is attached"):
        veneer.remove(model, "b")


def test_only_the_active_adapter_gets_gradients():
    model, inputs = tiny.build("llama"), tiny.batch("llama")
    veneer.attach(model, veneer.LoRA(rank=2, targets=["q_proj"]), "a")
    veneer.attach(model, veneer.LoRA(rank=2, targets=["q_proj"]), "b")
    model(**inputs).loss.backward()
    with_gradient = {path for path, p in model.named_parameters() if p.grad is not None}
    assert with_gradient
    assert all(".b." in path for path in with_gradient)


def test_an_unknown_adapter_name_lists_what_is_attached():
    model = tiny.build("llama")
    veneer.attach(model, veneer.LoRA(), "style")
    with pytest.raises(TargetError, match=r"No adapter named 'styles'.*Did you mean 'style'.*Attached are: style"):
        veneer.activate(model, "styles")


def test_what_was_frozen_before_stays_frozen_after_remove():
    model = tiny.build("llama")
    model.model.embed_tokens.weight.requires_grad_(False)
    veneer.attach(model, veneer.LoRA())
    veneer.remove(model)
    frozen = {path for path, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"model.embed_tokens.weight"}


def test_an_embedding_is_adapted():
    model, inputs = tiny.build("gemma3"), tiny.batch("gemma3")
    base = tiny.logits(model, inputs)
    veneer.attach(model, veneer.LoRA(rank=3, targets=["embed_tokens"], dropout=0.1))
    assert isinstance(model.model.embed_tokens, AdaptedEmbedding)
    assert torch.equal(tiny.logits(model, inputs), base)
    tiny.train_steps(model, inputs)
    adapted = tiny.logits(model, inputs)
    assert not torch.equal(adapted, base)
    veneer.merge(model)
    torch.testing.assert_close(tiny.logits(model, inputs), adapted, rtol=0, atol=1e-5)
    assert model.config.tie_word_embeddings is False, "only the embedding was adapted: the head is untied"
    veneer.unmerge(model)
    assert model.config.tie_word_embeddings is True


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma3"])
def test_new_tokens_train_their_rows_only(name, tmp_path):
    model, inputs = tiny.build(name), tiny.batch(name)
    inputs["input_ids"][:, 2] = 60
    base = tiny.logits(model, inputs)
    veneer.attach(model, veneer.LoRA(targets=["q_proj"], new_tokens=[60, 63]))
    assert torch.equal(tiny.logits(model, inputs), base)
    frozen = model.get_input_embeddings().weight.clone()
    tiny.train_steps(model, inputs)
    assert torch.equal(model.get_input_embeddings().weight, frozen)
    adapted = tiny.logits(model, inputs)
    veneer.save(model, tmp_path / "a")
    other = tiny.build(name)
    veneer.load_adapter(other, tmp_path / "a")
    assert torch.equal(tiny.logits(other, inputs), adapted)
    veneer.merge(other)
    torch.testing.assert_close(tiny.logits(other, inputs), adapted, rtol=0, atol=1e-5)
    embedding, head = other.get_input_embeddings().weight, other.get_output_embeddings().weight
    assert (embedding is head) == (name != "llama"), "tied matrices stay tied"
    changed = (embedding != frozen).any(dim=1).nonzero().flatten().tolist()
    assert set(changed) <= {60, 63}
    assert 60 in changed


def test_new_tokens_refusals():
    _refused(r"names \[64\], but the embedding has 64 rows; call model.resize_token_embeddings", tiny.build("llama"),
             new_tokens=[3, 64])  # fmt: skip
    _refused(r"names a token twice", tiny.build("llama"), new_tokens=[3, 3])
    _refused(r"embed_tokens is adapted or trained whole", tiny.build("llama"), targets=["embed_tokens"], new_tokens=[3])
    _refused(r"needs a model with an input embedding", nn.Sequential(nn.Linear(2, 2)), targets=["0"], new_tokens=[1])


def test_train_also_trains_a_copy_and_a_head_is_trained_by_itself():
    model, inputs = tiny.build("bert"), tiny.batch("bert")
    before = tiny.state(model)
    veneer.attach(model, veneer.LoRA(targets=["query"]))
    rows = {row.name: row for row in veneer.trainable(model).rows}
    assert rows["classifier"].rank is None
    assert rows["classifier"].parameters == 32 * 3 + 3
    tiny.train_steps(model, inputs)
    veneer.remove(model)
    assert tiny.same_state(model, before)
    _refused(r"q_proj is in both targets and train_also", tiny.build("llama"), targets=["q_proj"], layers=[0],
             train_also=["layers.0.self_attn.q_proj"])  # fmt: skip


def test_whole_and_updated_in_two_adapters_is_refused():
    model = tiny.build("llama")
    veneer.attach(model, veneer.LoRA(targets=["k_proj"], train_also=["model.norm", "1.mlp"]), "a")
    with pytest.raises(TargetError, match=r"trained whole by one adapter"):
        veneer.attach(model, veneer.LoRA(targets=["up_proj"]), "b")
    veneer.attach(model, veneer.LoRA(targets=["k_proj"], train_also=["model.norm"]), "b")
    with pytest.raises(
        TargetError, match=r"a, b meet at model.norm, and a trains it whole, so .* one of them at a time"
    ):
        veneer.activate(model, "a", "b")
    assert veneer.updates.record.adapters_of(model).active == ("b",)


def test_rows_that_are_replaced_take_no_second_update():
    model = tiny.build("llama-tied")
    veneer.attach(model, veneer.LoRA(targets=["q_proj"], new_tokens=[3]), "rows")
    veneer.attach(model, veneer.LoRA(targets=["lm_head"]), "head")
    with pytest.raises(TargetError, match=r"meet at lm_head, and rows replaces some of its rows"):
        veneer.activate(model, "rows", "head")


def test_an_adapter_is_in_force_once():
    model, inputs = tiny.build("llama"), tiny.batch("llama")
    veneer.attach(model, veneer.LoRA(targets=["q_proj"]))
    tiny.train_steps(model, inputs)
    once = tiny.logits(model, inputs)
    veneer.activate(model, "default", "default")
    assert torch.equal(tiny.logits(model, inputs), once)


def test_a_lone_layer_is_no_model():
    with pytest.raises(TargetError, match=r"The model is itself a Linear, .* such as nn.Sequential\(layer\)"):
        veneer.attach(nn.Linear(4, 4), veneer.LoRA())


@pytest.mark.parametrize("name", ["train", "items", "eval"])
def test_a_name_that_pytorch_uses_is_refused(name):
    model = tiny.build("llama")
    with pytest.raises(TargetError, match=f"'{name}' cannot name an adapter"):
        veneer.attach(model, veneer.LoRA(), name)
    assert all(p.requires_grad for p in model.parameters())


def test_modules_trained_whole_neither_overlap_nor_are_lists():
    _refused(r"names model.layers.0.mlp.up_proj, and model.layers.0.mlp that holds it",
             tiny.build("llama"), targets=["q_proj"], train_also=["0.mlp", "0.mlp.up_proj"])  # fmt: skip
    _refused(r"names model.layers, a list of modules .* such as model.layers.0\.",
             tiny.build("llama"), targets=[], train_also=["layers"])  # fmt: skip


def test_one_module_under_two_names_of_one_parent():
    model = nn.Sequential()
    model.first = model.second = nn.Linear(4, 4)
    veneer.attach(model, veneer.LoRA(rank=2))
    assert model.first is model.second
    assert isinstance(model.second, AdaptedLinear)


def test_names_with_commas_are_a_list_and_alphas_are_positive():
    assert veneer.LoRA(targets="q_proj, v_proj").targets == ["q_proj", "v_proj"]
    with pytest.raises(ConfigError, match="alpha_pattern gives 'q_proj' alpha -3; an alpha is a number above 0"):
        veneer.LoRA(alpha_pattern={"q_proj": -3})
    with pytest.raises(ConfigError, match="alpha = inf is not valid"):
        veneer.LoRA(alpha=float("inf"))


def test_blocks_of_disabled_that_overlap_leave_the_adapter_on():
    """The second begins within the first, and ends after it."""
    model = veneer.attach(tiny.build("llama"), veneer.LoRA(rank=2))
    first, second = veneer.disabled(model), veneer.disabled(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert adapters_of(model).active == (), "the second goes on"
    second.__exit__(None, None, None)
    assert adapters_of(model).active == ("default",)
    with veneer.disabled(model), veneer.disabled(model):
        pass
    assert adapters_of(model).active == ("default",)


def test_what_one_thread_has_turned_off_others_have_on():
    model, inputs = veneer.attach(tiny.build("llama"), veneer.LoRA(rank=2)), tiny.batch("llama")
    tiny.train_steps(model, inputs)
    on = tiny.logits(model, inputs)
    with ThreadPoolExecutor(1) as pool, veneer.disabled(model):
        off = tiny.logits(model, inputs)
        assert torch.equal(pool.submit(tiny.logits, model, inputs).result(), on)
        assert pool.submit(lambda: adapters_of(model).active).result() == ("default",)
        copied = copy.deepcopy(model)
        veneer.attach(model, veneer.LoRA(rank=2), "more")
        assert torch.equal(tiny.logits(model, inputs), off)
    assert not torch.equal(on, off)
    assert torch.equal(tiny.logits(copied, inputs), off), "a copy stays as it was made"
    assert adapters_of(model).active == ("more",)


def test_a_block_that_another_thread_closes_is_closed():
    """As a generator's may be."""
    model = veneer.attach(tiny.build("llama"), veneer.LoRA(rank=2))
    block = veneer.disabled(model)
    block.__enter__()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(block.__exit__, None, None, None).result()
    assert adapters_of(model).active == ("default",)
