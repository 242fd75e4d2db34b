"""Labels are those that evaluate chooses, texts those that generate gives, row by row; what was computed is kept."""

from __future__ import annotations

import io
import json
import math
import shutil

import datasets
import pandas
import pytest
import torch
import transformers as tf
from rich.console import Console

import veneer
from tokens import tokenizer as make_tokenizer
from veneer.data.formats import to_examples
from veneer.data.read import read_rows
from veneer.errors import ArgumentError, ConfigError, DataError, ModelError
from veneer.generation.likelihood import likeliest
from veneer.prediction import answers as kinds
from veneer.prediction.memory import batched
from veneer.prediction.progress import PredictionProgress
from veneer.runs.opened import open_named, open_run

pytestmark = pytest.mark.unit

PROMPTS = ["one", "a longer question, with a comma", "three?", "x", "Is this so", "12 + 30 =", "why", "x y", "z"]
ROWS = [{"prompt": prompt, "id": number} for number, prompt in enumerate(PROMPTS)]


def _predict(*given, **options):
    said = io.StringIO()
    console = Console(file=said, width=1000)
    result = veneer.predict(*given, console=console, **options)
    return result, said.getvalue()


def test_a_runs_labels_are_those_that_evaluate_chooses(finished_run):
    evaluation = finished_run / "evaluation.json"
    before = evaluation.read_bytes() if evaluation.exists() else None
    file = finished_run.parent / "rows.jsonl"
    result, said = _predict(finished_run, data=file)
    prepared = open_run(finished_run)
    examples = to_examples(read_rows(file)).items
    chosen = likeliest(prepared.model, prepared.renderer, examples, [" no", " yes"], 16)
    assert [each.text for each in result] == [label.strip() for label in chosen]
    assert {each.text for each in result} == {"no", "yes"}
    assert result.labels == ("no", "yes")
    assert "The rows have answers (the column completion), which are not read." in result.notes
    assert "48 rows, 2 labels (no, yes). Passes of up to 1,024 tokens, about " in said
    assert (evaluation.read_bytes() if evaluation.exists() else None) == before


@torch.no_grad()
def test_probabilities_are_those_of_a_plain_computation(loaded):
    """Of labels of one token and of several, which begin alike, after prompts that do so, too."""
    model, tokenizer = loaded
    labels = [" yes", " yet", " no"]
    for before in ("", "What all of them begin with: "):
        rows = [{"prompt": before + prompt} for prompt in PROMPTS]
        result, _ = _predict(model, tokenizer, data=rows, labels=labels, batch_tokens=60)
        for row, each in zip(rows, result, strict=True):
            ids = tokenizer(row["prompt"], add_special_tokens=False).input_ids
            scores = []
            for label in labels:
                answer = tokenizer(label, add_special_tokens=False).input_ids
                logits = model(input_ids=torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1]
                scores.append(float(logits.log_softmax(-1)[range(len(answer)), answer].sum()))
            wanted = torch.tensor(scores, dtype=torch.float64).softmax(0).tolist()
            assert list(each.probabilities.values()) == pytest.approx(wanted, rel=1e-3, abs=1e-6)
            assert each.text == labels[max(range(3), key=scores.__getitem__)].strip()


def test_a_classifiers_classes(finished_classifier):
    rows = [{"text": prompt} for prompt in PROMPTS]
    result, _ = _predict(finished_classifier, data=rows, batch_tokens=20)
    opened = open_named(finished_classifier)
    for row, each in zip(rows, result, strict=True):
        ids = torch.tensor([opened.renderer.tokenizer(row["text"]).input_ids])
        with torch.no_grad():
            wanted = opened.model(ids).logits[0].softmax(-1).tolist()
        assert list(each.probabilities.values()) == pytest.approx(wanted, rel=1e-4)
        assert list(each.probabilities) == list(opened.renderer.classes)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_texts_are_those_that_generate_gives(loaded, temperature, monkeypatch):
    monkeypatch.setattr(kinds, "_LIVE", 4)  # fewer than rows, so that some join while others go on
    how = {
        "max_new_tokens": 6,
        "temperature": temperature,
        "seed": 5,
        "repetition_penalty": 1.2,
        "stop": ["a", "\ufffd"],
    }
    result, said = _predict(*loaded, data=ROWS, **how)
    assert [each.text for each in result] == [veneer.generate(*loaded, prompt, **how) for prompt in PROMPTS]
    assert result.labels == ()
    assert "9 rows, texts." in said


def test_conversations_are_answered_without_their_last_answer(loaded):
    asked = [[{"role": "user", "content": prompt}] for prompt in PROMPTS[:3]]
    wanted = [veneer.generate(*loaded, messages, max_new_tokens=4) for messages in asked]
    answered = [{"messages": [*messages, {"role": "assistant", "content": "no"}]} for messages in asked]
    for rows in ([{"messages": messages} for messages in asked], answered):
        result, _ = _predict(*loaded, data=rows, max_new_tokens=4)
        assert [each.text for each in result] == wanted
    labelled, _ = _predict(*loaded, data=answered, labels=["yes", "no"])
    assert sum(labelled[0].probabilities.values()) == pytest.approx(1, abs=1e-5)


def test_an_encoder_decoder_answers_by_text_and_by_label():
    made = make_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = tf.T5Config(
            vocab_size=len(made), d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, pad_token_id=0,
            decoder_start_token_id=0, eos_token_id=made.eos_token_id,
        )  # fmt: skip
        model = tf.T5ForConditionalGeneration(config).eval()
    texts, _ = _predict(model, made, data=ROWS[:3], max_new_tokens=4)
    assert [each.text for each in texts] == veneer.generate(model, made, PROMPTS[:3], max_new_tokens=4)
    labels, _ = _predict(model, made, data=ROWS[:3], labels=["yes", "no", "perhaps"])
    assert all(sum(each.probabilities.values()) == pytest.approx(1, abs=1e-5) for each in labels)


def test_rows_come_in_every_form_and_go_to_a_frame(loaded):
    frame = pandas.DataFrame(ROWS)
    results = [_predict(*loaded, data=data, labels=["a", "b"])[0]
               for data in (ROWS, frame, datasets.Dataset.from_list(ROWS))]  # fmt: skip
    assert results[0].records() == results[1].records() == results[2].records()
    made = results[0].to_pandas()
    assert list(made.columns) == ["prompt", "id", "prediction", "probability_a", "probability_b"]
    assert list(made["id"]) == list(range(9))
    assert len(results[0]) == 9
    assert repr(results[0]) == "Predictions(9 rows, of 2 labels)"
    assert "<td" in results[0]._repr_html_()


class Interrupted(PredictionProgress):
    def add(self, rows):
        super().add(rows)
        raise KeyboardInterrupt


@pytest.fixture
def interrupted(loaded, tmp_path, monkeypatch):
    """An output of which the first batch was computed."""
    output = tmp_path / "out.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr("veneer.prediction.predict.PredictionProgress", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            _predict(*loaded, data=ROWS, labels=["a", "b"], output=output, batch_tokens=80)
    assert not output.exists()
    return output, tmp_path / "out.jsonl.partial"


def test_an_interrupted_prediction_goes_on_and_computes_no_row_twice(loaded, tmp_path, monkeypatch, passed):
    output = tmp_path / "out.jsonl"
    options = {"data": ROWS, "labels": ["a", "b"], "batch_tokens": 40}
    with monkeypatch.context() as patch:
        patch.setattr("veneer.prediction.predict.PredictionProgress", Interrupted)
        times = 0
        while not output.exists() and times < 20:
            times += 1
            try:
                _predict(*loaded, output=output, **options)
            except KeyboardInterrupt:
                continue
    assert times > 2
    assert sum(passed) == 2 * len(ROWS), "a pass over the prompt, and one over the labels' second tokens"
    result, _ = _predict(*loaded, output=output, overwrite=True, **options)
    assert result.reused == 0
    whole, _ = _predict(*loaded, **options)
    assert [json.loads(line) for line in output.read_text().splitlines()] == whole.records()
    assert not output.with_name("out.jsonl.partial").exists()


def test_what_was_kept_is_said(interrupted, loaded, passed):
    output, kept = interrupted
    there = len(kept.read_text().splitlines()) - 1
    result, said = _predict(*loaded, data=ROWS, labels=["a", "b"], output=output)
    assert result.reused == there > 0
    assert sum(passed) == 2 * (len(ROWS) - there)
    assert f"{there} rows were predicted before the interruption, and kept." in said
    assert not kept.exists()


def test_a_line_that_a_kill_cut_off_is_computed_again(interrupted, loaded):
    output, kept = interrupted
    there = len(kept.read_text().splitlines()) - 1
    kept.write_text(kept.read_text()[:-9])
    result, _ = _predict(*loaded, data=ROWS, labels=["a", "b"], output=output)
    assert result.reused == there - 1
    assert len(output.read_text().splitlines()) == len(ROWS)


def test_what_was_predicted_otherwise_is_refused_by_name(interrupted, loaded):
    output, kept = interrupted
    before = kept.read_text()
    same = {"data": ROWS, "labels": ["a", "b"], "output": output}
    refusals = [
        ({"data": ROWS[1:]}, "predicted with other rows; give --overwrite to start from the first row"),
        ({"labels": ["a", "c"]}, r"predicted with labels = \['a', 'b'\], not \['a', 'c'\];"),
        ({"max_length": 5}, "predicted with max_length = 128, not 5;"),
    ]
    for changed, message in refusals:
        with pytest.raises(DataError, match=rf"out\.jsonl\.partial holds \d rows that were {message}"):
            _predict(*loaded, **{**same, **changed})
        assert kept.read_text() == before
    model = tf.AutoModelForCausalLM.from_config(loaded[0].config)
    with pytest.raises(DataError, match="predicted with another model or adapter;"):
        _predict(model, loaded[1], **same)
    kept.write_text('{"model": 3}\n[]\n')
    with pytest.raises(DataError, match=r"out\.jsonl\.partial is damaged; delete it"):
        _predict(*loaded, **same)
    kept.write_text(before)
    result, _ = _predict(*loaded, **{**same, "data": ROWS[1:], "overwrite": True})
    assert (len(result), result.reused) == (8, 0)


def test_two_at_once_are_refused(interrupted, loaded):
    import fcntl

    output, kept = interrupted
    with kept.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(DataError, match=r"^Another process is predicting into .*out\.jsonl; wait until it ends"):
            _predict(*loaded, data=ROWS, labels=["a", "b"], output=output)


def test_an_output_that_exists_is_kept(loaded, tmp_path):
    output = tmp_path / "out.csv"
    output.write_text("mine")
    with pytest.raises(DataError, match=r"out\.csv exists; choose another output, or give --overwrite to replace it"):
        _predict(*loaded, data=ROWS, labels=["a", "b"], output=output)
    assert output.read_text() == "mine"
    _predict(*loaded, data=ROWS, labels=["a", "b"], output=output, overwrite=True)
    assert output.read_text().startswith("prompt,id,prediction,probability_a,probability_b\none,0,")


def test_long_prompts_are_cut_and_said(loaded, finished_classifier):
    result, said = _predict(*loaded, data=ROWS, max_length=8, max_new_tokens=2)
    note = (
        "3 prompts are longer than max_length = 8 tokens (row 2 of the given rows, row 5 of the given rows, row 6 of "
    )
    assert note in said
    assert said.count("the end is kept") == len(result.notes) == 1
    assert result[1].text == veneer.generate(*loaded, PROMPTS[1][-8:], max_new_tokens=2)
    _, said = _predict(*loaded, data=ROWS, max_length=9, labels=["a", "b"])
    assert "3 prompts are longer than max_length = 9 tokens" in said, "with a label after it"
    _, said = _predict(finished_classifier, data=[{"text": "a" * 20}], max_length=8)
    assert "1 prompt is longer than max_length = 8 tokens (row 1 of the given rows): the beginning is kept." in said


def test_passes_fit_the_memory_that_is_available(loaded, monkeypatch, tmp_path):
    monkeypatch.setattr("veneer.prediction.memory.anonymous_memory", lambda: 0)
    monkeypatch.setattr("veneer.prediction.memory.usable_memory", lambda device: 500_000)
    _, said = _predict(*loaded, data=ROWS, labels=["a", "b"])
    assert "of 0.5 MB available, fewer than 1,024 so that they fit." in said
    monkeypatch.setattr("veneer.prediction.memory.usable_memory", lambda device: 20_000)
    with pytest.raises(ModelError, match=r"^row 2 of the given rows takes 32 tokens in a pass, and the available "
                                         r"memory is enough for \d+; lower max_length, or free memory\.$"):  # fmt: skip
        _predict(*loaded, data=ROWS, labels=["a", "b"], output=tmp_path / "out.csv")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": ["a"]}, "labels has one label; give two or more that differ"),
        ({"labels": ["a", "a "]}, "labels has 'a' twice"),
        ({"answer": "label"}, "answer is label, and the model's labels are not known; name them with --labels"),
        ({"answer": "text", "labels": ["a", "b"]}, "labels are given, and answer is text"),
        ({"labels": ["a", "b"], "temperature": 1.0}, "^temperature does nothing where labels are chosen"),
        ({"max_length": 500}, "max_length = 500 is more than the 128 tokens that the model can take"),
        ({"batch_size": 3}, "no option 'batch_size'. Did you mean 'batch_tokens'"),
        ({"output": "out.txt"}, r"The output out\.txt ends in \.txt; it may end in \.jsonl, \.csv, \.parquet\."),
    ],
)
def test_options_that_make_no_sense_are_refused(loaded, options, message, passed):
    with pytest.raises(ConfigError, match=message):
        _predict(*loaded, data=ROWS, **options)
    assert passed == []


def test_a_classifier_chooses_among_its_own(finished_classifier):
    for options, what in [
        ({"answer": "text"}, "answer text"),
        ({"labels": ["a", "b"]}, "labels"),
        ({"seed": 3}, "seed"),
    ]:
        with pytest.raises(ConfigError, match=f"^The model is a classifier, to which {what} does nothing"):
            _predict(finished_classifier, data=ROWS, **options)
    with pytest.raises(DataError, match="is a conversation; a classifier reads a text or a prompt"):
        _predict(finished_classifier, data=[{"messages": [{"role": "user", "content": "a"}]}])
    opened = open_named(finished_classifier)
    opened.model.config.problem_type = "multi_label_classification"
    found, _ = _predict(opened.model, opened.renderer.tokenizer, data=ROWS)
    assert all(each.labels == tuple(name for name, p in each.probabilities.items() if p > 0.5) for each in found)


def test_what_is_no_model_is_refused(loaded, tiny_encoder):
    with pytest.raises(
        ArgumentError, match=r"^predict takes a run, an adapter or a model, by path or loaded, not the int"
    ):
        _predict(3, data=ROWS)
    with pytest.raises(ArgumentError, match=r"^predict takes the model's tokenizer as tokenizer, not None"):
        _predict(loaded[0], data=ROWS)
    with pytest.raises(ArgumentError, match=r"^predict takes a tokenizer with a loaded model"):
        _predict("some/path", loaded[1], data=ROWS)
    with pytest.raises(DataError, match="The given data holds no rows"):
        _predict(*loaded, data=[])


def test_an_adapter_and_a_models_own_weights(finished_run, tiny_folder, tmp_path):
    rows = [{"prompt": "bat:"}, {"prompt": "mat:"}]
    run, _ = _predict(finished_run, data=rows)
    adapter, _ = _predict(finished_run / "adapter", data=rows, labels=["no", "yes"])
    assert adapter.records() == run.records()
    alone = shutil.copytree(finished_run / "adapter", tmp_path / "alone")
    assert _predict(alone, data=rows)[0].records() == run.records(), "its folder knows its labels"
    text, _ = _predict(finished_run, data=rows, answer="text", max_new_tokens=4)
    assert [each.text.strip() for each in text] == ["yes", "no"]
    base, _ = _predict(tiny_folder, data=rows, labels=["no", "yes"])
    assert base.records() != run.records(), "the base is another model"


def test_a_run_that_did_not_write_its_labels_down_reads_its_rows(finished_run, tmp_path):
    folder = shutil.copytree(finished_run, tmp_path / "run")
    rows = json.loads((folder / "rows.json").read_text())
    assert rows.pop("choices") == [" no", " yes"]
    (folder / "rows.json").write_text(json.dumps(rows))
    assert _predict(folder, data=[{"prompt": "bat:"}])[0].labels == ("no", "yes")
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("rows.jsonl", "gone.jsonl"))
    with pytest.raises(
        DataError, match=r"There is no file .*gone\.jsonl.* the labels of .*run are not known; name them"
    ):
        _predict(folder, data=[{"prompt": "bat:"}])
    assert _predict(folder, data=[{"prompt": "bat:"}], answer="text")[0].labels == ()


def test_probabilities_have_six_digits(loaded):
    result, _ = _predict(*loaded, data=ROWS, labels=["a", "b"])
    for each in result:
        assert math.isclose(sum(each.probabilities.values()), 1, abs_tol=1e-5)
        assert all(float(f"{p:.6g}") == p for p in each.probabilities.values())


def test_rows_of_one_length_are_a_batch_of_their_own():
    assert batched([0, 1, 2, 3, 4], [5, 5, 4, 4, 4], 20, 9) == [[0, 1], [2, 3, 4]]
    assert batched([0, 1, 2, 3], [5, 4, 4, 4], 20, 9) == [[0, 1], [2, 3]]
    assert batched([0, 1, 2], [5, 5, 5], 20, 2) == [[0, 1], [2]]
    assert batched([0, 1], [50, 5], 20, 9) == [[0], [1]], "one that is longer than a batch is alone"
