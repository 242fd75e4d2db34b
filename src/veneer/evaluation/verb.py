"""What the commands evaluate, generate and merge do, for Python as well."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from veneer.commands.verbs import EvaluateOptions, ExportOptions, GenerateOptions, MergeOptions, QuantizeOptions
from veneer.data.formats import Example, to_examples
from veneer.data.read import read_rows
from veneer.errors import ConfigError, DataError, ModelError
from veneer.evaluation.answers import answered, spread
from veneer.evaluation.compare import Comparison, compare
from veneer.evaluation.generate import continuations
from veneer.evaluation.likelihood import choose
from veneer.evaluation.moved import Moved, swap_and_measure
from veneer.evaluation.opened import Opened, base_of_run, open_named, open_run
from veneer.files import atomic_folder, write_text
from veneer.frozen.bnb_file import write_folder
from veneer.frozen.config import CODE_BITS, BlockwiseOptions
from veneer.frozen.layers import DTYPES, linear_layers
from veneer.frozen.load import dtype_of, load, quiet
from veneer.frozen.weight import QuantisedLinear, int8_activations
from veneer.training.config import CONFIG_NAME
from veneer.training.own_weights import MODEL
from veneer.training.preflight import check_writable
from veneer.training.prepare import Prepared
from veneer.training.run import ADAPTER, refuse_no_run, result_of
from veneer.updates.attach import disabled
from veneer.updates.export import export
from veneer.updates.merge import merge

_ASKED = "The question"  # where a prompt stands, in a message about it


def evaluate_run(folder: Path, options: EvaluateOptions) -> Comparison:
    """Measure a finished run's base and adapter; the figures are written to its evaluation.json, too."""
    refuse_no_run(folder)
    opened: Opened | Prepared
    if options.data:
        opened, rows, seen = open_named(folder), to_examples(read_rows(options.data)).items, []
    else:
        opened = open_run(folder)
        rows, seen = opened.held_out, opened.train
    if not rows:
        raise DataError(f"{folder} was trained without held-out rows; give some with --data.")
    base = base_of_run(folder)
    comparison = compare(
        opened.model, opened.tokeniser, rows, base=base, seen=seen, exact_match=options.exact_match,
        batch_size=options.batch_size,
    )  # fmt: skip
    told = answered(opened.model, opened.tokeniser, spread(rows, options.examples), options.batch_size, base=base)
    comparison = replace(comparison, examples=told, data=options.data)
    write_text(folder / "evaluation.json", json.dumps(comparison.as_json(), indent=2) + "\n")
    return comparison


def answer(source: str, prompt: str, options: GenerateOptions) -> dict[str, str]:
    """ "base", "adapter" or "model" → what it answers to ``prompt``."""
    opened = open_named(source)
    return {name: say(opened, ({"role": "user", "content": prompt},), name, options) for name in sides(opened, options)}


def sides(opened: Opened, options: GenerateOptions) -> list[str]:
    """Which answers were asked for. Raises ConfigError when there is no adapter to compare with."""
    if options.base and options.both:
        raise ConfigError("Give --base or --both, not both of them.")
    if opened.own_weights and (options.base or options.both):
        raise ConfigError(
            "The run trained the model's own weights, so its base is not in it; ask the base by its own name, without "
            "--base or --both."
        )
    if not opened.adapted:
        if options.both:
            raise ConfigError("--both needs a run or an adapter; this is a model without one.")
        return ["model"]
    return ["base", "adapter"] if options.both else ["base"] if options.base else ["adapter"]


def say(
    opened: Opened, messages: tuple[dict[str, str], ...], side: str, options: GenerateOptions,
    on_text: Callable[[str], None] | None = None,
) -> str:  # fmt: skip
    """The answer of one side ("base" is without the adapter) to a conversation, or to its last message alone where
    no chat template is used. ``on_text`` is told each piece of it as it comes."""
    if side == "base":
        with disabled(opened.model):
            return say(opened, messages, "model", options, on_text)
    with int8_activations(opened.model) if options.activations == "int8" else nullcontext():
        return _say(opened, messages, options, on_text)


def _say(
    opened: Opened, messages: tuple[dict[str, str], ...], options: GenerateOptions,
    on_text: Callable[[str], None] | None,
) -> str:  # fmt: skip
    tokeniser, prompt = opened.tokeniser, messages[-1]["content"]
    if tokeniser.classes:
        (name,) = choose(opened.model, tokeniser, [Example(_ASKED, prompt=prompt)], list(tokeniser.classes), 1)
        if on_text is not None:
            on_text(name)
        return name
    chat = opened.chat if options.template == "auto" else options.template == "chat"
    ids = tokeniser.turn(messages) if chat else tokeniser.prompt(Example(_ASKED, prompt=prompt, answer="a"))
    (text,) = continuations(
        opened.model, tokeniser, [ids], max_new_tokens=options.max_new_tokens, temperature=options.temperature,
        seed=options.seed, on_text=on_text,
    )  # fmt: skip
    return text


def quantise_to(source: str, out: Path, options: QuantizeOptions) -> None:
    """Write a model with its linear layers in 4 bits, as a folder that transformers loads with bitsandbytes."""
    _refuse_taken(out)
    model, tokenizer = load(source, **options.model_dump())
    with atomic_folder(out) as folder, quiet():
        write_folder(model, folder, dtype_of(source))
        tokenizer.save_pretrained(folder)


def _refuse_taken(out: Path) -> None:
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise ModelError(f"{out} exists and is not an empty folder; choose a new one.")
    check_writable(out)


def export_to(source: Path, out: Path, options: ExportOptions) -> None:
    """Write a finished run's or an adapter folder's adapter as a plain LoRA."""
    _refuse_own_weights(source, "export")
    export(source / ADAPTER if (source / CONFIG_NAME).is_file() else source, out, padded=options.padded)


def merge_to(source: str, out: Path, options: MergeOptions) -> Moved | None:
    """Write a run's or an adapter's base with the adapter folded in, as a transformers folder.

    In nf4 or fp4 it is quantised after the merge in fp32, and how far that moved it is measured and returned.
    """
    _refuse_taken(out)
    _refuse_own_weights(Path(source), "merge")
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
        moved = swap_and_measure(model, layers, opened.tokeniser, rows)
    else:
        model.to(DTYPES[options.storage])
    with atomic_folder(out) as folder, quiet():
        if quantised:
            write_folder(model, folder, torch.float32)
        else:
            model.save_pretrained(folder)
        opened.tokeniser.tokenizer.save_pretrained(folder)
    return moved


def _refuse_own_weights(source: Path, verb: str) -> None:
    if (source / CONFIG_NAME).is_file() and result_of(source) == source / MODEL:
        raise ModelError(
            f"{source} trained the model's own weights, so there is no adapter to {verb}: {source / MODEL} is a model "
            f"already."
        )


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
