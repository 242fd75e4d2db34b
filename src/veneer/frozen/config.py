"""How a frozen base is kept: the storages, and the options of the quantised ones. No torch here."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field, field_validator

from veneer.device import AUTO, known_name
from veneer.options import Options

Storage = Literal["fp32", "bf16", "fp16", "nf4", "fp4", "int4", "int8"]
DenseStorage = Literal["fp32", "bf16", "fp16"]
Compute = Literal["auto", "fp32", "bf16"]
COMPUTES: tuple[str, ...] = get_args(Compute)
# A storage of codes → the bits of one. All have a scale for each block of weights.
CODE_BITS = {"nf4": 4, "fp4": 4, "int4": 4, "int8": 8}
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


class OnDevice(Options):
    """Where a model is, and computes."""

    device: str = Field(
        default=AUTO,
        description="cpu, cuda, cuda:N, mps or xpu; auto: a GPU that holds what is asked, by the plan, else the CPU.",
    )
    _device_known = field_validator("device", mode="before")(known_name)


class BlockwiseOptions(Options):
    """What the quantised storages have in common."""

    block_size: int = Field(
        default=64, description="Weights of a quantised storage that share a scale: 32, 64, … 4096."
    )
    double_quantisation: bool = Field(
        default=True, description="Keep the scales of a quantised storage in 8 bits, too."
    )

    @field_validator("block_size")
    @classmethod
    def _power_of_two(cls, value: int) -> int:
        if value not in BLOCK_SIZES:
            raise ValueError(f"block_size = {value} is not one of {', '.join(map(str, BLOCK_SIZES))}.")
        return value


class BaseOptions(OnDevice, BlockwiseOptions):
    """How a base is kept, beside its storage."""

    dense_storage: DenseStorage = Field(
        default="fp32",
        description="How embeddings and head are kept beside a storage of codes (nf4, fp4, int4, int8). bf16 halves "
        "their memory.",
    )
    compute: Compute = Field(
        default="auto",
        description="The type of activations and products, whatever the storage; auto: bf16 where a step was measured "
        "to be clearly faster in it on this machine, else fp32.",
    )


class UsedIn(OnDevice):
    """What a model computes in where it is used, and not trained."""

    compute: Compute = Field(
        default="auto",
        description="The type of activations and products; auto: that of the run, or of a model whichever is faster on "
        "this machine.",
    )
