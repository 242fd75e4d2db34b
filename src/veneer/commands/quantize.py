"""A model written with its linear layers in 4 bits."""

from __future__ import annotations

from pathlib import Path

from veneer.commands.config import QuantizeOptions
from veneer.files import atomic_folder
from veneer.models.bnb_file import write_folder
from veneer.models.checkpoint import Checkpoint
from veneer.models.library import quiet
from veneer.models.load import load
from veneer.runs.preflight import refuse_taken


def quantise_to(source: str, out: Path, options: QuantizeOptions) -> None:
    """Write a model with its linear layers in 4 bits, as a folder that transformers loads with bitsandbytes."""
    refuse_taken(out)
    checkpoint = Checkpoint(source)
    model, tokenizer = load(checkpoint, **options.model_dump())
    with atomic_folder(out) as folder, quiet():
        write_folder(model, folder, checkpoint.dtype)
        tokenizer.save_pretrained(folder)
