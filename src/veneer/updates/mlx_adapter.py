"""An adapter as mlx-lm has adapters: for its generate, chat and server on Apple's machines."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.errors import AdapterFileError, ModelError
from veneer.files import atomic_folder
from veneer.updates.adapter_file import write_tensors
from veneer.updates.export import plain_updates

# transformers' model types whose layers mlx-lm calls by the same names, and for which its logits were compared.
MODELS = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "smollm3", "granite", "olmo2")
_IN_A_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


def write_mlx_adapter(folder: Path, out: Path, config: Any, name: str) -> None:
    """Write the adapter of a PEFT ``folder`` over a base of transformers' ``config`` called ``name`` to the folder
    ``out``: one rank for all modules, filled with zeros, and scale 1.

    Raises ModelError for a base of a kind that is not in `MODELS`, and AdapterFileError for what mlx-lm's adapters
    cannot carry: it names the module.
    """
    if config.model_type not in MODELS:
        raise ModelError(
            f"{name} is a {config.model_type}, whose adapters are not written for mlx-lm; those of {', '.join(MODELS)} "
            f"are. Merge it instead: mlx-lm loads transformers folders."
        )
    updates = plain_updates(folder)
    rank = max(1, *(len(update.A) for update in updates.values()))
    tensors: dict[str, Tensor] = {}
    keys: dict[str, None] = {}
    for module, (A, B, _, _) in sorted(updates.items()):
        within = _IN_A_LAYER.fullmatch(module)
        if within is None:
            raise AdapterFileError(
                f"{folder} adapts {module}, which is in no layer, and mlx-lm's adapters are for layers; merge it into "
                f"its base instead: mlx-lm loads transformers folders."
            )
        keys[within[2]] = None
        missing = rank - len(A)
        # mlx-lm computes x a b, with a (in, rank) and b (rank, out).
        tensors[f"{module}.lora_a"] = torch.cat([A, A.new_zeros(missing, A.shape[1])]).t().contiguous()
        tensors[f"{module}.lora_b"] = torch.cat([B, B.new_zeros(len(B), missing)], 1).t().contiguous()
    fields = {
        "fine_tune_type": "lora",
        "num_layers": config.num_hidden_layers,
        "lora_parameters": {"rank": rank, "scale": 1.0, "dropout": 0.0, "keys": list(keys)},
    }
    with atomic_folder(out) as temporary:
        write_tensors(tensors, temporary / "adapters.safetensors")
        (temporary / "adapter_config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
