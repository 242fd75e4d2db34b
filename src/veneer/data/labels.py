"""Examples → tokens, and which of them are learned: the answer and the end token, not the prompt.

The prompt and the answer are tokenised apart, as they are when the model is used: it sees the prompt's tokens and
goes on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from veneer.data.dates import date_arguments
from veneer.data.formats import Example, class_of
from veneer.errors import DataError, did_you_mean, shown
from veneer.frozen.text_part import text_config_of

IGNORE = -100  # the label of a token that is not learned, in PyTorch's cross-entropy and everywhere else
Template = Literal["auto", "chat", "plain"]
Learn = Literal["answer", "all"]


@dataclass(frozen=True)
class Tokens:
    """One row as the model sees it. ``labels[i]`` is ``ids[i]`` where token i is learned, else -100.

    For an encoder-decoder ``ids`` is the encoder's input and ``labels`` the decoder's target; for a classifier
    ``labels`` is the number of the class.
    """

    ids: list[int]
    labels: list[int]
    where: str

    @property
    def learned(self) -> int:
        """Tokens (or classes) that this row is learned from. The first token has none before it to be learned from."""
        return sum(label != IGNORE for label in self.labels)


@dataclass
class Report:
    """What happened to rows on their way to tokens: nothing is left out or cut without being counted here."""

    rows: int = 0
    learned: int = 0
    cut: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def sentences(self, max_length: int) -> list[str]:
        """One sentence for each thing the user should know; none when all rows went through whole."""
        sentences = []
        if self.cut:
            sentences.append(f"{_rows(self.cut)} longer than max_length = {max_length} tokens: cut at the end.")
        if self.left_out:
            sentences.append(
                f"{_rows(self.left_out)} left out, because no token to learn remains within max_length = {max_length}."
            )
        return sentences


@dataclass(frozen=True)
class Renderer:
    """How examples become tokens: the tokenizer, the template, what is learned, and where long rows are cut."""

    tokenizer: Any
    template: Template = "auto"
    learn: Learn = "answer"
    max_length: int = 1024
    seq2seq: bool = False
    classes: tuple[str, ...] = ()  # of a classifier; else empty

    @property
    def kind(self) -> Literal["causal", "seq2seq", "classification"]:
        """What the rows teach the model."""
        return "classification" if self.classes else "seq2seq" if self.seq2seq else "causal"

    @property
    def pad(self) -> int:
        """The token that fills up short rows."""
        return self.tokenizer.pad_token_id or 0

    def all(self, examples: list[Example]) -> tuple[list[Tokens], Report]:
        """Tokens of every example that has something to learn, and what became of the others.

        Raises DataError when no example has.
        """
        report, kept = Report(rows=len(examples)), []
        for example in examples:
            tokens, cut = self._cut(self.one(example))
            if not tokens.learned:
                report.left_out.append(example.where)
                continue
            if cut:
                report.cut.append(example.where)
            report.learned += tokens.learned
            kept.append(tokens)
        if not kept:
            raise DataError(
                f"None of the {len(examples)} rows has a token to learn within max_length = {self.max_length}; the "
                f"first is {examples[0].where}. Is the answer empty, or the prompt longer than that?"
            )
        return kept, report

    def one(self, example: Example) -> Tokens:
        """Tokens of an example at full length."""
        if self.classes:
            return self._classified(example)
        if self.seq2seq:
            prompt, answer = self._source_and_target(example)
            return Tokens(prompt, answer, example.where)
        ids: list[int] = []
        labels: list[int] = []
        for piece, learned in self._pieces(example):
            ids += piece
            labels += piece if learned or self.learn == "all" else [IGNORE] * len(piece)
        # Nothing stands before the first token that it could be predicted from.
        return Tokens(ids, [IGNORE, *labels[1:]], example.where)

    def prompt(self, example: Example) -> list[int]:
        """The tokens before the last answer: what generation starts from. Raises DataError when there are none."""
        if self.seq2seq:
            return self._source_and_target(example)[0]
        pieces = list(self._pieces(example))
        last = max((i for i, (_, learned) in enumerate(pieces) if learned), default=len(pieces))
        ids = [token for piece, _ in pieces[:last] for token in piece]
        if not ids:
            raise DataError(
                f"{example.where} has an empty prompt, and the tokenizer puts nothing before it to go on from."
            )
        return ids

    def turn(self, messages: tuple[dict[str, Any], ...]) -> list[int]:
        """The tokens of a conversation in the chat template, up to where the model is to answer."""
        example = Example("the conversation", messages=messages)
        if not self.tokenizer.chat_template:
            raise DataError(
                f"The tokenizer of {self.tokenizer.name_or_path} has no chat template; use the template plain, or the "
                f"model's instruct variant."
            )
        return self.encode(_renderer(self.tokenizer, messages, example)(len(messages), True))

    def encode(self, text: str) -> list[int]:
        """The tokens of a text inside a row, without begin and end tokens."""
        return _tokens(self.tokenizer, text, add_special_tokens=False)

    def ends(self) -> list[int]:
        """The tokens that end an answer: the end token, and what the chat template closes an answer with."""
        ends = self._end()
        if self.tokenizer.chat_template:
            talk = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
            ids = self.one(Example("the chat template", messages=talk)).ids
            ends += [ids[-1]] if ids[-1] in self.tokenizer.all_special_ids else []
        return list(dict.fromkeys(ends))

    def _cut(self, tokens: Tokens) -> tuple[Tokens, bool]:
        ids, labels, limit = tokens.ids, tokens.labels, self.max_length
        if max(len(ids), len(labels)) <= limit:
            return tokens, False
        if (self.classes or self.seq2seq) and len(ids) > limit:
            ids = [*ids[: limit - 1], ids[-1]]  # an encoder's input keeps its closing token
        return Tokens(ids[:limit], labels[:limit], tokens.where), True

    def _pieces(self, example: Example) -> Iterator[tuple[list[int], bool]]:
        """(tokens, whether they are an answer) in order."""
        messages = example.messages or self._as_messages(example)
        if messages:
            texts, learned = zip(*_rendered(self.tokenizer, messages, example), strict=True)
            yield from zip(self._encode_in_turn(texts), learned, strict=True)
            return
        if example.prompt is None:
            yield self._opening, False
            yield [*self.encode(example.answer), *self._end()], True
            return
        prompt, answer = self._encode_in_turn((example.prompt, example.answer))
        yield [*self._opening, *prompt], False
        yield [*answer, *(self._end() if example.answer else [])], True

    def _encode_in_turn(self, texts: tuple[str, ...]) -> list[list[int]]:
        """The tokens of texts that follow one another, those of each text apart.

        Some tokenizers (Llama 2's) put a space before all that they are given, so a later text's tokens are what it
        adds to those of the texts before it. Only where that would change these, a token across the border, are
        they the text's own.
        """
        pieces: list[list[int]] = []
        done: list[int] = []
        for number, text in enumerate(texts, start=1):
            ids = self.encode("".join(texts[:number]))
            pieces.append(ids[len(done) :] if ids[: len(done)] == done else self.encode(text))
            done += pieces[-1]
        return pieces

    def _as_messages(self, example: Example) -> tuple[dict[str, Any], ...]:
        """A prompted text as a conversation, when the chat template is asked for."""
        if self.template != "chat" or example.prompt is None:
            return ()
        asked = {"role": "user", "content": example.prompt.strip()}
        return asked, {"role": "assistant", "content": example.answer.strip()}

    @cached_property
    def _opening(self) -> list[int]:
        """What this tokenizer puts before a text: a begin token, or nothing."""
        inner, whole = self.encode("a"), self.tokenizer("a").input_ids
        return next((whole[:i] for i in range(len(whole)) if whole[i : i + len(inner)] == inner), [])

    def _end(self) -> list[int]:
        end = self.tokenizer.eos_token_id
        return [] if end is None else [end]

    def _source_and_target(self, example: Example) -> tuple[list[int], list[int]]:
        if example.messages:
            prompt = "\n".join(message["content"] for message in example.messages[:-1])
            answer = example.messages[-1]["content"]
        elif example.prompt is None:
            raise DataError(
                f"{example.where} is plain text; an encoder-decoder model learns from a prompt and an answer."
            )
        else:
            prompt, answer = example.prompt, example.answer.strip()
        return _tokens(self.tokenizer, prompt), [*self.encode(answer), *self._end()] if answer else []

    def _classified(self, example: Example) -> Tokens:
        if example.prompt is None:
            raise DataError(f"{example.where} has no label; a classifier needs text and label (or prompt, completion).")
        name = class_of(example)
        if name not in self.classes:
            raise DataError(
                f"{example.where} has the label {name!r}, which is not one of the model's: {', '.join(self.classes)}."
                f"{did_you_mean(name, self.classes)}"
            )
        return Tokens(_tokens(self.tokenizer, example.prompt.strip()), [self.classes.index(name)], example.where)


def _tokens(tokenizer: Any, text: str, **how: bool) -> list[int]:
    """The tokens of a text. Raises DataError for one with half of a surrogate pair, which no encoding has."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"A text has {text[error.start]!r} as its character {error.start + 1}, half of a surrogate pair, which is "
            f"no character: the text was cut or decoded wrongly. It begins {shown(text[:60])}."
        ) from None
    ids: list[int] = tokenizer(text, **how).input_ids
    return ids


def _rendered(tokenizer: Any, messages: tuple[dict[str, Any], ...], example: Example) -> Iterator[tuple[str, bool]]:
    """The conversation in the model's chat template, cut where an assistant's answer begins and ends.

    A template renders a whole conversation. The answers can be located only if the text of the first messages begins
    the text of all of them; that is checked.
    """
    if not tokenizer.chat_template:
        raise DataError(_no_template(tokenizer, example))
    render = _renderer(tokenizer, messages, example)
    done = ""
    for number, message in enumerate(messages):
        if message["role"] != "assistant" or number < example.given:
            continue
        before, after = render(number, True), render(number + 1, False)
        if not (before.startswith(done) and after.startswith(before)):
            raise DataError(
                f"{example.where}: the chat template of {tokenizer.name_or_path} changes the text before message "
                f"{number + 1} once others follow, so the learned part cannot be located; split the conversation."
            )
        answer, rest = _through_end_token(after[len(before) :], tokenizer)
        if message["content"]:
            yield before[len(done) :], False
            yield answer, True
            done = after[: len(after) - len(rest)]
    whole = render(len(messages), False)
    if whole.startswith(done) and whole[len(done) :].strip():
        yield whole[len(done) :], False


def _no_template(tokenizer: Any, example: Example) -> str:
    return (
        f"{example.where} is a conversation, but the tokenizer of {tokenizer.name_or_path} has no chat template; use "
        f"prompt and completion columns, or the model's instruct variant."
    )


def _renderer(tokenizer: Any, messages: tuple[dict[str, Any], ...], example: Example) -> Callable[[int, bool], str]:
    def render(count: int, ask: bool) -> str:
        first, date = list(messages[:count]), date_arguments(tokenizer)
        try:
            text: str = tokenizer.apply_chat_template(first, tokenize=False, add_generation_prompt=ask, **date)
        except Exception as error:  # a template is a program of the model's, which may raise anything
            raise DataError(f"{example.where}: the chat template refuses this conversation: {error}") from None
        return text

    return render


def _through_end_token(text: str, tokenizer: Any) -> tuple[str, str]:
    """An answer through its end token, and what the template writes after it; an end token is added if it has none."""
    ends = [token for token in tokenizer.all_special_tokens if token in text]
    if not ends:
        return text + (tokenizer.eos_token or ""), ""
    stop = max(text.rindex(token) + len(token) for token in ends)
    return text[:stop], text[stop:]


def _rows(where: list[str]) -> str:
    shown = ", ".join(where[:3]) + (", …" if len(where) > 3 else "")
    return f"{len(where)} row{'s' if len(where) > 1 else ''} ({shown})"


def longest_row(wanted: int, config: Any) -> int:
    """Tokens of a row at most: ``wanted``, or the positions that the model of this config has, if these are fewer."""
    positions = getattr(text_config_of(config), "max_position_embeddings", None)
    return min(wanted, positions) if isinstance(positions, int) and positions > 0 else wanted
