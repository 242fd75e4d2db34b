"""Several adapters as one: the weighted sum of what they change, exactly or in fewer ranks, or what they agree on.

Each adapter's own scale, pattern of ranks, rsLoRA and λ are in its update ΔW = s · B A before anything is combined, so
adapters of different options add up to what their updates add up to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from veneer.arguments import described, folder_given
from veneer.errors import AdapterFileError, ArgumentError, ConfigError, shown
from veneer.updates.config import CombineOptions
from veneer.updates.export import Plain, plain_updates, refuse_occupied_folder, write_plain
from veneer.updates.loftq import best_factors
from veneer.updates.peft_config import base_named, read_fields
from veneer.updates.reached import warn


class _Part(NamedTuple):
    weight: float
    A: Tensor  # (rank, in)
    B: Tensor  # (out, rank), with the scale in it
    scale: float

    def delta(self) -> Tensor:
        return self.B.double() @ self.A.double()


def combine(
    folders: Sequence[str | Path], weights: Sequence[float], out: str | Path, **options: Any
) -> None:  # fmt: skip
    """Write the adapters of PEFT ``folders``, each times its weight, to ``out`` as one plain LoRA.

    ``options``: those of `CombineOptions`. A module that an adapter does not have counts as zero in it. ``how``:

    - "cat": Σ wᵢ ΔWᵢ exactly; a module's rank is the sum of the ranks.
    - "svd": the same, as near as ``rank`` allows; by default the largest rank of the adapters.
    - "linear": A and B themselves are added, each times √(wᵢ sᵢ), as peft does: of one rank, and with cross terms.
    - "ties" (Yadav et al., 2023, arXiv:2306.01708): of each ΔWᵢ the largest share, ``density``, and of these the values
      whose sign is that of their sum; their mean.
    - "dare_linear", "dare_ties" (Yu et al., 2023, arXiv:2311.03099): of each ΔWᵢ a random share, made larger for it,
      summed or as in ties.

    The last three form ΔW and end in ``rank``, as peft's ties_svd and its kin. Raises ConfigError for options that make
    no sense, AdapterFileError when a folder holds no adapter, more than low-rank updates, or one of another model.

    Example:
        >>> veneer.combine(["adapter", "adapter"], [0.7, 0.3], "mixed", how="svd")
        >>> sorted(os.listdir("mixed"))
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    if isinstance(folders, str | Path) or not isinstance(folders, Sequence):
        raise ArgumentError(f"combine takes a list of folders, not {described(folders)}.")
    paths, out = [folder_given("combine", folder) for folder in folders], folder_given("combine", out, "out")
    asked, numbers = CombineOptions(**options), _weights(weights, len(paths))
    refuse_occupied_folder(out)
    adapters = [plain_updates(folder) for folder in paths]
    fields = [read_fields(folder) for folder in paths]
    _refuse_others(paths, adapters)
    bases = {folder: base for folder, its in zip(paths, fields, strict=True) if (base := base_named(its))}
    if len(set(bases.values())) > 1:
        named = " and ".join(f"{folder} of {base}" for folder, base in list(bases.items())[:3])
        warn(f"The adapters name different bases, {named}; their sum means something over one base only.")
    combined: dict[str, Plain] = {}
    generator = torch.Generator().manual_seed(asked.seed)
    for path in dict.fromkeys(path for adapter in adapters for path in adapter):
        its = [(number, adapter[path]) for number, adapter in zip(numbers, adapters, strict=True) if path in adapter]
        parts = [_Part(number, one.A, one.B, one.scale) for number, one in its]
        A, B = _combined(parts, asked, generator, f"{path} of {', '.join(map(str, paths))}")
        combined[path] = Plain(A.float().contiguous(), B.float().contiguous(), 1.0, its[0][1].embedding)
    source = {**fields[0], "target_modules": None, "lora_dropout": 0.0}
    write_plain(out, combined, source, padded=asked.padded)


def _weights(weights: Sequence[float], count: int) -> list[float]:
    if not isinstance(weights, Sequence) or isinstance(weights, str):
        raise ArgumentError(f"combine takes a list of numbers as weights, not {described(weights)}.")
    for weight in weights:
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ConfigError(f"weights holds {shown(weight)}, which is no finite number.")
    if len(weights) != count or not count:
        raise ConfigError(f"There are {len(weights)} weights for {count} adapters; give one weight for each.")
    return [float(weight) for weight in weights]


def _refuse_others(paths: list[Path], adapters: list[dict[str, Plain]]) -> None:
    """Raises AdapterFileError where two adapters have a module of one name and other sizes, or kinds."""
    first: dict[str, tuple[Path, tuple[int, int, bool]]] = {}
    for folder, adapter in zip(paths, adapters, strict=True):
        for path, one in adapter.items():
            size = (len(one.B), one.A.shape[1], one.embedding)
            other, known = first.setdefault(path, (folder, size))
            if size != known:
                raise AdapterFileError(
                    f"{path} is ({size[0]}, {size[1]}) in {folder} and ({known[0]}, {known[1]}) in {other}: these are "
                    f"adapters of different models."
                )


def _combined(
    parts: list[_Part], asked: CombineOptions, generator: torch.Generator, what: str
) -> tuple[Tensor, Tensor]:
    """A (k, in) and B (out, k) of one module."""
    if asked.how == "linear":
        return _added(parts, what)
    A = torch.cat([part.A.double() for part in parts])
    B = torch.cat([part.weight * part.B.double() for part in parts], 1)
    if asked.how == "cat":
        return A, B
    rank = asked.rank or max(len(part.A) for part in parts)
    if asked.how == "svd":
        return _truncated(A, B, rank)
    deltas = torch.stack([part.delta() for part in parts])
    weights = torch.tensor([part.weight for part in parts], dtype=deltas.dtype)[:, None, None]
    if asked.how == "ties":
        kept = torch.stack([largest(delta, asked.density) for delta in deltas])
    else:
        kept = torch.stack([random_share(delta, asked.density, generator) for delta in deltas])
    return best_factors((kept * weights).sum(0) if asked.how == "dare_linear" else agreed(kept, weights), rank)


def _added(parts: list[_Part], what: str) -> tuple[Tensor, Tensor]:
    ranks = sorted({len(part.A) for part in parts})
    if len(ranks) > 1:
        raise ConfigError(
            f"how = 'linear' adds matrices of one rank, and those of {what} have the ranks "
            f"{', '.join(map(str, ranks))}; use svd or cat."
        )
    A, B = torch.zeros_like(parts[0].A.double()), torch.zeros_like(parts[0].B.double())
    for part in parts:
        A += math.copysign((abs(part.weight) * part.scale) ** 0.5, part.weight) * part.A.double()
        B += (abs(part.weight) / part.scale) ** 0.5 * part.B.double()  # which has the scale in it
    return A, B


def _truncated(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The nearest to B A of this rank, by a decomposition no larger than the ranks (thin QR of both)."""
    left, upper = torch.linalg.qr(B)
    right, lower = torch.linalg.qr(A.t())
    U, S, V = torch.linalg.svd(upper @ lower.t(), full_matrices=False)
    root = S[:rank].sqrt()
    return root[:, None] * (V[:rank] @ right.t()), (left @ U[:, :rank]) * root


def largest(delta: Tensor, density: float) -> Tensor:
    """``delta`` with the ``density`` of its values that are largest, and zeros."""
    if density == 1:
        return delta
    flat = torch.zeros(delta.numel(), dtype=delta.dtype)
    kept = delta.abs().flatten().topk(int(density * delta.numel())).indices
    flat[kept] = delta.flatten()[kept]
    return flat.view_as(delta)


def random_share(delta: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """A random ``density`` of the values of ``delta``, divided by it, and zeros (DARE)."""
    if density == 1:
        return delta
    kept = torch.bernoulli(torch.full(delta.shape, density), generator=generator)
    return delta * kept / density


def agreed(kept: Tensor, weights: Tensor) -> Tensor:
    """Of ``kept`` (n, out, in), the mean of those values, times their weights, whose sign is that of the sum (TIES)."""
    sign = torch.where(kept.sum(0) >= 0, 1, -1)
    same = kept.sign() == sign
    return (kept * weights * same).sum(0) / same.sum(0).clamp(min=1)
