"""A run's or a folder's adapter written as a plain LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from veneer.arguments import folder_given
from veneer.commands.card import write_card
from veneer.commands.config import ExportOptions
from veneer.models.library import quiet
from veneer.models.own_tokenizer import tokenizer_in
from veneer.runs.facts import read_facts
from veneer.runs.folder import RunFolder
from veneer.runs.opened import refuse_own_weights
from veneer.updates.export import export


def export_to(source: str | Path, out: str | Path, **options: Any) -> None:
    """Write the adapter of a finished run or of an adapter folder to the folder ``out``, as a plain LoRA, with all
    that lets it stand alone.

    ``options``: those of `ExportOptions`. Raises ConfigError for an option that does not exist, ModelError where the
    run trained the model's own weights, AdapterFileError for what is no adapter.

    Example:
        >>> export_to("runs/first", "plain")
    """
    asked, source = ExportOptions(**options), folder_given("export_to", source, "source")
    refuse_own_weights(source, "export")
    run = RunFolder(source)
    folder, out = run.adapter if run.exists else source, folder_given("export_to", out, "out")
    facts = read_facts(folder)
    export(folder, out, padded=asked.padded)
    if facts is None:
        return
    if facts.own_tokenizer:
        with quiet():
            tokenizer_in(folder).save_pretrained(out)
    facts.write(out)
    write_card(out)
