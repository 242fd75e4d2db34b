"""What of generation_config.json is followed, on every path alike, and what is named."""

from __future__ import annotations

import json
import re
import warnings

import pytest
import torch
import transformers as tf

import veneer
from tokens import tokenizer
from veneer.data.formats import Example
from veneer.data.labels import Renderer
from veneer.evaluation.compare import compare
from veneer.generation import batched, decoder
from veneer.generation.config import SamplingOptions
from veneer.generation.generate import continuations, exact_matches
from veneer.generation.own_settings import not_followed
from veneer.generation.session import Session
from veneer.generation.stream import pieces
from veneer.kernels.backends import cpu

pytestmark = pytest.mark.unit
MADE = tokenizer()
# What once changed answers on one path alone, or was a traceback there.
OTHERS = {
    "num_beams": 3, "no_repeat_ngram_size": 2, "num_return_sequences": 3, "return_dict_in_generate": True,
    "output_scores": True, "stop_strings": ["a"], "penalty_alpha": 0.6, "dola_layers": "high", "guidance_scale": 2.0,
    "cache_implementation": "quantized", "prompt_lookup_num_tokens": 2, "min_new_tokens": 3, "top_k": 2,
    "do_sample": True, "sequence_bias": [[[5], 9.0]], "temperature": 3.0, "repetition_penalty": 1.5,
    "forced_eos_token_id": 20,
}  # fmt: skip


def _llama(**config):
    torch.manual_seed(1)
    made = tf.LlamaConfig(
        vocab_size=len(MADE), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, eos_token_id=None, bos_token_id=None, **config,
    )  # fmt: skip
    return tf.LlamaForCausalLM(made).eval()


def _t5():
    torch.manual_seed(2)
    config = tf.T5Config(
        vocab_size=len(MADE), d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, pad_token_id=0,
        decoder_start_token_id=0, eos_token_id=None, initializer_factor=0.7,
    )  # fmt: skip
    return tf.T5ForConditionalGeneration(config).eval()


def _mamba():
    torch.manual_seed(3)
    config = tf.MambaConfig(
        vocab_size=len(MADE), hidden_size=32, num_hidden_layers=1, state_size=4, eos_token_id=None, bos_token_id=None,
        pad_token_id=0, initializer_range=0.5,
    )  # fmt: skip
    return tf.MambaForCausalLM(config).eval()


MODELS = {"kernels": _llama, "torch": _llama, "seq2seq": _t5, "state": _mamba}


@pytest.fixture(params=[
    pytest.param("kernels", marks=pytest.mark.skipif(not cpu.VARIANTS, reason="the C++ kernels were not built")),
    "torch", "seq2seq", "state",
])  # fmt: skip
def way(request, monkeypatch):
    """(model, renderer) by each of the ways to generate."""
    if request.param == "torch":
        monkeypatch.setattr(decoder, "Decoder", _refusing)
    return MODELS[request.param](), Renderer(MADE, seq2seq=request.param == "seq2seq")


def _refusing(*_):
    raise decoder.Unsupported


def _tokens(model, renderer, prompt, count=8, **how):
    session = Session(model, renderer)
    session.add(prompt, max_new_tokens=count, **how)
    said = []
    while session.keys():
        said += [added.token for added in session.step()]
    return said


def _by_transformers(model, prompt, count=8, **how):
    ids = torch.tensor([prompt])
    start = 1 if model.config.is_encoder_decoder else len(prompt)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.generate(ids, max_new_tokens=count, do_sample=False, pad_token_id=0, **how)[0, start:].tolist()


def test_tokens_that_are_never_said_are_those_of_transformers(way):
    model, renderer = way
    prompt = [5, 6, 7, 8, 9]
    plain = _tokens(model, renderer, prompt)
    assert plain == _by_transformers(model, prompt)
    settings = model.generation_config
    for name, value in (
        ("suppress_tokens", plain[1:3]),
        ("begin_suppress_tokens", plain[:1]),
        ("bad_words_ids", [plain[1:2], plain[2:4]]),
    ):
        setattr(settings, name, value)
        others = _tokens(model, renderer, prompt)
        assert others == _by_transformers(model, prompt), name
        assert others != plain, name
    settings.eos_token_id = others[3]
    assert _tokens(model, renderer, prompt) == _by_transformers(model, prompt)[: others.index(others[3]) + 1]


def test_an_encoder_decoders_answer_begins_with_the_token_that_it_is_given():
    model = _t5()
    model.generation_config.forced_bos_token_id = 42
    model.generation_config.begin_suppress_tokens = [_by_transformers(model, [5, 6])[1]]
    said = _tokens(model, Renderer(MADE, seq2seq=True), [5, 6])
    assert said == _by_transformers(model, [5, 6])
    assert said[0] == 42


def test_a_penalty_that_is_given_is_that_of_transformers(way):
    model, renderer = way
    model.generation_config.eos_token_id = renderer.ends()
    plain = _tokens(model, renderer, [5, 6, 7, 8, 9])
    others = []
    for penalty in (0.2, 1.8):
        for prompt in ([5, 6, 7, 8, 9], [12]):
            said = _tokens(model, renderer, prompt, repetition_penalty=penalty)
            assert said == _by_transformers(model, prompt, repetition_penalty=penalty)
            others.append(said)
    assert others[0] != plain or others[2] != plain


def test_no_other_setting_changes_an_answer(way):
    model, renderer = way
    plain = _tokens(model, renderer, [5, 6, 7])
    sampled = _tokens(model, renderer, [5, 6, 7], temperature=1.5, seed=3)
    model.generation_config.update(**OTHERS)
    assert _tokens(model, renderer, [5, 6, 7]) == plain
    assert _tokens(model, renderer, [5, 6, 7], temperature=1.5, seed=3) == sampled
    assert model.generation_config.num_beams == 3, "and it is as it was"
    assert len(continuations(model, renderer, [[5, 6], [7]], max_new_tokens=3)) == 2


HOWS = [
    {},
    {"repetition_penalty": 1.4},
    {"temperature": 1.5},
    {"temperature": 1.5, "top_k": 5},
    {"temperature": 1.5, "top_p": 0.6},
    {"temperature": 1.5, "min_p": 0.2},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 1.2},
]


@pytest.mark.skipif(not cpu.VARIANTS, reason="the C++ kernels were not built")
def test_the_kernels_and_transformers_pass_say_the_same(monkeypatch):
    model, renderer = _llama(), Renderer(MADE)
    model.generation_config.update(suppress_tokens=[5, 6], bad_words_ids=[[9, 10]], repetition_penalty=1.3)
    prompts = [[5, 6, 7, 8, 9], [12], list(range(20, 44))]
    said = {}
    for path in ("kernels", "torch"):
        if path == "torch":
            monkeypatch.setattr(decoder, "Decoder", _refusing)
        said[path] = [
            continuations(model, renderer, prompts, max_new_tokens=10, seed=seed, **how)
            for how in HOWS for seed in (1, 2)
        ]  # fmt: skip
    assert said["kernels"] == said["torch"]
    assert len({str(texts) for texts in said["torch"]}) == 2 * len(HOWS) - 2, "greedy has no seed"


def test_the_same_prompt_and_seed_give_the_same_text_in_a_list(way):
    model, renderer = way
    prompts = [[5, 6, 7, 8, 9], [12], [13, 14, 15]]
    how = {**HOWS[-1], "max_new_tokens": 8, "seed": 4}
    alone = [continuations(model, renderer, [prompt], **how)[0] for prompt in prompts]
    assert continuations(model, renderer, prompts[::-1], **how) == alone[::-1]


def test_a_stop_text_ends_an_answer_on_every_path(way):
    model, renderer = way
    model.generation_config.suppress_tokens = list(range(128, len(MADE)))  # characters of one token
    (whole,) = continuations(model, renderer, [[5, 6, 7]], max_new_tokens=20)
    stop = whole[4:7]
    end = whole.index(stop)
    how = {"max_new_tokens": 20, "stop": [stop, "never said"]}
    assert continuations(model, renderer, [[5, 6, 7]], **how) == [whole[:end]]
    streamed = list(pieces(model, renderer, [5, 6, 7], **how))
    assert "".join(streamed) == whole[:end]
    steps = _tokens(model, renderer, [5, 6, 7], 20, stop=stop)
    assert MADE.decode(steps) == whole[: end + len(stop)], "no step after it"


def test_a_special_token_stops_too():
    model, renderer = _llama(), Renderer(MADE)
    special = MADE.convert_tokens_to_ids("<|user|>")
    with torch.no_grad():
        model.lm_head.weight[special] = model.lm_head.weight[_tokens(model, renderer, [5, 6])[2]] * 1.5
    said = _tokens(model, renderer, [5, 6])
    assert special in said
    assert _tokens(model, renderer, [5, 6], stop="<|user|>") == said[: said.index(special) + 1]


def test_settings_that_are_not_followed_are_named_once():
    model = _llama()
    assert not_followed(model, SamplingOptions()) == ""
    settings = {"do_sample": True, "temperature": 0.7, "top_k": 20, "repetition_penalty": 1.05, "num_beams": 4}
    model.generation_config.update(**settings)
    sentence = (
        "Veneer does not follow the model's generation_config.json in temperature=0.7, top_k=20, "
        "repetition_penalty=1.05, num_beams=4; of these you can give temperature, top_k, repetition_penalty as options."
    )
    with pytest.warns(UserWarning, match=f"^{re.escape(sentence)}$") as said:
        veneer.generate(model, MADE, ["a", "b"], max_new_tokens=2)
    assert len(said) == 1
    assert said[0].filename == __file__
    given = SamplingOptions(temperature=1.0, top_k=5, repetition_penalty=1.0)
    assert not_followed(model, given) == ("Veneer does not follow the model's generation_config.json in num_beams=4.")
    model.generation_config.update(do_sample=False, num_beams=1)
    assert "temperature" not in not_followed(model, SamplingOptions()), "transformers samples nothing with it either"


def test_settings_that_are_no_tokens_are_a_sentence():
    model = _llama()
    model.generation_config.suppress_tokens = ["x"]
    with pytest.raises(
        veneer.VeneerError,
        match=r"^The model's generation_config\.json has suppress_tokens = \['x'\]; it takes token ids\.$",
    ):
        veneer.generate(model, MADE, "a")


def test_commands_name_them_on_standard_error(tiny_folder, tmp_path, veneer_command):
    model, made = veneer.load(tiny_folder)
    plain = veneer_command("generate", tiny_folder, "x", "--max-new-tokens", 4)
    for part in (model, made):
        part.save_pretrained(tmp_path / "beams")
    file = tmp_path / "beams" / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_beams": 4, "repetition_penalty": 0.2}))
    note = (
        "Veneer does not follow the model's generation_config.json in repetition_penalty=0.2, num_beams=4; of these "
        "you can give repetition_penalty as options.\n"
    )
    done = veneer_command("generate", tmp_path / "beams", "x", "--max-new-tokens", 4)
    assert done == (0, plain.out, note)
    assert veneer_command("chat", tmp_path / "beams", "--max-new-tokens", 4, stdin="x\n").err == note
    (tmp_path / "rows.jsonl").write_text('{"prompt": "x"}\n')
    asked = ("predict", tmp_path / "beams", tmp_path / "rows.jsonl", "--max-new-tokens", 4)
    assert note.strip() in veneer_command(*asked).err
    done = veneer_command("generate", tmp_path / "beams", "x", "--max-new-tokens", 4, "--repetition-penalty", 0.2)
    assert "repetition_penalty" not in done.err
    assert done.out != plain.out


def test_exact_matches_are_the_same_with_other_settings():
    model, renderer = _llama(), Renderer(MADE)
    model.generation_config.suppress_tokens = list(range(94, len(MADE)))  # printable characters of one token
    model.generation_config.eos_token_id = _tokens(model, renderer, renderer.encode("ab"))[4]
    (said,) = continuations(model, renderer, [renderer.encode("ab")], max_new_tokens=6)
    rows = [Example("d", prompt="ab", answer=said)]
    before = exact_matches(model, renderer, rows, 1)
    assert before == [True]
    veneer.attach(model, veneer.LoRA(rank=2))
    assert compare(model, renderer, rows, exact_match=True).note == ""
    model.generation_config.update(**OTHERS)
    assert exact_matches(model, renderer, rows, 1) == before
    measured = compare(model, renderer, rows, exact_match=True)
    assert measured.adapter.exact_match == 1
    assert measured.note.startswith("Veneer does not follow the model's generation_config.json in temperature=3.0, ")


def test_a_model_in_training_answers_without_dropout(monkeypatch):
    monkeypatch.setattr(decoder, "Decoder", _refusing)
    model, renderer = _llama(attention_dropout=0.5), Renderer(MADE)
    wanted = _tokens(model, renderer, [5, 6, 7])
    model.train()
    model.lm_head.eval()
    assert _tokens(model, renderer, [5, 6, 7]) == wanted
    assert model.training
    assert model.model.layers[0].self_attn.training
    assert not model.lm_head.training


def test_no_path_is_given_the_models_settings(monkeypatch):
    """Whatever transformers may add to its settings: its generate sees none of the model's."""
    model = _t5()
    model.generation_config.update(**OTHERS)
    seen = []
    generate = type(model).generate
    monkeypatch.setattr(type(model), "generate", lambda self, **how: seen.append(self.generation_config.to_diff_dict())
                        or generate(self, **how))  # fmt: skip
    _tokens(model, Renderer(MADE, seq2seq=True), [5])
    assert seen
    assert not set(OTHERS) & set(seen[0])
    assert batched.GenerationConfig is tf.GenerationConfig
