"""How an answer is generated: the options of generate and chat. No torch here."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from veneer.options import Options


class GenerateOptions(Options):
    """veneer generate and veneer chat"""

    max_new_tokens: int = Field(default=128, ge=1, description="Longest answer, in tokens.")
    temperature: float = Field(default=0.0, ge=0, description="0 is greedy; higher is more varied.")
    seed: int = Field(default=0, ge=0, description="Seed of sampling.")
    template: Literal["auto", "chat", "plain"] = Field(
        default="auto",
        description="Put the prompt into the model's chat template, or not; auto does as the run was trained.",
    )
    activations: Literal["fp32", "int8"] = Field(
        default="fp32", description="What a base in 4 bits multiplies, a token at a time: int8 is faster and not exact."
    )
    base: bool = Field(default=False, description="The base's answer, without the adapter.")
    both: bool = Field(default=False, description="Base and adapter side by side.")
