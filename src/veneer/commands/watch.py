"""A run in progress, redrawn in the terminal."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from veneer.errors import DataError, did_you_mean
from veneer.reporting.charts import gigabytes
from veneer.runs.folder import RunFolder
from veneer.runs.history import MetricsTail, RunHistory
from veneer.terminal import terminal
from veneer.training.progress import clock

_EVERY = 1.0  # seconds between two looks
_LINES = 6  # of the chart
_WIDEST = 100
_GAP = 2  # columns after each of the table's two
_HELD_OUT = "held-out loss"
_EIGHTHS = " ▁▂▃▄▅▆▇█"


def watch(path: str | Path, console: Console | None = None) -> None:
    """Show the run in ``path`` until it ends, or until Ctrl-C; a run that is not there yet is waited for.

    Where nothing can be redrawn, in a pipe or a file, it is shown once. Raises DataError when it is not there then, and
    ConfigError for a damaged config.yaml.
    """
    path, console = Path(path), console or terminal()
    tail = MetricsTail(path)
    if not console.is_terminal:
        if not RunFolder(path).exists:
            raise DataError(_absent(path))
        console.print(screen(RunHistory.read(path, tail), console.width))
        return
    quiet = 0  # checks in a row at which nobody was training it
    with Live(console=console, auto_refresh=False, transient=False) as live:
        while quiet < 2:  # one may fall between two files of a run that begins
            there = RunFolder(path).exists
            run = RunHistory.read(path, tail) if there else None
            waiting = Text(f"{_absent(path)} Waiting for it.")
            live.update(waiting if run is None else screen(run, console.width), refresh=True)
            quiet = quiet + 1 if run is not None and run.phase in ("stopped", "finished") else 0
            if quiet < 2:
                time.sleep(_EVERY)


def _absent(path: Path) -> str:
    near = [str(file.parent) for file in path.parent.glob(f"*/{RunFolder.config_file}")]
    return f"There is no run in {path}: it has no {RunFolder.config_file}.{did_you_mean(str(path), near)}"


def screen(run: RunHistory, width: int) -> RenderableType:
    """What is shown of a run in a terminal ``width`` columns wide."""
    width = max(20, min(width, _WIDEST))
    bar = ProgressBar(total=max(run.total or 1, 1), completed=run.step, width=width)
    parts: list[RenderableType] = [*_head(run, width), bar]
    losses = [record["loss"] for record in run.steps]
    if losses:
        parts += [Text(f"training loss, steps 1 to {run.step:,}", style="dim"), chart(losses, width)]
    parts.append(_numbers(run, width))
    parts += [Text(note, style="yellow") for note in [*run.advice, *run.notes]]
    return Group(*parts)


def _head(run: RunHistory, width: int) -> list[Text]:
    """Folder, step and phase in one line where they fit, else each in its own. A command is never cut."""
    said = {
        "starting": "starting", "running": "in progress", "finished": "finished",
        "stopped": f"not finished, and nobody trains it: veneer train --resume {run.folder}",
    }[run.phase]  # fmt: skip
    of = f"/{run.total:,}" if run.total is not None else ""
    name, step = Text(str(run.folder), "bold", overflow="fold"), Text(f"step {run.step:,}{of}")
    state, colon, command = said.partition(": ")
    line = Text("  ").join([name, step, Text(said, "italic")])
    if line.cell_len <= width:
        return [line]
    lines = [name, Text("  ").join([step, Text(f"{state}{colon.strip()}", "italic")])]
    return [*lines, Text(command, overflow="fold")] if command else lines


def _numbers(run: RunHistory, width: int) -> Table:
    table = Table.grid(padding=(0, _GAP))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, overflow="ellipsis")
    for name, value in _rows(run, width - _GAP - len(_HELD_OUT) - _GAP):
        table.add_row(Text(name, style="dim"), Text(value))
    return table


def _rows(run: RunHistory, width: int) -> list[tuple[str, str]]:
    """What the numbers are called, and they, at most ``width`` columns wide."""
    rows = []
    left = run.seconds_left()
    if run.phase == "running" and left is not None:
        rows.append(("time left", f"{clock(left)}, evaluations come on top"))
    if run.steps:
        last = run.steps[-1]
        rows.append(("loss", f"{last['loss']:.4f}"))
    if run.held_out:
        rows.append((_HELD_OUT, _held_out(run, width)))
    if run.accuracies:
        rows.append(("accuracy", _accuracy(run, width)))
    if run.rewards:
        rows.append(("rewards", _rewards(run, width)))
    if run.steps:
        last = run.steps[-1]
        rows.append(("tokens a second", f"{last['tokens_per_second']:,.0f}, median {run.tokens_per_second:,.0f}"))
        rows.append(("learning rate", f"{last['learning_rate']:.3g}"))
        predicted = f", predicted {gigabytes(run.predicted_peak)}" if run.predicted_peak is not None else ""
        rows.append(("peak memory", f"{gigabytes(last['peak_memory'])}{predicted}"))
        if "budget" in last:
            rows.append(("rank budget", f"{last['budget']:,} triplets in force"))
    return rows


def _rewards(run: RunHistory, width: int) -> str:
    """How many of the better answers have the higher reward, and by how much."""
    newest = run.rewards[-1]
    margin = newest.get("held_out_reward_margin")
    by = "" if margin is None else f", margin {margin:.3f}"
    said = f"{100 * newest['held_out_reward_accuracy']:.1f} % right at step {newest['step']:,}{by}"
    return _with_sparkline(said, [record["held_out_reward_accuracy"] for record in run.rewards], width)


def _held_out(run: RunHistory, width: int) -> str:
    """The newest held-out loss and the best one, and the latest ones as blocks where there is room for them."""
    newest, best = run.held_out[-1], run.best()
    kept = f", best {best['held_out_loss']:.4f} at step {best['step']:,}" if best else ""
    said = f"{newest['held_out_loss']:.4f} at step {newest['step']:,}{kept}"
    return _with_sparkline(said, [record["held_out_loss"] for record in run.held_out], width)


def _accuracy(run: RunHistory, width: int) -> str:
    """The newest share of held-out rows that are right beside the largest class's, and the latest ones as blocks."""
    newest = run.accuracies[-1]
    largest = "" if run.largest_class is None else f", largest class {100 * run.largest_class:.1f} %"
    said = f"{100 * newest['held_out_accuracy']:.1f} % at step {newest['step']:,}{largest}"
    return _with_sparkline(said, [record["held_out_accuracy"] for record in run.accuracies], width)


def _with_sparkline(said: str, values: Sequence[float], width: int) -> str:
    """``said`` and the latest of ``values`` as blocks where there is room for them."""
    columns = min(40, width - len(said) - 2)
    return f"{said}  {sparkline(values[-columns:])}" if columns > 0 and len(values) > 1 else said


def chart(values: Sequence[float], width: int) -> Text:
    """``values`` as columns of an area, each the mean of the steps that fall on it; the axis at the left."""
    low, high = min(values), max(values)
    label = max(len(f"{low:.3g}"), len(f"{high:.3g}"))
    heights = _heights(values, max(1, width - label - 2), 8 * _LINES)
    text = Text()
    for line in range(_LINES - 1, -1, -1):
        end = f"{high:.3g}" if line == _LINES - 1 else f"{low:.3g}" if line == 0 else ""
        text.append(f"{end:>{label}} │", style="dim")
        text.append("".join(_EIGHTHS[min(8, max(0, height - 8 * line))] for height in heights), style="cyan")
        text.append("\n" if line else "")
    return text


def sparkline(values: Sequence[float]) -> str:
    """``values`` in one line, the lowest as the lowest block."""
    return "".join(_EIGHTHS[height] for height in _heights(values, len(values), 8))


def _heights(values: Sequence[float], columns: int, most: int) -> list[int]:
    """The heights, from 1 to ``most``, of at most ``columns`` columns."""
    columns = min(columns, len(values))
    edges = [round(i * len(values) / columns) for i in range(columns + 1)]
    means = [fmean(values[edges[i] : edges[i + 1]]) for i in range(columns)]
    low, high = min(values), max(values)
    spread = high - low
    return [1 + round((most - 1) * (mean - low) / spread) if spread else most // 2 for mean in means]
