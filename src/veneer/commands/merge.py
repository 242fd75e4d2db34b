"""A run's or an adapter's base written with the adapter folded in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from veneer.arguments import folder_given
from veneer.commands.card import write_merged_card
from veneer.commands.config import MergeOptions
from veneer.commands.gguf import MODEL, asked_in, draft_of, file_in, measure, write_draft
from veneer.commands.ollama import MODELFILE, modelfile, write_modelfile
from veneer.data.bad import BadRows
from veneer.data.columns import Reading
from veneer.data.formats import Example
from veneer.device import CPU
from veneer.errors import ConfigError, DataError, ModelError
from veneer.evaluation.moved import Moved, swap_and_measure
from veneer.files import atomic_file, atomic_folder
from veneer.frozen.config import CODE_BITS, BlockwiseOptions
from veneer.frozen.experts import DenseStack, QuantisedStack
from veneer.frozen.layers import DTYPES, linear_layers
from veneer.frozen.weight import QuantisedLinear
from veneer.models.bnb_file import write_folder
from veneer.models.composite import copy_processor, whole
from veneer.models.gguf_k_quants import K_QUANTS, refuse_without_llama_cpp
from veneer.models.gguf_types import TYPES
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


@dataclass(frozen=True)
class Merged:
    """What a merge wrote, ``out``. ``moved``: how far rounding moved the model, where it was rounded; ``notes``: what a
    person may want to know, as sentences."""

    out: Path
    moved: Moved | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def next_command(self) -> str:
        """What a person may do with it."""
        if (self.out / MODELFILE).is_file():
            return f"ollama create NAME -f {self.out / MODELFILE}"
        return f"llama-cli -m {self.out}" if self.out.suffix == ".gguf" else f"veneer chat {self.out}"


def merge_to(source: str | Path, out: str | Path, **options: Any) -> Merged:
    """Write the base of a run or an adapter with the adapter folded in to ``out``: a transformers folder, a GGUF file,
    or a folder for Ollama. The ``source`` of the last two may be a model, too.

    ``options``: those of `MergeOptions`. In ``storage`` nf4, fp4 and GGUF's types the model is rounded after the merge
    in fp32, and how far that moved it is measured before it is written.

    Raises ConfigError for an option that does not exist or makes no sense, ModelError where there is nothing to merge,
    or the format cannot hold the model, DataError where there are no rows to measure on, and TrainingError for a run
    that has not finished or an ``out`` that holds something.

    Example:
        >>> merge_to("runs/first", "merged", storage="bf16")
    """
    asked = MergeOptions(**options)
    source, out = folder_given("merge_to", source, "source"), folder_given("merge_to", out, "out")
    _refuse_storage(asked)
    refuse_taken(out)
    if asked.format == "ollama" and out.suffix == ".gguf":
        raise ConfigError(f"format = ollama writes a folder; give OUT a name that does not end in .gguf, not {out}.")
    if asked.format != "folder":
        return _as_gguf(source, out, asked)
    refuse_own_weights(source, "merge")
    quantised = asked.storage in CODE_BITS
    opened, rows = (
        _with_rows(source, asked.check, asked.device) if quantised else (open_named(source, "fp32", asked.device), [])
    )
    if isinstance(opened, Opened) and not opened.adapted:
        raise ModelError(f"{source} is a model, not a run or an adapter: there is nothing to merge.")
    model = opened.model
    merge(model, reversible=False)
    model.to(CPU)
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
    return Merged(out, moved)


def _refuse_storage(asked: MergeOptions) -> None:
    """Raises ConfigError for a storage that the format has not, and for options that change nothing."""
    here = (
        (*TYPES, *K_QUANTS)
        if asked.format != "folder"
        else (*DTYPES, *(name for name in CODE_BITS if name in ("nf4", "fp4")))
    )
    if asked.storage not in here:
        raise ConfigError(f"format = {asked.format} keeps weights in {', '.join(here)}, and not in {asked.storage}.")
    if asked.check is not None and asked.storage in DTYPES:
        raise ConfigError(
            f"--check measures what 8 bits or fewer change, and the merged model is kept in {asked.storage}."
        )
    if asked.format != "folder" and asked.device != CPU:
        raise ConfigError("device is for format folder: GGUF files are computed on the CPU; leave it out.")
    if asked.pre is not None and asked.format == "folder":
        raise ConfigError("--pre is for GGUF files; add --format gguf, or leave it out.")


def _as_gguf(source: Path, out: Path, asked: MergeOptions) -> Merged:
    """Nothing is merged in memory: each tensor is computed when it is written, and what rounding costs is measured of
    the file, before it has its name."""
    if asked.storage in K_QUANTS:
        refuse_without_llama_cpp(asked.storage)
    rounds = asked.storage not in DTYPES
    opened, rows = _with_rows(source, asked.check) if rounds else (open_named(source, "fp32"), [])
    model, renderer = opened.model, opened.renderer
    draft = draft_of(model, renderer, "fp32" if asked.storage in K_QUANTS else asked.storage, asked.pre)

    def write(file: Path) -> tuple[Moved | None, list[str]]:
        notes = write_draft(draft, file, asked.storage)
        return measure(model, draft, file, renderer, rows) if rounds else None, notes

    if asked.format == "gguf":
        with atomic_file(file := file_in(out, MODEL)) as temporary:
            moved, notes = write(temporary)
        return Merged(file, moved, notes)
    chat, system = asked_in(opened)
    text, more = modelfile(renderer, [f"FROM ./{MODEL}"], chat=chat, system=system)
    with atomic_folder(out) as folder:
        moved, notes = write(folder / MODEL)
        write_modelfile(folder, text)
    return Merged(out, moved, [*notes, *more])


def _experts_in_codes(model: nn.Module, how: dict[str, Any]) -> dict[str, nn.Module]:
    """Name of each projection of a mixture's experts → what it is in codes; the model's own become modules."""
    stacks = {name: module for name, module in modules_of(model).items() if isinstance(module, DenseStack)}
    for name in stacks:
        hold_stack(model, name)
    return {
        name: QuantisedStack.of(stack.weight.detach(), name, stack.weight.dtype, stack.transposed, **how)
        for name, stack in stacks.items()
    }


def _with_rows(
    source: Path, check: str | None, device: str = CPU
) -> tuple[Opened | Prepared, Sequence[Example]]:  # fmt: skip
    """What is merged, and the rows to measure it on. Raises DataError when there are none."""
    if check is not None:
        bad = BadRows()
        examples = read_examples(check, kept_reading(source) or Reading(), bad)
        bad.refuse()
        return open_named(source, "fp32", device), examples.items
    prepared = open_run(Path(source), "fp32", device) if RunFolder(source).exists else None
    if prepared is None or not prepared.held_out:
        raise DataError(
            f"{source} has no held-out rows on which to measure what rounding changes; give some with --check."
        )
    return prepared, prepared.held_out
