"""Examples → tokens, and which of them are learned: the answer and the end token, not the prompt.

The prompt and the answer are tokenised apart, as they are when the model is used: it sees the prompt's tokens and
goes on from there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal

from veneer.data.bad import BadRows
from veneer.data.formats import Example, with_system
from veneer.data.forms import Template
from veneer.data.kept import those_of
from veneer.data.lengths import LongRows, cut_at_the_end, cut_at_the_front, in_pieces
from veneer.data.messages import said_in
from veneer.data.problems import target_of
from veneer.data.report import Report
from veneer.data.template import ChatTemplate
from veneer.data.token_rows import IGNORE as IGNORE
from veneer.data.token_rows import TokenRows
from veneer.data.token_rows import Tokens as Tokens
from veneer.data.turns import Turns
from veneer.errors import DataError, shown
from veneer.frozen.text_part import text_config_of
from veneer.models.problems import Problem

if TYPE_CHECKING:
    from transformers import BatchEncoding

Learn = Literal["answer", "last", "all"]


@dataclass(frozen=True)
class Renderer:
    """How examples become tokens: the tokenizer, the template, what is learned, and where long rows are cut."""

    tokenizer: Any
    template: Template = "auto"
    learn: Learn = "answer"
    max_length: int = 1024
    seq2seq: bool = False
    classes: tuple[str, ...] = ()  # of a classifier; else empty
    problem: Problem = "classification"  # what a classifier is asked: a class, all labels of a text, or a number
    fold_turns: bool = False  # the system message into the first user turn, and turns of one role as one
    arguments: Mapping[str, Any] = field(default_factory=dict)  # of the chat template
    long_rows: LongRows = "auto"  # what becomes of rows of more than max_length tokens
    system: str | None = None  # message of conversations that have none

    @property
    def kind(self) -> Literal["causal", "seq2seq", "classification"]:
        """What the rows teach the model."""
        return "classification" if self.classes else "seq2seq" if self.seq2seq else "causal"

    @property
    def pad(self) -> int:
        """The token that fills up short rows."""
        return self.tokenizer.pad_token_id or 0

    def all(
        self, examples: Sequence[Example], watched: Callable[[Sequence[Example]], Iterable[Example]] = iter,
        bad: BadRows | None = None,
    ) -> tuple[TokenRows, Report]:  # fmt: skip
        """Tokens of every example that has something to learn, and what became of the others. An example has a row, or
        a row for each of its answers where these cannot be learned in one. ``watched``: hands them out one by one, and
        shows how far it is. Those that the template refuses go to ``bad``; without it the first one is an error.

        Raises DataError when none has.
        """
        report, kept, refused = Report(rows=len(examples)), TokenRows(), BadRows()
        report.cut_at = "front" if self.long_rows == "cut-front" else "end"
        for example in watched(examples):
            try:
                rows = self._rows(example, report)
            except DataError as error:
                refused.add(example.where, str(error))
                continue
            if not any(row.learned for row in rows):
                report.empty.append(example.where)
            for whole in rows or [Tokens([], [], example.where)]:
                for fitted in self._fitted(example, whole, report):
                    kept.append(fitted)
        if bad is None or not len(kept):
            refused.refuse()
        if bad is not None:
            bad.rows += refused.rows
        if not len(kept):
            raise DataError(
                f"None of the {len(examples)} rows has a token to learn within max_length = {self.max_length}; the "
                f"first is {examples[0].where}. Is the answer empty, or the prompt longer than that?"
            )
        return kept, report

    def usable(self, examples: Sequence[Example], bad: BadRows) -> Sequence[Example]:
        """The examples that the template takes; the others go to ``bad``. Raises DataError where it takes none."""
        refused = BadRows()
        for example in examples:
            with refused.instead_of_an_error(example.where):
                self.one(example)
        refused.refuse_all(len(examples))
        bad.rows += refused.rows
        left = {row.where for row in refused.rows}
        return those_of(examples, [n for n, example in enumerate(examples) if example.where not in left])

    def one(self, example: Example) -> Tokens:
        """Tokens of an example at full length; of one that is a row for each of its answers, the last row."""
        rows = self._rows(example, Report())
        return rows[-1] if rows else Tokens([], [], example.where)

    def cut_rows(self, example: Example, report: Report) -> list[Tokens]:
        """The rows that one answer is learned in, cut where they are long; counted in ``report``."""
        own = Report(cut_at=report.cut_at)
        rows = [row for whole in self._rows(example, report) for row in self._fitted(example, whole, own)]
        report.tokens += own.tokens
        report.lost += own.lost
        report.cut += [where for where in own.cut if where not in report.cut[-1:]]
        report.dropped += [where for where in own.dropped if where not in report.dropped[-1:]]
        return rows

    def prompt(self, example: Example) -> list[int]:
        """The tokens before the last answer: what generation starts from. Raises DataError when there are none."""
        if self.seq2seq:
            return self._source(example)
        pieces = self._pieces(example, Report())[-1]
        last = max((i for i, (_, learned) in enumerate(pieces) if learned), default=len(pieces))
        ids = [token for piece, _ in pieces[:last] for token in piece]
        if not ids:
            raise DataError(
                f"{example.where} has an empty prompt, and the tokenizer puts nothing before it to go on from."
            )
        return ids

    def answer(self, example: Example) -> str:
        """The last answer as the model writes it: its text in the row, without special tokens and space around it."""
        if self.classes or self.seq2seq or not example.messages:
            return example.last_answer()
        learned = [piece for piece, is_learned in self._pieces(example, Report())[-1] if is_learned]
        return str(self.tokenizer.decode(learned[-1], skip_special_tokens=True)).strip() if learned else ""

    def turn(self, messages: tuple[dict[str, Any], ...]) -> list[int]:
        """The tokens of a conversation in the chat template, up to where the model is to answer, after the system
        message of all if it has none."""
        if not self.tokenizer.chat_template:
            raise DataError(
                f"The tokenizer of {self.tokenizer.name_or_path} has no chat template; use the template plain, or the "
                f"model's instruct variant."
            )
        asked = with_system(Example("the conversation", messages), self.system)
        return self.encode(self._chat.question(asked.messages, asked.where))

    def encode(self, text: str) -> list[int]:
        """The tokens of a text inside a row, without begin and end tokens."""
        return _tokens(self.tokenizer, text, add_special_tokens=False)

    def ends(self) -> list[int]:
        """The tokens that end an answer: the end token, and what the chat template closes an answer with."""
        return list(self._ends)

    @cached_property
    def _ends(self) -> tuple[int, ...]:
        ends = self._end()
        if self.tokenizer.chat_template and self.kind == "causal":
            talk = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
            with suppress(DataError):  # a template need not take this conversation
                ids = replace(self, learn="answer", system=None).one(Example("the chat template", messages=talk)).ids
                ends += [ids[-1]] if ids and ids[-1] in self.tokenizer.all_special_ids else []
        return tuple(dict.fromkeys(ends))

    def _fitted(self, example: Example, whole: Tokens, report: Report) -> list[Tokens]:
        """A row as it is where it is short enough, else what ``long_rows`` makes of it; the report counts what is
        lost."""
        fits = max(len(whole.ids), 0 if self.classes else len(whole.labels)) <= self.max_length
        rows = [whole] if fits else self._shortened(example, whole, report)
        kept = [row for row in rows if row.learned]
        if not kept and (fits or rows):
            report.left_out.append(example.where)
        report.tokens += whole.size
        report.lost += whole.size - sum(row.size for row in kept)
        report.learned += sum(row.learned for row in kept)
        return kept

    def _shortened(self, example: Example, whole: Tokens, report: Report) -> list[Tokens]:
        ids, labels, limit, how = whole.ids, whole.labels, self.max_length, self.long_rows
        is_text = self.kind == "causal" and example.prompt is None and not example.messages
        if how == "split" and not is_text:
            raise DataError(
                f"{example.where} is longer than max_length = {limit} tokens and no plain text, so it has no pieces to "
                f"be learned one by one; choose another way for long_rows: cut, cut-front or drop."
            )
        if how == "drop":
            report.dropped.append(example.where)
            return []
        if is_text and how in ("auto", "split"):
            pieces = in_pieces(ids, labels, limit)
            rows = [Tokens(piece, [IGNORE, *learned[1:]], whole.where) for piece, learned in pieces]
            report.divided.append(example.where)
            report.pieces += len(rows)
            return rows
        if how == "cut-front":
            opening = int(bool(ids) and ids[0] in self.tokenizer.all_special_ids)
            ids = cut_at_the_front(ids, limit, opening)
            causal = self.kind == "causal"
            labels = [IGNORE, *cut_at_the_front(labels, limit, opening)[1:]] if causal else labels
        else:
            ids = cut_at_the_end(ids, limit, int(self.kind != "causal"))  # an encoder's input keeps its closing token
        labels = labels if self.classes else labels[:limit]
        made = Tokens(ids, labels, whole.where)
        if made.learned:
            report.cut.append(example.where)
        return [made]

    def _rows(self, example: Example, report: Report) -> list[Tokens]:
        """The rows that an example is learned in, at full length."""
        if self.classes:
            return [self._classified(example)]
        if self.seq2seq:
            return self._sources_and_targets(example)
        rows = []
        for pieces in self._pieces(example, report):
            ids: list[int] = []
            labels: list[int] = []
            for piece, learned in pieces:
                ids += piece
                labels += piece if learned or self.learn == "all" else [IGNORE] * len(piece)
            # Nothing stands before the first token that it could be predicted from.
            rows.append(Tokens(ids, [IGNORE, *labels[1:]], example.where))
        return rows

    def _pieces(self, example: Example, report: Report) -> list[list[tuple[list[int], bool]]]:
        """The rows of an example, each as (tokens, whether they are an answer) in order."""
        if example.messages or (self.template == "chat" and example.prompt is not None):
            rendered = self._chat.render(self._talk(example), everything=self.learn == "all")
            report.saw(example.where, rendered)
            rows = []
            for pieces in rendered.rows:
                texts, learned = zip(*pieces, strict=True) if pieces else ((), ())
                rows.append(list(zip(self._turns.encode(texts), learned, strict=True)))
            return rows
        texts = (example.answer,) if example.prompt is None else (example.prompt, example.answer)
        self._look_for_markers(example.where, "".join(texts), report)
        *prompt, answer = self._turns.encode(texts)
        opening = [] if self._opens((*prompt, answer)[0]) else self._opening
        ended = not (example.answer or example.prompt is None) or self._is_ended("".join(texts))
        given = [*opening, *(prompt[0] if prompt else [])]
        return [[(given, False), ([*answer, *([] if ended else self._end())], True)]]

    def _talk(self, example: Example) -> Example:
        """A conversation of which the answers to be learned are left; of a prompted text, one of a question."""
        if not example.messages and example.prompt is not None:
            asked = {"role": "user", "content": example.prompt.strip()}
            turn = (asked, {"role": "assistant", "content": example.answer.strip()})
            return with_system(replace(example, messages=turn), self.system)
        example = with_system(example, self.system)
        answers = example.answers()
        return replace(example, given=answers[-1]) if self.learn == "last" and answers else example

    @cached_property
    def _chat(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer, self.arguments, self.fold_turns)

    def _opens(self, ids: list[int]) -> bool:
        """Whether a text's tokens bring what the tokenizer puts before a text."""
        return bool(self._opening) and ids[: len(self._opening)] == self._opening

    def _is_ended(self, text: str) -> bool:
        """Whether a text brings its end token."""
        return text.rstrip().endswith(self._end_texts)

    @cached_property
    def _end_texts(self) -> tuple[str, ...]:
        return tuple(str(self.tokenizer.convert_ids_to_tokens(token)) for token in self.ends())

    def _look_for_markers(self, where: str, text: str, report: Report) -> None:
        if self._markers and (markers := self._markers.findall(text)):
            report.marked.append(where)
            report.markers |= dict.fromkeys(markers)

    @cached_property
    def _markers(self) -> re.Pattern[str] | None:
        """The special tokens, as text, except those that stand for unknown words."""
        added = getattr(self.tokenizer, "added_tokens_decoder", {}).values()
        tokens = {*self.tokenizer.all_special_tokens, *(str(token) for token in added if token.special)}
        tokens -= {self.tokenizer.unk_token}
        return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))) if tokens else None

    @cached_property
    def _turns(self) -> Turns:
        return Turns(self.tokenizer, partial(_encoded, self.tokenizer, add_special_tokens=False))

    @cached_property
    def _opening(self) -> list[int]:
        """What this tokenizer puts before a text: a begin token, or nothing."""
        inner, whole = self.encode("a"), self.tokenizer("a").input_ids
        return next((whole[:i] for i in range(len(whole)) if whole[i : i + len(inner)] == inner), [])

    def _end(self) -> list[int]:
        end = self.tokenizer.eos_token_id
        return [] if end is None else [end]

    def _sources_and_targets(self, example: Example) -> list[Tokens]:
        """What an encoder reads and a decoder writes: of a conversation, a row for each answer."""
        if not example.messages:
            return [Tokens(self._source(example), self._target(example.answer.strip()), example.where)]
        example = with_system(example, self.system)
        numbers = example.answers()[-1 if self.learn == "last" else 0 :]
        parts = [replace(example, messages=example.messages[: number + 1], given=number) for number in numbers]
        return [Tokens(self._source(part), self._target(part.last_answer()), part.where) for part in parts]

    def _source(self, example: Example) -> list[int]:
        if example.messages:
            example = with_system(example, self.system)
            before = example.asked()
            roles = sum(message["role"] != "system" for message in before) > 1  # else who speaks is clear
            prompt = "\n".join(f"{m['role']}: {said_in(m)}" if roles else said_in(m) for m in before)
        elif example.prompt is None:
            raise DataError(
                f"{example.where} is plain text; an encoder-decoder model learns from a prompt and an answer."
            )
        else:
            prompt = example.prompt
        ids = _tokens(self.tokenizer, prompt)
        twice = len(ids) > 1 and ids[-1] == ids[-2] and ids[-1] in self._end()  # the text brings one
        return ids[:-1] if twice else ids

    def _target(self, answer: str) -> list[int]:
        return [*self.encode(answer), *([] if self._is_ended(answer) else self._end())] if answer else []

    def _classified(self, example: Example) -> Tokens:
        if example.prompt is None:
            raise DataError(f"{example.where} has no label; a classifier needs text and label (or prompt, completion).")
        target = target_of(example, self.problem, self.classes)
        return Tokens(_tokens(self.tokenizer, example.prompt.strip()), target, example.where)


def _tokens(tokenizer: Any, text: str, **how: bool) -> list[int]:
    """The tokens of a text."""
    ids: list[int] = _encoded(tokenizer, text, **how).input_ids
    return ids


def _encoded(tokenizer: Any, text: str, **how: bool) -> BatchEncoding:
    """A text as its tokenizer encodes it.

    Raises DataError for one with half of a surrogate pair, which no encoding has.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"A text has {text[error.start]!r} as its character {error.start + 1}, half of a surrogate pair, which is "
            f"no character: the text was cut or decoded wrongly. It begins {shown(text[:60])}."
        ) from None
    encoded: BatchEncoding = tokenizer(text, **how)
    return encoded


def longest_row(wanted: int, config: Any) -> int:
    """Tokens of a row at most: ``wanted``, or the positions that the model of this config has, if these are fewer."""
    positions = getattr(text_config_of(config), "max_position_embeddings", None)
    return min(wanted, positions) if isinstance(positions, int) and positions > 0 else wanted
