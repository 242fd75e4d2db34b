"""What makes a prediction that one and no other: digests of the model's values and of the rows."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import nn

from veneer.data.read import Row

_ALL = 2**16  # values of a tensor that are all read; of a larger one as many, at equal distances


def digest_of_model(model: nn.Module) -> str:
    """By the name, type, shape and values of every tensor; a large one by a sample, so that mapped weights are not all
    read. Training changes nearly all values of what it trains."""
    digest = hashlib.blake2b(digest_size=16)
    tensors = [*model.named_parameters(remove_duplicate=True), *model.named_buffers()]
    for name, tensor in tensors:
        flat = tensor.detach().reshape(-1) if tensor.is_contiguous() else tensor.detach().flatten()
        sample = flat[:: -(-len(flat) // _ALL)] if len(flat) > _ALL else flat
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(sample.contiguous().view(torch.uint8).cpu().numpy().tobytes() if len(sample) else b"")
    return digest.hexdigest()


def digest_of_rows(rows: list[Row]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for row in rows:
        digest.update(json.dumps(row.fields, ensure_ascii=False, default=str).encode() + b"\n")
    return digest.hexdigest()


def identity(model: nn.Module, adapters: tuple[str, ...], rows: list[Row], options: dict[str, Any]) -> dict[str, Any]:
    """What an interrupted prediction must be the same in, to go on."""
    return {"model": f"{digest_of_model(model)} {' '.join(adapters)}".strip(), "rows": digest_of_rows(rows),
            "options": json.loads(json.dumps(options))}  # fmt: skip
