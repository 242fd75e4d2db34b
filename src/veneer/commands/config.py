"""The options of the small verbs; training's are in veneer/training/config.py."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from veneer.data.config import RowOptions
from veneer.data.forms import check_template, typed_arguments
from veneer.data.lengths import LongRows
from veneer.device import CPU
from veneer.frozen.config import BlockwiseOptions, OnDevice
from veneer.options import Options
from veneer.updates.config import CombineOptions


class MergeOptions(OnDevice, BlockwiseOptions):
    """veneer merge RUN OUT"""

    storage: Literal[
        "fp32", "bf16", "fp16", "nf4", "fp4", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0",
        "q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "q3_k_m", "q2_k",
    ] = Field(
        default="fp32",
        description="How the merged weights are kept: nf4 and fp4 in a folder alone, q8_0 to q2_k in GGUF alone, those "
        "with a k where llama-cpp-python is installed.",
    )  # fmt: skip
    format: Literal["folder", "gguf", "ollama"] = Field(
        default="folder",
        description="A transformers folder; one GGUF file, for llama.cpp and others; or a folder for ollama create.",
    )
    device: str = Field(
        default=CPU, description="Where the sum is computed: as in train. Another than cpu may give other last bits."
    )
    check: str | None = Field(
        default=None,
        description="Rows on which to measure what 8 bits or fewer change. Default: the run's held-out rows.",
    )
    pre: str | None = Field(
        default=None,
        description="For GGUF: llama.cpp's name of how the tokenizer splits text, where Veneer does not know it.",
    )
    experts: Literal["codes", "dense"] = Field(
        default="codes",
        description="A mixture's experts in nf4 or fp4: in codes, which Veneer alone reads, or dense, which "
        "transformers reads.",
    )


class QuantizeOptions(BlockwiseOptions):
    """veneer quantize MODEL OUT"""

    storage: Literal["nf4", "fp4"] = Field(default="nf4", description="How the linear layers are kept.")
    experts: Literal["codes", "dense"] = Field(
        default="codes",
        description="A mixture's experts: in codes, which Veneer alone reads, or dense, which transformers reads.",
    )


class ExportOptions(Options):
    """veneer export RUN OUT"""

    format: Literal["peft", "gguf", "ollama", "mlx"] = Field(
        default="peft",
        description="A PEFT folder; GGUF, for llama.cpp's --lora; a folder for ollama create; or mlx-lm's form.",
    )
    padded: bool = Field(
        default=True,
        description="For peft: one rank for all modules, filled with zeros; or each its own, which PEFT alone reads.",
    )


class WeightedOptions(CombineOptions):
    """veneer combine RUN RUN OUT"""

    weights: list[float] = Field(
        default=[], description="A number for each adapter, which its update is times: 0.7,0.3. Default: equal shares."
    )


class PushOptions(Options):
    """veneer push RUN REPO"""

    private: bool = Field(default=False, description="Make a repository that only you and its owner see.")
    update: bool = Field(default=False, description="Replace the files of a repository that exists.")


class InspectOptions(RowOptions):
    """veneer inspect X"""

    png: str | None = Field(
        default=None, description="For an adapter: write the heat map of its ranks to this file, too."
    )

    model: str | None = Field(
        default=None, description="For rows: the model whose tokens and template show what is learned."
    )
    rows: int = Field(default=3, ge=1, description="For rows: how many to print.")
    template: str = Field(default="auto", description="For rows: as in train.")
    template_arguments: dict[str, Any] = Field(default={}, description="For rows: as in train.")
    fold_turns: bool = Field(default=False, description="For rows: as in train.")
    learn: Literal["answer", "last", "all"] = Field(default="answer", description="For rows: as in train.")
    system: str | None = Field(default=None, description="For rows: as in train.")
    max_length: int = Field(default=1024, ge=2, description="For rows: as in train.")
    long_rows: LongRows = Field(default="auto", description="For rows: as in train.")

    _template_known = field_validator("template")(check_template)
    _arguments_typed = field_validator("template_arguments", mode="before")(typed_arguments)
