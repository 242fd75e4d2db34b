"""What a session generates, and what a way to generate it must offer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from veneer.generation.sampling import Sampler
from veneer.generation.text import Text
from veneer.updates.rows import Names


@dataclass(eq=False)
class Continuation:
    """A prompt (token ids) and what has been generated after it."""

    key: int
    prompt: list[int]
    adapters: Names  # that it is generated with; none: the base
    limit: int  # tokens to generate at most
    sampler: Sampler
    ends: frozenset[int] = frozenset()  # tokens that end it
    text: Text | None = None  # where texts end it, too
    tokens: list[int] = field(default_factory=list)

    def put(self, token: int) -> bool:
        """Add a token to it. Whether it ends with this one."""
        self.tokens.append(token)
        if self.text is not None:
            self.text.put(token)
        stopped = self.text is not None and self.text.stopped
        return stopped or token in self.ends or len(self.tokens) == self.limit


class Lane(Protocol):
    """A way to generate: it has its own sequences, which join and leave while others go on."""

    def add(self, continuation: Continuation) -> None:
        """Take it over; it gets its first token in the next step."""

    def step(self) -> list[tuple[Continuation, int]]:
        """One token more for each; those that have begun go on from their last token."""

    def drop(self, continuations: list[Continuation]) -> None:
        """Free what is kept of these."""


def by_adapters(continuations: list[Continuation]) -> dict[Names, list[Continuation]]:
    """Adapters → those that are generated with them, in order."""
    groups: dict[Names, list[Continuation]] = {}
    for continuation in continuations:
        groups.setdefault(continuation.adapters, []).append(continuation)
    return groups
