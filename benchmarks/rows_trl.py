"""The side of trl in rows.py, run by the peers' own environment."""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import time
from typing import Any

import torch
from common import peak_memory, resident_memory
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
from trl import SFTConfig, SFTTrainer


class _Clock(TrainerCallback):
    def __init__(self) -> None:
        self.ends: list[float] = []
        self.losses: list[float] = []

    def on_step_end(self, *arguments: Any, **more: Any) -> None:
        self.ends.append(time.perf_counter())

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))


def main(
    folder: str, data: str, kept: str, how: str, part: str, steps: str, rows: str, warm: str, rank: str
) -> dict[str, Any]:
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    count, at_once, a_step = int(steps), int(part), int(rows)
    with open(data, encoding="utf-8") as file:
        dataset = Dataset.from_list([json.loads(line) for line in file][: count * a_step])
    quantised = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    more: dict[str, Any] = {"quantization_config": quantised} if kept == "nf4" else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more)
    before = resident_memory(model)
    tuned = {} if how == "defaults" else {"bf16": False, "gradient_checkpointing": False}
    clock = _Clock()
    with tempfile.TemporaryDirectory() as output:
        trainer = SFTTrainer(
            model=model,
            processing_class=AutoTokenizer.from_pretrained(folder),
            train_dataset=dataset,
            peft_config=LoraConfig(r=int(rank), lora_alpha=2 * int(rank), target_modules="all-linear"),
            args=SFTConfig(
                output_dir=output, per_device_train_batch_size=at_once, gradient_accumulation_steps=a_step // at_once,
                num_train_epochs=1, learning_rate=1e-3, logging_steps=1, save_strategy="no", report_to="none",
                disable_tqdm=True, use_cpu=True, **tuned,
            ),
            callbacks=[clock],
        )  # fmt: skip
        trainer.train()
    assert len(clock.ends) == count
    timed = clock.ends[-1] - clock.ends[int(warm) - 1]
    return {
        "rows_per_second": a_step * (count - int(warm)) / timed, "resident_gb": before / 1e9,
        "peak_gb": peak_memory() / 1e9, "losses": [clock.losses[0], clock.losses[-1]],
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
