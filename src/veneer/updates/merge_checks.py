"""What a merge and its undoing refuse: values that are not finite, and training that would be lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer.errors import AdapterFileError, TargetError
from veneer.updates.layers import Dora, LowRank


def refuse_not_finite_sum(path: str, weight: Tensor, updates: Sequence[LowRank], summed: Callable[[], Tensor]) -> None:
    """Raises AdapterFileError where W0 + Σ ΔW has a value that is not finite in W0's type.

    ``summed`` makes that sum, which is only needed where the sizes of the factors do not exclude it.
    """
    limit = torch.finfo(weight.dtype).max if weight.is_floating_point() else float("inf")
    bound = _largest(weight)
    for update in updates:
        if isinstance(update, Dora):
            bound = float("inf")  # it scales W0, too
            break
        A, B = update.matrices()
        bound += abs(update.scale) * A.shape[-2] * _largest(A) * _largest(B)
    if not bound < limit and not bool(torch.isfinite(summed()).all()):
        raise AdapterFileError(_not_finite(path, str(weight.dtype)))


def refuse_not_finite_copy(path: str, module: nn.Module, dtype: torch.dtype | None) -> None:
    """Raises AdapterFileError where a module trained whole, or rows that are, have a value that is not finite in
    ``dtype``, or in their own."""
    for parameter in module.parameters():
        if not bool(torch.isfinite(parameter.detach().to(dtype)).all()):
            raise AdapterFileError(_not_finite(path, str(dtype or parameter.dtype)))


def _largest(values: Tensor) -> float:
    """max |v|; NaN where one is."""
    if not values.numel():
        return 0.0
    low, high = torch.aminmax(values.detach())
    return float(torch.maximum(-low, high))


def _not_finite(path: str, dtype: str) -> str:
    return (
        f"{path} cannot be merged: its weight would have values that are not finite in {dtype.removeprefix('torch.')}; "
        f"the adapter is damaged, or too large for this type: merge into a base of fp32."
    )


class Written:
    """The parameters of a merged module, and how often torch had written into them when it was made.

    A copy of the model has other ones, of which nothing is known.
    """

    def __init__(self, module: nn.Module) -> None:
        self._then = [(p, p._version) for p in module.parameters() if not p.is_inference()]

    def changed(self, module: nn.Module) -> bool:
        """Whether one of them was written into since, or another one put in its place."""
        now = {id(parameter) for parameter in module.parameters()}
        return any(id(parameter) not in now or parameter._version != version for parameter, version in self._then)

    def __getstate__(self) -> dict[str, Any]:
        return {"_then": []}


def refuse_trained(model: nn.Module, written: dict[str, Written]) -> None:
    """Raises TargetError where a merged weight changed after the merge."""
    changed = [path for path, then in written.items() if then.changed(model.get_submodule(path))]
    if changed:
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise TargetError(
            f"{changed[0]}{more} changed after the merge, by training or otherwise, which unmerge would drop; keep the "
            f"model with save_pretrained(…), or drop the changes with unmerge(model, drop_changes=True)."
        )
