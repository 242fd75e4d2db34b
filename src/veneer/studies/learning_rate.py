"""Which learning rate: a method's over a grid, beside the one that ``auto`` chooses."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any, ClassVar

from veneer.errors import DivergedError
from veneer.studies.numbers import Metric, best_learned, grouped, not_recommended, unlearned
from veneer.studies.plots import errorbars, new_figure, save_figure
from veneer.studies.study import MEASURED, Job, Row, Study
from veneer.studies.trained import rate_taken, trained
from veneer.training.automatic import RATES

# Times the rate that auto has for a model as narrow as the packaged ones, where it is the middle of them.
_FACTORS = (0.03, 0.1, 0.3, 3.0)


class LearningRateStudy(Study):
    name = "learning-rate"
    title = "Which learning rate?"
    columns: ClassVar = {
        "method": "as in train",
        "chosen": "by auto, or given",
        "learning_rate": "highest one; a run that diverged has no other numbers",
    }

    def rates(self, method: str) -> list[Any]:
        """Those to compare: the ones given, or a grid around auto's; and auto itself."""
        return ["auto", *(self.options.rates or [float(f"{factor * RATES[method]:.2g}") for factor in _FACTORS])]

    def jobs(self, rows: list[Row]) -> list[Job]:
        return [
            Job(self.name, "trained", {"run": self.run(seed, method=method, learning_rate=rate)})
            for method in self.options.methods
            for rate in self.rates(method)
            for seed in self.options.seeds
        ]

    @classmethod
    def work(cls, what: str, options: dict[str, Any], runs: Path) -> list[Row]:
        run = options["run"]
        automatic = run["learning_rate"] == "auto"
        row = {"method": run["method"], "chosen": "auto" if automatic else "given"}
        try:
            folder, measured = trained(run, runs)
        except DivergedError:
            none = dict.fromkeys(MEASURED)
            return [row | none | {"learning_rate": None if automatic else run["learning_rate"], "seed": run["seed"]}]
        return [row | {"learning_rate": rate_taken(folder)} | measured]

    def findings(self, rows: list[Row]) -> str:
        return " ".join([f"{self.size}.", *(self._of(method, its) for method, its in _by_method(rows).items())])

    def _of(self, method: str, rows: list[Row]) -> str:
        finished = [row for row in rows if row["loss"] is not None]
        diverged = dict.fromkeys(_name(row) for row in rows if row["loss"] is None)
        metric = Metric.of(finished)
        finished.sort(key=lambda row: row["learning_rate"])
        groups = grouped(finished, _name)
        values = {name: metric.values(its) for name, its in groups.items()}
        means = {name: statistics.mean(its) for name, its in values.items()}
        behind = unlearned(groups)
        sentences = []
        if values:
            best = best_learned(metric, means, behind)
            numbers = ", ".join(f"{name} {metric.shown(its)}" for name, its in values.items())
            sentences += [f"{method}, {metric.name}: {numbers}.", f"The best is {best or 'none'}."]
            own = next((name for name in means if name.startswith("auto")), best)
            if best and own != best and own not in behind:
                error = metric.standard_error(list(values.values()), self.options.held_out) * 2**0.5
                level = "" if metric.within(means[own], means[best], error) else "not "
                sentences += [
                    f"auto is {level}within one standard error of a difference ({metric.margin(error)}) of it."
                ]
            sentences += [not_recommended(behind).strip()] if behind else []
        if diverged:
            sentences += [f"Diverged: {', '.join(diverged)}."]
        return " ".join(sentences)

    def draw(self, rows: list[Row], folder: Path) -> list[str]:
        finished = [row for row in rows if row["loss"] is not None]
        metric = Metric.of(finished)
        figure, axes = new_figure()
        for method, its in _by_method(finished).items():
            values = {rate: metric.values(own) for rate, own in grouped(its, lambda row: row["learning_rate"]).items()}
            errorbars(axes, values, method, metric.factor)
        axes.set_xscale("log")
        axes.legend()
        axes.set_xlabel("highest learning rate")
        axes.set_ylabel(metric.title)
        axes.set_title(f"{self.options.data}, {self.options.model}, {self.options.steps} steps", fontsize="medium")
        return [save_figure(figure, folder / "learning-rate.png")]


def _by_method(rows: list[Row]) -> dict[str, list[Row]]:
    return grouped(rows, lambda row: row["method"])


def _name(row: Row) -> str:
    rate = "auto" if row["learning_rate"] is None else f"{row['learning_rate']:g}"
    return f"auto ({rate})" if row["chosen"] == "auto" and rate != "auto" else rate
