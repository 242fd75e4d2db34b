"""An adapter folder that stands alone → its base, loaded as the adapter was trained over it, with the adapter on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from veneer.data.dates import pin_date
from veneer.errors import AdapterFileError, ModelError
from veneer.models.checkpoint import Task
from veneer.models.load import load
from veneer.models.origin import is_local
from veneer.models.own_tokenizer import tokenizer_in
from veneer.runs.facts import Facts, read_facts
from veneer.updates.adapter_file import read_tensors
from veneer.updates.load_adapter import load_adapter
from veneer.updates.peft_config import CONFIG_NAME, base_named, from_peft, read_fields

_HEADS = ("classifier", "score")  # what PEFT saves of a classifier, by the names that transformers' models have
_TASKS: dict[Any, Task] = {"SEQ_CLS": "classification", "SEQ_2_SEQ_LM": "seq2seq", "CAUSAL_LM": "causal"}


def load_adapted(folder: Path, base: str | None = None, **kept: Any) -> tuple[Any, Any]:
    """The model of an adapter folder, its adapter on it and active, and its tokenizer, whose template prints the date
    of the run.

    ``base``: instead of the one that the folder names; ``kept``: storage, block_size, double_quantisation and compute,
    instead of those that it was trained with.

    Raises AdapterFileError where the folder is damaged, or names no base that is here; ModelError for a damaged base.
    """
    from_peft(folder)  # refuses what is no adapter's config
    facts = read_facts(folder)
    source = base or named_base(folder, facts)
    if facts is None:
        model, tokenizer = load(source, **kept, **task_by_peft(folder))
        load_adapter(model, folder)
        return model, tokenizer
    torch.manual_seed(facts.seed)  # as before the run: a classification head may be new
    how = {"compute": "fp32", **facts.kept, **kept}
    model, tokenizer = load(source, **how, task=facts.task, labels=facts.classes or None)
    if facts.own_tokenizer:
        tokenizer = tokenizer_in(folder)
    give_tokens(model, folder, facts)
    tokenizer.chat_template = facts.prompts.chat_template
    if facts.prompts.date is not None:
        pin_date(tokenizer, facts.prompts.date)
    load_adapter(model, folder)
    return model, tokenizer


def known_of(folder: Path) -> str:
    """What an adapter's folder says of its base, for a person: "LlamaForCausalLM, 134,515,008 parameters"."""
    facts = read_facts(folder)
    return f"{facts.base.name}, {facts.base.kind}, {facts.base.parameters:,} parameters" if facts else ""


def named_base(folder: Path, facts: Facts | None) -> str:
    """The base that the folder names. Raises AdapterFileError where it names none, or a place that is not here."""
    config = folder / CONFIG_NAME
    base = base_named(read_fields(folder))
    known = f" It was trained over {known_of(folder)}." if facts else ""
    todo = "write where it is, a folder or a hub id, into that field"
    if not base:
        raise AdapterFileError(f"{config} names no base model (base_model_name_or_path); {todo}.{known}")
    if is_local(base) and not Path(base).expanduser().exists():
        raise AdapterFileError(
            f"The base of {folder} is not at {base} (base_model_name_or_path in {config}); {todo}.{known}"
        )
    return base


def task_by_peft(folder: Path) -> dict[str, Any]:
    """The task that PEFT's config names; of a classifier its classes, numbered, as many as its head has rows."""
    task = _TASKS.get(read_fields(folder).get("task_type"))
    if task != "classification":
        return {} if task is None else {"task": task}
    sizes = [
        len(tensor)
        for key, tensor in read_tensors(folder).items()
        if key.endswith(".weight") and ".lora_" not in key and any(f".{head}." in key for head in _HEADS)
    ]
    if not sizes:
        return {"task": task}
    return {"task": task, "labels": [f"LABEL_{number}" for number in range(sizes[-1])]}


def give_tokens(model: Any, folder: Path, facts: Facts) -> None:
    """Give the base as many tokens as it had under the adapter. Raises AdapterFileError where these are not in it."""
    there, wanted = model.get_input_embeddings().weight.shape[0], facts.base.tokens
    if there == wanted:
        return
    config = from_peft(folder)
    embedding = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    whole = any(embedding.endswith(name) for name in config.train_also)
    if wanted < there or not (whole or set(range(there, wanted)) <= set(config.new_tokens)):
        raise AdapterFileError(
            f"{folder} was trained over a base of {wanted:,} tokens, and this one has {there:,}: their embeddings are "
            f"not in the adapter. Save the base with them by save_pretrained, and name it in {CONFIG_NAME}."
        )
    try:
        model.resize_token_embeddings(wanted, mean_resizing=False)
    except (ValueError, TypeError, NotImplementedError, AttributeError) as error:
        raise ModelError(f"The base of {folder} cannot be given {wanted:,} tokens: {error}") from None
