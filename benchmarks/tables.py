"""The tables of the docs that `make bench` measures, from benchmarks/results.

    python benchmarks/tables.py        all of them

A page says `<!-- measured: NAME -->` before a table. The table's head is the page's, its body is what `BODIES[NAME]`
makes of the results. A benchmark puts its own there when it is done; a test asks that none is of other results.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
TABLE = re.compile(
    r"(?<=^<!-- measured: )(?P<name>\w+) -->\n\n(?P<head>\|.*\n\|.*\n)(?P<body>(?:\|.*\n)*)", re.MULTILINE
)

# What is predicted for a run, over what it takes.
MEMORY, TIME = (0.98, 1.05), (0.85, 1.15)

Cells = Iterator[tuple[str, ...]]  # of a row


def tell(*names: str) -> None:
    """Writes these tables into their pages, and prints them."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if (new := filled(text, names)) != text:
            page.write_text(new, encoding="utf-8")
        for table in TABLE.finditer(new):
            if table["name"] in names:
                print(f"\n{table['head']}{table['body']}\nIn {page.relative_to(ROOT)}, from benchmarks/results.")


def filled(text: str, names: tuple[str, ...] = ()) -> str:
    """A page's text with the bodies of these tables, or of all, as the results have them."""
    return TABLE.sub(lambda table: _filled(table) if table["name"] in (names or BODIES) else table[0], text)


def _filled(table: re.Match[str]) -> str:
    body = "".join(f"| {' | '.join(cells)} |\n" for cells in BODIES[table["name"]]())
    return f"{table['name']} -->\n\n{table['head']}{body}"


def _result(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def _gb(gigabytes: float) -> str:
    return f"{gigabytes:.2f} GB"


def _mb(size: float) -> str:
    return f"{size / 1e6:,.0f} MB"


def _times(ratio: float | None, digits: int = 2) -> str:
    return "" if ratio is None else f"{ratio:.{digits}f} ×"


def _step() -> Cells:
    found = _result("step")
    for what, kept, tokens in (("fp32", "fp32", "8 × 128"), ("nf4", "nf4", "8 × 128"), ("long", "fp32", "2 × 1024")):
        for who, side in (("Veneer", found[what]["veneer"]), ("peft", found[what]["peft"])):
            yield kept, tokens, who, f"{side['tokens_per_second']:.0f}", _gb(side["peak_gb"])
        yield kept, tokens, "ratio", _times(found[what]["speed_ratio"]), _times(found[what]["memory_ratio"])


def _compute() -> Cells:
    said = {
        "fp32": ("fp32", "fp32", "8 × 128"), "fp32 in bf16": ("fp32", "bf16", "8 × 128"),
        "bf16": ("bf16", "bf16", "8 × 128"), "nf4": ("nf4", "bf16", "8 × 128"), "long": ("nf4", "bf16", "2 × 1024"),
    }  # fmt: skip
    for name, found in _result("compute")["cases"].items():
        ours, theirs = found["veneer"], found["peft"]
        speeds = (f"{side['tokens_per_second']:,.0f}, {_gb(side['peak_gb'])}" for side in (ours, theirs))
        ratios = (_times(found[f"{what}_ratio"]) for what in ("tokens_per_second", "peak_gb"))
        share = f"{found['share_of_mm']:.2f}" if "share_of_mm" in found else ""
        yield *said[name], *speeds, found["setting"], *ratios, share


def _rows() -> Cells:
    found = _result("rows")

    def side(kept: str, who: str, run: dict[str, float]) -> tuple[str, ...]:
        return kept, who, f"{run['rows_per_second']:.2f}", _gb(run["peak_gb"] - run["resident_gb"])

    yield side("fp32", "trl, its defaults, 4 steps", found["trl_defaults"])
    for kept, of in found["runs"].items():
        yield side(kept, f"trl, tuned, {of['trl_rows_at_once']} rows at once", of["trl"])
        yield side(kept, "Veneer", of["veneer"])
        yield kept, "Veneer / trl, tuned", _times(of["speed_ratio"]), _times(of["memory_ratio"])
        if kept == "fp32":
            yield kept, "Veneer / trl, its defaults", _times(found["speed_ratio_defaults"], 1), ""


def _speed(found: dict[str, float]) -> tuple[str, ...]:
    return f"{found['tokens_per_second']:.0f}", f"{found['gflop_per_second']:.0f}", _gb(found["peak_gb"])


def _lengths() -> Cells:
    for length, found in _result("lengths")["lengths"].items():
        yield length, *_speed(found)


def _sizes() -> Cells:
    for found in _result("lengths")["sizes"].values():
        yield f"{found['parameters'] / 1e6:,.0f} M", *_speed(found)


def _busy() -> Cells:
    said = {
        "nothing": "nothing", "a busy process": "a busy process of one thread",
        "a second run": "a second training run",
    }  # fmt: skip
    sides = _result("busy")["tokens_per_second"].values()
    for beside, name in said.items():
        yield name, *(_beside(of.get(beside), of["nothing"]) for of in sides)


def _beside(speed: float | None, idle: float) -> str:
    if speed is None:
        return ""
    return f"{speed:.0f}" if speed == idle else f"{speed:.0f} ({_times(speed / idle)})"


def _kernels() -> Cells:
    for name, found in _result("kernels")["milliseconds"].items():
        ours, theirs, plain = (found.get(side) for side in ("veneer", "bitsandbytes", "fp32"))
        milliseconds = (f"{time:.2f} ms" if time else "" for time in (ours, theirs, plain))
        yield name, *milliseconds, *(_times(time and time / ours) for time in (theirs, plain))


def _generation() -> Cells:
    said = {"int8": "Veneer, activations in 8 bits", "exact": "Veneer, exact"}
    speeds = _result("generation")["tokens_per_second"]
    for side, speed in speeds.items():
        ratios = (_times(speed / speeds[peer]) for peer in ("bitsandbytes", "llama.cpp"))
        yield said.get(side, side), f"{speed:.1f}", *ratios


def _adalora() -> Cells:
    found = _result("adalora")
    seconds, peak, ratio = found["seconds"], found["peak_gb"], found["time_ratio"]
    before, after = "before the cut", "after the cut"
    yield "LoRA", f"{seconds['lora']:.2f}", "1", _gb(peak["lora"])
    memory = f"{_gb(peak[before])} ({_times(found['memory_ratio'], 3)})"
    yield f"AdaLoRA, {before}", f"{seconds[before]:.2f}", _times(ratio[before], 3), memory
    yield f"AdaLoRA, {after}", f"{seconds[after]:.2f}", _times(ratio[after], 3), ""


def _paged() -> Cells:
    said = {
        "fits": "all in the budget", "half fits": "half of them in the budget, free memory beside it",
        "a tenth fits": "a tenth in the budget, free memory beside it",
        "a tenth fits, memory for half": "a tenth in the budget, memory limited to half of the states",
    }  # fmt: skip
    found = _result("paged")
    for case, name in said.items():
        if case in found["ratios"]:
            yield name, f"{found['seconds'][case]:.3f}", _times(found["ratios"][case], 1)


def _loftq() -> Cells:
    both = [{(row["rank"], row["iterations"]): row for row in rows} for rows in _result("loftq").values()]
    keys = sorted({*both[0], *both[1]}, key=lambda key: (key[0] or 0, -1 if key[1] is None else key[1]))
    for rank, iterations in keys:
        said = f"rank {rank}, iterations: {iterations}" if iterations else "B = 0"
        rows = [of.get((rank, iterations)) for of in both]
        cells = (_digits(row[what]) if row else "" for row in rows for what in ("error", "measured"))
        yield "not quantised" if iterations is None else said, *cells


def _digits(value: float) -> str:
    return f"{value:#.4g}" if value else "0"


def _sixteen() -> Cells:
    for shape, found in _result("sixteen")["shapes"].items():
        yield shape, *(_times(found["over_fp32"][how]) for how in ("bf16", "fp16", "bf16 alone"))


def _storage() -> Cells:
    for name, found in _result("storage").items():
        perplexities = (f"{found[f'perplexity_{which}']:.2f}" for which in ("packaged", "off_grid"))
        yield name, f"{found['bits']:.3f}", f"{found['relative_squared_error']:.2g}", *perplexities


def _demo_seeds() -> Cells:
    found = _result("demo_seeds")
    for storage, pairs in found["runs"].items():
        before, after = (", ".join(f"{100 * accuracy:.1f}" for accuracy in each) for each in zip(*pairs, strict=True))
        yield storage, f"{before} %", f"{after} %", f"{100 * found['mean_after'][storage]:.1f} %"


def _large() -> Cells:
    for model, found in _result("large").items():
        seconds = (f"{found[which]['step_seconds']:.0f} s" for which in ("limited", "unlimited"))
        yield model, f"{found['base_gb']:.1f} GB", f"{found['limit_gb']} GB", *seconds


def _plan() -> Cells:
    for run, found in _result("plan")["runs"].items():
        memory = (_mb(found["measured"]), _times(found["memory_ratio"], 3))
        yield run, *memory, f"{found['seconds']:.2f} s", _times(found["time_ratio"])


def _plan_bounds() -> Cells:
    runs = _result("plan")["runs"].values()
    for what, bounds in (("memory", MEMORY), ("time", TIME)):
        of_runs = [found[f"{what}_ratio"] for found in runs]
        of_rounds = [one for found in runs for one in found["rounds"][f"{what}_ratio"]]
        yield what, *_within(of_runs, *bounds), *_within(of_rounds, *bounds)


def _within(ratios: list[float], low: float, high: float) -> tuple[str, str]:
    inside = sum(low <= ratio <= high for ratio in ratios)
    return f"{min(ratios):.3f} to {max(ratios):.3f}", f"{inside} of {len(ratios)}"


def _plan_rows() -> Cells:
    for run, found in _result("plan_rows")["runs"].items():
        memory = (_mb(found[which]) for which in ("first", "later", "last", "foreseen"))
        yield run, *memory, _times(found["foreseen"] / found["last"], 3)


BODIES: dict[str, Callable[[], Cells]] = {
    "step": _step, "compute": _compute, "rows": _rows, "lengths": _lengths, "sizes": _sizes, "busy": _busy,
    "kernels": _kernels,
    "generation": _generation, "adalora": _adalora, "paged": _paged, "loftq": _loftq, "sixteen": _sixteen,
    "storage": _storage, "demo_seeds": _demo_seeds, "large": _large, "plan": _plan, "plan_bounds": _plan_bounds,
    "plan_rows": _plan_rows,
}  # fmt: skip


if __name__ == "__main__":
    tell(*(sys.argv[1:] or BODIES))
