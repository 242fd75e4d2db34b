"""A mixture's experts in codes in checkpoints: bitsandbytes' keys of one weight, for all experts at once or one by one.

Veneer writes the experts P (experts, out, in) of a projection as P (their codes), P.absmax, P.nested_absmax and
P.nested_offset with a row for each expert, and P.quant_map, P.nested_quant_map and P.quant_state as of one weight. That
is read by Veneer alone: bitsandbytes in transformers 5 leaves experts as they are. transformers 4 had a module for each
expert and matrix, and so has a checkpoint of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from veneer.documents import parsed_json
from veneer.errors import ModelError
from veneer.frozen.blockwise import NESTED_BLOCK, Quantised
from veneer.frozen.codebook import dynamic8
from veneer.frozen.config import CODE_BITS
from veneer.models.bnb_file import STATE, read_weight, state_tensor

_SHARED = ("quant_map", "nested_quant_map")  # by all experts


def read_stack(name: str, parts: set[str], read: Callable[[str], Tensor]) -> list[Quantised]:
    """The experts called ``name``, of which ``parts`` stand beside their codes. Raises ModelError for damage."""
    states = [part for part in parts if part.startswith(STATE)]
    tensors = {part: read(f"{name}.{part}") for part in parts} | {"": read(name)}
    try:
        state: dict[str, Any] = parsed_json(bytes(tensors[states[0]].tolist()))
        experts, *shape = map(int, state["shape"])
        offsets = tensors["nested_offset"].tolist() if "nested_offset" in parts else None
    except (IndexError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{name} cannot be read as experts in codes: {type(error).__name__} {error}.") from None
    rows = {part for part in tensors if part not in (*_SHARED, *states)}
    short = sorted(part for part in rows if len(tensors[part]) != experts)
    if short:
        raise ModelError(f"{name}.{short[0]} has {len(tensors[short[0]])} rows where there are {experts} experts.")

    def of(expert: int) -> Callable[[str], Tensor]:
        own = {**state, "shape": shape, **({} if offsets is None else {"nested_offset": offsets[expert]})}

        def read_one(key: str) -> Tensor:
            part = key.removeprefix(name).removeprefix(".")
            if part in states:
                return state_tensor(own)
            return tensors[part][expert] if part in rows else tensors[part]

        return read_one

    return [read_weight(name, parts - {"nested_offset"}, of(expert)) for expert in range(experts)]


def read_one_by_one(
    name: str, experts: list[list[str]], beside: dict[str, set[str]], read: Callable[[str], Tensor]
) -> list[Quantised]:
    """The experts called ``name`` of which each is kept in parts, one below the other: gate and up. Their scales become
    floats, exactly, as each part's are codes of another kind. Raises ModelError where they do not fit together."""
    return [_joined(name, [read_weight(key, beside.get(key, set()), read) for key in own]) for own in experts]


def _joined(name: str, parts: list[Quantised]) -> Quantised:
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    kinds = {(part.storage, part.block_size, part.shape[1]) for part in parts}
    whole = all(part.shape[0] * part.shape[1] % part.block_size == 0 for part in parts)
    if len(kinds) > 1 or not whole or CODE_BITS[first.storage] != 4:
        raise ModelError(f"The parts of {name} are kept in codes of several kinds, or in blocks that cannot be joined.")
    shape = sum(part.shape[0] for part in parts), first.shape[1]
    codes, scales = torch.cat([part.codes for part in parts]), torch.cat([_float_scales(part) for part in parts])
    return Quantised(first.storage, first.block_size, shape, codes, scales)


def _float_scales(part: Quantised) -> Tensor:
    if part.nested_scales is None or part.offset is None:
        return part.scales
    nested = part.nested_scales.repeat_interleave(NESTED_BLOCK)[: part.blocks]
    return dynamic8()[part.scales.int()] * nested + part.offset
