"""Which rank is enough: separately trained ranks, and one high-rank run cut to every smaller one.

The update ΔW = s · B A of the highest rank is cut to its r largest singular values (Eckart and Young, 1936: the nearest
matrix of rank r), all matrices alike. That costs one training; the study shows whether it predicts what separate
trainings reach.
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any, ClassVar

from veneer.studies.numbers import Metric, grouped, not_recommended, unlearned
from veneer.studies.plots import errorbars, new_figure, save_figure
from veneer.studies.study import Job, Row, Study
from veneer.studies.trained import quality, timed, trained

RANKS = (1, 2, 4, 8, 16, 32)


class RankStudy(Study):
    name = "rank"
    title = "Which rank is enough?"
    columns: ClassVar = {
        "how": "trained: LoRA of this rank; cut: the highest rank's update cut to this one",
        "rank": "rank of every matrix",
        "highest": "of a cut the rank that was trained",
    }

    @property
    def ranks(self) -> list[int]:
        return self.options.ranks or list(RANKS)

    def jobs(self, rows: list[Row]) -> list[Job]:
        seeds, highest = self.options.seeds, max(self.ranks)
        jobs = [
            Job(self.name, "trained", {"rank": rank, "run": self.run(seed, rank=rank)})
            for seed in seeds
            for rank in sorted(self.ranks, reverse=True)
        ]
        done = {row["run"] for row in rows}
        for seed in seeds:
            run = self.run(seed, rank=highest)
            if Job(self.name, "trained", {"rank": highest, "run": run}).key in done:  # else a cut would train it
                smaller = [rank for rank in self.ranks if rank < highest]
                jobs += [Job(self.name, "cut", {"rank": rank, "run": run}) for rank in smaller]
        return jobs

    @classmethod
    def work(cls, what: str, options: dict[str, Any], runs: Path) -> list[Row]:
        folder, measured = trained(options["run"], runs)
        row = {"how": what, "rank": options["rank"], "highest": None}
        return [row | (measured if what == "trained" else _cut(folder, options["rank"], measured))]

    def findings(self, rows: list[Row]) -> str:
        by_how = {how: grouped(its, lambda row: row["rank"]) for how, its in grouped(rows, lambda r: r["how"]).items()}
        metrics = dict.fromkeys((Metric.of(rows), Metric("loss")))
        said = " ".join([f"{self.size}.", *(self._by(metric, by_how) for metric in metrics)])
        return said + not_recommended(f"rank {rank}" for rank in sorted(unlearned(by_how["trained"])))

    def _by(self, metric: Metric, by_how: dict[str, dict[int, list[Row]]]) -> str:
        counts = {rank: its[0]["parameters"] for rank, its in by_how["trained"].items()}
        values = {rank: metric.values(by_how["trained"][rank]) for rank in self.ranks}
        means = {rank: statistics.mean(its) for rank, its in values.items()}
        error = metric.standard_error(list(values.values()), self.options.held_out)
        said = f"By the {metric.name}: " + ", ".join(f"rank {rank} {metric.shown(its)}" for rank, its in values.items())
        behind = unlearned(by_how["trained"])
        learned = {rank: mean for rank, mean in means.items() if rank not in behind}
        said += self._to_take(metric, learned, error, counts) if learned else ". No rank is recommended."
        cuts = {rank: metric.values(its) for rank, its in sorted(by_how.get("cut", {}).items())}
        if cuts:
            results = ", ".join(f"rank {rank} {metric.shown(its)}" for rank, its in cuts.items())
            said += f" Rank {max(self.ranks)} cut by SVD: {results}{self._trusted(cuts, means, error)}."
        return said

    def _to_take(self, metric: Metric, means: dict[int, float], error: float, counts: dict[int, int]) -> str:
        """Among ranks that learned, the smallest that is as good as the best."""
        best = metric.best(means)
        enough = min((rank for rank in means if metric.within(means[rank], means[best], error)), default=best)
        spared = f", with {counts[enough]:,} parameters instead of {counts[best]:,}" if enough != best else ""
        return (
            f". The best is rank {best}; the smallest within one standard error of it ({metric.margin(error)}) is "
            f"rank {enough}{spared}: take rank {enough}."
        )

    def _trusted(self, cuts: dict[int, list[float]], means: dict[int, float], error: float) -> str:
        if math.isnan(error):
            return ""
        gaps = {rank: statistics.mean(its) - means[rank] for rank, its in cuts.items()}
        near = [str(rank) for rank, gap in gaps.items() if abs(gap) <= 2**0.5 * error]
        return f"; within one standard error of a difference from the trained rank at {', '.join(near) or 'none'}"

    def draw(self, rows: list[Row], folder: Path) -> list[str]:
        metric, counts = Metric.of(rows), {row["rank"]: row["parameters"] for row in rows}
        figure, axes = new_figure()
        names = {"trained": "trained at this rank", "cut": f"rank {max(self.ranks)}, cut by SVD"}
        for how, its in grouped(rows, lambda row: row["how"]).items():
            points = {rank: metric.values(same) for rank, same in grouped(its, lambda row: row["rank"]).items()}
            errorbars(axes, points, names[how], metric.factor, mark="o-" if how == "trained" else "s--")
        axes.set_xscale("log", base=2)
        axes.set_xticks(self.ranks, [f"{rank}\n{counts[rank]:,}" for rank in self.ranks], fontsize="small")
        axes.set_xlabel("rank, and parameters")
        axes.set_ylabel(metric.title)
        axes.set_title(f"{self.options.data}, {self.options.model}, {self.options.steps} steps", fontsize="medium")
        axes.legend()
        return [save_figure(figure, folder / "rank.png")]


def _cut(folder: Path, rank: int, measured: Row) -> Row:
    from veneer.runs.opened import open_run
    from veneer.studies.decompose import of_product, truncate
    from veneer.updates.layers import Pair
    from veneer.updates.record import updates_of

    prepared = open_run(folder)
    updates = {path: u for path, u in updates_of(prepared.model, "default").items() if isinstance(u, Pair)}
    highest = max(update.rank for update in updates.values())
    whole = measured["parameters"] - sum(p.numel() for u in updates.values() for p in u.parameters())
    parameters = whole + (measured["parameters"] - whole) * rank // highest
    row: Row = {"highest": highest, "seed": measured["seed"], "parameters": parameters}
    with timed(row):
        for update in updates.values():
            truncate(update, *of_product(update.B, update.A), rank)
        row |= quality(prepared)
    return row
