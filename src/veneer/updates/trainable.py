"""What is trained, as a table: module, shape, rank, parameters, and their share of the whole model."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from veneer.arguments import refuse_no_model
from veneer.frozen.experts import Stack
from veneer.notebook import html_table
from veneer.updates.config import LoRA
from veneer.updates.experts import experts_left_out
from veneer.updates.inner import inner_model
from veneer.updates.layers import LowRank, weight_shape
from veneer.updates.record import adapters_of, updates_of
from veneer.updates.select import LINEAR_TYPES, count_parameters, modules_of

_HEADER = ("module", "shape", "rank", "parameters")


@dataclass(frozen=True)
class Row:
    """One trained module. ``rank`` is None where all of the module, or rows of it, are trained."""

    name: str
    shape: tuple[int, ...]  # (out, in) of the frozen weight
    rank: int | None
    parameters: int


@dataclass(frozen=True, repr=False)
class Trainable:
    """The rows, the number of trained parameters, and that of the base; prints as a table.

    Example:
        >>> table = veneer.trainable(veneer.attach(model, veneer.LoRA(rank=2, targets=["q_proj"])))
        >>> [(row.name, row.rank) for row in table.rows]
        [('model.layers.0.self_attn.q_proj', 2), ('model.layers.1.self_attn.q_proj', 2)]
        >>> f"{table.share:.2%}"
        '0.79%'
    """

    rows: list[Row]
    parameters: int
    base_parameters: int
    left_out: str = ""  # a sentence on a mixture's experts that are not adapted

    @property
    def share(self) -> float:
        """Trained parameters over those of the base."""
        return self.parameters / self.base_parameters

    def __repr__(self) -> str:
        return f"Trainable({self.total}, {len(self.rows)} modules)"

    def __str__(self) -> str:
        lines = [_HEADER, *self._lines()]
        widths = [max(len(line[i]) for line in lines) for i in range(4)]
        table = [
            f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}".rstrip() for a, b, c, d in lines
        ]
        return "\n".join([*table, self.total, *([self.left_out] if self.left_out else [])])

    def _repr_html_(self) -> str:
        return html_table(_HEADER, self._lines(), f"{self.total} {self.left_out}".strip())

    def _lines(self) -> list[tuple[str, str, str, str]]:
        return [
            (name, " × ".join(map(str, shape)), "whole" if rank is None else str(rank), f"{parameters:,}")
            for name, shape, rank, parameters in _grouped(self.rows)
        ]

    @property
    def total(self) -> str:
        """How many parameters are trained, as a sentence."""
        return f"{self.parameters:,} of {self.base_parameters:,} parameters are trained ({100 * self.share:.3g} %)"


def trainable(model: nn.Module) -> Trainable:
    """The trained parameters of the active adapters, or of the model itself when it has none attached.

    Example:
        >>> print(veneer.trainable(veneer.attach(model, veneer.LoRA(rank=2, targets=["q_proj"]))))
        module                               shape  rank  parameters
        model.layers.*.self_attn.q_proj (×2)  32 × 32     2         256
        256 of ... parameters are trained (... %)
    """
    refuse_no_model("trainable", model)
    model = inner_model(model)
    record = adapters_of(model)
    if not record.configs:
        return _of_plain_model(model)
    modules = modules_of(model)
    rows, seen = [], set()
    for name in record.active:
        for path, update in updates_of(model, name).items():
            count = sum(p.numel() for p in update.parameters() if p.requires_grad)
            if not count or id(update) in seen:
                continue
            seen.add(id(update))  # a tied embedding and head share their new rows
            rank = update.rank if isinstance(update, LowRank) else None
            rows.append(Row(path, _shape(modules[path]), rank, count))
    by_lora = any(isinstance(record.configs[name], LoRA) for name in record.active)
    low_rank = any(row.rank is not None for row in rows)
    said = experts_left_out(model, {row.name for row in rows}, by_lora) if low_rank else ""
    return Trainable(rows, sum(row.parameters for row in rows), count_parameters(modules), said)


def _of_plain_model(model: nn.Module) -> Trainable:
    rows = [Row(path, tuple(p.shape), None, p.numel()) for path, p in model.named_parameters() if p.requires_grad]
    return Trainable(rows, sum(row.parameters for row in rows), count_parameters(modules_of(model)))


def _shape(module: nn.Module) -> tuple[int, ...]:
    """(out, in) of a linear layer or embedding, (experts, out, in) of experts; () of one that holds several weights."""
    if isinstance(module, Stack):
        return (module.experts, *module.shape)
    if isinstance(module, (*LINEAR_TYPES, nn.Embedding)):
        return weight_shape(module)
    weight = getattr(module, "weight", None)
    return tuple(weight.shape) if isinstance(weight, nn.Parameter) else ()


def _grouped(rows: list[Row]) -> list[tuple[str, tuple[int, ...], int | None, int]]:
    """Rows that differ only in the layer's number as one: model.layers.{0–29}.mlp.up_proj, with their sum."""
    groups: dict[tuple[str, tuple[int, ...], int | None], list[Row]] = {}
    for row in rows:
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", row.name, count=1)
        groups.setdefault((pattern, row.shape, row.rank), []).append(row)
    lines = []
    for (pattern, shape, rank), members in groups.items():
        name = members[0].name if len(members) == 1 else f"{pattern} (×{len(members)})"
        lines.append((name, shape, rank, sum(row.parameters for row in members)))
    return lines
