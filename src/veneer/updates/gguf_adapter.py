"""An adapter as a GGUF file, for llama.cpp's --lora and what is built on it.

Each module keeps its own rank. λ and every scale are in B, and the file says no alpha: llama.cpp then multiplies by 1,
whatever the rank, where its converter divides rsLoRA's alpha by the rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from veneer.errors import AdapterFileError
from veneer.files import atomic_file
from veneer.models.gguf_description import architecture_of
from veneer.models.gguf_layout import Array, namer, rows_as_written
from veneer.models.gguf_tokenizer import Said
from veneer.models.gguf_write import announce, put_key
from veneer.updates.export import plain_updates

_EMBEDDING, _HEAD = "token_embd", "output"


def write_gguf_adapter(folder: Path, path: Path, config: Any, name: str, general: Mapping[str, Any]) -> None:
    """Write the adapter of a PEFT ``folder`` over a base of transformers' ``config`` called ``name`` to ``path``.

    ``general``: more keys, whole names. Raises ModelError for a base whose architecture is not written, and
    AdapterFileError for what the file cannot carry: it names the module.
    """
    architecture = architecture_of(config, name)
    tensors = _tensors(folder, architecture, config)
    with atomic_file(path) as temporary:
        writer = gguf.GGUFWriter(temporary, architecture)
        for key, value in {"general.type": "adapter", "adapter.type": "lora", **general}.items():
            put_key(writer, key, Said(value))
        for tensor, values in tensors.items():
            announce(writer, tensor, values.shape, gguf.GGMLQuantizationType.F32)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for values in tensors.values():
            writer.write_tensor_data(np.ascontiguousarray(values))
        writer.close()


def _tensors(folder: Path, architecture: str, config: Any) -> dict[str, Array]:
    name_of = namer(config, architecture, "model" if architecture != "gpt2" else "transformer")
    made: dict[str, Array] = {}
    for module, (A, B, _, embedding) in sorted(plain_updates(folder).items()):
        name = name_of(module)
        if name is None:
            raise _refused(folder, module, "which a GGUF file of its base has no name for")
        if name in (_EMBEDDING, _HEAD) and config.tie_word_embeddings:
            raise _refused(folder, module, "whose weight embedding and head share, and llama.cpp has one name for both")
        if not len(A):  # AdaLoRA took its whole rank
            continue
        a, b = (part.detach().float().numpy() for part in (A, B))
        # llama.cpp looks up the rows of an embedding's A, token by token.
        made[f"{name}.weight.lora_a"] = a.T if embedding else a
        made[f"{name}.weight.lora_b"] = b if embedding else rows_as_written(architecture, f"{name}.weight", b, config)
    if not made:
        raise AdapterFileError(f"{folder} changes nothing: each of its updates has rank 0.")
    return made


def _refused(folder: Path, module: str, why: str) -> AdapterFileError:
    return AdapterFileError(
        f"{folder} adapts {module}, {why}; merge it into its base instead (veneer merge, format: gguf)."
    )
