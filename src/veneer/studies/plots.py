"""Small plots that look alike. matplotlib takes a second to import, so only where one is drawn."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from veneer.files import atomic_file


def new_figure(columns: int = 1, width: float = 6.5, height: float = 4.0) -> tuple[Any, Any]:
    """A figure and its axes (an array of them when there are several)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns)


def errorbars(
    axes: Any, points: dict[Any, list[float]], label: str, factor: float = 1.0, *, mark: str = "o-", shift: float = 0.0
) -> None:
    """Mean and spread of the values at each place, in order; without spread where there is one value."""
    places = sorted(points)
    means = [factor * statistics.mean(points[place]) for place in places]
    spreads = [factor * statistics.stdev(points[place]) if len(points[place]) > 1 else 0.0 for place in places]
    axes.errorbar([place + shift for place in places], means, spreads, fmt=mark, capsize=4, label=label)


def bars(axes: Any, values: dict[str, list[float]], factor: float = 1.0) -> None:
    """A point with its spread for each name, the seeds' own values beside it; a bar from zero would hide it."""
    for place, its in enumerate(values.values()):
        axes.plot([place + 0.15] * len(its), [factor * value for value in its], ".", color="0.6")
    errorbars(axes, dict(enumerate(values.values())), "mean and spread", factor, mark="o")
    axes.set_xticks(range(len(values)), list(values), fontsize="small")


def save_figure(figure: Any, path: Path) -> str:
    """Write the figure as PNG; its name."""
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return path.name
