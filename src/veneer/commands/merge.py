"""A run's or an adapter's base written with the adapter folded in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from veneer.arguments import folder_given
from veneer.commands.card import write_merged_card
from veneer.commands.config import MergeOptions
from veneer.data.bad import BadRows
from veneer.data.columns import Reading
from veneer.data.formats import Example
from veneer.errors import ConfigError, DataError, ModelError
from veneer.evaluation.moved import Moved, swap_and_measure
from veneer.files import atomic_folder
from veneer.frozen.config import CODE_BITS, BlockwiseOptions
from veneer.frozen.experts import DenseStack, QuantisedStack
from veneer.frozen.layers import DTYPES, linear_layers
from veneer.frozen.weight import QuantisedLinear
from veneer.models.bnb_file import write_folder
from veneer.models.composite import copy_processor, whole
from veneer.models.library import quiet
from veneer.runs.folder import RunFolder
from veneer.runs.opened import Opened, open_named, open_run, refuse_own_weights
from veneer.runs.preflight import refuse_taken
from veneer.runs.prepare import Prepared
from veneer.runs.reading import kept_reading
from veneer.runs.rows import read_examples
from veneer.updates.experts import hold_stack
from veneer.updates.merge import merge
from veneer.updates.select import modules_of


def merge_to(source: str | Path, out: str | Path, **options: Any) -> Moved | None:
    """Write the base of a run or an adapter with the adapter folded in to the folder ``out``, as a transformers folder.

    ``options``: those of `MergeOptions`. In ``storage`` nf4 or fp4 the model is quantised after the merge in fp32, and
    how far that moved it is measured and returned. Raises ConfigError for an option that does not exist or makes no
    sense, ModelError where there is nothing to merge, DataError where there are no rows to measure on, and
    TrainingError for a run that has not finished or an ``out`` that holds something.

    Example:
        >>> merge_to("runs/first", "merged", storage="bf16")
    """
    asked = MergeOptions(**options)
    source, out = folder_given("merge_to", source, "source"), folder_given("merge_to", out, "out")
    refuse_taken(out)
    refuse_own_weights(source, "merge")
    quantised = asked.storage in CODE_BITS
    if asked.check is not None and not quantised:
        raise ConfigError(f"--check measures what nf4 or fp4 changes, and the merged model is kept in {asked.storage}.")
    opened, rows = _with_rows(source, asked.check) if quantised else (open_named(source), [])
    if isinstance(opened, Opened) and not opened.adapted:
        raise ModelError(f"{source} is a model, not a run or an adapter: there is nothing to merge.")
    model = opened.model
    merge(model, reversible=False)
    moved = None
    if quantised:
        how = {name: getattr(asked, name) for name in ("storage", *BlockwiseOptions.model_fields)}
        layers: dict[str, nn.Module] = {
            name: QuantisedLinear.of(model.get_submodule(name), f"{name}.weight", **how)
            for name in linear_layers(model)
        }
        if asked.experts == "codes":
            layers |= _experts_in_codes(model, how)
        moved = swap_and_measure(model, layers, opened.renderer, rows)
    else:
        model.to(DTYPES[asked.storage])
    with atomic_folder(out) as folder, quiet():
        if quantised:
            with whole(model):
                write_folder(model, folder, torch.float32)
        else:
            model.save_pretrained(folder)
        opened.renderer.tokenizer.save_pretrained(folder)
        copy_processor(model, folder)
        write_merged_card(folder, RunFolder(source).adapter if RunFolder(source).exists else source, asked.storage)
    return moved


def _experts_in_codes(model: nn.Module, how: dict[str, Any]) -> dict[str, nn.Module]:
    """Name of each projection of a mixture's experts → what it is in codes; the model's own become modules."""
    stacks = {name: module for name, module in modules_of(model).items() if isinstance(module, DenseStack)}
    for name in stacks:
        hold_stack(model, name)
    return {
        name: QuantisedStack.of(stack.weight.detach(), name, stack.weight.dtype, stack.transposed, **how)
        for name, stack in stacks.items()
    }


def _with_rows(source: Path, check: str | None) -> tuple[Opened | Prepared, Sequence[Example]]:
    """What is merged, and the rows to measure it on. Raises DataError when there are none."""
    if check is not None:
        bad = BadRows()
        examples = read_examples(check, kept_reading(source) or Reading(), bad)
        bad.refuse()
        return open_named(source), examples.items
    prepared = open_run(Path(source)) if RunFolder(source).exists else None
    if prepared is None or not prepared.held_out:
        raise DataError(
            f"{source} has no held-out rows on which to measure what 4 bits change; give some with --check."
        )
    return prepared, prepared.held_out
