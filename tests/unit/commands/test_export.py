"""veneer export: a run's or an adapter folder's adapter as a plain LoRA."""

from __future__ import annotations

import json

import pytest

import tiny
import veneer

pytestmark = pytest.mark.unit


def test_a_run_or_an_adapter_folder(finished_classifier, tmp_path, refused):
    said = refused("export", finished_classifier, tmp_path / "out")
    assert "trains more than low-rank updates" in said
    assert said.endswith("which no plain LoRA can carry; merge it into its base instead.")
    assert not (tmp_path / "out").exists()


def test_each_modules_own_rank(tmp_path, veneer_command):
    model = tiny.build("llama")
    veneer.attach(model, veneer.LoRA(rank=4, rank_pattern={"q_proj": 2}))
    veneer.save(model, tmp_path / "adapter")
    for arguments, pattern in (((), {}), (("--no-padded",), {"q_proj": 2, "up_proj": 4})):
        out = tmp_path / f"plain{len(arguments)}"
        done = veneer_command("export", tmp_path / "adapter", out, *arguments)
        assert (done.code, done.out) == (0, f"Plain LoRA written to {out}.\n")
        fields = json.loads((out / "adapter_config.json").read_text())
        found = {key.rpartition(".")[2]: rank for key, rank in fields["rank_pattern"].items()}
        assert {name: found.get(name) for name in pattern} == pattern
        assert (fields["r"], fields["lora_alpha"]) == (4, 4)
