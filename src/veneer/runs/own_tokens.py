"""A run whose tokenizer, or whose number of tokens, is not that of the model's name: it came changed in memory."""

from __future__ import annotations

from typing import Any

from veneer.errors import ModelError
from veneer.files import atomic_folder
from veneer.models.library import quiet
from veneer.models.own_tokenizer import is_changed, tokenizer_in
from veneer.runs.folder import RunFolder
from veneer.training.config import TrainConfig


def keep_tokenizer(run: RunFolder, tokenizer: Any, base: str) -> bool:
    """Write a tokenizer that is not the one of the model called ``base`` into the run's folder, for the run to go on
    with. Whether it is such a one."""
    if not is_changed(tokenizer, base):
        return False
    with atomic_folder(run.tokenizer) as temporary, quiet():
        tokenizer.save_pretrained(temporary)
    return True


def kept_tokenizer(run: RunFolder) -> Any | None:
    """The tokenizer that `keep_tokenizer` wrote; None where the run has that of its base.

    Raises ModelError where its files are damaged.
    """
    return tokenizer_in(run.tokenizer) if run.exists and run.tokenizer.is_dir() else None


def with_the_runs_tokens(model: Any, run: RunFolder, config: TrainConfig, *, trained: bool = True) -> None:
    """Give a ``model`` loaded by its name as many tokens as the run began with, where the run trains the embeddings of
    those that it lacks: its checkpoints have them. ``trained``: whether these are then put into the model.

    Raises ModelError where they are not, and so are nowhere any more.
    """
    wanted = run.rows().get("tokens") if run.exists and run.rows_file.is_file() else None
    embedding = model.get_input_embeddings()
    there = embedding.weight.shape[0]
    if wanted is None or wanted == there:
        return
    name = next(name for name, module in model.named_modules() if module is embedding)
    whole = config.method == "full" or any(name.endswith(also) for also in config.train_also)
    kept = trained and (whole or set(range(there, wanted)) <= set(config.new_tokens))
    if wanted < there or not kept:
        raise ModelError(
            f"{run} began with a model of {wanted:,} tokens, which came in memory, and {config.model} has {there:,}: "
            f"with which embeddings it began is not in the run's folder. Save that model and its tokenizer by "
            f"save_pretrained, and start a new run over that folder."
        )
    model.resize_token_embeddings(wanted, mean_resizing=False)
