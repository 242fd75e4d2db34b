"""How an answer is generated: the options of generate and chat, and of all that generates text. No torch here."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from veneer.errors import shown
from veneer.frozen.config import UsedIn
from veneer.options import Options

_CUTS = ("top_p", "top_k", "min_p")


class SamplingOptions(Options):
    """How tokens are chosen, and where an answer ends."""

    max_new_tokens: int = Field(default=128, ge=1, description="Longest answer, in tokens.")
    temperature: float = Field(default=0.0, ge=0, description="0 is greedy; higher is more varied.")
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="Sample among the likeliest tokens that make up this share; 1: among all."
    )
    top_k: int = Field(default=0, ge=0, description="Sample among this many of the likeliest tokens; 0: among all.")
    min_p: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Sample among tokens with at least this share of the likeliest one's probability; 0: among all.",
    )
    repetition_penalty: float = Field(
        default=1.0,
        gt=0,
        description="Above 1 tokens of the prompt and of the answer so far become less likely; 1: no penalty.",
    )
    stop: str | list[str] = Field(
        default=[],
        description="Texts that end an answer, which does not include them. A special token counts, too.",
        json_schema_extra={"texts": True},
    )
    seed: int = Field(
        default=0, ge=0, lt=2**64, description="Seed of sampling, for each prompt its own generator of this seed."
    )

    @field_validator("stop")
    @classmethod
    def _some_text(cls, value: str | list[str]) -> list[str]:
        texts = [value] if isinstance(value, str) else value
        if not all(texts):
            raise ValueError("stop has an empty text, which would end every answer at once; leave it out.")
        return texts

    @model_validator(mode="after")
    def _cuts_need_a_temperature(self) -> SamplingOptions:
        given = [name for name in _CUTS if getattr(self, name) != SamplingOptions.model_fields[name].default]
        if given and not self.temperature:
            raise ValueError(
                f"{given[0]} = {shown(getattr(self, given[0]))} does nothing at temperature 0, which takes the "
                f"likeliest token; give a temperature above 0, such as 0.7, or leave {given[0]} out."
            )
        return self

    def sampling(self) -> dict[str, Any]:
        """These options alone, by name."""
        return {name: getattr(self, name) for name in SamplingOptions.model_fields}


class GenerateOptions(UsedIn, SamplingOptions):
    """veneer generate and veneer chat"""

    template: Literal["auto", "chat", "plain"] = Field(
        default="auto",
        description="Put the prompt into the model's chat template, or not; auto does as the run was trained.",
    )
    system: str | None = Field(
        default=None, description="System message before the question. Default: the run's; an empty one is none."
    )
    activations: Literal["fp32", "int8"] = Field(
        default="fp32", description="What a base in 4 bits multiplies, a token at a time: int8 is faster and not exact."
    )
    base: bool = Field(default=False, description="The base's answer, without the adapter.")
    both: bool = Field(default=False, description="Base and adapter side by side.")
