"""What a model says: greedy or sampled continuations, several prompts at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from veneer.data.formats import Example, class_of
from veneer.data.labels import Renderer
from veneer.errors import DataError
from veneer.generation.decoder import Decoder, Unsupported


def generate(
    model: Any, tokenizer: Any, prompts: list[str], *, max_new_tokens: int = 64, temperature: float = 0.0, seed: int = 0
) -> list[str]:
    """What a causal language model says after each of ``prompts``, without special tokens; several at once.

    ``temperature``: 0 is greedy; else tokens are sampled, the same ones for the same seed. Models of Llama's kind
    generate by the C++ kernels, with their adapters, over fp32 and 4-bit bases, and inside `int8_activations` faster
    still; all others by transformers. Raises DataError for a prompt that is empty or fills the model's positions.
    """
    renderer = Renderer(tokenizer)
    ids = [renderer.encode(prompt) for prompt in prompts]
    return continuations(
        model, renderer, ids, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
    )  # fmt: skip


@torch.no_grad()
def continuations(
    model: Any,
    renderer: Renderer,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    on_text: Callable[[str], None] | None = None,
) -> list[str]:
    """The text after each prompt (token ids), without special tokens.

    ``temperature``: 0 is greedy; else tokens are sampled, the same ones for the same seed. ``on_text`` is told each
    new piece as it comes, for a single prompt. Raises DataError for a prompt that is empty or fills the model's
    positions.
    """
    tokenizer = renderer.tokenizer
    if not all(prompts):
        raise DataError("A prompt is empty: there is nothing to go on from.")
    width = max(len(prompt) for prompt in prompts)
    start = 0 if renderer.seq2seq else width
    positions = getattr(model.config, "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        if width > positions or start == positions:
            raise DataError(
                f"A prompt has {width} tokens, but the model positions for {positions}: nothing can follow."
            )
        max_new_tokens = min(max_new_tokens, positions - start)
    known = getattr(model.generation_config, "eos_token_id", None)
    ends = {*renderer.ends(), *(known if isinstance(known, list) else [] if known is None else [known])}
    told = Told(tokenizer, on_text) if on_text is not None else None
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            decoder = Decoder(model, len(prompts), width + max_new_tokens)
        except Unsupported:
            out = _by_transformers(model, renderer, prompts, ends, max_new_tokens, temperature, told)
        else:
            out = _by_decoder(decoder, prompts, ends, max_new_tokens, temperature, told)
    if told is not None:
        told.end()
    texts: list[str] = tokenizer.batch_decode(out, skip_special_tokens=True)
    return texts


def _by_decoder(
    decoder: Decoder, prompts: list[list[int]], ends: set[int], max_new_tokens: int, temperature: float,
    told: Told | None,
) -> list[list[int]]:  # fmt: skip
    """The tokens after each prompt; a sequence that has ended takes no more steps."""
    out: list[list[int]] = [[] for _ in prompts]
    alive, logits = list(range(len(prompts))), decoder.read(prompts)
    while alive:
        if temperature > 0:
            tokens = torch.multinomial((logits / temperature).softmax(-1), 1)[:, 0].tolist()
        else:
            tokens = logits.argmax(-1).tolist()
        for sequence, token in zip(alive, tokens, strict=True):
            out[sequence].append(token)
        if told is not None:
            told.put(torch.tensor(tokens))
        alive = [i for i in alive if out[i][-1] not in ends and len(out[i]) < max_new_tokens]
        if alive:
            logits = decoder.step([out[i][-1] for i in alive], alive)
    return out


def _by_transformers(
    model: Any, renderer: Renderer, prompts: list[list[int]], ends: set[int], max_new_tokens: int, temperature: float,
    told: Told | None,
) -> Any:  # fmt: skip
    """The same of any other model."""
    width = max(map(len, prompts))
    # Padding at the left: every row goes on from its own last token.
    ids = torch.tensor([[renderer.pad] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    how = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=temperature > 0, temperature=temperature or None, top_k=None,
        eos_token_id=sorted(ends) or None, pad_token_id=renderer.pad, bos_token_id=renderer.tokenizer.bos_token_id,
        decoder_start_token_id=getattr(model.config, "decoder_start_token_id", None),
    )  # fmt: skip
    streamer = _Streamer(told) if told is not None else None
    out = model.generate(input_ids=ids, attention_mask=mask, generation_config=how, streamer=streamer)
    return out[:, 0 if renderer.seq2seq else width :]


def exact_matches(model: Any, renderer: Renderer, examples: list[Example], batch_size: int) -> list[bool]:
    """Whether the greedy continuation of each prompt is its answer, but for space around it."""
    found = [False] * len(examples)
    prompts = [renderer.prompt(example) for example in examples]
    answers = [answer_of(example) for example in examples]
    order = sorted(range(len(examples)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        longest = max(len(renderer.encode(answers[i])) for i in part)
        # Two tokens more than the longest answer show that a continuation does not end where it should.
        room = max(1, renderer.max_length - longest - 2)  # of a prompt longer than that, its end is kept
        said = continuations(model, renderer, [prompts[i][-room:] for i in part], max_new_tokens=longest + 2)
        for i, text in zip(part, said, strict=True):
            found[i] = text.strip() == answers[i]
    return found


def answer_of(example: Example) -> str:
    """The right answer: the last message of a conversation, or the completion."""
    if example.messages:
        return str(example.messages[-1]["content"]).strip()
    return class_of(example)


class Told:
    """Tells new text as tokens come; a character of several tokens is told when it is whole."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        self._tokenizer, self._on_text = tokenizer, on_text
        self._ids: list[int] = []
        self._told = ""

    def put(self, tokens: torch.Tensor) -> None:
        self._ids += tokens.flatten().tolist()
        self._tell(self._tokenizer.decode(self._ids, skip_special_tokens=True))

    def end(self) -> None:
        self._tell(self._tokenizer.decode(self._ids, skip_special_tokens=True), whole=True)

    def _tell(self, text: str, whole: bool = False) -> None:
        if whole or not text.endswith("\ufffd"):
            self._on_text(text[len(self._told) :])
            self._told = text


class _Streamer(BaseStreamer):  # type: ignore[misc]
    """What transformers gives: the prompt first, which is not told, and then tokens."""

    def __init__(self, told: Told) -> None:
        self._told, self._prompt = told, True

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt:
            self._told.put(value)
        self._prompt = False

    def end(self) -> None:
        pass
