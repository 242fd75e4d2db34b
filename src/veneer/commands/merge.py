"""A run's or an adapter's base written with the adapter folded in."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from veneer.commands.config import MergeOptions
from veneer.data.formats import Example, to_examples
from veneer.data.read import read_rows
from veneer.errors import ConfigError, DataError, ModelError
from veneer.evaluation.moved import Moved, swap_and_measure
from veneer.files import atomic_folder
from veneer.frozen.config import CODE_BITS, BlockwiseOptions
from veneer.frozen.layers import DTYPES, linear_layers
from veneer.frozen.weight import QuantisedLinear
from veneer.models.bnb_file import write_folder
from veneer.models.library import quiet
from veneer.runs.opened import Opened, open_named, open_run, refuse_own_weights
from veneer.runs.preflight import refuse_taken
from veneer.runs.prepare import Prepared
from veneer.training.config import CONFIG_NAME
from veneer.updates.merge import merge


def merge_to(source: str, out: Path, options: MergeOptions) -> Moved | None:
    """Write a run's or an adapter's base with the adapter folded in, as a transformers folder.

    In nf4 or fp4 it is quantised after the merge in fp32, and how far that moved it is measured and returned.
    """
    refuse_taken(out)
    refuse_own_weights(Path(source), "merge")
    quantised = options.storage in CODE_BITS
    if options.check is not None and not quantised:
        raise ConfigError(
            f"--check measures what nf4 or fp4 changes, and the merged model is kept in {options.storage}."
        )
    opened, rows = _with_rows(source, options.check) if quantised else (open_named(source), [])
    if isinstance(opened, Opened) and not opened.adapted:
        raise ModelError(f"{source} is a model, not a run or an adapter: there is nothing to merge.")
    model = opened.model
    merge(model, reversible=False)
    moved = None
    if quantised:
        how = {name: getattr(options, name) for name in ("storage", *BlockwiseOptions.model_fields)}
        layers: dict[str, nn.Module] = {
            name: QuantisedLinear.of(model.get_submodule(name), f"{name}.weight", **how)
            for name in linear_layers(model)
        }
        moved = swap_and_measure(model, layers, opened.renderer, rows)
    else:
        model.to(DTYPES[options.storage])
    with atomic_folder(out) as folder, quiet():
        if quantised:
            write_folder(model, folder, torch.float32)
        else:
            model.save_pretrained(folder)
        opened.renderer.tokenizer.save_pretrained(folder)
    return moved


def _with_rows(source: str, check: str | None) -> tuple[Opened | Prepared, list[Example]]:
    """What is merged, and the rows to measure it on. Raises DataError when there are none."""
    if check is not None:
        return open_named(source), to_examples(read_rows(check)).items
    prepared = open_run(Path(source)) if (Path(source) / CONFIG_NAME).is_file() else None
    if prepared is None or not prepared.held_out:
        raise DataError(
            f"{source} has no held-out rows on which to measure what 4 bits change; give some with --check."
        )
    return prepared, prepared.held_out
