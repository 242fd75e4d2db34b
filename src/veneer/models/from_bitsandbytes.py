"""A model that transformers loaded with BitsAndBytesConfig, moved into Veneer's storage."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from veneer.arguments import refuse_no_model
from veneer.errors import ModelError
from veneer.frozen.foreign import how_to_move, is_8_bits, of_bitsandbytes
from veneer.frozen.weight import QuantisedLinear
from veneer.models.bnb_file import read_weight

M = TypeVar("M", bound=nn.Module)


def from_bitsandbytes(model: M) -> M:
    """Keep each 4-bit layer of bitsandbytes in ``model`` as Veneer does, in place, with the same codes and scales.

    For models that transformers loaded with ``BitsAndBytesConfig(load_in_4bit=True, …)``, in nf4 or fp4, with double
    quantisation or without: each weight stands for the same values. Everything then works as on a model that
    `veneer.load` made, and the model's config does not name bitsandbytes any more. Returns ``model`` itself.

    Raises ModelError, with the model unchanged, where it has no such layer, one in 8 bits, which is another format, or
    one whose scales bitsandbytes rounded when it was called on a CPU.

    Example:
        >>> try:
        ...     veneer.from_bitsandbytes(model)
        ... except veneer.VeneerError as error:
        ...     print(error)
        from_bitsandbytes moves layers that bitsandbytes keeps in 4 bits, and this model has none.
    """
    refuse_no_model("from_bitsandbytes", model)
    layers = {name: module for name, module in model.named_modules() if of_bitsandbytes(module)}
    if not layers:
        raise ModelError("from_bitsandbytes moves layers that bitsandbytes keeps in 4 bits, and this model has none.")
    moved = {name: _moved(name, module) for name, module in layers.items()}
    for name, module in moved.items():
        model.set_submodule(name, module)
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    model.__dict__.pop("is_loaded_in_4bit", None)
    return model


def _moved(name: str, module: Any) -> QuantisedLinear:
    if is_8_bits(module):
        raise ModelError(f"{name} is kept by bitsandbytes{how_to_move(module)}")
    state = getattr(module.weight, "quant_state", None)
    if state is None:
        raise ModelError(f"{name} has no codes yet: bitsandbytes makes them when the model is moved to its device.")
    if getattr(state, "packing_format_for_cpu", False):
        raise ModelError(
            f"{name} has other scales than it was loaded with: bitsandbytes rounded them to bf16 when the model was "
            f"called on this CPU; load the model again and move it before it is called."
        )
    tensors = {f"{name}.{key}": tensor.detach() for key, tensor in module.state_dict().items()}
    parts = {key.removeprefix(f"{name}.weight.") for key in tensors if key.startswith(f"{name}.weight.")}
    codes = read_weight(f"{name}.weight", parts, tensors.__getitem__)
    return QuantisedLinear(codes, module.bias, state.dtype).train(module.training)
