"""A mixture's experts, which many checkpoints have one by one, and gate and up apart: the pieces of one tensor.

transformers' conversion mapping says which they are. Here they are read one expert after another, so that all of them
are never in memory before they are quantised.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from veneer.models.bnb_file import weight_and_part


class NotTensorByTensor(Exception):
    """A checkpoint's tensors are not the model's own, one by one; the text says why, of the checkpoint as "it"."""


@dataclass(frozen=True)
class Names:
    """The model's names for what a checkpoint holds."""

    alone: dict[str, str] = field(default_factory=dict)  # name → the file's key
    joined: dict[str, list[list[str]]] = field(default_factory=dict)  # name → of each expert, the keys of its parts
    beside: dict[str, set[str]] = field(default_factory=dict)  # key of such a part → what describes its codes


def is_joining(conversion: Any) -> bool:
    """Whether a conversion of transformers stacks matrices, and puts the rows of several into one before that."""
    operations = getattr(conversion, "operations", ())
    kinds, dims = [type(one) for one in operations], [getattr(one, "dim", None) for one in operations]
    return kinds in ([MergeModulelist], [MergeModulelist, Concatenate]) and dims in ([0], [0, 1])


def names_for(model: Any, keys: Iterable[str]) -> Names:
    """What the model calls the tensors of a checkpoint. Raises NotTensorByTensor where one becomes another by more than
    a name and a place in a stack."""
    conversions = get_model_conversion_mapping(model, add_legacy=False)
    renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
    converters = [conversion for conversion in conversions if isinstance(conversion, WeightConverter)]
    names, pieces = Names(), dict[str, dict[str, list[str]]]()
    for key in sorted(keys, key=dot_natural_key):
        weight, part = weight_and_part(key)
        name, pattern = rename_source_key(weight, renamings, converters)
        if pattern is None:
            names.alone[f"{name}.{part}" if part else name] = key
        elif part:
            names.beside.setdefault(weight, set()).add(part)
        else:
            converter = next(one for one in converters if pattern in one.source_patterns)
            if not is_joining(converter):
                raise NotTensorByTensor("its tensors are joined or turned as they are read")
            own = pieces.setdefault(name, {source: [] for source in converter.source_patterns})
            own[pattern].append(key)
    for name, parts in pieces.items():
        if len({len(own) for own in parts.values()}) > 1:
            raise NotTensorByTensor(f"it lacks parts of {name}")
        names.joined[name] = [list(own) for own in zip(*parts.values(), strict=True)]
    return names
