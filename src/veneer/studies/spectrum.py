"""The low-rank hypothesis itself: what full fine-tuning changed, its singular values, and what their first r keep.

Beside it, the subspaces that LoRA runs of different ranks and seeds find (Hu et al., 2021, section 7.2): φ of the right
singular vectors of their A, as in the paper; and of the left singular vectors of B A, since B starts at zero and has
only what was learned, while A keeps most of its random start.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

from veneer.studies.numbers import Metric, grouped, not_recommended, unlearned
from veneer.studies.plots import errorbars, new_figure, save_figure
from veneer.studies.study import Job, Row, Study
from veneer.studies.trained import quality, timed, trained

KEPT = (1, 2, 4, 8, 16, 32, 64)  # singular values of each matrix that are put on the base
LORA_RANKS = (4, 16)
DIRECTIONS = (1, 2, 4, 8)  # of which φ is taken


class SpectrumStudy(Study):
    name = "spectrum"
    title = "Is what fine-tuning changes of low rank?"
    columns: ClassVar = {
        "what": "full: fine-tuned; LoRA; base: before; part: base and the part of rank r of each matrix's change; "
        "matrices: base and all of their change; matrix: one of them; overlap: of two LoRA runs",
        "rank": "of the part, or of LoRA; of a matrix how many singular values hold 90 % of its change's energy; of an "
        "overlap the number of directions",
        "name": "the matrix; or which runs overlap",
        "share": "of a part: of Σ σ² of the change, mean over the matrices",
        "energy": "of a matrix Σ σ² of its change",
        "singular_values": "of a matrix the largest ones, as JSON",
        "phi_a": "φ of two runs' A, right singular vectors, mean over the matrices",
        "phi_b": "φ of two runs' B A, left singular vectors, mean over the matrices",
        "random_a": "φ of random subspaces of the size of phi_a's",
        "random_b": "φ of random subspaces of the size of phi_b's",
    }

    @property
    def ranks(self) -> list[int]:
        return self.options.ranks or list(LORA_RANKS)

    def jobs(self, rows: list[Row]) -> list[Job]:
        full = [self.run(seed, method="full", learning_rate=self.rate_for("full")) for seed in self.options.seeds]
        lora = {(seed, rank): self.run(seed, rank=rank) for seed in self.options.seeds for rank in self.ranks}
        jobs = [Job(self.name, "full", {"run": run}) for run in full]
        jobs += [Job(self.name, "LoRA", {"rank": rank, "run": run}) for (_, rank), run in lora.items()]
        done = {row["run"] for row in rows}
        if all(job.key in done for job in jobs):  # the others read what these leave
            jobs += [Job(self.name, "parts", {"run": run}) for run in full]
            jobs += [
                Job(self.name, "overlap", {"which": which, "runs": [lora[one], lora[other]]})
                for which, one, other in self._pairs()
            ]
        return jobs

    def _pairs(self) -> list[tuple[str, tuple[int, int], tuple[int, int]]]:
        """The lowest and the highest rank of each seed; each rank of neighbouring seeds."""
        seeds, low, high = self.options.seeds, min(self.ranks), max(self.ranks)
        same = [(f"ranks {low} and {high} of one seed", (s, low), (s, high)) for s in seeds if low != high]
        return same + [(f"rank {high} of two seeds", (one, high), (other, high)) for one, other in pairwise(seeds)]

    @classmethod
    def work(cls, what: str, options: dict[str, Any], runs: Path) -> list[Row]:
        row: Row = dict.fromkeys(cls.columns)
        if what == "overlap":
            return [row | own for own in _overlaps(options["which"], options["runs"], runs)]
        folder, measured = trained(options["run"], runs)
        if what == "parts":
            return [row | own for own in _parts(folder, measured)]
        return [row | measured | {"what": what, "rank": options.get("rank")}]

    def findings(self, rows: list[Row]) -> str:
        by = grouped(rows, lambda row: row["what"])
        metric, loss = Metric.of(by["full"]), Metric("loss")
        said = [
            f"{self.size}, {metric.name}. The base {metric.shown(metric.values(by['base']))}, full fine-tuning "
            f"{metric.shown(metric.values(by['full']))}, the base with all that changed in its linear layers and "
            f"nothing else {metric.shown(metric.values(by['matrices']))}."
        ]
        behind = unlearned({"full fine-tuning": by["full"]})
        said[0] += not_recommended(behind)
        for own in dict.fromkeys((metric, loss)):
            kept = _kept(by, own)
            enough = next((rank for rank in sorted(kept) if kept[rank] >= 0.9), None) if not behind else None
            if not kept:
                said.append(f"There is no gain in {own.column} of which a part could keep a share.")
                continue
            said.append(
                f"On the base alone, the part of rank r of every matrix's change keeps this share of the gain in "
                f"{own.column}: "
                + ", ".join(f"{100 * kept[rank]:.0f} % (r {rank})" for rank in sorted(kept))
                + (f"; nine tenths from rank {enough} on." if enough else ".")
            )
        energy = {rank: _mean(its, "share") for rank, its in grouped(by["part"], lambda row: row["rank"]).items()}
        needed = [row["rank"] for row in by["matrix"]]
        said.append(
            "It holds "
            + ", ".join(f"{100 * energy[rank]:.0f} %" for rank in sorted(energy))
            + f" of the change's energy. Nine tenths of it take {statistics.median(needed):.0f} singular values in the "
            f"median matrix, {min(needed)} to {max(needed)} over all."
        )
        for which, its in grouped(by.get("overlap", ()), lambda row: row["name"]).items():
            ends = [[row for row in its if row["rank"] == number] for number in _ends(its)]
            said.append(
                f"φ of {which}: "
                + "; ".join(
                    f"of {own[0]['rank']} direction{'s' if own[0]['rank'] > 1 else ''} {_mean(own, 'phi_a'):.3f} in A "
                    f"(random {_mean(own, 'random_a'):.3f}), {_mean(own, 'phi_b'):.3f} in B A (random "
                    f"{_mean(own, 'random_b'):.3f})"
                    for own in ends
                )
                + "."
            )
        return " ".join(said)

    def draw(self, rows: list[Row], folder: Path) -> list[str]:
        by = grouped(rows, lambda row: row["what"])
        figure, (kept, energy, overlap) = new_figure(3, width=15)
        _draw_kept(kept, by, Metric.of(by["full"]))
        _draw_energy(energy, by["matrix"])
        for which, its in grouped(by.get("overlap", ()), lambda row: row["name"]).items():
            own = grouped(its, lambda row: row["rank"])
            for column, of in (("phi_a", "A"), ("phi_b", "B A")):
                points = {rank: [row[column] for row in same] for rank, same in own.items()}
                errorbars(overlap, points, f"{of}, {which}", mark="o-" if of == "A" else "s--")
            if which == by["overlap"][-1]["name"]:
                errorbars(overlap, {r: [_mean(same, "random_a")] for r, same in own.items()}, "random", mark=":")
        overlap.set_ylim(0, 1)
        overlap.set_xlabel("directions")
        overlap.set_ylabel("φ, mean over the matrices")
        for axes in (kept, energy, overlap):
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:g}")
            if axes.get_legend_handles_labels()[0]:  # of one rank and one seed there is no overlap
                axes.legend(fontsize="small")
        figure.suptitle(f"{self.options.data}, {self.options.model}, {self.options.steps} steps", fontsize="medium")
        return [save_figure(figure, folder / "spectrum.png")]


def _draw_kept(axes: Any, by: dict[str, list[Row]], metric: Metric) -> None:
    parts = grouped(by["part"], lambda row: row["rank"])
    errorbars(axes, {r: metric.values(its) for r, its in parts.items()}, "base + part of rank r", metric.factor)
    styles = {"full": ("-", "full fine-tuning"), "matrices": ("--", "base + all of the change"), "base": (":", "base")}
    for what, (style, label) in styles.items():
        value = metric.factor * statistics.mean(metric.values(by[what]))
        axes.axhline(value, color="0.4", linestyle=style, label=label)
    axes.set_xlabel("singular values of each matrix's change")
    axes.set_ylabel(metric.title)


def _draw_energy(axes: Any, rows: list[Row]) -> None:
    for kind, its in grouped(rows, lambda row: row["name"].split(".")[-1]).items():
        shares: dict[int, list[float]] = {rank: [] for rank in KEPT}
        for row in its:
            values = json.loads(row["singular_values"])
            for rank in KEPT:
                shares[rank].append(100 * sum(value**2 for value in values[:rank]) / row["energy"])
        axes.plot(KEPT, [statistics.mean(shares[rank]) for rank in KEPT], "o-", markersize=3, label=kind)
    axes.set_xlabel("singular values of each matrix's change")
    axes.set_ylabel("share of its energy, %")


def _kept(by: dict[str, list[Row]], metric: Metric) -> dict[int, float]:
    """Rank → share of the gain from the base to full fine-tuning that the part of that rank keeps; none of no gain."""
    base, full = (statistics.mean(metric.values(by[what])) for what in ("base", "full"))
    parts = grouped(by["part"], lambda row: row["rank"]) if base != full else {}
    return {rank: (statistics.mean(metric.values(its)) - base) / (full - base) for rank, its in parts.items()}


def _mean(rows: Iterable[Row], column: str) -> float:
    return statistics.mean(float(row[column]) for row in rows)


def _ends(rows: list[Row]) -> tuple[int, int]:
    numbers = sorted({row["rank"] for row in rows})
    return numbers[0], numbers[-1]


def _parts(folder: Path, measured: Row) -> list[Row]:
    from veneer.frozen.layers import linear_layers
    from veneer.runs.opened import base_of_run, open_run
    from veneer.studies.decompose import Changes
    from veneer.updates.select import classification_head

    prepared = open_run(folder)
    full, base = prepared.model, base_of_run(folder)
    assert base is not None
    head = classification_head(base)
    if head is not None:  # a new one is random: the trained one stands on the base, too
        base.get_submodule(head).load_state_dict(full.get_submodule(head).state_dict())
    prepared.model = base
    changes = Changes(base, full, linear_layers(base), max(KEPT))
    rows: list[Row] = []
    for what, rank in [("base", 0), *(("part", rank) for rank in KEPT), ("matrices", None)]:
        row: Row = {"what": what, "rank": rank or None, "seed": measured["seed"], "parameters": 0}
        with timed(row):
            changes.put(rank)
            row |= quality(prepared)
        if rank:
            row["share"] = statistics.mean(changes.energy(name, rank) for name in changes.values)
        rows.append(row)
    nothing = {"loss": None, "accuracy": None, "parameters": None, "seconds": None, "peak_memory": None}
    for name, values in changes.values.items():
        shares = values.double().square().cumsum(0)
        rows.append({
            "what": "matrix", "name": name, "seed": measured["seed"], "energy": float(shares[-1]),
            "rank": int((shares < 0.9 * shares[-1]).sum()) + 1,
            "singular_values": json.dumps([float(f"{value:.4g}") for value in values[: max(KEPT)]]), **nothing,
        })  # fmt: skip
    return rows


def _overlaps(which: str, pair: list[dict[str, Any]], runs: Path) -> list[Row]:
    from veneer.studies.decompose import of_product, overlap
    from veneer.updates.adapter_file import read_tensors

    row: Row = {"what": "overlap", "name": which, "seed": pair[0]["seed"], "loss": None, "accuracy": None}
    with timed(row):
        one, other = (read_tensors(trained(run, runs)[0] / "adapter") for run in pair)
        names = [key.removesuffix("A.weight") for key in one if key.endswith("lora_A.weight")]
        spans: dict[str, list[tuple[Any, Any]]] = {"a": [], "b": []}
        for name in names:
            sides = [of_product(tensors[f"{name}B.weight"], tensors[f"{name}A.weight"]) for tensors in (one, other)]
            spans["b"].append((sides[0][0], sides[1][0]))
            spans["a"].append(tuple(_right_vectors(tensors[f"{name}A.weight"]) for tensors in (one, other)))
        most = min(min(len(tensors[f"{name}A.weight"]) for name in names) for tensors in (one, other))
        rows = []
        for number in [number for number in DIRECTIONS if number <= most]:
            own: Row = {"rank": number}
            for side, pairs in spans.items():
                own[f"phi_{side}"] = statistics.mean(overlap(*pair, number) for pair in pairs)
                own[f"random_{side}"] = statistics.mean(number / len(pair[0]) for pair in pairs)
            rows.append(own)
    return [row | {"parameters": None} | own for own in rows]


def _right_vectors(A: Any) -> Any:
    """(in, rank), the right singular vectors of A (rank, in)."""
    import torch

    return torch.linalg.svd(A.double(), full_matrices=False)[2].T
