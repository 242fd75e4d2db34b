"""Full fine-tuning, LoRA and its kin, AdaLoRA, biases or head alone, at stated numbers of parameters."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any, ClassVar

from veneer.errors import TargetError
from veneer.studies.numbers import Metric, best_and_level, grouped, not_recommended, unlearned
from veneer.studies.plots import new_figure, save_figure
from veneer.studies.study import MEASURED, Job, Row, Study
from veneer.studies.trained import rate_taken, trained

METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "LoRA": {"method": "lora"},
    "AdaLoRA": {"method": "adalora"},
    "QLoRA": {"method": "lora", "storage": "nf4"},
    "DoRA": {"method": "lora", "dora": True},
    "LoRA+": {"method": "lora", "lora_plus": 4.0},
    "PiSSA": {"method": "lora", "init": "pissa"},
    "NEFTune": {"method": "lora", "neftune": 5.0},
    "biases": {"method": "bias"},
    "head": {"method": "head"},
}
_RANKED = {"AdaLoRA": "target_rank"} | {name: "rank" for name, its in METHODS.items() if its["method"] == "lora"}


class MethodsStudy(Study):
    name = "methods"
    title = "What does each method reach, with how many parameters?"
    columns: ClassVar = {"method": ", ".join(METHODS), "learning_rate": "highest one"}

    def run_of(self, method: str, seed: int) -> dict[str, Any]:
        options = METHODS[method]
        ranked = {_RANKED[method]: self.options.rank} if method in _RANKED else {}
        return self.run(seed, **options, **ranked, learning_rate=self.rate_for(options["method"]))

    def jobs(self, rows: list[Row]) -> list[Job]:
        return [
            Job(self.name, "trained", {"method": method, "run": self.run_of(method, seed)})
            for seed in self.options.seeds
            for method in METHODS
        ]

    @classmethod
    def work(cls, what: str, options: dict[str, Any], runs: Path) -> list[Row]:
        row = {"method": options["method"]}
        try:
            folder, measured = trained(options["run"], runs)
            return [row | {"learning_rate": rate_taken(folder)} | measured]
        except TargetError:
            if options["method"] != "biases":
                raise
            none = dict.fromkeys(("learning_rate", *MEASURED))  # a model without any biases
            return [row | none | {"seed": options["run"]["seed"]}]

    def findings(self, rows: list[Row]) -> str:
        there = [row for row in rows if row["loss"] is not None]
        metric = Metric.of(there)
        groups = grouped(there, lambda row: row["method"])
        values = {method: metric.values(its) for method, its in groups.items()}
        error = metric.standard_error(list(values.values()), self.options.held_out) * 2**0.5
        means = {method: statistics.mean(its) for method, its in values.items()}
        behind = unlearned(groups)
        best, level = best_and_level(metric, means, error, behind)
        said = [
            f"{self.size}, {metric.name}: "
            + "; ".join(
                f"{method} {metric.shown(values[method])} with {its[0]['parameters']:,} parameters "
                f"(rate {its[0]['learning_rate']:g}, {_gigabytes(its)} GB, {_seconds(its)} s)"
                for method, its in groups.items()
            )
            + ".",
            f"The best is {best or 'none'}; within one standard error of a difference ({metric.margin(error)}): "
            f"{', '.join(level) or 'none'}.{not_recommended(behind)}",
        ]
        if "full" in means and "LoRA" in means:
            share = groups["LoRA"][0]["parameters"] / groups["full"][0]["parameters"]
            said.append(
                f"LoRA trains {100 * share:.2g} % of what full fine-tuning does and differs from it by "
                f"{metric.number(means['LoRA'] - means['full'])}{metric.unit}."
            )
        if {row["method"] for row in rows} - set(groups):
            said.append("This model's layers have no biases.")
        return " ".join(said)

    def draw(self, rows: list[Row], folder: Path) -> list[str]:
        there = [row for row in rows if row["loss"] is not None]
        metric = Metric.of(there)
        figure, axes = new_figure()
        marks = iter("os^vD*PX<>")
        for method, its in grouped(there, lambda row: row["method"]).items():
            values = [metric.factor * value for value in metric.values(its)]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            axes.errorbar(
                [its[0]["parameters"]], [statistics.mean(values)], [spread], fmt=next(marks), capsize=4, label=method
            )
        axes.set_xscale("log")
        axes.legend()
        axes.set_xlabel("parameters trained")
        axes.set_ylabel(metric.title)
        axes.set_title(f"{self.options.data}, {self.options.model}, {self.options.steps} steps", fontsize="medium")
        return [save_figure(figure, folder / "methods.png")]


def _gigabytes(rows: list[Row]) -> str:
    return f"{max(row['peak_memory'] for row in rows) / 1e9:.2f}"


def _seconds(rows: list[Row]) -> str:
    return f"{statistics.mean(row['seconds'] for row in rows):.0f}"
