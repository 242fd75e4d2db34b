"""What is drawn, as plain values: the page's script draws it, its tables show the same numbers, and a screen reader
reads the sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any, Literal

from veneer.runs.history import RunHistory

X = float | str
_TABLE_ROWS = 200  # more help nobody who reads them
_SMOOTHED_FROM = 50  # steps; fewer are seen as they are
_FAR_APART = 20  # times


@dataclass(frozen=True)
class Series:
    name: str
    points: list[tuple[X, float]]
    faint: bool = False  # its smoothed form stands beside it
    mean: str = ""  # the series whose points are the means of these, which are drawn as dots without a line


@dataclass(frozen=True)
class Chart:
    """``x``, ``y``: what the axes show, with units. ``categories``: the values of x in order, where these are text."""

    name: str  # unique on its page; letters and hyphens
    title: str
    x: str
    y: str
    series: tuple[Series, ...]
    kind: Literal["line", "scatter", "bar"] = "line"
    note: str = ""
    log: bool = False  # the axis of y
    categories: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def sentence(self) -> str:
        """The chart in words."""
        parts = []
        for one in self.columns:
            (first_x, first), (last_x, last) = one.points[0], one.points[-1]
            low_x, low = min(one.points, key=lambda point: point[1])
            high_x, high = max(one.points, key=lambda point: point[1])
            said = f"{displayed(first)} at {displayed(first_x)}"
            if len(one.points) > 1:
                said += f" to {displayed(last)} at {displayed(last_x)}"
                said += (
                    f", lowest {displayed(low)} at {displayed(low_x)}, highest {displayed(high)} at {displayed(high_x)}"
                )
            parts.append(f"{one.name}: {said}")
        return f"{self.title}, {self.y} by {self.x}. {'; '.join(parts)}."

    @property
    def columns(self) -> list[Series]:
        """The series that have one value at an x."""
        return [one for one in self.series if not one.mean]

    @property
    def x_values(self) -> list[X]:
        xs = dict.fromkeys(x for one in self.columns for x, _ in one.points)
        return sorted(xs, key=self.categories.index if self.categories else float)

    def table(self) -> list[list[str]]:
        """Rows of x and each series' value there; a series of very many has some at equal distances and the last."""
        values = self.x_values
        every = -(-len(values) // _TABLE_ROWS)
        few = {x for one in self.columns if len(one.points) <= _TABLE_ROWS for x, _ in one.points}
        kept = [x for left, x in enumerate(reversed(values)) if left % every == 0 or x in few][::-1]
        columns = [dict(one.points) for one in self.columns]
        return [[displayed(x), *(displayed(column[x]) if x in column else "" for column in columns)] for x in kept]


def displayed(value: Any) -> str:
    """A number in at most five digits, nothing for none, and anything else as it is."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int) or (value.is_integer() and abs(value) < 1e15):
        return f"{int(value):,}"
    return f"{value:.5g}"


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


def run_charts(run: RunHistory) -> list[Chart]:
    """The curves of a run that there are numbers for."""
    last = run.total or run.step
    charts = [
        _loss_chart(run),
        Chart("rewards", "Held-out rewards", "step", "share of the held-out rows, %", tuple(_rewards(run))),
        Chart(
            "margin",
            "Held-out margin",
            "step",
            "reward of better answers less that of worse ones",
            (Series("margin", _margins(run)),),
        ),
        Chart("accuracy", "Held-out accuracy", "step", "share of the held-out rows, %", tuple(_accuracies(run))),
        _of(run, "learning-rate", "Learning rate", "AdamW's rate", "learning_rate"),
        _of(run, "gradient-norm", "Gradient", "norm before clipping", "gradient_norm"),
        _of(run, "speed", "Speed", "tokens a second, without padding", "tokens_per_second"),
        Chart("memory", "Memory", "step", "peak of the process so far, GB", tuple(_memory(run, last))),
        _of(run, "budget", "AdaLoRA's budget", "triplets in force", "budget"),
        _of(run, "orthogonality", "AdaLoRA's orthogonality", "mean distance ‖PᵀP − I‖", "orthogonality_deviation"),
    ]
    drawn = [replace(chart, series=tuple(one for one in chart.series if one.points)) for chart in charts]
    return [chart for chart in drawn if chart.series]


def _loss_chart(run: RunHistory) -> Chart:
    series = tuple(_losses(run))
    values = [value for one in series for _, value in one.points]
    # The first losses of a base that had everything to learn would press the others flat.
    log = bool(values) and 0 < _FAR_APART * min(values) < max(values)
    of = "a learned token, nats" if run.objective == "likelihood" else f"a row, {run.objective}"
    return Chart("loss", "Loss", "step", f"mean loss of {of}", series, log=log)


def _losses(run: RunHistory) -> list[Series]:
    training = [(record["step"], record["loss"]) for record in run.steps]
    held_out: list[tuple[X, float]] = [(record["step"], record["held_out_loss"]) for record in run.held_out]
    series = [Series("training", list(training), faint=len(training) >= _SMOOTHED_FROM)]
    if len(training) >= _SMOOTHED_FROM:
        over = max(5, len(training) // 25)
        series.append(Series(f"training, mean of {over} steps", smoothed(training, over)))
    return [*series, Series("held-out rows", held_out)]


def _rewards(run: RunHistory) -> list[Series]:
    right: list[tuple[X, float]] = [(one["step"], 100 * one["held_out_reward_accuracy"]) for one in run.rewards]
    return [Series("better answer has the higher reward", right)]


def _margins(run: RunHistory) -> list[tuple[X, float]]:
    return [(one["step"], one["held_out_reward_margin"]) for one in run.rewards if "held_out_reward_margin" in one]


def _accuracies(run: RunHistory) -> list[Series]:
    measured: list[tuple[X, float]] = [(record["step"], 100 * record["held_out_accuracy"]) for record in run.accuracies]
    if run.largest_class is None:
        return [Series("right", measured)]
    largest = 100 * run.largest_class  # what always answering it would reach
    return [Series("right", measured), Series("largest class", [(step, largest) for step, _ in measured])]


def smoothed(points: Sequence[tuple[float, float]], over: int) -> list[tuple[X, float]]:
    """At each point the mean of it and those before it, ``over`` in all."""
    return [(x, fmean(value for _, value in points[max(0, i + 1 - over) : i + 1])) for i, (x, _) in enumerate(points)]


def _memory(run: RunHistory, last: int) -> list[Series]:
    measured: list[tuple[X, float]] = [(record["step"], record["peak_memory"] / 1e9) for record in run.steps]
    if run.predicted_peak is None or not measured:
        return [Series("measured", measured)]
    predicted: list[tuple[X, float]] = [(at, run.predicted_peak / 1e9) for at in (1, max(last, 2))]
    return [Series("measured", measured), Series("predicted", predicted)]


def _of(run: RunHistory, name: str, title: str, y: str, key: str) -> Chart:
    points: list[tuple[X, float]] = [(record["step"], record[key]) for record in run.steps if key in record]
    return Chart(name, title, "step", y, (Series(y, points),))
