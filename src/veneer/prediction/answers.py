"""The three kinds of answer: what a classifier says, a language model's label, and text."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

from torch import Tensor

from veneer.data.formats import Example
from veneer.data.known_tokens import refuse_unknown_tokens
from veneer.data.labels import Renderer
from veneer.errors import DataError
from veneer.frozen.text_part import text_config_of
from veneer.generation.batched import has_steps
from veneer.generation.config import SamplingOptions
from veneer.generation.labels import LabelScores, asked_of, shortened
from veneer.generation.likelihood import DIGITS, Said, class_scores, classified, said_by
from veneer.generation.session import Session
from veneer.generation.text import answer_text
from veneer.prediction.memory import Room, batched, room_for
from veneer.prediction.result import Prediction

_LIVE = 64  # texts that are generated side by side, at most
_ANY = 2**62  # tokens: no limit

Predicted = list[tuple[int, Prediction]]


class Answers(Protocol):
    """``cut``: where the rows stand whose prompt is longer than a model is given."""

    labels: tuple[str, ...]
    cut: list[str]
    room: Room

    def of(self, rows: list[int]) -> Iterator[Predicted]:
        """What is predicted for these rows, as it comes, each row once."""


class Classes:
    """A sequence classifier's."""

    def __init__(self, model: Any, renderer: Renderer, questions: Sequence[Example], tokens: int) -> None:
        for question in questions:
            if question.prompt is None:
                raise DataError(f"{question.where} is a conversation; a classifier reads a text or a prompt.")
        whole = classified(replace(renderer, max_length=_ANY), questions)
        self.cut = [row.where for row in whole if len(row.ids) > renderer.max_length]
        self.labels = () if renderer.problem == "regression" else renderer.classes
        self.room = room_for(model, tokens, logits=0)
        self._model, self._renderer = model, renderer
        self._rows = classified(renderer, questions) if self.cut else whole

    def of(self, rows: list[int]) -> Iterator[Predicted]:
        widths, where = [len(row.ids) for row in self._rows], [row.where for row in self._rows]
        for part in _parts(rows, widths, where, self.room):
            scores = class_scores(self._model, self._renderer, [self._rows[i] for i in part])
            yield [(row, _written(said)) for row, said in zip(part, said_by(scores, self._renderer), strict=True)]


class Labels:
    """The likeliest of a few labels after a prompt, as `evaluate` chooses."""

    def __init__(
        self, model: Any, renderer: Renderer, questions: Sequence[Example], labels: list[str], tokens: int
    ) -> None:
        self.labels = tuple(label.strip() for label in labels)
        whole = asked_of(replace(renderer, max_length=_ANY), questions, labels)
        self._asked = [shortened(row, renderer) for row in whole]
        self.cut = [
            question.where for question, row, uncut in zip(questions, self._asked, whole, strict=True)
            if len(row.prompt) < len(uncut.prompt)
        ]  # fmt: skip
        self._where = [question.where for question in questions]
        self._scores = LabelScores(model, renderer, self._asked)
        self._widths = [self._scores.width(row) for row in self._asked]
        self.shared = self._scores.shared
        longest = max(len(answer) for row in self._asked for answer in row.answers)
        steps = max(1, max(self._widths))
        # Logits are formed at a prompt's last token, and at the labels' further ones.
        formed = (1 + len(labels) * (longest - 1)) / max(1, min(self._widths))
        kept = 1.0 + self._scores.shared / steps if has_steps(model) else 0.0
        self.room = room_for(model, tokens, logits=formed * _vocabulary(model), kept=kept)

    def of(self, rows: list[int]) -> Iterator[Predicted]:
        for part in _parts(rows, self._widths, self._where, self.room):
            yield _chosen(part, self._scores([self._asked[i] for i in part]), self.labels)


class Texts:
    """What a model generates after a prompt, as `veneer.generate` does."""

    labels: tuple[str, ...] = ()

    def __init__(
        self, model: Any, renderer: Renderer, questions: Sequence[Example], tokens: int, asked: SamplingOptions
    ) -> None:
        limit = renderer.max_length
        whole = [renderer.prompt(question) for question in questions]
        self.cut = [question.where for question, prompt in zip(questions, whole, strict=True) if len(prompt) > limit]
        self._prompts = [prompt[-limit:] for prompt in whole]
        for question, prompt in zip(questions, self._prompts, strict=True):
            refuse_unknown_tokens(model, question.where, prompt)
        self._where = [question.where for question in questions]
        self._asked = asked
        self._model, self._renderer = model, renderer
        mean = sum(map(len, self._prompts)) / len(self._prompts)
        # Those that are read in a pass are added to up to _LIVE that go on, whose keys and values are kept.
        kept = 1.0 + _LIVE * (mean + asked.max_new_tokens) / tokens
        self.room = room_for(model, tokens, logits=_vocabulary(model) / max(1.0, mean), kept=kept)

    def of(self, rows: list[int]) -> Iterator[Predicted]:
        widths = [len(prompt) for prompt in self._prompts]
        waiting = deque(_parts(rows, widths, self._where, self.room, _LIVE // 2))
        session, live = Session(self._model, self._renderer), dict[int, tuple[int, list[int]]]()
        while waiting or live:
            if waiting and (not live or len(live) + len(waiting[0]) <= _LIVE):
                for row in waiting.popleft():
                    live[session.add(self._prompts[row], **self._asked.sampling())] = row, []
            ended: Predicted = []
            for added in session.step():
                live[added.key][1].append(added.token)
                if added.ended:
                    row, ids = live.pop(added.key)
                    text = answer_text(self._renderer.tokenizer, ids, self._asked.stop)
                    ended.append((row, Prediction(text)))
            if ended:
                yield ended


def _parts(rows: list[int], widths: list[int], where: list[str], room: Room, most: int = _ANY) -> list[list[int]]:
    """The rows in batches, the longest first: if it does not fit the memory, that is known at once."""
    order = sorted(rows, key=lambda row: -widths[row])
    if order:
        room.refuse_longer(where[order[0]], widths[order[0]])
    return batched(order, widths, room.tokens, most)


def _chosen(part: list[int], scores: Tensor, labels: tuple[str, ...]) -> Predicted:
    """Scores (rows, labels) → the likeliest label of each, and all probabilities: softmax(scores)."""
    best = scores.argmax(dim=1).tolist()
    shares = scores.cpu().double().softmax(dim=1).tolist()
    return [
        (row, Prediction(labels[choice], dict(zip(labels, (_rounded(p) for p in each), strict=True))))
        for row, choice, each in zip(part, best, shares, strict=True)
    ]


def _written(said: Said) -> Prediction:
    shares = {name: _rounded(share) for name, share in said.probabilities.items()}
    return Prediction(said.text, shares, said.labels, None if said.number is None else _rounded(said.number))


def _rounded(number: float) -> float:
    return float(f"{number:.{DIGITS}g}")


def _vocabulary(model: Any) -> int:
    size = getattr(text_config_of(model.config), "vocab_size", None)
    return size if isinstance(size, int) else 0
