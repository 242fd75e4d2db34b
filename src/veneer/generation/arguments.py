"""The options that public functions take by name, as type checkers read them. No torch here.

Written by tests/arguments_file.py from the option classes, where each option is declared; do not edit.
"""

from __future__ import annotations

from typing import TypedDict


class SamplingArguments(TypedDict, total=False):
    """The options of `veneer.generate` and `veneer.stream`."""

    temperature: float
    """0 is greedy; higher is more varied."""
    top_p: float
    """Sample among the likeliest tokens that make up this share; 1: among all."""
    top_k: int
    """Sample among this many of the likeliest tokens; 0: among all."""
    min_p: float
    """Sample among tokens with at least this share of the likeliest one's probability; 0: among all."""
    repetition_penalty: float
    """Above 1 tokens of the prompt and of the answer so far become less likely; 1: no penalty."""
    stop: str | list[str]
    """Texts that end an answer, which does not include them. A special token counts, too."""
    seed: int
    """Seed of sampling, for each prompt its own generator of this seed."""
