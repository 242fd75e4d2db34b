"""bitsandbytes 4-bit checkpoints, in and out: the keys of one weight, and a whole model folder.

A weight P of shape (out, in) is kept under P (its codes), P.absmax, P.quant_map, with double quantisation
P.nested_absmax and P.nested_quant_map, and P.quant_state.bitsandbytes__nf4 (or __fp4), the rest as JSON in bytes.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from veneer.documents import parsed_json
from veneer.errors import ModelError
from veneer.frozen.blockwise import NESTED_BLOCK, Quantised
from veneer.frozen.codebook import codebook, dynamic8
from veneer.frozen.config import BLOCK_SIZES
from veneer.frozen.experts import QuantisedStack
from veneer.frozen.layers import HEADS, dense_linear_layers
from veneer.frozen.text_part import beside_text
from veneer.frozen.weight import QuantisedLinear
from veneer.models.finite import is_finite

TYPES = ("nf4", "fp4")
STATE = "quant_state.bitsandbytes__"
_DESCRIBES = re.compile(r"(.+?)\.(absmax|quant_map|nested_\w+|quant_state\.bitsandbytes__.*)")
_SHARD = 4 * 2**30  # bytes of a file


def says_bitsandbytes(config: Any) -> bool:
    """Whether a model's config says that bitsandbytes keeps it."""
    return bool(quantisation_said(config).get("quant_method") == "bitsandbytes")


def refuse_8_bits(config: Any, name: str) -> None:
    """Raises ModelError when the config of the model ``name`` says that bitsandbytes keeps it in 8 bits, which is
    another format."""
    if not quantisation_said(config).get("load_in_4bit"):
        raise ModelError(f"{name} is a bitsandbytes checkpoint in 8 bits; those in 4 bits (nf4, fp4) can be read.")


def quantisation_said(config: Any) -> dict[str, Any]:
    """What config.json says of how weights are kept; MLX has a place of its own for it."""
    said = getattr(config, "quantization_config", None) or getattr(config, "quantization", None) or {}
    return dict(said if isinstance(said, dict) else said.to_dict())


def holds_codes(keys: Iterable[str]) -> bool:
    """Whether any weight among the tensors ``keys`` is kept as bitsandbytes keeps one, in 4 or 8 bits."""
    return any(".weight.absmax" in key or key.endswith(".SCB") for key in keys)


def weight_and_part(key: str) -> tuple[str, str]:
    """The weight that a key describes the codes of, and as what: ("…q_proj.weight", "absmax"); else the key and ""."""
    parts = _DESCRIBES.fullmatch(key)
    return (parts[1], parts[2]) if parts else (key, "")


def quantised_weights(keys: Iterable[str]) -> dict[str, set[str]]:
    """The name of each weight that is kept in codes → the keys beside it that describe it."""
    parts: dict[str, set[str]] = {}
    for weight, part in map(weight_and_part, keys):
        if part:
            parts.setdefault(weight, set()).add(part)
    return parts


def read_weight(name: str, parts: set[str], read: Callable[[str], Tensor]) -> Quantised:
    """The weight called ``name``, of which ``parts`` stand beside its codes; ``read`` gives the tensor of a key.

    Its codes are the very tensor that ``read`` gave. Raises ModelError when a part is missing or fits no other.
    """
    states = [part for part in parts if part.startswith(STATE)]
    if len(states) != 1:
        raise ModelError(f"{name} is kept in codes, but the checkpoint has no {STATE}nf4 (or fp4) that describes it.")
    kind = states[0].removeprefix(STATE)
    if kind not in TYPES:
        raise ModelError(f"{name} is kept as {kind!r}; of bitsandbytes' types {' and '.join(TYPES)} can be read.")
    shape, block_size, nested = _state(name, read(f"{name}.{states[0]}"), kind)
    needed = {"absmax", "quant_map", *(("nested_absmax", "nested_quant_map") if nested else ())}
    if needed - parts:
        raise ModelError(f"{name} is kept as {kind}, but the checkpoint lacks {name}.{min(needed - parts)}.")
    if not _same_table(read(f"{name}.quant_map"), codebook(kind), 1e-3):
        raise ModelError(f"{name}.quant_map is not the table of {kind}: its codes stand for unknown values.")
    codes = read(name).reshape(-1).view(torch.uint8)
    scales = read(f"{name}.absmax").reshape(-1)
    if (scales.dtype is torch.uint8) != bool(nested) or not (nested or scales.is_floating_point()):
        raise ModelError(
            f"{name}.absmax is of the type {_name(scales.dtype)}; with nested scales it is uint8, and else a float."
        )
    weight = Quantised(kind, block_size, shape, codes, scales)
    _same_count(name, "codes", len(codes), (shape[0] * shape[1] + 1) // 2)
    _same_count(f"{name}.absmax", "scales", len(scales), weight.blocks)
    made = _with_nested(weight, name, read, *nested) if nested else _in_fp32(weight)
    _refuse_scales_not_finite(made, name, bool(nested))
    return made


def _refuse_scales_not_finite(q: Quantised, name: str, nested: bool) -> None:
    kept = {f"{name}.{'nested_absmax' if nested else 'absmax'}": q.nested_scales, f"{name}.absmax": q.scales}
    if q.offset is not None and not is_finite(q.offset):
        raise ModelError(f"{name}.quant_state has a nested_offset that is not finite: its weights are unknown.")
    for key, scales in kept.items():
        if scales is not None and not is_finite(scales):
            raise ModelError(f"{key} holds a scale that is not finite: its weights are unknown.")


def _state(name: str, tensor: Tensor, kind: str) -> tuple[tuple[int, int], int, tuple[int, float] | None]:
    """Shape, block size, and of double quantisation its block size and offset, as the JSON says."""
    try:
        state = parsed_json(bytes(tensor.tolist()))
        rows, columns = state["shape"]
        shape, block_size = (int(rows), int(columns)), int(state["blocksize"])
        nested = (int(state["nested_blocksize"]), float(state["nested_offset"])) if "nested_offset" in state else None
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{name}.{STATE}{kind} cannot be read: {type(error).__name__} {error}.") from None
    if state.get("quant_type") != kind:
        raise ModelError(f"{name}.{STATE}{kind} says that it is of the type {state.get('quant_type')!r}.")
    if nested is not None and nested[0] < 1:
        raise ModelError(f"{name}.{STATE}{kind} has nested scales in blocks of {nested[0]}.")
    if block_size not in BLOCK_SIZES:
        raise ModelError(f"{name} has blocks of {block_size}, not of one of {', '.join(map(str, BLOCK_SIZES))}.")
    return shape, block_size, nested


def _with_nested(q: Quantised, name: str, read: Callable[[str], Tensor], block: int, offset: float) -> Quantised:
    nested, table = read(f"{name}.nested_absmax").reshape(-1), read(f"{name}.nested_quant_map").reshape(-1)
    _same_count(f"{name}.nested_absmax", "scales of scales", len(nested), -(-q.blocks // block))
    _same_count(f"{name}.nested_quant_map", "values", len(table), 256)
    if block == NESTED_BLOCK and torch.equal(table.float(), dynamic8()):
        made = Quantised(q.storage, q.block_size, q.shape, q.codes, q.scales, nested.float(), torch.tensor(offset))
        return made
    # Another table or block than ours: what its scales are is kept as floats, exactly.
    values = table.float()[q.scales.int()] * nested.float().repeat_interleave(block)[: q.blocks] + offset
    return Quantised(q.storage, q.block_size, q.shape, q.codes, values)


def _in_fp32(q: Quantised) -> Quantised:
    return Quantised(q.storage, q.block_size, q.shape, q.codes, q.scales.float())


def _same_table(table: Tensor, wanted: Tensor, tolerance: float) -> bool:
    return table.shape == wanted.shape and torch.allclose(table.float(), wanted, rtol=0, atol=tolerance)


def _same_count(name: str, what: str, count: int, wanted: int) -> None:
    if count != wanted:
        raise ModelError(f"{name} has {count} bytes or {what} where its shape and block size need {wanted}.")


def weight_tensors(layer: QuantisedLinear, name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Key → tensor of the weight called ``name``, to be given back in ``dtype``."""
    q = layer.quantised
    state: dict[str, Any] = {
        "quant_type": q.storage, "blocksize": q.block_size, "dtype": _name(dtype), "shape": list(q.shape),
    }  # fmt: skip
    tensors = {name: q.codes.view(-1, 1), f"{name}.absmax": q.scales, f"{name}.quant_map": codebook(q.storage)}
    if q.nested_scales is not None and q.offset is not None:
        tensors[f"{name}.nested_absmax"] = q.nested_scales
        tensors[f"{name}.nested_quant_map"] = dynamic8()
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": float(q.offset)}
    tensors[f"{name}.{STATE}{q.storage}"] = state_tensor(state)
    return tensors


def stack_tensors(stack: QuantisedStack, name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Key → tensor of the experts called ``name``, to be given back in ``dtype``."""
    state: dict[str, Any] = {
        "quant_type": stack.storage, "blocksize": stack.block_size, "dtype": _name(dtype),
        "shape": [stack.experts, *stack.shape],
    }  # fmt: skip
    tensors = {name: stack.codes, f"{name}.absmax": stack.scales, f"{name}.quant_map": codebook(stack.storage)}
    if stack.nested_scales is not None and stack.offset is not None:
        tensors[f"{name}.nested_absmax"] = stack.nested_scales
        tensors[f"{name}.nested_quant_map"] = dynamic8()
        tensors[f"{name}.nested_offset"] = stack.offset
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"}
    return tensors | {f"{name}.{STATE}{stack.storage}": state_tensor(state)}


def state_tensor(state: dict[str, Any]) -> Tensor:
    """A weight's description as JSON in bytes."""
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def write_folder(model: Any, folder: Path, dtype: torch.dtype) -> None:
    """A model with layers in nf4 or fp4 as a folder that transformers loads with bitsandbytes; with experts in codes
    Veneer alone loads it.

    What is not kept in codes is written in ``dtype``. Raises ModelError for a model of which transformers would not
    load some of the codes.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantisedLinear)}
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    never = sorted({name.rpartition(".")[2] for name in layers if kept & set(name.split("."))})
    if never:
        raise ModelError(
            f"transformers keeps {', '.join(never)} of a {type(model).__name__} in fp32, so that it would not find "
            f"their codes; load it with storage={next(iter(layers.values())).storage!r} instead."
        )
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    stacks = {name: m for name, m in model.named_modules() if isinstance(m, QuantisedStack)}
    state = {key: t for key, t in model.state_dict().items() if key.rpartition(".")[0] not in layers.keys() | stacks}
    tensors = {
        key: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for key, tensor in state.items()
        if not (key in tied and tied[key] in state and tensor.data_ptr() == state[tied[key]].data_ptr())
    }
    for name, layer in layers.items():
        tensors |= weight_tensors(layer, f"{name}.weight", dtype)
        if layer.bias is not None:
            tensors[f"{name}.bias"] = layer.bias.detach().to(dtype)
    for name, stack in stacks.items():
        tensors |= stack_tensors(stack, name, dtype)
    _save(tensors, folder)
    config = copy.deepcopy(model.config)
    config.dtype, config.architectures = dtype, [type(model).__name__]
    config.quantization_config = _quantization_config(model, next(iter(layers.values())), dtype)
    config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)


def _quantization_config(model: nn.Module, layer: QuantisedLinear, dtype: torch.dtype) -> dict[str, Any]:
    # transformers itself leaves out a language model's head; a classifier's it would quantise.
    heads = [name for name, _ in model.named_children() if name in HEADS]
    # The dense parts of the text part by the end of their names, its other parts by their whole names.
    dense = [*beside_text(model), *sorted({name.rpartition(".")[2] for name in dense_linear_layers(model)})]
    if dense:  # named, these take the place of what transformers leaves out itself
        heads += [*dense, *(["lm_head"] if hasattr(model, "lm_head") else [])]
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True, "load_in_8bit": False, "_load_in_4bit": True, "_load_in_8bit": False,
        "bnb_4bit_quant_type": layer.storage,
        "bnb_4bit_use_double_quant": layer.nested_scales is not None,
        "bnb_4bit_compute_dtype": _name(dtype),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": heads or None,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
    }  # fmt: skip


def _save(tensors: dict[str, Tensor], folder: Path) -> None:
    """model.safetensors, or several files and their index."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for key, tensor in tensors.items():
        if size and size + tensor.nbytes > _SHARD:
            shards.append({})
            size = 0
        shards[-1][key] = tensor.contiguous()
        size += tensor.nbytes
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
            "weight_map": {key: name for name, shard in zip(names, shards, strict=True) for key in shard},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    for name, shard in zip(names, shards, strict=True):
        # quant_map is one tensor for all layers, and a file wants each its own.
        save_file({key: t.clone() if "quant_map" in key else t for key, t in shard.items()}, folder / name,
                  metadata={"format": "pt"})  # fmt: skip


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
