"""What `veneer plan` predicts of a run, against what `veneer.train` takes: peak memory and time of a step.

    make bench

Five architectures of 50M to 100M parameters with random weights, over methods, storages, batches, lengths and
checkpointing, each in a process of its own: the largest memory the system has seen of it (VmHWM), and the median of
its steps but the first. Rows are of words from all over the vocabulary, so that of an embedding that is mapped from
its file all is read, as the plan takes it to be. All of it is done twice, for a machine's speed changes from minute to
minute, by a fifth on a virtual one: the rates are measured, then the runs taken, and a run's numbers are the means
of both rounds. Names of runs as arguments measure these alone, with the rates that are known. Run it on an idle
machine.
"""

from __future__ import annotations

import json
import math
import os
import random
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import in_a_process, main_or_run, peak_memory, versions
from tables import MEMORY, TIME, tell

from veneer.threads import settle

STEPS, ROUNDS = 5, 2
RESULT = Path(__file__).parent / "results" / "plan.json"
PLOT = Path(__file__).parents[1] / "docs" / "studies" / "plan.png"
# architecture, method, storage, rows, tokens of a row, layers recomputed (all: 99), rows of a pass
_RUNS = (
    ("llama", "lora", "fp32", 8, 128, 0, 0),
    ("llama", "lora", "fp32", 2, 512, 0, 0),
    ("llama", "lora", "nf4", 8, 128, 99, 0),
    ("llama", "lora", "nf4", 16, 64, 0, 0),
    ("llama", "lora", "bf16", 1, 1024, 99, 0),
    ("llama", "adalora", "int8", 4, 256, 0, 0),
    ("llama", "lora", "fp32", 4, 256, 6, 0),
    ("gpt2", "lora", "fp32", 8, 128, 0, 0),
    ("gpt2", "lora", "nf4", 4, 256, 0, 0),
    ("gpt2", "adalora", "bf16", 8, 128, 99, 0),
    ("gpt2", "lora", "int8", 16, 64, 4, 0),
    ("gpt2", "lora", "fp32", 4, 256, 99, 2),
    ("gemma", "lora", "fp32", 4, 256, 0, 0),
    ("gemma", "adalora", "nf4", 8, 128, 0, 0),
    ("gemma", "lora", "int8", 1, 1024, 99, 0),
    ("gemma", "lora", "bf16", 4, 256, 0, 2),
    ("gemma", "adalora", "fp32", 16, 64, 4, 0),
    ("phi", "lora", "fp32", 8, 64, 0, 0),
    ("phi", "lora", "nf4", 4, 256, 0, 0),
    ("phi", "adalora", "int8", 8, 128, 99, 0),
    ("phi", "lora", "bf16", 1, 512, 0, 0),
    ("phi", "lora", "fp32", 1, 1024, 4, 0),
    ("llama", "lora", "nf4", 1, 1536, 0, 0),
    ("gemma", "lora", "nf4", 8, 128, 0, 4),
    ("olmoe", "lora", "fp32", 8, 128, 0, 0),
    ("olmoe", "lora", "nf4", 4, 256, 99, 0),
)  # fmt: skip


def _name(name: str, method: str, storage: str, rows: int, length: int, again: int, part: int) -> str:
    more = (f"-again{again}" if again else "") + (f"-by{part}" if part else "")
    return f"{name}-{method}-{storage}-{rows}x{length}{more}"


RUNS = {_name(*run): run for run in _RUNS}


def main() -> None:
    wanted = sys.argv[1:] or list(RUNS)
    settle()
    load_before = os.getloadavg()[0]
    known: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.is_file() and sys.argv[1:] else {"runs": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name in sorted({RUNS[run][0] for run in wanted}):
            _save(name, Path(folder))
        rounds = [_round(wanted, folder, afresh=not sys.argv[1:]) for _ in range(ROUNDS)]
    known["runs"] |= {run: _mean([found[run] for found in rounds]) for run in wanted}
    known |= {"load_before": load_before, "versions": versions(), "steps": STEPS}
    RESULT.write_text(json.dumps(known, indent=2) + "\n")
    _draw(known["runs"])
    tell("plan", "plan_bounds")


def _round(wanted: list[str], folder: str, afresh: bool) -> dict[str, dict[str, float]]:
    """Run → what was measured and predicted, by rates that are measured before the runs."""
    from veneer.planning.machine import measured

    machine, found = measured(afresh=afresh), {}
    for run in wanted:
        took = in_a_process(__file__, "--run", folder, run)
        made = _predicted(run, folder, machine)
        found[run] = {
            "measured": took["peak"], "foreseen": made.peak, "memory_ratio": made.peak / took["peak"],
            "seconds": took["seconds"], "seconds_foreseen": made.step_seconds,
            "time_ratio": made.step_seconds / took["seconds"], "load": os.getloadavg()[0],
        }  # fmt: skip
        print(
            f"{run:<36} {took['peak'] / 1e6:7.0f} MB × {found[run]['memory_ratio']:.3f}   {took['seconds']:6.2f} s × "
            f"{found[run]['time_ratio']:.2f}", file=sys.stderr, flush=True,
        )  # fmt: skip
    return found


def _mean(rounds: list[dict[str, float]]) -> dict[str, Any]:
    each = {name: [found[name] for found in rounds] for name in rounds[0]}
    return {name: statistics.mean(values) for name, values in each.items()} | {"rounds": each}


def _save(name: str, folder: Path) -> None:
    """A model of random weights and a tokenizer that merges as many words as it has, as a transformers folder."""
    import torch
    import transformers as tf

    from veneer.runs.measure import tokenizer_of, words

    torch.manual_seed(0)
    heads = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "max_position_embeddings": 2048}
    made = {
        "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(
            **{**heads, "hidden_size": 576, "num_hidden_layers": 12, "num_attention_heads": 9}, vocab_size=49152,
            intermediate_size=1536, num_key_value_heads=3, tie_word_embeddings=True,
        )),
        "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(
            vocab_size=50257, n_embd=512, n_layer=8, n_head=8, n_positions=2048,
        )),
        "gemma": lambda: tf.GemmaForCausalLM(tf.GemmaConfig(
            **heads, vocab_size=65536, intermediate_size=2048, num_key_value_heads=1, head_dim=64,
        )),
        "phi": lambda: tf.PhiForCausalLM(tf.PhiConfig(**heads, vocab_size=51200, intermediate_size=2048)),
        "olmoe": lambda: tf.OlmoeForCausalLM(tf.OlmoeConfig(
            **{**heads, "hidden_size": 384, "num_attention_heads": 6}, vocab_size=49152, intermediate_size=512,
            num_key_value_heads=6, num_experts=16, num_experts_per_tok=4, tie_word_embeddings=True, eos_token_id=1,
            pad_token_id=0,
        )),
    }[name]()  # fmt: skip
    made.save_pretrained(folder / name)
    tokenizer_of(words(made.config.vocab_size)).save_pretrained(folder / name)


def _options(run: str, folder: str) -> dict[str, Any]:
    name, method, storage, rows, length, again, part = RUNS[run]
    options: dict[str, Any] = {
        "model": str(Path(folder, name)), "method": method, "storage": storage, "batch_size": rows,
        "max_length": length, "steps": STEPS, "gradient_checkpointing": again == 99,
    }  # fmt: skip
    return {**options, "micro_batch_size": part} if part else options


def _predicted(run: str, folder: str, machine: Any) -> Any:
    from veneer.planning.config import PlanOptions
    from veneer.planning.plan import plan

    again = RUNS[run][5]
    return plan(PlanOptions(**_options(run, folder)), machine, recomputed=None if again in (0, 99) else again)


def _measure(folder: str, run: str) -> dict[str, Any]:
    """Trained as a person would, on rows of exactly the length; the number of layers recomputed is set."""
    from veneer.runs import memory as planned
    from veneer.runs.folder import RunFolder
    from veneer.runs.measure import words
    from veneer.runs.train import train

    again, predicted = RUNS[run][5], planned.predicted
    planned.generous = lambda *_: math.inf  # the plan before the first step, where layers may be recomputed yet
    if again not in (0, 99):
        planned.predicted = lambda *known, **more: replace(predicted(*known, **more), recomputed=again)
    rows, length = RUNS[run][3:5]
    with tempfile.TemporaryDirectory() as place:
        known, draw = words(49152)[1:], random.Random(0)
        texts = [" ".join(draw.choices(known, k=length - 1)) for _ in range(rows * STEPS)]
        data = Path(place, "rows.jsonl")
        data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        result = train(
            **_options(run, folder), data=str(data), output=str(Path(place, "run")), held_out=0, check_memory=False
        )
        steps = [record for record in RunFolder(result.folder).metrics() if "tokens_per_second" in record]
        assert steps[0]["tokens"] == rows * length
        seconds = statistics.median(rows * length / record["tokens_per_second"] for record in steps[1:])
    return {"peak": peak_memory(), "seconds": seconds}


def _draw(runs: dict[str, Any]) -> None:
    """Measured against predicted, memory and time, with the bounds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4.6), layout="constrained")
    marks = {"llama": "o", "gpt2": "s", "gemma": "^", "phi": "D", "olmoe": "v"}
    for panel, (measured, predicted), unit, scale, (low, high) in zip(
        panels, (("measured", "foreseen"), ("seconds", "seconds_foreseen")), ("GB", "s"), (1e9, 1.0),
        (MEMORY, TIME), strict=True,
    ):  # fmt: skip
        for name, mark in marks.items():
            mine = [found for run, found in runs.items() if run.startswith(f"{name}-")]
            panel.scatter(
                [one[measured] / scale for one in mine],
                [one[predicted] / scale for one in mine],
                marker=mark,
                label=name,
            )
        ends = [0.9 * min(one[measured] for one in runs.values()) / scale,
                1.1 * max(one[measured] for one in runs.values()) / scale]  # fmt: skip
        panel.plot(ends, ends, color="black", linewidth=0.8)
        panel.fill_between(ends, [low * end for end in ends], [high * end for end in ends], alpha=0.15, color="grey")
        panel.set_xlabel(f"measured ({unit})")
        panel.set_ylabel(f"predicted ({unit})")
    panels[0].set_title("Peak memory of a run; grey: −2 % to +5 %")
    panels[1].set_title("Time of a step; grey: ±15 %")
    panels[0].legend()
    PLOT.parent.mkdir(exist_ok=True)
    figure.savefig(PLOT, dpi=110)


if __name__ == "__main__":
    main_or_run(main, _measure)
