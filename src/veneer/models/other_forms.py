"""Checkpoints that other tools keep in fewer bits, in forms that are not read: refused by what they are."""

from __future__ import annotations

from typing import Any

from veneer.errors import ModelError
from veneer.models.bnb_file import quantisation_said
from veneer.models.tensors import SafetensorsFolder

# By what config.json calls the method. transformers expands FP8 by blocks and MXFP4 itself.
_FORMS = {
    "gptq": "GPTQ", "awq": "AWQ", "auto-round": "AutoRound", "compressed-tensors": "compressed-tensors",
    "modelopt": "NVIDIA ModelOpt (FP8 or NVFP4)", "nvfp4": "NVFP4", "fbgemm_fp8": "FBGEMM's FP8", "hqq": "HQQ",
    "quanto": "Quanto", "torchao": "torchao", "aqlm": "AQLM", "vptq": "VPTQ", "eetq": "EETQ", "higgs": "HIGGS",
    "spqr": "SpQR", "bitnet": "BitNet", "quark": "AMD Quark", "fp_quant": "FP-Quant", "sinq": "SINQ", "exl2": "EXL2",
    "exl3": "EXL3", "mlx": "MLX", "metal": "Metal",
}  # fmt: skip
_READ = frozenset({"bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit", "gguf", "fp8", "mxfp4"})


def refuse_other_forms(config: Any, name: str) -> None:
    """Raises ModelError where a model's config says that its weights are kept in a form that is not read."""
    said = quantisation_said(config)
    method = str(said.get("quant_method") or ("mlx" if "group_size" in said and "bits" in said else ""))
    if not said or method in _READ:
        return
    what = _FORMS.get(method, f"a form called {method[:40]!r}" if method else "a form that it has no name for")
    raise ModelError(
        f"The weights of {name} are kept in {what}, which cannot be read; what can: plain weights (fp32, bf16, fp16), "
        f"bitsandbytes in 4 bits, FP8 by blocks, MXFP4, and GGUF files. Take the model that it was made of."
    )


def refuse_uneven_blocks(config: Any, files: SafetensorsFolder, name: str) -> None:
    """Raises ModelError for FP8 by blocks where a weight ends within one: transformers expands it wrongly."""
    said = quantisation_said(config)
    block = said.get("weight_block_size")
    if said.get("quant_method") != "fp8" or not isinstance(block, (list, tuple)) or len(block) != 2:
        return
    for scales in sorted(key for key in files.names() if key.endswith(".weight_scale_inv")):
        weight = scales.removesuffix("_scale_inv")
        shape = files.shape(weight) if weight in files.names() else ()
        if len(shape) == 2 and (shape[0] % int(block[0]) or shape[1] % int(block[1])):
            raise ModelError(
                f"{weight} of {name} is {shape[0]} × {shape[1]} in FP8 by blocks of {block[0]} × {block[1]}, which "
                f"only whole blocks can be expanded from; take the model in bf16."
            )
