"""What a model says: greedy or sampled continuations, several prompts at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from veneer.data.formats import Example, class_of
from veneer.data.labels import Tokeniser
from veneer.errors import DataError


@torch.no_grad()
def generate(
    model: Any,
    tokeniser: Tokeniser,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    on_text: Callable[[str], None] | None = None,
) -> list[str]:
    """The text after each prompt (token ids), without special tokens.

    ``temperature``: 0 is greedy; else tokens are sampled, the same ones for the same seed. ``on_text`` is told each
    new piece as it comes, for a single prompt. Raises DataError for a prompt that fills the model's positions.
    """
    tokenizer = tokeniser.tokenizer
    width = max(len(prompt) for prompt in prompts)
    start = 0 if tokeniser.seq2seq else width
    positions = getattr(model.config, "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        if width > positions or start == positions:
            raise DataError(
                f"A prompt has {width} tokens, but the model positions for {positions}: nothing can follow."
            )
        max_new_tokens = min(max_new_tokens, positions - start)
    # Padding at the left: every row goes on from its own last token.
    ids = torch.tensor([[tokeniser.pad] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    known = getattr(model.generation_config, "eos_token_id", None)
    ends = {*tokeniser.ends(), *(known if isinstance(known, list) else [] if known is None else [known])}
    how = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=temperature > 0, temperature=temperature or None, top_k=None,
        eos_token_id=sorted(ends) or None, pad_token_id=tokeniser.pad, bos_token_id=tokenizer.bos_token_id,
        decoder_start_token_id=getattr(model.config, "decoder_start_token_id", None),
    )  # fmt: skip
    streamer = _Streamer(tokenizer, on_text) if on_text is not None else None
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        out = model.generate(input_ids=ids, attention_mask=mask, generation_config=how, streamer=streamer)
    texts: list[str] = tokenizer.batch_decode(out[:, start:], skip_special_tokens=True)
    return texts


def exact_matches(model: Any, tokeniser: Tokeniser, examples: list[Example], batch_size: int) -> list[bool]:
    """Whether the greedy continuation of each prompt is its answer, but for space around it."""
    found = [False] * len(examples)
    prompts = [tokeniser.prompt(example) for example in examples]
    answers = [answer_of(example) for example in examples]
    order = sorted(range(len(examples)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        longest = max(len(tokeniser.encode(answers[i])) for i in part)
        # Two tokens more than the longest answer show that a continuation does not end where it should.
        room = max(1, tokeniser.max_length - longest - 2)  # of a prompt longer than that, its end is kept
        said = generate(model, tokeniser, [prompts[i][-room:] for i in part], max_new_tokens=longest + 2)
        for i, text in zip(part, said, strict=True):
            found[i] = text.strip() == answers[i]
    return found


def answer_of(example: Example) -> str:
    """The right answer: the last message of a conversation, or the completion."""
    if example.messages:
        return str(example.messages[-1]["content"]).strip()
    return class_of(example)


class _Streamer(BaseStreamer):  # type: ignore[misc]
    """Tells new text as tokens come; a character of several tokens is told when it is whole."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        self._tokenizer, self._on_text = tokenizer, on_text
        self._ids: list[int] = []
        self._told, self._prompt = "", True

    def put(self, value: torch.Tensor) -> None:
        if self._prompt:
            self._prompt = False
            return
        self._ids += value.flatten().tolist()
        self._tell(self._tokenizer.decode(self._ids, skip_special_tokens=True))

    def end(self) -> None:
        self._tell(self._tokenizer.decode(self._ids, skip_special_tokens=True), whole=True)

    def _tell(self, text: str, whole: bool = False) -> None:
        if whole or not text.endswith("\ufffd"):
            self._on_text(text[len(self._told) :])
            self._told = text
