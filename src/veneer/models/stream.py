"""A safetensors folder or GGUF file → a model whose linear layers are kept in codes, one tensor after another.

The model is made without weights. Each is read, quantised and dropped before the next one is read, so the peak is the
result and two tensors. What a bitsandbytes checkpoint keeps in codes is not read at all: its tensors are the mapped
file, whose pages the system brings when a product needs them.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.pytorch_utils import Conv1D

from veneer.device import CPU
from veneer.errors import ModelError
from veneer.frozen.blockwise import Quantised, dense, quantise
from veneer.frozen.experts import QuantisedStack, experts_of, own_experts, projections, put_stack
from veneer.frozen.layers import linear_layers
from veneer.frozen.new_parts import may_be_missing, remember_checkpoint, task_parts
from veneer.frozen.weight import QuantisedLinear
from veneer.models.bnb_experts import read_one_by_one, read_stack
from veneer.models.bnb_file import quantised_weights, read_weight
from veneer.models.checkpoint import Checkpoint
from veneer.models.composite import class_for
from veneer.models.joined import NotTensorByTensor, is_joining
from veneer.models.library import call_library, no_model, some_of
from veneer.models.places import refuse_without_place, without_place
from veneer.models.tensors import Tensors
from veneer.models.ties import tie


def streamed(
    checkpoint: Checkpoint, kind: str, config: Any, dtype: torch.dtype, how: dict[str, Any], experts: bool = True,
    device: str = CPU,
) -> Any:  # fmt: skip
    """The model of a folder or GGUF file, its linear layers quantised as ``how`` says (see `quantise`), the rest in
    ``dtype``. ``kind``: of `CLASSES`; ``experts``: whether a mixture's experts are quantised, too. Each
    tensor is quantised on the ``device``, which thus never holds more than the result and one tensor.

    Raises NotTensorByTensor when the checkpoint's tensors are not the model's own, name by name and shape by shape:
    other names, a head that is new, one file for many. transformers knows what to do about these, and what to call
    them. Raises ModelError for a damaged file.
    """
    tensors = checkpoint.tensors()
    model = unfilled_model(kind, config, dtype, checkpoint.name)
    tensors.rename(model)
    _require_one_to_one(model, tensors, kind)
    for name in linear_layers(model):
        layer, key = model.get_submodule(name), f"{name}.weight"
        transposed = isinstance(layer, Conv1D)
        weight = tensors.read(key).to(device)
        made = quantise(weight.t() if transposed else weight, key, **how)
        del weight  # and with it the pages of the file
        model.set_submodule(name, QuantisedLinear(made, layer.bias, dtype, transposed))
    for key, (module, projection) in (_stacks(model) if experts else {}).items():
        transposed = module.is_transposed
        stack = QuantisedStack.of(
            (matrix.to(device) for matrix in tensors.matrices(key)), key, dtype, transposed, **how
        )
        put_stack(own_experts(module), projection, stack)
    for key in set(_tensors(model)) & tensors.names():
        _fill(model, key, tensors.read(key), dtype, copy=True, device=device)
    return _finished(model, checkpoint, tensors.names(), set())


def stream_quantised(checkpoint: Checkpoint, kind: str, config: Any, dtype: torch.dtype) -> Any:
    """The model of a bitsandbytes checkpoint, its codes and scales as they are, the rest in ``dtype``.

    A classifier (``kind``) has a new head where the checkpoint has none, one of another kind, or one for other classes,
    and so for what else stands beside its backbone, and a pooler.

    Raises ModelError when it is damaged, or its tensors are not the model's own.
    """
    files = checkpoint.safetensors()
    model = unfilled_model(kind, config, dtype, checkpoint.name)
    files.rename(model)
    weights = quantised_weights(files.names())
    beside = {f"{weight}.{part}" for weight, parts in weights.items() for part in parts}
    layers = set(linear_layers(model))
    held = files.names() - beside
    stacks = _stacks(model)
    one_by_one = {name: files.pieces(name) for name in stacks.keys() & held}
    one_by_one = {name: pieces for name, pieces in one_by_one.items() if pieces[1]}
    coded = {*weights, *one_by_one}
    new = _new(model, files, held, coded) if kind == "classification" else {}
    held -= set(new)
    _refuse_others(model, files, held, coded, checkpoint.name, set(new), kind)
    for name, pieces in one_by_one.items():
        _put_experts(stacks[name], name, read_one_by_one(name, *pieces, files.stored), dtype, checkpoint.name)
    own = _tensors(model).keys()
    for weight, parts in weights.items():
        if weight in stacks:
            stack = _put_experts(
                stacks[weight], weight, read_stack(weight, parts, files.mapped), dtype, checkpoint.name
            )
            stack.codes = files.mapped(weight)  # its pages
            continue
        if weight not in own:  # the head of another task
            continue
        _put_quantised(model, weight, read_weight(weight, parts, files.mapped), layers, dtype, checkpoint.name)
    for key in (set(_tensors(model)) & held) - coded:
        _fill(model, key, files.mapped(key), dtype)
    for part in dict.fromkeys(new.values()):
        model.get_submodule(part).to_empty(device=CPU).to(dtype).apply(model._init_weights)
    return _finished(model, checkpoint, held, set(new))


def _put_quantised(model: Any, weight: str, codes: Quantised, layers: set[str], dtype: torch.dtype, name: str) -> None:
    """Put a weight that is kept in codes in its place; a head, which is no one of the ``layers``, is expanded."""
    path = weight.removesuffix(".weight")
    layer = model.get_submodule(path)
    transposed = isinstance(layer, Conv1D)
    shape = tuple(layer.weight.shape[::-1] if transposed else layer.weight.shape)
    if shape != codes.shape:
        raise ModelError(f"{weight} of {name} is {codes.shape}, where its config.json says {shape}.")
    if path in layers:
        model.set_submodule(path, QuantisedLinear(codes, layer.bias, dtype, transposed))
    else:
        whole = dense(codes, dtype)
        _fill(model, weight, whole.t().contiguous() if transposed else whole, dtype)


def _stacks(model: nn.Module) -> dict[str, tuple[Any, str]]:
    """Name of a projection of a mixture's experts → the module that holds it, and what it is called there."""
    return {
        f"{path}.{name}": (module, name) for path, module in experts_of(model).items() for name in projections(module)
    }


def _put_experts(
    place: tuple[Any, str], key: str, experts: list[Quantised], dtype: torch.dtype, name: str
) -> QuantisedStack:
    """Put experts in codes in their place. Raises ModelError where they are of another number or shape."""
    module, projection = place
    count, *shape = getattr(module, projection).shape
    shape = shape[::-1] if module.is_transposed else shape
    if (len(experts), *experts[0].shape) != (count, *shape):
        here = (len(experts), *experts[0].shape)
        raise ModelError(f"{key} of {name} is {here}, where its config.json says {(count, *shape)}.")
    stack = QuantisedStack(experts, dtype, module.is_transposed)
    put_stack(own_experts(module), projection, stack)
    return stack


def _new(model: Any, files: Tensors, held: set[str], weights: set[str]) -> dict[str, str]:
    """The keys of a classifier's parts that the checkpoint lacks, or has in another shape → the part, which is then new
    as a whole."""
    wanted = {key: tuple(tensor.shape) for key, tensor in _tensors(model).items() if may_be_missing(model, key)}
    beside = set(task_parts(model))
    part_of = {key: key.split(".")[0] if key.split(".")[0] in beside else key.rpartition(".")[0] for key in wanted}
    misfits = {
        part_of[key]
        for key, shape in wanted.items()
        if key not in weights and not (key in held and files.shape(key) == shape)
    }
    return {key: part for key, part in part_of.items() if part in misfits}


def unfilled_model(kind: str, config: Any, dtype: torch.dtype, name: str) -> Any:
    """The model with parameters that have a shape and no values; buffers that no file holds have theirs."""
    with init_empty_weights(include_buffers=False):
        return call_library(
            class_for(kind, config, name).from_config, no_model(name), config, trust_remote_code=False, dtype=dtype
        )


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint holds of the model, quantised layers' codes and scales left out, but not their bias."""
    inside = {
        f"{name}.{buffer}"
        for name, m in model.named_modules()
        if isinstance(m, QuantisedLinear | QuantisedStack)
        for buffer in m._buffers
    }
    return {key: tensor for key, tensor in model.state_dict().items() if key not in inside}


def _require_one_to_one(model: Any, tensors: Tensors, kind: str) -> None:
    """Raises NotTensorByTensor unless each tensor of the checkpoint is one of the model's, and the other way round."""
    names, wanted = tensors.names(), _tensors(model)
    if not names:
        raise NotTensorByTensor("it has no safetensors file")
    missing, unexpected = _differences(model, names, kind)
    if missing and unexpected:
        raise NotTensorByTensor(f"it has other names, such as {unexpected[0]} where its model has {missing[0]}")
    if missing:
        raise NotTensorByTensor(f"it lacks {some_of(missing)}")
    if unexpected:
        raise NotTensorByTensor(f"its model has no place for {some_of(unexpected)}")
    reshaped = [key for key in sorted(names & set(wanted)) if tensors.shape(key) != tuple(wanted[key].shape)]
    if reshaped:
        raise NotTensorByTensor(f"its model has another shape for {some_of(reshaped)}")


def reassembled_names(model: Any) -> set[str]:
    """Names of the tensors that a checkpoint has in other pieces, such as a mixture's experts one by one: they are
    joined or turned as they are read, and so take memory of their own, outside the mapped file."""
    patterns = [
        ".*".join(map(re.escape, re.split(r"\\1|\*", pattern)))  # a group that was matched, or any number
        for conversion in _conversions(model) for pattern in conversion.target_patterns
    ]  # fmt: skip
    return {name for name, _ in model.named_parameters() if any(re.search(pattern, name) for pattern in patterns)}


def is_read_whole(config: Any) -> bool:
    """Whether checkpoints of this kind have tensors in other pieces than experts one by one, so that the whole model is
    in memory before its layers are quantised."""
    return not all(map(is_joining, _joining(get_checkpoint_conversion_mapping(config.model_type) or [])))


def _conversions(model: Any) -> list[WeightConverter]:
    return _joining(get_model_conversion_mapping(model, add_legacy=False))


def _joining(conversions: list[Any]) -> list[WeightConverter]:
    return [conversion for conversion in conversions if isinstance(conversion, WeightConverter)]


def _differences(model: Any, keys: set[str], kind: str) -> tuple[list[str], list[str]]:
    """Keys that the model needs and the files lack, and those that it has no place for."""
    wanted, tied = set(_tensors(model)), set(getattr(model, "all_tied_weights_keys", None) or {})
    return sorted(wanted - keys - tied), without_place(model, keys - wanted, kind)


def _refuse_others(
    model: Any, files: Tensors, keys: set[str], weights: set[str], name: str, new: set[str], kind: str
) -> None:
    missing, _ = _differences(model, keys | new, kind)
    if missing:
        raise ModelError(f"The checkpoint of {name} lacks {some_of(missing)}.")
    refuse_without_place(model, keys - set(_tensors(model)), kind, name)
    wanted = _tensors(model)
    for key in sorted((keys & set(wanted)) - weights):
        if files.shape(key) != tuple(wanted[key].shape):
            raise ModelError(
                f"{key} of {name} is {files.shape(key)}, where its config.json says {tuple(wanted[key].shape)}."
            )


def _fill(
    model: nn.Module, key: str, tensor: Tensor, dtype: torch.dtype, copy: bool = False, device: str = CPU
) -> None:  # fmt: skip
    """Put a checkpoint's tensor in its place on the ``device``, parameters in ``dtype``."""
    path, _, name = key.rpartition(".")
    module = model.get_submodule(path)
    if name in module._buffers:
        module._buffers[name] = tensor.to(device, copy=True)
    else:
        old = module._parameters[name]
        trained = old is not None and old.requires_grad
        module._parameters[name] = nn.Parameter(tensor.to(device, dtype, copy=copy), requires_grad=trained)


def _finished(model: Any, checkpoint: Checkpoint, held: set[str], new: set[str]) -> Any:
    """``held``: the tensors that the checkpoint has values for; ``new``: those that were given initial values."""
    tie(model, set(_tensors(model)) - held - new)
    remember_checkpoint(model, new, checkpoint.vocabulary)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config = checkpoint.generation_config() or model.generation_config
    return model
