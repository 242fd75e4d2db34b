"""Which matrices to adapt, all with one number of parameters (LoRA, Hu et al., 2021, section 7.1 and table 5)."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from veneer.errors import TargetError
from veneer.studies.numbers import Metric, best_and_level, grouped, not_recommended, unlearned
from veneer.studies.plots import bars, new_figure, save_figure
from veneer.studies.study import Job, Row, Study
from veneer.studies.trained import trained

if TYPE_CHECKING:
    from torch import nn

CHOICES = {"q": "q", "k": "k", "v": "v", "o": "o", "qk": "qk", "qv": "qv", "qkvo": "qkvo", "mlp": "m"}
BUDGET = "qv"  # the paper's favourite: its parameters at the rank that is asked for are what each choice gets
# How architectures call the matrices of attention, at the ends of their names. All other linear layers are the MLP's.
_ATTENTION = {
    "q": ("q_proj", "query", "q_lin", "SelfAttention.q", "EncDecAttention.q", "attention.wq"),
    "k": ("k_proj", "key", "k_lin", "SelfAttention.k", "EncDecAttention.k", "attention.wk"),
    "v": ("v_proj", "value", "v_lin", "SelfAttention.v", "EncDecAttention.v", "attention.wv"),
    "o": ("o_proj", "out_proj", "attention.output.dense", "out_lin", "SelfAttention.o", "EncDecAttention.o",
          "attention.wo", "self_attn.dense"),
}  # fmt: skip
_IN_ONE = ("c_attn", "qkv_proj", "query_key_value", "Wqkv", "in_proj")


class MatricesStudy(Study):
    name = "matrices"
    title = "Which matrices should be adapted?"
    columns: ClassVar = {
        "matrices": "which: q, k, v, o of the attention; mlp: all linear layers of the MLP",
        "rank": "the one with which their parameters are nearest to the budget",
    }

    def jobs(self, rows: list[Row]) -> list[Job]:
        return [
            Job(self.name, "trained", {"matrices": matrices, "as_qv_of_rank": self.options.rank, "run": self.run(seed)})
            for seed in self.options.seeds
            for matrices in CHOICES
        ]

    @classmethod
    def work(cls, what: str, options: dict[str, Any], runs: Path) -> list[Row]:
        run = options["run"]
        targets, rank = placed(_model(run), options["matrices"], options["as_qv_of_rank"])
        _, measured = trained({**run, "targets": targets, "rank": rank}, runs)
        return [{"matrices": options["matrices"], "rank": rank, **measured}]

    def findings(self, rows: list[Row]) -> str:
        metric, groups = Metric.of(rows), grouped(rows, lambda row: row["matrices"])
        values = {matrices: metric.values(its) for matrices, its in groups.items()}
        error = metric.standard_error(list(values.values()), self.options.held_out) * 2**0.5
        means = {matrices: statistics.mean(its) for matrices, its in values.items()}
        unlearned_ones = unlearned(groups)
        best, level = best_and_level(metric, means, error, unlearned_ones)
        behind = [m for m in means if m != best and m not in level]
        one, several = (
            statistics.mean(means[m] for m in means if (len(CHOICES[m]) == 1 and m != "mlp") is single)
            for single in (True, False)
        )
        return (
            f"{self.size}, {metric.name}: "
            + "; ".join(
                f"{matrices} (rank {its[0]['rank']}, {its[0]['parameters']:,} parameters) "
                f"{metric.shown(values[matrices])}"
                for matrices, its in groups.items()
            )
            + f". The best is {best or 'none'}. Within one standard error of a difference ({metric.margin(error)}): "
            f"{', '.join(level) or 'none'}; behind: {', '.join(behind) or 'none'}. One kind of attention matrix alone "
            f"reaches {metric.number(one)}{metric.unit} on average, several kinds at a smaller rank, and the MLP's, "
            f"{metric.number(several)}{metric.unit}.{not_recommended(unlearned_ones)}"
        )

    def draw(self, rows: list[Row], folder: Path) -> list[str]:
        metric = Metric.of(rows)
        figure, axes = new_figure()
        groups = grouped(rows, lambda row: row["matrices"])
        bars(axes, {f"{m}\nr {its[0]['rank']}": metric.values(its) for m, its in groups.items()}, metric.factor)
        axes.set_xlabel("adapted matrices, and the rank at equal parameters")
        axes.set_ylabel(metric.title)
        axes.set_title(f"{self.options.data}, {self.options.model}, {self.options.steps} steps", fontsize="medium")
        return [save_figure(figure, folder / "matrices.png")]


def placed(model: nn.Module, matrices: str, rank: int) -> tuple[list[str], int]:
    """The names of the matrices, and the rank at which they have the parameters of `BUDGET` at ``rank``.

    Raises TargetError for a model whose attention is not of four matrices that are known here.
    """
    from veneer.updates.config import LoRA
    from veneer.updates.layers import weight_shape
    from veneer.updates.select import choose

    sizes = {chosen.name: sum(weight_shape(chosen.module)) for chosen in choose(model, LoRA())}
    by_role = {
        role: [name for name in sizes if any(name == end or name.endswith(f".{end}") for end in ends)]
        for role, ends in _ATTENTION.items()
    }
    missing = [role for role, names in by_role.items() if not names]
    if missing:
        one = next((name.split(".")[-1] for name in sizes if name.endswith(_IN_ONE)), None)
        why = f"its {one} holds several in one" if one else "its names for them are not known"
        raise TargetError(f"The study needs the matrices q, k, v and o of each layer apart, and of this model {why}.")
    attention = {name for names in by_role.values() for name in names}
    # Layers of no block (a pooler) are none of the MLP's.
    by_role["m"] = [name for name in sizes if name not in attention and any(part.isdigit() for part in name.split("."))]
    names, budget = ([name for role in CHOICES[which] for name in by_role[role]] for which in (matrices, BUDGET))
    return names, max(1, round(rank * sum(sizes[name] for name in budget) / sum(sizes[name] for name in names)))


def _model(run: dict[str, Any]) -> nn.Module:
    """The run's model, for its names and shapes."""
    from veneer.models.checkpoint import Checkpoint
    from veneer.models.load import load

    checkpoint = Checkpoint(run["model"])
    labels = None if checkpoint.generates_text else ["a", "b"]
    model: nn.Module = load(checkpoint, compute="fp32", labels=labels)[0]
    return model
