"""Any adapter as a plain LoRA that every loader of PEFT folders reads, vLLM and llama.cpp's converter among them.

They take ``lora_A`` and ``lora_B``, one rank and one alpha, and ignore what says otherwise for some modules. So
AdaLoRA's λ and every module's own scale are folded into B, and the rank is made the same with zeros.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from veneer.arguments import folder_given
from veneer.errors import AdapterFileError
from veneer.files import atomic_folder
from veneer.updates.adapter_file import WEIGHTS_NAME, read_tensors, refuse_not_finite, write_tensors
from veneer.updates.config import AdaLoRA, LoRA
from veneer.updates.peft_config import CONFIG_NAME, from_peft, kept_triplets, read_fields
from veneer.updates.select import rank_and_scale

_PART = re.compile(r"base_model\.model\.(?P<path>.+)\.lora_(?P<embedding>embedding_)?(?P<part>[ABE])(\.weight)?")
_PLAIN = ("task_type", "base_model_name_or_path", "revision", "target_modules", "fan_in_fan_out")


def export(folder: str | Path, out: str | Path, *, padded: bool = True) -> None:
    """Write the adapter of a PEFT ``folder`` to ``out`` as a LoRA of scale 1.

    ``padded``: every module has the largest rank that one of them needs, filled with zeros, which every loader takes.
    Otherwise each has its own, in a ``rank_pattern``, which PEFT reads and vLLM and llama.cpp do not.

    Raises AdapterFileError when the folder holds no adapter, ``out`` exists and is not an empty folder, or what is
    trained is more than low-rank updates: modules trained whole, or rows of an embedding.

    Example:
        >>> veneer.export("adapter", "plain")
        >>> sorted(os.listdir("plain"))
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    folder, out = folder_given("export", folder), folder_given("export", out, "out")
    refuse_occupied_folder(out)
    write_plain(out, plain_updates(folder), read_fields(folder), padded=padded)


class Plain(NamedTuple):
    """One update, whose ΔW is B A."""

    A: Tensor  # (rank, in)
    B: Tensor  # (out, rank), with λ and the scale in it
    scale: float  # that is in B
    embedding: bool


def refuse_occupied_folder(out: Path) -> None:
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise AdapterFileError(f"{out} exists and is not an empty folder; choose a new one.")


def write_plain(out: Path, updates: dict[str, Plain], source: dict[str, Any], *, padded: bool) -> None:
    """Write module name → update as a PEFT folder of scale 1; ``source``: the fields of the config that it comes from,
    without target_modules: the modules are named."""
    ranks = {path: max(1, len(one.A)) for path, one in updates.items()}
    largest = max(ranks.values())
    tensors: dict[str, Tensor] = {}
    for path, (A, B, _, embedding) in updates.items():
        missing = (largest if padded else ranks[path]) - len(A)
        name = f"base_model.model.{path}.lora_{'embedding_' if embedding else ''}{{}}{'' if embedding else '.weight'}"
        tensors[name.format("A")] = torch.cat([A, A.new_zeros(missing, A.shape[1])])
        tensors[name.format("B")] = torch.cat([B, B.new_zeros(len(B), missing)], 1)
    fields = {name: source.get(name) for name in _PLAIN} | {
        "peft_type": "LORA",
        "r": largest,
        # With the pattern an alpha of its own for each rank, so that the scale is 1 there, too.
        "lora_alpha": largest,
        "rank_pattern": {} if padded else {re.escape(path): rank for path, rank in ranks.items()},
        "alpha_pattern": {} if padded else {re.escape(path): rank for path, rank in ranks.items()},
        "lora_dropout": source.get("lora_dropout", 0.0),
        "use_rslora": False,
        "modules_to_save": None,
        "bias": "none",
        "inference_mode": True,
    }
    if fields["target_modules"] is None:
        fields["target_modules"] = list(updates)
    with atomic_folder(out) as temporary:
        write_tensors(dict(sorted(tensors.items())), temporary / WEIGHTS_NAME)
        (temporary / CONFIG_NAME).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def plain_updates(folder: Path) -> dict[str, Plain]:
    """Module name → its update, as it is in a folder of PEFT's.

    Raises AdapterFileError where the folder holds no adapter, or more than low-rank updates.
    """
    config, tensors = from_peft(folder), read_tensors(folder)
    if isinstance(config, LoRA) and config.target_parameters:
        raise AdapterFileError(
            f"{folder} adapts parameters of experts ({', '.join(config.target_parameters)}), which no plain LoRA can "
            f"carry; merge it into its base instead."
        )
    parts: dict[str, dict[str, Tensor]] = {}
    embeddings, others = set(), []
    for key, tensor in tensors.items():
        key_parts = _PART.fullmatch(key)
        if key_parts is None:
            others.append(key)
            continue
        parts.setdefault(key_parts["path"], {})[key_parts["part"]] = tensor
        if key_parts["embedding"]:
            embeddings.add(key_parts["path"])
    # PEFT writes an adapted embedding's own frozen weight beside it.
    others = [key for key in others if key.removeprefix("base_model.model.").removesuffix(".weight") not in embeddings]
    if others or not parts:
        what = f"trains more than low-rank updates ({others[0]})" if others else "holds no low-rank update"
        raise AdapterFileError(f"{folder} {what}, which no plain LoRA can carry; merge it into its base instead.")
    convolution = next((path for path, its in parts.items() if all(tensor.dim() > 2 for tensor in its.values())), None)
    if convolution is not None:
        raise AdapterFileError(
            f"{folder} adapts convolutions ({convolution}), which no plain LoRA can carry; merge it into its base "
            f"instead."
        )
    refuse_not_finite(tensors, str(folder / WEIGHTS_NAME))
    kept = kept_triplets(folder) if isinstance(config, AdaLoRA) else {}
    found_updates = {}
    for path, its in parts.items():
        _refuse_misfit(folder, path, its, config, kept.get(path, []))
        A, B = its["A"], its["B"]
        scale = _scale(config, path)
        # In fp64: what is folded here is rounded once, to the type that it is kept in.
        factor = scale * its["E"].double().t() if "E" in its else scale
        folded = (B.double() * factor).to(B.dtype).contiguous()
        found_updates[path] = Plain(A, folded, scale, path in embeddings)
    return found_updates


def _refuse_misfit(folder: Path, path: str, its: dict[str, Tensor], config: LoRA | AdaLoRA, flags: list[bool]) -> None:
    """Raises AdapterFileError where a module's tensors do not fit each other, or the rank that the config gives it."""
    parts = ("A", "B") if isinstance(config, LoRA) else ("A", "B", "E")
    if set(its) != set(parts):
        differing = sorted(set(its) ^ set(parts))
        raise AdapterFileError(
            f"{folder} is no whole {'LoRA' if isinstance(config, LoRA) else 'AdaLoRA'} adapter: of {path} it "
            f"{'lacks' if differing[0] in parts else 'has'} lora_{differing[0]}."
        )
    if isinstance(config, LoRA):
        rank = rank_and_scale(path, config)[0]
    else:
        rank = sum(flags) if len(flags) == config.initial_rank else config.initial_rank or 0
    shapes = {part: tuple(tensor.shape) for part, tensor in its.items()}
    wanted = {"A": (rank, *shapes["A"][1:2]), "B": (*shapes["B"][:1], rank), "E": (rank, 1)}
    if any(len(shape) != 2 or shape != wanted[part] for part, shape in shapes.items()):
        found = ", ".join(f"lora_{part} {shapes[part]}" for part in parts)
        raise AdapterFileError(
            f"{folder / CONFIG_NAME} gives {path} the rank {rank}, and its tensors have another ({found}); its scale "
            f"would be wrong, so correct the config."
        )


def _scale(config: LoRA | AdaLoRA, path: str) -> float:
    if isinstance(config, LoRA):
        return rank_and_scale(path, config)[1]
    assert config.initial_rank is not None
    assert config.alpha is not None
    return config.alpha / config.initial_rank
