"""A model written with its linear layers in 4 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from veneer.arguments import folder_given
from veneer.commands.config import QuantizeOptions
from veneer.files import atomic_folder
from veneer.frozen.layers import without_codes
from veneer.models.bnb_file import write_folder
from veneer.models.checkpoint import Checkpoint
from veneer.models.composite import copy_processor, whole
from veneer.models.library import quiet
from veneer.models.load import load
from veneer.runs.preflight import refuse_taken


def quantise_to(source: str | Path, out: str | Path, **options: Any) -> str | None:
    """Write a model with its linear layers in 4 bits to the folder ``out``, which transformers loads with bitsandbytes;
    one with experts in codes Veneer alone loads. Returns a sentence on experts that stay dense, or None.

    ``source``: as `load` takes it, with a tokenizer or without; ``options``: those of `QuantizeOptions`. Raises
    ConfigError for an option that does not exist or makes no sense, ModelError for what is no model, TrainingError for
    an ``out`` that holds something.

    Example:
        >>> quantise_to("smollm2-135m-instruct", "smollm2-nf4")
    """
    asked, out = QuantizeOptions(**options), folder_given("quantise_to", out, "out")
    refuse_taken(out)
    checkpoint = Checkpoint(source)
    kept = asked.model_dump(exclude={"experts"}) | {"experts": asked.experts == "codes"}
    model, tokenizer = load(checkpoint, **kept, compute="fp32", with_tokenizer=checkpoint.has_tokenizer)
    with atomic_folder(out) as folder, quiet():
        with whole(model):
            write_folder(model, folder, checkpoint.dtype)
        copy_processor(model, folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    return without_codes(model)
