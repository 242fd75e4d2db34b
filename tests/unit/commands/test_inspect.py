"""veneer inspect: what is in a model, an adapter, a run or rows, told to a person and as JSON."""

from __future__ import annotations

import json
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

import tiny
import veneer
from veneer.frozen.compute import computing
from veneer.kernels.serving import serving, serving_line
from veneer.runs.folder import RunFolder

pytestmark = pytest.mark.unit


def _json(veneer_command, *arguments):
    done = veneer_command("inspect", *arguments, "--json")
    assert done.code == 0, done.err
    return json.loads(done.out)


def test_a_model(tiny_folder, veneer_command):
    kinds = dict.fromkeys(["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], 2)
    found = _json(veneer_command, tiny_folder)
    assert found == {
        "kind": "model", "class": "LlamaForCausalLM", "parameters": 32224, "targets": {**found["targets"], **kinds},
        "head": ["lm_head"], "chat_template": True, "end_token": "<|end|>",
        "kernels": serving(), "compute": dict.fromkeys(("fp32", "bf16", "nf4"), "fp32"),
        "fused": {"LlamaRMSNorm": 5, "LlamaMLP": 2, "LlamaAttention": 2},
        "generates_by": "transformers (heads of another size)",
    }  # fmt: skip
    out = veneer_command("inspect", tiny_folder).out
    assert out.startswith(f"{tiny_folder}: LlamaForCausalLM, 32,224 parameters\n")
    assert "\n  q_proj                  2\n" in out
    assert out.endswith(
        "head, left out of all-linear: lm_head\nchat template: yes; end token: <|end|>\n"
        f"4-bit kernels on this CPU: {serving_line()}\n"
        f"compute: auto, for a base kept in fp32: {computing('auto', 'fp32')}\n"
        f"compute: auto, for a base kept in 16 bits: {computing('auto', 'bf16')}\n"
        f"compute: auto, for a base kept in codes: {computing('auto', 'nf4')}\n"
        "fused while it trains: 2 LlamaAttention, 2 LlamaMLP, 5 LlamaRMSNorm\n"
        "generates by transformers (heads of another size)\n"
    )


def test_an_adapter(finished_run, tiny_folder, veneer_command):
    adapter = finished_run / "adapter"
    tensors = load_file(adapter / "adapter_model.safetensors")
    count = sum(tensor.numel() for tensor in tensors.values())
    assert _json(veneer_command, adapter) == {
        "kind": "adapter", "base": str(tiny_folder), "rank": 8, "alpha": 16, "parameters": count,
        "tensors": {key: list(tensor.shape) for key, tensor in tensors.items()},
        "ranks": {
            key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): 8
            for key in tensors if key.endswith("lora_A.weight")
        },
        "trained": json.loads((adapter / "veneer.json").read_text()),
    }  # fmt: skip
    first, *lines = veneer_command("inspect", adapter).out.splitlines()
    assert first == f"adapter {adapter} for {tiny_folder}: rank 8, alpha 16, {count:,} parameters"
    assert "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight  8 × 48" in lines
    assert lines[:2] == [
        "trained over tiny0 (LlamaForCausalLM, 32,224 parameters) in fp32",
        "on 32 rows of the shape prompt/completion, 100 steps of method lora",
    ]
    assert "questions are asked as they are" in lines
    assert lines[lines.index("ranks:") :] == [
        "ranks:",
        "layer   down_proj  gate_proj  up_proj  k_proj  o_proj  q_proj  v_proj",
        "    0           8          8        8       8       8       8       8",
        "    1           8          8        8       8       8       8       8",
    ]


def test_the_ranks_of_an_adalora_adapter(tmp_path, veneer_command, refused):
    model = tiny.build("gpt2")
    torch.manual_seed(0)
    veneer.attach(model, veneer.AdaLoRA(initial_rank=3, target_rank=2, total_steps=4, targets=["c_attn", "c_proj"]))
    kept = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [0, 0, 0], [1, 1, 1], [1, 1, 1]]).bool()
    veneer.allocator(model).fix(kept)
    veneer.save(model, tmp_path / "a")
    picture = tmp_path / "ranks.png"
    out = veneer_command("inspect", tmp_path / "a", "--png", picture).out.splitlines()
    assert "AdaLoRA, 12 of 3 × 6 triplets, alpha 6" in out[0]
    assert out[-4:] == [
        "layer   c_attn  attn.c_proj  mlp.c_proj",
        "    0        3            1           2",
        "    1        0            3           3",
        f"heat map written to {picture}",
    ]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert _json(veneer_command, tmp_path / "a")["ranks"]["transformer.h.1.attn.c_attn"] == 0
    said = refused("inspect", tmp_path, "--png", picture)
    assert said == f"--png draws the ranks of an adapter, and {tmp_path} is no adapter folder."


def test_a_run(finished_run, veneer_command, tmp_path):
    found = _json(veneer_command, finished_run)
    held_out = [[r["step"], r["held_out_loss"]] for r in RunFolder(finished_run).metrics() if "held_out_loss" in r]
    assert {key: found[key] for key in ("kind", "steps", "finished", "held_out_loss", "checkpoints")} == {
        "kind": "run", "steps": 100, "finished": True, "held_out_loss": held_out, "checkpoints": ["step-000100"],
    }  # fmt: skip
    assert found["options"]["learning_rate"] == 0.01
    assert "seed" not in found["options"], "only what is not the default"
    run = shutil.copytree(finished_run, tmp_path / "run")
    shutil.rmtree(run / "adapter")
    (run / "metrics.jsonl").unlink()
    lines = veneer_command("inspect", run).out.splitlines()
    assert lines[0] == f"{'run':<24}{run}: 0 steps, not finished: veneer train --resume {run}"
    assert f"{'steps':<24}100" in lines


def test_rows(rows_file, veneer_command):
    assert _json(veneer_command, rows_file) == {
        "kind": "rows", "rows": 48, "shape": "prompt/completion", "unused_columns": [], "columns": {},
        "labels": {"no": 24, "yes": 24}, "bad": {"count": 0, "rows": []},
    }  # fmt: skip
    assert veneer_command("inspect", rows_file).out == (
        f"{rows_file}: 48 rows of the shape prompt/completion\n"
        "labels: no 24, yes 24\n"
        "Give --model M to see its tokens, and which of them are learned.\n"
    )


def test_the_learned_part_of_rows_is_marked(tiny_folder, veneer_command, tmp_path):
    path = tmp_path / "d.jsonl"
    rows = [{"prompt": "1+1=", "completion": " 2", "id": 7}, {"prompt": "a long question", "completion": " x", "id": 8},
            {"prompt": "q", "completion": " yes", "id": 9}]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = _json(veneer_command, path, "--model", tiny_folder, "--rows", 1, "--max-length", 8)
    assert found == {
        "kind": "rows", "rows": 3, "shape": "prompt/completion", "unused_columns": ["id"], "learned_tokens": 8,
        "longest": 7, "cut": [], "left_out": [f"{path}:2"], "columns": {}, "bad": {"count": 0, "rows": []},
        "examples": [{
            "where": f"{path}:1",
            "pieces": [{"text": "1+1=", "learned": False}, {"text": " 2<|end|>", "learned": True}],
        }],
    }  # fmt: skip
    assert veneer_command("inspect", path, "--model", tiny_folder, "--max-length", 8).out == (
        f"{path}: 3 rows of the shape prompt/completion\n"
        "columns not used: id\n"
        "8 tokens are learned (marked ⟦…⟧); the longest row has 7 tokens\n"
        f"1 row ({path}:2) left out, because no token to learn remains within max_length = 8.\n"
        "58.1 % of all tokens are in what was cut or left out.\n"
        f"\n{path}:1\n1+1=⟦ 2<|end|>⟧\n"
        f"\n{path}:3\nq⟦ yes<|end|>⟧\n"
    )
    learned = _json(veneer_command, path, "--model", tiny_folder, "--learn", "all", "--template", "chat")
    assert learned["examples"][0]["pieces"][1]["text"] == "1+1=<|end|>\n<|assistant|>2<|end|>"
    assert [piece["learned"] for piece in learned["examples"][0]["pieces"]] == [False, True]


def test_rows_are_cut_where_a_run_would_cut_them(tiny_folder, veneer_command, tmp_path):
    """At the positions that the model has, when these are fewer than max_length."""
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"prompt": "a", "completion": "x" * 200}) + "\n")
    found = _json(veneer_command, path, "--model", tiny_folder)
    assert (found["longest"], found["cut"]) == (128, [f"{path}:1"])
    assert "longer than max_length = 128 tokens: cut" in veneer_command("inspect", path, "--model", tiny_folder).out


def test_rows_of_an_encoder_decoder(veneer_command, tmp_path):
    import transformers as tf

    from tokens import tokenizer

    made = tokenizer()
    config = tf.T5Config(vocab_size=len(made), d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4,
                         decoder_start_token_id=0)  # fmt: skip
    for part in (tf.T5ForConditionalGeneration(config), made):
        part.save_pretrained(tmp_path / "t5")
    path = tmp_path / "d.jsonl"
    path.write_text('{"prompt": "1+1=", "completion": " 2"}\n')
    (shown,) = _json(veneer_command, path, "--model", tmp_path / "t5")["examples"]
    assert shown["pieces"] == [{"text": "1+1=", "learned": False}, {"text": "2<|end|>", "learned": True}]


def test_what_rows_are(rows_file, tmp_path, tiny_folder, veneer_command):
    """A folder of data files, one that datasets wrote, and the packaged set are rows, too."""
    import datasets

    folder = tmp_path / "files"
    folder.mkdir()
    shutil.copy(rows_file, folder / "train.jsonl")
    datasets.Dataset.from_list([{"text": "a"}]).save_to_disk(tmp_path / "written")
    assert _json(veneer_command, folder)["rows"] == 48
    assert _json(veneer_command, tmp_path / "written")["shape"] == "text"
    assert _json(veneer_command, "bbc-topics")["rows"] == 2096
    both = datasets.DatasetDict({name: datasets.Dataset.from_list([{"text": "ab"}] * 2) for name in ("train", "test")})
    both.save_to_disk(tmp_path / "both")
    found = _json(veneer_command, f"{tmp_path / 'both'}:test", "--model", tiny_folder)
    assert found["examples"][0]["where"] == f"{tmp_path / 'both'}:test row 1"
    assert found["learned_tokens"] == 2 * len("b|")


def test_refusals(finished_classifier, rows_file, tmp_path, refused, tiny_folder):
    merged = tmp_path / "merged"
    from veneer.commands.merge import merge_to

    merge_to(str(finished_classifier), merged)
    assert refused("inspect", rows_file, "--model", merged) == (
        f"{merged} is a classifier: of a row it learns the label, and no token."
    )
    missing = tmp_path / "rows.josnl"
    assert refused("inspect", missing) == f"There is no model at {missing}. Did you mean '{rows_file}'?"
    assert refused("inspect", rows_file.with_name("row.jsonl")) == (
        f"There is no file {rows_file.with_name('row.jsonl')}. Did you mean '{rows_file}'?"
    )
    assert refused("inspect", rows_file, "--rows", 0).startswith("InspectOptions: rows = '0' is not valid: ")
    (tmp_path / "junk.jsonl").write_bytes(b"\xff\x00")
    assert refused("inspect", tmp_path / "junk.jsonl").endswith(
        "junk.jsonl:1 is not UTF-8 text; save the file as UTF-8."
    )
    assert refused("inspect", rows_file, "--model", tiny_folder, "--max-length", 2).startswith(
        "None of the 48 rows has a token to learn within max_length = 2; the first is "
    )


def test_a_folder_of_runs_is_a_table_of_them(run_folder, tmp_path, veneer_command):
    first, second = run_folder(20, name="first"), run_folder(12, name="second", method="adalora")
    third = run_folder(0, name="third", model=str(tmp_path / "models" / "mine"))
    damaged = run_folder(0, name="damaged")
    (first / "adapter").mkdir()
    (first / "adapter" / "adapter_config.json").write_text("{}")
    (damaged / "config.yaml").write_text("- no options")
    for age, run in enumerate((third, second, first, damaged)):
        for file in ("config.yaml", "metrics.jsonl"):
            if (run / file).exists():
                os.utime(run / file, (1_700_000_000 - 86400 * age,) * 2)
    out = veneer_command("inspect", tmp_path).out.splitlines()
    assert out[0] == f"{tmp_path}: 4 runs, the newest first"
    assert out[1].split("  ")[0] == "run"
    assert "accuracy" not in out[1], "which none has"
    cells = [re.split(r"  +", line) for line in out[2:]]
    assert [row[0] for row in cells] == ["third", "second", "first", "damaged"]
    assert cells[0][1:5] == ["mine", "lora", "90", "starting"]
    assert cells[1][1:6] == ["some/base", "adalora", "90", "stopped at step 12 of 20", "0.550"]
    assert cells[2][1:6] == ["some/base", "lora", "90", "finished, 20 steps", "0.400"]
    assert cells[3][1] == "damaged config.yaml"
    runs = _json(veneer_command, tmp_path)["runs"]
    assert runs[1] == {
        "name": "second", "model": "some/base", "method": "adalora", "rows": 90, "state": "stopped", "step": 12,
        "steps": 20, "held_out_loss": 0.55, "held_out_accuracy": None, "written": runs[1]["written"],
    }  # fmt: skip
    assert re.fullmatch(r"2023-11-1\d \d\d:\d\d", runs[1]["written"])


def test_a_folder_without_runs_is_refused(refused, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    then = "; name a model, an adapter, rows, a run, or a folder with runs in it."
    assert refused("inspect", empty) == f"{empty} is empty{then}"
    (empty / "sub").mkdir()
    assert refused("inspect", empty) == f"{empty} holds no run: none of its folders has a config.yaml{then}"
