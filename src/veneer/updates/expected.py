"""The tensors that an adapter of some config would have on a model, by name, shape and type, without making one."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from veneer.frozen.experts import Stack
from veneer.updates.adapter_file import MAGNITUDES, PREFIX, ROWS
from veneer.updates.attach import rows_for, trained_whole
from veneer.updates.config import AdaLoRA, LoRA
from veneer.updates.convolutions import CONVOLUTIONS, conv_shapes
from veneer.updates.declared import Declared
from veneer.updates.experts import adapter_keys
from veneer.updates.layers import training_dtype, weight_shape
from veneer.updates.select import Chosen, choose, modules_of
from veneer.updates.wrappers import plain_name


def expected_tensors(
    model: nn.Module, config: LoRA | AdaLoRA, rows_on: list[str] | None, kept: dict[str, list[bool]]
) -> dict[str, Declared]:
    """PEFT's key → what `adapter_tensors` would have there once ``config`` was attached.

    ``rows_on``: as `add_adapter` takes it; ``kept``: as `kept_triplets` gives it. Raises TargetError as `attach` does.
    """
    modules = modules_of(model)
    chosen = choose(model, config) if config.chooses else []
    experts = adapter_keys([one.name for one in chosen if isinstance(one.module, Stack)], modules)
    whole = trained_whole(model, config)
    declared: dict[str, Declared] = {}
    for one in chosen:
        declared |= _of_update(one, config, experts.get(one.name), kept)
    for path, module in whole.items():
        for key, tensor in module.state_dict(keep_vars=True).items():
            declared[f"{PREFIX}{path}.{key}"] = Declared(tuple(tensor.shape), tensor.dtype)
    for group in rows_for(model, config, {one.name for one in chosen} | set(whole), rows_on):
        path = next((path for path in modules if path in group), next(iter(group)))
        weight = cast(Tensor, group[path].weight)
        shape = len(config.new_tokens), *weight.shape[1:]
        declared[f"{PREFIX}{path}{ROWS}"] = Declared(shape, training_dtype(weight))
    return {plain_name(key): tensor for key, tensor in declared.items()}


def _of_update(
    one: Chosen, config: LoRA | AdaLoRA, of_experts: str | None, kept: dict[str, list[bool]]
) -> dict[str, Declared]:
    shapes: dict[str, tuple[int, ...]]
    (rows, columns), dtype = weight_shape(one.module), training_dtype(cast(Tensor, one.module.weight))
    if isinstance(config, AdaLoRA):
        assert config.initial_rank is not None
        flags = kept.get(plain_name(one.name), [])
        rank = sum(flags) if len(flags) == config.initial_rank else config.initial_rank
        shapes = {"lora_A": (rank, columns), "lora_B": (rows, rank), "lora_E": (rank, 1)}
    elif isinstance(one.module, nn.Embedding):
        shapes = {"lora_embedding_A": (one.rank, columns), "lora_embedding_B": (rows, one.rank)}
    elif isinstance(one.module, CONVOLUTIONS):
        shapes = dict(zip(("lora_A.weight", "lora_B.weight"), conv_shapes(one.module, one.rank), strict=True))
    else:
        rank = one.rank * (one.module.experts if isinstance(one.module, Stack) else 1)
        shapes = {"lora_A.weight": (rank, columns), "lora_B.weight": (rows, rank)}
    declared = {f"{PREFIX}{of_experts or one.name}.{part}": Declared(shape, dtype) for part, shape in shapes.items()}
    if isinstance(config, LoRA) and config.dora:
        declared[f"{PREFIX}{one.name}{MAGNITUDES}"] = Declared((rows,), dtype)
    return declared
