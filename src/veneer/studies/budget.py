"""AdaLoRA against LoRA at equal numbers of parameters, and which matrices AdaLoRA gives the ranks to.

Both are tuned alike where rates are given: the rate with the best value on a seed that is none of the study's.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any, ClassVar, Literal

from veneer.errors import DivergedError, TrainingError
from veneer.studies.config import StudyOptions
from veneer.studies.numbers import Metric, not_recommended, unlearned
from veneer.studies.plots import errorbars, new_figure, save_figure
from veneer.studies.study import MEASURED, Job, Row, Study
from veneer.studies.trained import rate_taken, trained

METHODS = ("LoRA", "AdaLoRA")
TUNING_SEED = 100
_RANKS = (1, 2, 4)


class BudgetStudy(Study):
    """``budgets``: name → the options of the LoRA whose parameters the budget is; by default the ranks asked for, over
    all linear layers."""

    name = "budget"
    title = "What does a budget of ranks, given out by importance, gain?"
    columns: ClassVar = {
        "budget": "the LoRA whose parameters both methods have",
        "method": "LoRA or AdaLoRA",
        "learning_rate": "highest one",
        "tuning": "1 for the runs that choose the learning rate, which are not counted; one that diverged has no "
        "numbers",
        "ranks": "module → rank, as JSON; a matrix that got none is not in it",
    }

    def __init__(self, options: StudyOptions, budgets: dict[str, dict[str, Any]] | None = None) -> None:
        super().__init__(options)
        ranks = options.ranks or list(_RANKS)
        self.budgets = budgets or {f"rank {rank}": {"rank": rank} for rank in ranks}

    def job(self, budget: str, method: str, rate: float | Literal["auto"], seed: int) -> Job:
        run = self.run(seed, learning_rate=rate)
        options = {"budget": budget, "method": method, "lora": self.budgets[budget], "run": run}
        return Job(self.name, "trained", options)

    def jobs(self, rows: list[Row]) -> list[Job]:
        jobs = []
        for budget in self.budgets:
            for method in METHODS:
                tuning = [self.job(budget, method, rate, TUNING_SEED) for rate in self.options.rates]
                jobs += tuning
                rate = self.rate(rows, budget, method)
                if rate is not None:
                    jobs += [self.job(budget, method, rate, seed) for seed in self.options.seeds]
        return jobs

    def rate(self, rows: list[Row], budget: str, method: str) -> float | Literal["auto"] | None:
        """The best rate on the tuning seed, of equal ones the first; None before all rates were tried there. Raises
        TrainingError where the runs of all diverged."""
        if not self.options.rates:
            return self.rate_for(method.lower())
        by_run = {row["run"]: row for row in rows}
        tried = [by_run.get(self.job(budget, method, rate, TUNING_SEED).key) for rate in self.options.rates]
        done = [row for row in tried if row is not None]
        if len(done) < len(tried):
            return None
        there = [row for row in done if row["loss"] is not None]
        if not there:
            raise TrainingError(f"{method} diverged at all of the rates {self.options.rates}; add lower ones.")
        behind = unlearned({row["learning_rate"]: [row] for row in there})
        there = [row for row in there if row["learning_rate"] not in behind] or there  # a study of none goes on, too
        metric = Metric.of(there)
        best: float = metric.best({row["learning_rate"]: float(row[metric.column]) for row in there})
        return best

    def measured(self, rows: list[Row], budget: str, method: str) -> list[Row]:
        """The rows of the study's seeds at the rate that was chosen."""
        rate = self.rate(rows, budget, method)
        keys = {self.job(budget, method, rate, seed).key for seed in self.options.seeds} if rate is not None else set()
        return [row for row in rows if row["run"] in keys]

    @classmethod
    def work(cls, what: str, options: dict[str, Any], runs: Path) -> list[Row]:
        run = {**options["run"], **options["lora"]}
        if options["method"] == "AdaLoRA":
            run = {**options["run"], "method": "adalora", "budget": str(_parameters(run, options["lora"]))}
        own = {name: options[name] for name in ("budget", "method")}
        own |= {"tuning": int(run["seed"] == TUNING_SEED), "ranks": None}
        try:
            folder, measured = trained(run, runs)
        except DivergedError:
            if not own["tuning"]:
                raise
            none = dict.fromkeys(MEASURED)  # the rate is none to choose
            return [own | none | {"learning_rate": run["learning_rate"], "seed": run["seed"]}]
        ranks, parameters = _ranks(folder / "adapter")
        return [
            own
            | {"learning_rate": rate_taken(folder)}
            | measured
            | {"parameters": parameters, "ranks": json.dumps(ranks)}
        ]

    def findings(self, rows: list[Row]) -> str:
        metric = self._metric(rows)
        clauses, ahead, behind = [], {}, []
        groups: list[list[float]] = []
        for budget in self.budgets:
            its = {method: self.measured(rows, budget, method) for method in METHODS}
            values = {method: metric.values(own) for method, own in its.items()}
            groups += values.values()
            parameters = statistics.mean(row["parameters"] for row in its["LoRA"])
            clauses.append(
                f"{budget} ({parameters:,.0f} parameters): "
                + ", ".join(
                    f"{method} {metric.shown(values[method])} (rate {its[method][0]['learning_rate']:g})"
                    for method in METHODS
                )
            )
            gain = statistics.mean(values["AdaLoRA"]) - statistics.mean(values["LoRA"])
            lost = unlearned(its)
            behind += [f"{method} at {budget}" for method in lost]
            if len(lost) < len(its):
                ahead[budget] = gain * (1 if metric.column == "accuracy" else -1)
        error = metric.standard_error(groups, self.options.held_out) * 2**0.5
        better = [budget for budget, gain in ahead.items() if gain > 0]
        clear = [budget for budget, gain in ahead.items() if abs(gain) > error]
        if not ahead:
            return f"{self.size}, {metric.name}. {'; '.join(clauses)}. No budget is compared.{not_recommended(behind)}"
        return (
            f"{self.size}, {metric.name}. "
            + "; ".join(clauses)
            + f". AdaLoRA is ahead at {len(better)} of {len(ahead)} budgets"
            + (f" ({', '.join(better)}), most at {max(ahead, key=lambda budget: ahead[budget])}" if better else "")
            + f". The difference is larger than one standard error of it ({metric.margin(error)}) at: "
            f"{', '.join(clear) or 'none'}.{not_recommended(behind)}"
        )

    def _metric(self, rows: list[Row]) -> Metric:
        return Metric.of([row for row in rows if row["loss"] is not None])

    def draw(self, rows: list[Row], folder: Path) -> list[str]:
        figure, axes = new_figure()
        self.draw_budgets(axes, rows)
        names = [save_figure(figure, folder / "budget.png")]
        for number, budget in enumerate(self.budgets):
            path = folder / f"ranks-{number + 1}.png"
            self.draw_ranks(path, rows, budget, f"AdaLoRA's ranks with the parameters of {budget}")
            names.append(path.name)
        return names

    def draw_budgets(self, axes: Any, rows: list[Row]) -> None:
        """Both methods over the budgets, on one plot's axes."""
        metric = self._metric(rows)
        for method, mark, shift in (("LoRA", "o-", -0.05), ("AdaLoRA", "s--", 0.05)):
            values = {
                place: metric.values(its)
                for place, budget in enumerate(self.budgets)
                if (its := self.measured(rows, budget, method))
            }
            errorbars(axes, values, method, metric.factor, mark=mark, shift=shift)
        axes.set_xticks(range(len(self.budgets)), list(self.budgets))
        axes.set_xlabel("budget: the parameters of LoRA")
        axes.set_ylabel(metric.title)
        axes.set_title(f"{self.options.data}, {self.options.steps} steps", fontsize="medium")
        axes.legend()

    def draw_ranks(self, path: Path, rows: list[Row], budget: str, title: str) -> None:
        """Mean rank of each matrix over the seeds, layer × module."""
        from veneer.reporting.heatmap import RankMap

        names = dict.fromkeys(name for row in rows for name in json.loads(row["ranks"] or "{}"))
        ranks = [json.loads(row["ranks"]) for row in self.measured(rows, budget, "AdaLoRA")]
        means = {name: statistics.mean(each.get(name, 0) for each in ranks) for name in names}
        RankMap.of(means).write_png(path, f"{title}, mean of {len(ranks)} seeds")


def _parameters(run: dict[str, Any], lora: dict[str, Any]) -> int:
    """Of LoRA's matrices, without a head that is trained beside them."""
    from veneer.models.checkpoint import Checkpoint
    from veneer.models.load import load
    from veneer.updates.attach import attach
    from veneer.updates.config import LoRA
    from veneer.updates.trainable import trainable

    checkpoint = Checkpoint(run["model"])
    model, _ = load(checkpoint, compute="fp32", labels=None if checkpoint.generates_text else ["a", "b"])
    attach(model, LoRA(**lora))
    return sum(row.parameters for row in trainable(model).rows if row.rank is not None)


def _ranks(adapter: Path) -> tuple[dict[str, int], int]:
    """Module name → rank of an adapter folder, in the model's order, and the parameters of its low-rank updates."""
    from veneer.reporting.heatmap import ranks_of
    from veneer.updates.adapter_file import read_tensors

    tensors = {key: tensor for key, tensor in read_tensors(adapter).items() if ".lora_" in key}
    ranks = ranks_of({key: tuple(tensor.shape) for key, tensor in tensors.items()})
    return {name: rank for name, rank in ranks.items() if rank}, sum(tensor.numel() for tensor in tensors.values())
