"""The memory of a pass, by the model's sizes, and the passes that fit what is available."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from veneer.device import CPU, device_of, usable_memory
from veneer.errors import ModelError
from veneer.frozen.text_part import text_config_of
from veneer.host_memory import anonymous_memory
from veneer.units import amount

_SHARE = 0.7  # of the memory that is available: the sizes leave something out
_LOGITS = 12  # bytes that a formed logit takes, its logarithm included


@dataclass(frozen=True)
class Room:
    """How many tokens a pass may have: ``tokens``, or a single row's up to ``most``, beyond which memory is short."""

    tokens: int
    most: int
    sentence: str

    def refuse_longer(self, where: str, tokens: int) -> None:
        """Raises ModelError for a row of more tokens than fit."""
        if tokens > self.most:
            raise ModelError(
                f"{where} takes {tokens:,} tokens in a pass, and the available memory is enough for {self.most:,}; "
                f"lower max_length, or free memory."
            )


def room_for(model: Any, wanted: int, *, logits: float, kept: float = 0.0) -> Room:
    """Passes of ``wanted`` tokens, or of as many as fit the memory that is available.

    ``logits``: formed for each token of a pass; ``kept``: tokens of which keys and values are kept, for each token. A
    model whose sizes are not known by the usual names is given what was wanted.
    """
    config, device = text_config_of(model.config), device_of(model)
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads")
    known = [number for name in names if isinstance(number := getattr(config, name, None), int)]
    if len(known) < len(names):
        return Room(wanted, 2**62, f"Passes of up to {wanted:,} tokens.")
    hidden, layers, heads = known
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    dim = getattr(config, "head_dim", None) or hidden // heads
    # Hidden states, queries, keys, values and norms at a time, and a gated layer's three products.
    each = 4 * (12 * hidden + 3 * inner) + kept * 8 * layers * key_heads * dim + logits * _LOGITS
    available = max(0, usable_memory(device) - (anonymous_memory() if device.type == CPU else 0))
    most = int(_SHARE * available / each)
    tokens = max(1, min(wanted, most))
    less = f", fewer than {wanted:,} so that they fit" if tokens < wanted else ""
    return Room(
        tokens, most,
        f"Passes of up to {tokens:,} tokens, about {amount(round(tokens * each))} of {amount(available)} available"
        f"{less}.",
    )  # fmt: skip


def batched(order: list[int], widths: list[int], tokens: int, most: int) -> list[list[int]]:
    """The rows ``order``, from the longest to the shortest, in batches of at most so many tokens, padding counted, and
    of ``most`` rows; a longer row alone. A batch that is half full ends where rows become shorter: rows of one length
    need no padding, and no mask in attention.

    >>> batched([2, 0, 1], [4, 3, 9], 12, 16)
    [[2], [0, 1]]
    """
    batches: list[list[int]] = []
    for row in order:
        size = len(batches[-1]) if batches else 0
        width = widths[batches[-1][0]] if batches else 0
        alike = widths[row] == width or 2 * width * size < tokens
        if size and alike and size < most and width * (size + 1) <= tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches
