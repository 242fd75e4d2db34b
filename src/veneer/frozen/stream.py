"""A safetensors folder → a model whose linear layers are kept in codes, one tensor after another.

The model is made without weights. Each is read, quantised and dropped before the next one is read, so the peak is the
result and two tensors. What a bitsandbytes checkpoint keeps in codes is not read at all: its tensors are the mapped
file, whose pages the system brings when a product needs them.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, apply_renamings
from transformers.pytorch_utils import Conv1D

from veneer.errors import ModelError
from veneer.frozen.blockwise import dense, quantise
from veneer.frozen.bnb_file import quantised_weights, read_weight
from veneer.frozen.layers import linear_layers
from veneer.frozen.weight import QuantisedLinear


def stream(auto: Any, config: Any, folder: Path, dtype: torch.dtype, how: dict[str, Any]) -> Any | None:
    """The model of ``folder``, its linear layers quantised as ``how`` says (see `quantise`), the rest in ``dtype``.

    None when the checkpoint's tensors are not the model's own, name by name and shape by shape: other names, a head
    that is new, one file for many. transformers knows what to do about these, and what to call them.
    """
    try:
        files = _Files(folder)
        model = _empty(auto, config, dtype)
        files.rename(model)
        fits = bool(files.where) and _one_to_one(model, files, set(files.where))
    except Exception:  # a damaged file or config, which raises the same again where it is reported
        return None
    if not fits:
        return None
    for name in linear_layers(model):
        layer, key = model.get_submodule(name), f"{name}.weight"
        transposed = isinstance(layer, Conv1D)
        weight = files.read(key)
        made = quantise(weight.t() if transposed else weight, key, **how)
        del weight  # and with it the pages of the file
        model.set_submodule(name, QuantisedLinear(made, layer.bias, dtype, transposed))
    for key in set(_tensors(model)) & set(files.where):
        _fill(model, key, files.read(key), dtype, copy=True)
    return _finished(model, folder)


def stream_quantised(auto: Any, config: Any, folder: Path, dtype: torch.dtype, name: str) -> Any:
    """The model of a bitsandbytes checkpoint, called ``name`` in messages, its codes and scales as they are.

    Raises ModelError when it is damaged, or its tensors are not the model's own.
    """
    files = _Files(folder)
    model = _empty(auto, config, dtype)
    files.rename(model)
    weights = quantised_weights(files.where)
    beside = {f"{weight}.{part}" for weight, parts in weights.items() for part in parts}
    layers = set(linear_layers(model))
    _refuse_others(model, files, set(files.where) - beside, set(weights), name)
    for weight, parts in weights.items():
        path = weight.removesuffix(".weight")
        layer = model.get_submodule(path)
        made = read_weight(weight, parts, files.mapped)
        transposed = isinstance(layer, Conv1D)
        shape = tuple(layer.weight.shape[::-1] if transposed else layer.weight.shape)
        if shape != made.shape:
            raise ModelError(f"{weight} of {name} is {made.shape}, where its config.json says {shape}.")
        if path in layers:
            model.set_submodule(path, QuantisedLinear(made, layer.bias, dtype, transposed))
        else:  # a head, which is multiplied as a whole
            whole = dense(made, dtype)
            _fill(model, weight, whole.t().contiguous() if transposed else whole, dtype)
    for key in set(_tensors(model)) & set(files.where) - set(weights):
        _fill(model, key, files.mapped(key), dtype)
    return _finished(model, folder)


class _Files:
    """The safetensors files of a folder: which holds what, and its tensors, copied or mapped."""

    def __init__(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        self.where: dict[str, Path] = {}
        if index.is_file():
            keys = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            self.where = {key: folder / file for key, file in keys.items()}
        elif (folder / "model.safetensors").is_file():
            with safe_open(folder / "model.safetensors", "pt") as file:
                self.where = dict.fromkeys(file.keys(), folder / "model.safetensors")
        self._open: dict[Path, Any] = {}
        self._names: dict[str, str] = {}

    def rename(self, model: Any) -> None:
        """Call the tensors as the model does, where its checkpoints have other names."""
        renamings = [c for c in get_model_conversion_mapping(model, add_legacy=False) if isinstance(c, WeightRenaming)]
        self._names = {apply_renamings(key, renamings): key for key in self.where}
        self.where = {name: self.where[key] for name, key in self._names.items()}

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._file(key).get_slice(self._names[key]).get_shape())

    def mapped(self, key: str) -> Tensor:
        """The tensor in the mapped file; all of a file are parts of one mapping, which lives as long as they do."""
        tensor: Tensor = self._file(key).get_tensor(self._names[key])
        return tensor

    def read(self, key: str) -> Tensor:
        """The tensor in a mapping of its own: when it goes, no page of the file is left in the process."""
        with safe_open(self.where[key], "pt") as file:
            tensor: Tensor = file.get_tensor(self._names[key])
        return tensor

    def _file(self, key: str) -> Any:
        path = self.where[key]
        if path not in self._open:
            self._open[path] = safe_open(path, "pt").__enter__()  # type: ignore[no-untyped-call]
        return self._open[path]


def _empty(auto: Any, config: Any, dtype: torch.dtype) -> Any:
    """The model with parameters that have a shape and no values; buffers that no file holds have theirs."""
    with init_empty_weights(include_buffers=False):
        return auto.from_config(config, dtype=dtype)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint holds of the model, less what is in quantised layers but for their bias."""
    inside = {
        f"{name}.{buffer}"
        for name, m in model.named_modules()
        if isinstance(m, QuantisedLinear)
        for buffer in m._buffers
    }
    return {key: tensor for key, tensor in model.state_dict().items() if key not in inside}


def _one_to_one(model: Any, files: _Files, keys: set[str]) -> bool:
    if not all(isinstance(c, WeightRenaming) for c in get_model_conversion_mapping(model, add_legacy=False)):
        return False  # tensors are joined or turned as they are read
    missing, unexpected = _differences(model, keys)
    wanted = _tensors(model)
    return not missing and not unexpected and all(
        files.shape(key) == tuple(wanted[key].shape) for key in keys if key in wanted
    )  # fmt: skip


def _differences(model: Any, keys: set[str]) -> tuple[list[str], list[str]]:
    """Keys that the model needs and the files lack, and those that are of no use to it."""
    wanted, tied = set(_tensors(model)), set(getattr(model, "all_tied_weights_keys", None) or {})
    ignored = [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []), r"rotary_emb\.inv_freq$"]
    unexpected = [key for key in keys - wanted if not any(re.search(pattern, key) for pattern in ignored)]
    return sorted(wanted - keys - tied), sorted(unexpected)


def _refuse_others(model: Any, files: _Files, keys: set[str], weights: set[str], name: str) -> None:
    missing, unexpected = _differences(model, keys)
    wrong = missing or unexpected
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        what = "lacks" if missing else "holds what its model has no place for:"
        raise ModelError(f"The checkpoint of {name} {what} {', '.join(wrong[:3])}{more}.")
    wanted = _tensors(model)
    for key in sorted((keys & set(wanted)) - weights):
        if files.shape(key) != tuple(wanted[key].shape):
            raise ModelError(
                f"{key} of {name} is {files.shape(key)}, where its config.json says {tuple(wanted[key].shape)}."
            )


def _fill(model: nn.Module, key: str, tensor: Tensor, dtype: torch.dtype, copy: bool = False) -> None:
    """Put a checkpoint's tensor in its place, parameters in ``dtype``."""
    path, _, name = key.rpartition(".")
    module = model.get_submodule(path)
    if name in module._buffers:
        module._buffers[name] = tensor.clone()
    else:
        old = module._parameters[name]
        trained = old is not None and old.requires_grad
        module._parameters[name] = nn.Parameter(tensor.to(dtype, copy=copy), requires_grad=trained)


def _finished(model: Any, folder: Path) -> Any:
    model.tie_weights()
    if getattr(model, "generation_config", None) is not None and (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model
