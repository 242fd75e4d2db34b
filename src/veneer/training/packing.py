"""Rows back to back in one sequence: no token is padding, and attention stays within a row.

The attention is registered with transformers under a name of its own; the rows' lengths reach it as one of the model's
keyword arguments, so that a checkpointed layer finds them again when it is computed a second time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from veneer.data.labels import IGNORE, Tokens
from veneer.frozen.text_part import text_part
from veneer.training.recipes import recipes_of

_NAME = "veneer_rows"
_PADDED = "sdpa"  # torch's, of a model that packs
_ROUNDING = 0.05  # share of a vector in 16 bits
# What models pass to their attention that this one honours, or that changes nothing in it.
_KNOWN = {"scaling", "dropout", "is_causal", "sliding_window", "row_lengths", "recipes", "position_ids", "use_cache",
          "output_attentions", "output_hidden_states", "cache_position", "return_dict"}  # fmt: skip


def hidden_of_rows(model: Any, rows: list[Tokens]) -> tuple[Tensor, Tensor]:
    """Last hidden states (n, dim) before each learned token of ``rows``, and these tokens (n,).

    Within `attention_by_rows_in`.
    """
    lengths = tuple(len(row.ids) for row in rows)
    device = model.device
    ids = torch.tensor([token for row in rows for token in row.ids], device=device)
    positions = torch.cat([torch.arange(length, device=device) for length in lengths])
    # The token that stands after each: of a row's last one that is the next row's first, which nothing is learned from.
    after = [token for row in rows for token in (*row.labels[1:], IGNORE)]
    learned = [(place, token) for place, token in enumerate(after) if token != IGNORE]
    places, labels = torch.tensor(learned, dtype=torch.long, device=device).view(-1, 2).unbind(1)
    states: Tensor = text_part(model)(
        input_ids=ids[None], position_ids=positions[None], row_lengths=lengths, recipes=recipes_of(model),
        use_cache=False,
    ).last_hidden_state  # fmt: skip
    return states[0][places], labels


@contextmanager
def attention_by_rows_in(model: Any) -> Iterator[None]:
    """Inside, the layers of ``model`` attend within the rows whose lengths they are given, and only so."""
    body = text_part(model)
    before = body.config._attn_implementation
    if before == _NAME:
        yield
        return
    body.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        body.set_attn_implementation(before)


@contextmanager
def attention_by_mask_in(model: Any) -> Iterator[None]:
    """Inside, the layers of ``model`` attend to padded rows again, where they attend within rows alone."""
    body = text_part(model)
    if getattr(body.config, "_attn_implementation", None) != _NAME:
        yield
        return
    body.set_attn_implementation(_PADDED)
    try:
        yield
    finally:
        body.set_attn_implementation(_NAME)


@torch.no_grad()
def packs(model: Any, sample: Tokens) -> bool:
    """Whether ``model`` gives rows that stand back to back the hidden states that it gives each alone; tried once.

    False for a model whose attention is not the ordinary one, or that takes no positions.
    """
    if getattr(text_part(model).config, "_attn_implementation", None) != _PADDED:
        return False
    training = model.training
    model.eval()
    ids = (sample.ids * 6)[:6]
    parts = ids[:5], ids[1:4], ids[2:5], ids
    rows = [Tokens(part, [IGNORE, *part[1:]], "") for part in parts]
    try:
        with attention_by_rows_in(model):
            packed, _ = hidden_of_rows(model, rows)
        # Two passes show what four rows have alone: two are of one length, and one begins as another does.
        of_six = _states(model, [ids])[0, :-1]
        of_three = _states(model, [parts[1], parts[2]])[:, :-1]
        wanted = torch.cat([of_six[:4], *of_three, of_six])
        return packed.shape == wanted.shape and are_the_same(packed, wanted)
    except (
        AttributeError,
        TypeError,
        ValueError,
        RuntimeError,
        IndexError,
    ):  # it takes other arguments, or passes none on
        return False
    finally:
        model.train(training)


def are_the_same(made: Tensor, wanted: Tensor) -> bool:
    """Whether two passes gave the same vectors (…, dim), apart from rounding in their type."""
    if min(made.itemsize, wanted.itemsize) > 2:
        scale = float(wanted.abs().max())
        return torch.allclose(made, wanted, rtol=1e-3, atol=1e-3 * scale)
    # In 16 bits all layers' rounding makes a few hundredths of a vector; another row's tokens make half of it.
    apart = (made.float() - wanted.float()).norm(dim=-1)
    return bool((apart <= _ROUNDING * wanted.float().norm(dim=-1)).all())


def _states(model: Any, ids: list[list[int]]) -> Tensor:
    """Last hidden states (rows, length, dim) of rows of one length, by the model's own attention."""
    states: Tensor = text_part(model)(
        input_ids=torch.tensor(ids, device=model.device), use_cache=False
    ).last_hidden_state
    return states


def attention_by_rows(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Causal attention (1, tokens, heads, dim) of query, key and value (1, heads, tokens, dim), within rows alone.

    Raises TypeError for an option of a model's attention that is not known here, and when no lengths came.
    """
    others = sorted(name for name, value in options.items() if name not in _KNOWN and value is not None)
    if others or mask is not None or not getattr(module, "is_causal", True) or "row_lengths" not in options:
        raise TypeError(f"attention by rows knows no {others or 'mask'}")
    # Neighbours of one length are a batch.
    groups = [(length, len(list(same))) for length, same in groupby(options["row_lengths"])]
    sizes = [length * count for length, count in groups]
    outputs = []
    parts = (torch.split(x, sizes, 2) for x in (query, key, value))
    for (length, count), q, k, v in zip(groups, *parts, strict=True):
        window = options.get("sliding_window")
        narrow = _within(length, window, q.device) if window is not None and window < length else None
        y = F.scaled_dot_product_attention(
            _batch(q, count), _batch(k, count), _batch(v, count), attn_mask=narrow, is_causal=narrow is None,
            dropout_p=options.get("dropout") or 0.0, scale=options.get("scaling"),
            enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
        outputs.append(y.transpose(1, 2).reshape(1, length * count, q.shape[1], v.shape[-1]))
    if len(outputs) == 1:
        return outputs[0], None
    recipes = options.get("recipes")
    # Kept are the parts, by what made them.
    return _joined(*outputs) if recipes is None else recipes.made(_joined, *outputs), None


def _joined(*parts: Tensor) -> Tensor:
    return torch.cat(parts, 1)


def _batch(x: Tensor, count: int) -> Tensor:
    """(1, heads, count · length, dim) → (count, heads, length, dim), the same memory."""
    heads, tokens, dim = x.shape[1:]
    return x[0].view(heads, count, tokens // count, dim).transpose(0, 1)


def _within(length: int, window: int, device: torch.device) -> Tensor:
    """Which tokens (length, length) a token attends to: itself and the window − 1 before it."""
    place = torch.arange(length, device=device)
    distance = place[:, None] - place[None]
    return (distance >= 0) & (distance < window)


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """The lengths say it all."""


AttentionInterface.register(_NAME, attention_by_rows)
AttentionMaskInterface.register(_NAME, _no_mask)
