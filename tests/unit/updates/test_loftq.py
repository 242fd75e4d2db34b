"""A and B that start from what quantising lost."""

from __future__ import annotations

import io
import shutil

import pytest
import torch
import transformers as tf
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import nn

import tiny
import veneer
from gguf_file import write_gguf
from tokens import tokenizer
from veneer.errors import ConfigError, ModelError, TargetError
from veneer.frozen.blockwise import dense, quantise
from veneer.models import original
from veneer.runs.opened import open_named, open_run
from veneer.runs.train import resume
from veneer.updates.loftq import best_factors, loftq
from veneer.updates.record import adapters_of, updates_of

pytestmark = pytest.mark.unit

HOW = {"storage": "nf4", "block_size": 64, "double_quantisation": True}
LOFTQ = veneer.LoRA(rank=4, init="loftq")


@given(rows=st.integers(1, 40), columns=st.integers(1, 40), rank=st.integers(1, 45), seed=st.integers(0, 9))
def test_the_factors_are_the_truncated_singular_value_decomposition(rows, columns, rank, seed):
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    A, B = best_factors(matrix, rank)
    kept = min(rank, rows, columns)
    assert (A.shape, B.shape) == ((kept, columns), (rows, kept))
    U, S, V = torch.linalg.svd(matrix.double(), full_matrices=False)
    wanted = (U[:, :kept] * S[:kept]) @ V[:kept]
    torch.testing.assert_close((B @ A).double(), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close((A.norm(dim=1) * B.norm(dim=0)).double(), S[:kept], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(A.norm(dim=1), B.norm(dim=0), rtol=1e-4, atol=1e-3)


def _lost(weight, kept, A, B):
    return float((weight - dense(kept) - B @ A).norm())


@pytest.mark.parametrize("storage", ["nf4", "fp4", "int4", "int8"])
def test_each_iteration_is_the_papers_and_loses_less(storage):
    """Algorithm 1, transcribed with torch's own decomposition."""
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(0))
    how = {**HOW, "storage": storage}
    lost = [_lost(weight, quantise(weight, **how), torch.zeros(8, 64), torch.zeros(96, 8))]
    rest = weight
    for iterations in (1, 2, 3):
        q = quantise(rest, **how)
        U, S, V = torch.linalg.svd(weight - dense(q), full_matrices=False)
        wanted = (U[:, :8] * S[:8]) @ V[:8]
        rest = weight - wanted
        kept, A, B = loftq(weight, 8, iterations, **how)
        torch.testing.assert_close(B @ A, wanted, rtol=0, atol=1e-5)
        lost.append(_lost(weight, kept, A, B))
    assert lost[1] < 0.95 * lost[0]
    assert lost[3] < lost[1]


def _weights(model):
    return {name: m.weight.detach() for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def _check(model, plain, init):
    """A quantised model whose adapter brings each product nearer to that of the plain model."""
    veneer.attach(model, init)
    updates, weights = updates_of(model, "default"), _weights(plain)
    quantised = {name: u for name, u in updates.items() if type(model.get_submodule(name).base).__name__[0] == "Q"}
    assert quantised
    for name, update in quantised.items():
        base = model.get_submodule(name).base.frozen().dense()
        before, after = (weights[name] - base), (weights[name] - base - update.delta(torch.float32))
        singular = torch.linalg.svdvals(before)
        torch.testing.assert_close(float(after.norm()), float(singular[update.rank :].norm()), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_an_adapter_starts_from_the_best_of_what_was_lost(tiny_folder, storage):
    """Of the module's own rank, whatever its scale."""
    plain, _ = veneer.load(tiny_folder)
    model, _ = veneer.load(tiny_folder, storage=storage, block_size=32)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    _check(model, plain, veneer.LoRA(rank=4, init="loftq", alpha=3, rank_pattern={"q_proj": 2}, rslora=True))
    after = dict(model.named_buffers())
    assert all(torch.equal(buffer, after[name.replace("proj.", "proj.base.")]) for name, buffer in before.items())


def test_of_a_gguf_file(tmp_path):
    torch.manual_seed(0)
    made = tokenizer(merges=(("h", "e"),))
    config = tf.LlamaConfig(
        vocab_size=len(made), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=4,
    )  # fmt: skip
    write_gguf(tmp_path / "tiny.gguf", tf.LlamaForCausalLM(config), made)
    _check(veneer.load(tmp_path / "tiny.gguf", storage="nf4")[0], veneer.load(tmp_path / "tiny.gguf")[0], LOFTQ)


def test_of_an_encoders_checkpoint_that_has_no_head(tiny_encoder):
    """Its tensors are the body's, without the body's name."""
    torch.manual_seed(0)
    plain, _ = veneer.load(tiny_encoder, labels=["a", "b"])
    model, _ = veneer.load(tiny_encoder, storage="nf4", labels=["a", "b"])
    _check(model, plain, LOFTQ)


@pytest.mark.parametrize("name", ["gpt2", "t5", "gptneox", "qwen3"])
def test_of_other_architectures(name, tmp_path):
    tiny.build(name).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    model, _ = veneer.load(tmp_path, storage="nf4")
    ids = tiny.batch(name)
    if name == "t5":
        ids["decoder_input_ids"] = ids["labels"]
    wanted = tiny.logits(veneer.load(tmp_path)[0], ids)
    before = float((tiny.logits(model, ids) - wanted).norm())
    veneer.attach(model, veneer.LoRA(rank=16, init="loftq"))
    assert float((tiny.logits(model, ids) - wanted).norm()) < before


def test_what_was_saved_is_an_adapter_over_the_base_as_it_is_loaded(tiny_folder, tmp_path):
    model, _ = veneer.load(tiny_folder, storage="nf4")
    veneer.attach(model, LOFTQ)
    veneer.save(model, tmp_path / "adapter")
    again, _ = veneer.load(tiny_folder, storage="nf4")
    veneer.load_adapter(again, tmp_path / "adapter")
    ids = tiny.batch("llama")
    assert torch.equal(tiny.logits(again, ids), tiny.logits(model, ids))
    assert '"init_lora_weights": true' in (tmp_path / "adapter/adapter_config.json").read_text()


def test_a_direction_in_which_nothing_was_lost_can_still_learn(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "flat")
    flat, _ = veneer.load(tiny_folder)
    with torch.no_grad():
        flat.model.layers[0].self_attn.q_proj.weight.fill_(0.5)
    flat.save_pretrained(folder)
    model, _ = veneer.load(folder, storage="nf4", double_quantisation=False)
    veneer.attach(model, veneer.LoRA(init="loftq", targets=["q_proj"]))
    update = updates_of(model, "default")["model.layers.0.self_attn.q_proj"]
    assert not update.B.any()
    assert bool(update.A.all())


def _refused(model, error, match):
    before = tiny.state(model)
    with pytest.raises(error, match=match):
        veneer.attach(model, LOFTQ)
    assert tiny.same_state(model, before)
    assert not adapters_of(model).configs


def test_what_it_cannot_start_from_is_refused(tiny_folder, tmp_path):
    plain, _ = veneer.load(tiny_folder)
    _refused(plain, TargetError, r"none of the targets is quantised; load the model with storage='nf4', or use init =")

    model, _ = veneer.load(tiny_folder, storage="nf4")
    model.model.layers[1].mlp.up_proj.codes[0] ^= 1
    _refused(model, TargetError, r"^model\.layers\.1\.mlp\.up_proj is not what its weight on disk is quantised to; was")

    model, _ = veneer.load(shutil.copytree(tiny_folder, tmp_path / "gone"), storage="nf4")
    shutil.rmtree(tmp_path / "gone")
    _refused(model, ModelError, r"There is no model at .*gone")
    model.name_or_path = ""
    _refused(model, ModelError, r"^Where this LlamaForCausalLM was loaded from is not known; use veneer\.load\.$")

    model, _ = veneer.load(shutil.copytree(tiny_folder, tmp_path / "other"), storage="nf4")
    tiny.build("gpt2").save_pretrained(tmp_path / "other")
    _refused(model, ModelError, r"other holds no model\.layers\.0\.self_attn\.q_proj\.weight, from which its codes")


def test_weights_that_cannot_be_read_one_by_one_are_refused(tiny_folder, tmp_path, monkeypatch):
    """In a GGUF file of an architecture whose tensors are reshaped, and in a checkpoint that joins some."""
    model, _ = veneer.load(tiny_folder, storage="nf4")
    path = tmp_path / "bloom.gguf"
    write_gguf(path, veneer.load(tiny_folder)[0], tokenizer())
    path.write_bytes(path.read_bytes().replace(b"llama", b"bloom"))
    model.name_or_path = str(path)
    _refused(
        model,
        ModelError,
        r"^Single weights cannot be read from .*bloom\.gguf: a GGUF file of bloom has tensors that are split or joined",
    )
    model.name_or_path = str(tiny_folder)
    monkeypatch.setattr(original, "get_model_conversion_mapping", lambda *_, **__: [object()])
    _refused(model, ModelError, r"^Single weights cannot be read from .*, which keeps several of them joined\.$")


def test_a_base_of_codes_alone_is_refused(tiny_folder, tmp_path):
    from veneer.commands.quantize import quantise_to

    quantise_to(str(tiny_folder), tmp_path / "nf4")
    model, _ = veneer.load(tmp_path / "nf4")
    _refused(model, ModelError, r"nf4 holds codes, and not the weights that they were made from; load the model that")


TWICE = veneer.LoRA(rank=4, init="loftq", loftq_iterations=2)


@pytest.fixture
def twice(tiny_folder):
    """A model whose base two iterations changed, and its tokenizer."""
    model, made = veneer.load(tiny_folder, storage="nf4")
    veneer.attach(model, TWICE)
    return model, made


def test_more_iterations_change_the_base_and_lose_less(tiny_folder, twice):
    plain, once = _weights(veneer.load(tiny_folder)[0]), veneer.load(tiny_folder, storage="nf4")[0]
    veneer.attach(once, LOFTQ)
    lost = []
    for model in (once, twice[0]):
        total = 0.0
        for name, update in updates_of(model, "default").items():
            base = model.get_submodule(name).base.frozen().dense()
            total += float((plain[name] - base - update.delta(torch.float32)).square().sum())
        lost.append(total)
    assert lost[1] < lost[0]
    for name, update in updates_of(twice[0], "default").items():
        kept, A, B = loftq(plain[name], 4, 2, **HOW)
        assert torch.equal(twice[0].get_submodule(name).base.codes, kept.codes)
        torch.testing.assert_close(update.delta(torch.float32), B @ A, rtol=1e-5, atol=1e-6)


def test_a_changed_base_is_saved_and_its_adapter_fits_it(twice, tmp_path):
    """Veneer loads them again, and so does whoever reads a bitsandbytes checkpoint and PEFT's folder."""
    model, made = twice
    for _ in range(2):  # over the one that stands there, too
        veneer.save_base(model, made, tmp_path / "base")
    veneer.save(model, tmp_path / "adapter")
    assert f'"base_model_name_or_path": "{tmp_path / "base"}"' in (tmp_path / "adapter/adapter_config.json").read_text()
    again, _ = veneer.load(tmp_path / "base")
    veneer.load_adapter(again, tmp_path / "adapter")
    ids = tiny.batch("llama")
    assert torch.equal(tiny.logits(again, ids), tiny.logits(model, ids))
    before = tiny.logits(model, ids)
    veneer.remove(model)
    assert not torch.equal(tiny.logits(model, ids), before)
    assert torch.equal(tiny.logits(model, ids), tiny.logits(veneer.load(tmp_path / "base")[0], ids))


def test_what_a_changed_base_does_not_allow_is_refused(twice, tiny_folder, tmp_path):
    model, made = twice
    with pytest.raises(
        TargetError, match=r"^loftq_iterations = 2 changed the base, which this adapter needs; save it fir"
    ):
        veneer.save(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    with pytest.raises(
        TargetError, match=r"^loftq_iterations = 2 changed the base, so it cannot be given back; load the"
    ):
        veneer.remove(model)
    assert list(adapters_of(model).configs) == ["default"]
    veneer.merge(model)
    with pytest.raises(TargetError, match=r"unmerge\(model\) before you save the base"):
        veneer.save_base(model, made, tmp_path / "base")

    other, _ = veneer.load(tiny_folder, storage="nf4")
    veneer.attach(other, LOFTQ, "first")
    codes = other.model.layers[0].mlp.up_proj.base.codes.clone()
    with pytest.raises(
        TargetError, match=r"^loftq_iterations = 2 changes the base under first; remove what is attached"
    ):
        veneer.attach(other, TWICE)
    assert torch.equal(other.model.layers[0].mlp.up_proj.base.codes, codes)

    whole, _ = veneer.load(tiny_folder, storage="int8")
    with pytest.raises(
        TargetError, match=r"changes the base, which could not be saved in int8; use nf4 or fp4, or loftq"
    ):
        veneer.attach(whole, TWICE)
    with pytest.raises(
        TargetError, match=r"^save_base writes a base that is kept in nf4 or fp4; for any other use save_"
    ):
        veneer.save_base(veneer.load(tiny_folder)[0], made, tmp_path / "base")
    with pytest.raises(ConfigError, match=r"loftq_iterations = 2 is of init = 'loftq', and init is 'kaiming'"):
        veneer.LoRA(loftq_iterations=2)
    assert not (tmp_path / "base").exists()


def test_a_run_over_a_changed_base_resumes_to_the_same_bytes_and_is_opened(tiny_folder, rows_file, tmp_path):
    """From its own base: after its first checkpoint, from its last, and after the folder was moved."""
    console = Console(file=io.StringIO())
    options = {"steps": 6, "rank": 4, "batch_size": 8, "learning_rate": 1e-2, "held_out": 8, "checkpoint_every": 3}
    run = tmp_path / "run"
    result = veneer.train(
        str(tiny_folder), data=str(rows_file), output=str(run), storage="nf4", init="loftq", loftq_iterations=2,
        keep_checkpoints=9, dropout=0.1, console=console, **options,
    )  # fmt: skip
    wanted = (run / "adapter/adapter_model.safetensors").read_bytes()
    ids = {"input_ids": torch.tensor([[72, 69, 76, 76, 79]])}
    logits = tiny.logits(result.model, ids)
    for last in ("step-000003", "step-000000"):
        for later in ("adapter", "best"):
            shutil.rmtree(run / later)
        for checkpoint in (run / "checkpoints").iterdir():
            if checkpoint.name > last:
                shutil.rmtree(checkpoint)
        resume(run, console=console)
        assert (run / "adapter/adapter_model.safetensors").read_bytes() == wanted
    assert torch.equal(tiny.logits(open_named(run / "adapter").model, ids), logits)
    moved = run.rename(tmp_path / "moved")
    assert torch.equal(tiny.logits(open_named(moved).model, ids), logits)
    assert torch.equal(tiny.logits(open_run(moved).model, ids), logits)
