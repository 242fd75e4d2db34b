"""A run's or a folder's adapter written for other programs: as a plain LoRA, as GGUF, for Ollama, for mlx-lm."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from veneer.arguments import folder_given
from veneer.commands.card import write_card
from veneer.commands.config import ExportOptions
from veneer.commands.gguf import ADAPTER, BASE, asked_in, base_header, draft_of, general
from veneer.commands.ollama import MODELFILE, modelfile, write_modelfile
from veneer.errors import ConfigError, ModelError
from veneer.files import atomic_folder
from veneer.frozen.layers import DTYPES
from veneer.models.checkpoint import Checkpoint
from veneer.models.gguf_description import architecture_of
from veneer.models.library import quiet
from veneer.models.own_tokenizer import tokenizer_in
from veneer.runs.adapter import named_base
from veneer.runs.facts import Facts, read_facts
from veneer.runs.folder import RunFolder
from veneer.runs.opened import Opened, open_named, refuse_own_weights
from veneer.runs.preflight import refuse_taken
from veneer.updates.export import export, refuse_occupied_folder
from veneer.updates.gguf_adapter import write_gguf_adapter
from veneer.updates.mlx_adapter import write_mlx_adapter
from veneer.updates.record import disabled

_OLLAMAS = ("llama", "gemma2")  # the architectures whose adapters Ollama applies; others it leaves out in silence


@dataclass(frozen=True)
class Exported:
    """What was written. ``base``: the GGUF file that an adapter in GGUF belongs over; ``notes``: what a person may want
    to know, as sentences."""

    out: Path
    base: Path | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def next_command(self) -> str:
        """What a person may do with it; nothing for what other programs load from Python."""
        if (self.out / MODELFILE).is_file():
            return f"ollama create NAME -f {self.out / MODELFILE}"
        return f"llama-cli -m {self.base} --lora {self.out}" if self.base is not None else ""


@dataclass(frozen=True)
class _Adapter:
    """The adapter that is exported, and its base."""

    source: Path  # what was named
    folder: Path
    facts: Facts | None
    base: str  # what the base is called

    @classmethod
    def of(cls, source: Path) -> _Adapter:
        run = RunFolder(source)
        folder = run.adapter if run.exists else source
        facts = read_facts(folder)
        base = run.base_source(run.finished_config()) if run.exists else named_base(folder, facts)
        return cls(source, folder, facts, base)


def export_to(source: str | Path, out: str | Path, **options: Any) -> Exported:
    """Write the adapter of a finished run or of an adapter folder to ``out``: a folder with a plain LoRA and all that
    lets it stand alone; a GGUF file, or a folder with one and its base; a folder for Ollama; or one for mlx-lm.

    ``options``: those of `ExportOptions`. Raises ConfigError for an option that does not exist or changes nothing,
    ModelError where the run trained the model's own weights, or the format cannot hold its base, AdapterFileError for
    what is no adapter, or more than the format carries.

    Example:
        >>> export_to("runs/first", "plain")
    """
    asked, source = ExportOptions(**options), folder_given("export_to", source, "source")
    refuse_own_weights(source, "export")
    out = folder_given("export_to", out, "out")
    if asked.format == "peft":
        _plain(source, out, asked.padded)
        return Exported(out)
    if not asked.padded:
        raise ConfigError(f"--no-padded is for a PEFT folder; {asked.format} has a rule of its own for ranks.")
    refuse_taken(out)
    adapter = _Adapter.of(source)
    if asked.format == "mlx":
        write_mlx_adapter(adapter.folder, out, Checkpoint(adapter.base).config, adapter.base)
        return Exported(out)
    if asked.format == "gguf" and out.suffix.lower() == ".gguf":
        _write(adapter, out)
        return Exported(out)
    return _beside_its_base(adapter, out, ollama=asked.format == "ollama")


def _plain(source: Path, out: Path, padded: bool) -> None:
    run = RunFolder(source)
    folder = run.adapter if run.exists else source
    facts = read_facts(folder)
    refuse_occupied_folder(out)
    with atomic_folder(out) as made:
        export(folder, made, padded=padded)
        if facts is None:
            return
        if facts.own_tokenizer:
            with quiet():
                tokenizer_in(folder).save_pretrained(made)
        facts.write(made)
        write_card(made)


def _write(adapter: _Adapter, file: Path) -> None:
    config = Checkpoint(adapter.base).config
    said = {**general(adapter.base, None), "general.base_model.count": 1}
    said["general.base_model.0.name"] = said.pop("general.name")
    write_gguf_adapter(adapter.folder, file, config, adapter.base, said)


def _beside_its_base(adapter: _Adapter, out: Path, *, ollama: bool) -> Exported:
    """A folder with the adapter, and its base as it was trained over, where that is not in a GGUF file already: of a
    base in codes the weights that these stand for."""
    architecture = architecture_of(Checkpoint(adapter.base).config, adapter.base)
    if ollama and (out.suffix == ".gguf" or architecture not in _OLLAMAS):
        raise _no_ollama(architecture, out)
    header = base_header(adapter.base)
    in_codes = adapter.facts is not None and adapter.facts.kept["storage"] not in DTYPES
    own = header.path if header is not None and not in_codes else None
    opened = open_named(adapter.source, "fp32") if ollama or own is None else None
    notes: list[str] = []
    with atomic_folder(out) as folder:
        _write(adapter, folder / ADAPTER)
        if own is None:
            assert opened is not None
            notes += _write_base(opened, adapter, folder / BASE)
        if ollama:
            assert opened is not None
            chat, system = asked_in(opened)
            lines = [f"FROM {own or f'./{BASE}'}", f"ADAPTER ./{ADAPTER}"]
            text, more = modelfile(opened.renderer, lines, chat=chat, system=system)
            notes += more
            write_modelfile(folder, text)
    return Exported(out if ollama else out / ADAPTER, own or out / BASE, notes)


def _write_base(opened: Opened, adapter: _Adapter, file: Path) -> list[str]:
    with disabled(opened.model):
        draft = draft_of(opened.model, opened.renderer, _storage_of_base(adapter))
        draft.write(file)
    return draft.notes


def _storage_of_base(adapter: _Adapter) -> str:
    """The type that rounds nothing: that of the checkpoint, or of the weights as the run kept them."""
    kept = adapter.facts.kept["storage"] if adapter.facts is not None else "fp32"
    if kept in ("bf16", "fp16"):
        return str(kept)
    dtype = Checkpoint(adapter.base).dtype if kept == "fp32" else torch.float32
    return next(name for name, its in DTYPES.items() if its is dtype)


def _no_ollama(architecture: str, out: Path) -> Exception:
    if out.suffix == ".gguf":
        return ConfigError(f"format = ollama writes a folder; give OUT a name that does not end in .gguf, not {out}.")
    return ModelError(
        f"Ollama applies no adapter to a {architecture}, and does not say so; merge it: veneer merge RUN OUT --format "
        f"ollama."
    )
