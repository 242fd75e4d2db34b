"""What each storage of the base costs: bits, error, perplexity, and what is reached over it (QLoRA, section 4)."""

from __future__ import annotations

import copy
import math
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from veneer.frozen.config import CODE_BITS
from veneer.studies.numbers import Metric, grouped, not_recommended, unlearned
from veneer.studies.plots import new_figure, save_figure
from veneer.studies.study import Job, Row, Study
from veneer.studies.trained import run_config, timed, trained

if TYPE_CHECKING:
    from veneer.data.labels import Tokens
    from veneer.runs.prepare import Prepared

# Storage → the options of `veneer.load` that keep a base so.
STORAGES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "16-bit": {"storage": "bf16"},
    "nf4 block 32": {"storage": "nf4", "block_size": 32, "double_quantisation": False},
    "nf4": {"storage": "nf4", "double_quantisation": False},
    "nf4 + DQ": {"storage": "nf4"},
    "fp4": {"storage": "fp4", "double_quantisation": False},
    "int4": {"storage": "int4", "double_quantisation": False},
}


class StorageStudy(Study):
    name = "storage"
    title = "What does a storage of the base cost?"
    columns: ClassVar = {
        "storage": "how the base's linear layers are kept: 16-bit is bf16; DQ: their scales in 8 bits; blocks of 64",
        "what": "kept: the base itself, without training; trained: LoRA over it",
        "bits": "of a parameter of the linear layers, scales included",
        "error": "relative squared error of the linear layers' weights against fp32",
        "perplexity": "of the base on what the held-out rows ask, or on their texts; empty of another kind of model",
        "tokens_per_second": "of training, mean over the steps",
    }

    def jobs(self, rows: list[Row]) -> list[Job]:
        seeds, rank = self.options.seeds, self.options.rank
        kept = [
            Job(self.name, "kept", {"storage": storage, "run": self.run(seeds[0], **how)})
            for storage, how in STORAGES.items()
        ]
        return kept + [
            Job(self.name, "trained", {"storage": storage, "run": self.run(seed, rank=rank, **how)})
            for seed in seeds
            for storage, how in STORAGES.items()
        ]

    @classmethod
    def work(cls, what: str, options: dict[str, Any], runs: Path) -> list[Row]:
        from veneer.runs.folder import RunFolder

        row: Row = dict.fromkeys(cls.columns) | {"storage": options["storage"], "what": what}
        if what == "kept":
            return [row | _kept(options["run"], STORAGES[options["storage"]])]
        folder, measured = trained(options["run"], runs)
        steps = [record for record in RunFolder(folder).metrics() if "loss" in record]
        seconds = (record["tokens_per_second"] for record in steps)
        return [row | measured | {"tokens_per_second": round(statistics.harmonic_mean(seconds), 1)}]

    def findings(self, rows: list[Row]) -> str:
        by = {
            what: grouped(its, lambda row: row["storage"]) for what, its in grouped(rows, lambda r: r["what"]).items()
        }
        metric = Metric.of([row for row in rows if row["what"] == "trained"])
        values = {storage: metric.values(its) for storage, its in by["trained"].items()}
        error = metric.standard_error(list(values.values()), self.options.held_out) * 2**0.5
        kept = {storage: its[0] for storage, its in by["kept"].items()}
        sentences = []
        for storage, its in by["trained"].items():
            own = kept[storage]
            perplexity = "" if own["perplexity"] is None else f", perplexity {own['perplexity']:.2f}"
            sentences.append(
                f"{storage}: {own['bits']:.3f} bits, error {own['error']:.2g}{perplexity}; trained "
                f"{metric.shown(values[storage])}, {max(row['peak_memory'] for row in its) / 1e9:.2f} GB, "
                f"{statistics.mean(row['tokens_per_second'] for row in its):.0f} tokens/s"
            )
        four = {storage: row["error"] for storage, row in kept.items() if _code_bits(storage) == 4}
        order = sorted(four, key=lambda storage: four[storage])
        means = {storage: statistics.mean(its) for storage, its in values.items()}
        behind = unlearned(by["trained"])
        worse = [s for s in four if not metric.within(means[s], means["16-bit"], error)]
        compared = (
            f" Worse than 16-bit by more than one standard error of a difference ({metric.margin(error)}) "
            f"after training: {', '.join(worse) or 'none'}."
        )
        return (
            f"{self.size}, {metric.name}. "
            + ". ".join(sentences)
            + f". In 4 bits the error grows in the order {', '.join(order)}."
            + ("" if "16-bit" in behind else compared)
            + not_recommended(behind)
        )

    def draw(self, rows: list[Row], folder: Path) -> list[str]:
        metric = Metric.of([row for row in rows if row["what"] == "trained"])
        figure, axes = new_figure(2, width=10)
        kept = {row["storage"]: row for row in rows if row["what"] == "kept"}
        for storage, its in grouped((r for r in rows if r["what"] == "trained"), lambda row: row["storage"]).items():
            values = [metric.factor * value for value in metric.values(its)]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            place = kept[storage]["bits"], statistics.mean(values)
            axes[0].errorbar([place[0]], [place[1]], [spread], fmt="o", capsize=4, label=storage)
        axes[0].set_xlabel("bits of a parameter")
        axes[0].set_xscale("log", base=2)
        axes[0].set_ylabel(f"{metric.title}, after training")
        axes[0].legend(fontsize="small")
        perplexity = all(row["perplexity"] is not None for row in kept.values())
        column = "perplexity" if perplexity else "error"
        axes[1].bar(list(kept), [row[column] for row in kept.values()], color="0.6")
        axes[1].set_ylabel("perplexity of the base" if perplexity else "relative squared error")
        axes[1].tick_params(axis="x", labelrotation=45)
        figure.suptitle(f"{self.options.data}, {self.options.model}, {self.options.steps} steps", fontsize="medium")
        return [save_figure(figure, folder / "storage.png")]


def _code_bits(storage: str) -> int | None:
    return CODE_BITS.get(STORAGES[storage].get("storage", ""))


def _kept(run: dict[str, Any], how: dict[str, Any]) -> Row:
    from veneer.runs.prepare import prepare
    from veneer.training.loss import Loss

    row: Row = {"seed": run["seed"], "loss": None, "accuracy": None, "parameters": 0}
    with timed(row):
        plain = {name: value for name, value in run.items() if name not in how}
        prepared = prepare(run_config({**plain, "compute": "fp32"}, "-"))
        row["bits"], row["error"] = bits_and_error(prepared.model, how)
        if prepared.renderer.kind == "causal":
            rows = _asked(prepared)
            loss = Loss(kept_in(prepared.model, how), prepared.renderer.pad, rows[0], kind="causal")
            row["perplexity"] = math.exp(loss.mean(rows, 32))
    return row


def _asked(prepared: Prepared) -> list[Tokens]:
    """The held-out rows without their answers, every token learned: how likely a base that never saw the task finds an
    answer's form would hide all else."""
    from veneer.data.labels import IGNORE, Tokens

    renderer, rows = prepared.renderer, []
    for example in prepared.held_out:
        text = example.prompt is None and not example.messages
        ids = (renderer.one(example).ids if text else renderer.prompt(example))[: renderer.max_length]
        rows.append(Tokens(ids, [IGNORE, *ids[1:]], example.where))
    return [row for row in rows if row.learned]


def kept_in(model: Any, how: dict[str, Any]) -> Any:
    """A copy of an fp32 ``model``, its linear layers kept as ``how`` says: options of `veneer.load`.

    Those of 16 bits are rounded, and multiplied in fp32.
    """
    from veneer.frozen.layers import DTYPES, linear_layers, quantise_linear_layers

    model, storage = copy.deepcopy(model), how.get("storage", "fp32")
    if storage in CODE_BITS:
        quantise_linear_layers(model, **how)
        return model
    for name in linear_layers(model):
        weight = model.get_submodule(name).weight
        weight.data = weight.data.to(DTYPES[storage]).to(weight.dtype)
    return model


def bits_and_error(model: Any, how: dict[str, Any]) -> tuple[float, float]:
    """Bits a parameter with all scales, and Σ (W − kept W)² / Σ W² over the linear layers of an fp32 ``model``."""
    from veneer.frozen.layers import DTYPES, linear_layers
    from veneer.frozen.weight import QuantisedLinear, frozen_weight

    storage = how.get("storage", "fp32")
    bits = parameters = wrong = total = 0.0
    for name in linear_layers(model):
        layer = model.get_submodule(name)
        weight = frozen_weight(layer).dense()
        if storage in CODE_BITS:
            kept = QuantisedLinear.of(layer, **how)
            stored = [tensor for key, tensor in kept.state_dict().items() if key != "bias"]
            bits += 8 * sum(tensor.nbytes for tensor in stored)
            values = kept.frozen().dense()
        else:
            values = weight.to(DTYPES[storage]).float()
            bits += weight.numel() * DTYPES[storage].itemsize * 8
        parameters += weight.numel()
        wrong += float((values - weight).double().square().sum())
        total += float(weight.double().square().sum())
    return bits / parameters, wrong / total
