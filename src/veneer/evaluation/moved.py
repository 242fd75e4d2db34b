"""How far a model's logits move when its linear layers are kept in codes: what a merge into 4 bits costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.data.formats import Example
from veneer.data.labels import Renderer
from veneer.generation.labels import learned_logits, within_logits
from veneer.training.batches import Batch, by_length, collate


@dataclass(frozen=True)
class Moved:
    """Over the learned tokens of some rows (a classifier's: over the rows)."""

    rows: int
    tokens: int
    kl: float  # mean of KL(before ‖ after), nats
    agreement: float  # share of the tokens whose most likely prediction is the same

    def sentence(self, storage: str) -> str:
        return (
            f"On {self.rows:,} rows ({self.tokens:,} predictions) {storage} moves the merged model by a mean KL of "
            f"{self.kl:.4f} nats; the most likely prediction stays the same in {100 * self.agreement:.1f} %."
        )


@torch.no_grad()
def swap_and_measure(
    model: Any, layers: dict[str, nn.Module], renderer: Renderer, examples: Sequence[Example], batch_size: int = 8
) -> Moved:
    """Compare ``model`` with itself with ``layers`` in the places of its own of these names, where they stay.

    Both forms are in memory, but never two models: layers are put in and taken out again for each batch.
    """
    own = {name: model.get_submodule(name) for name in layers}
    rows, _ = renderer.all(examples)
    total_kl, same, tokens = 0.0, 0, 0
    model.eval()
    parts = by_length(rows, batch_size)
    if renderer.kind != "classification":
        parts = (some for part in parts for some in within_logits(part, model))
    for part in parts:
        batch = collate(part, renderer.pad, problem=renderer.problem if renderer.classes else None)
        before = _predictions(model, batch, renderer.kind)
        _put(model, layers)
        after = _predictions(model, batch, renderer.kind)
        _put(model, own)
        total_kl += float(F.kl_div(after, before, reduction="sum", log_target=True))
        same += int((before.argmax(-1) == after.argmax(-1)).sum())
        tokens += len(before)
    _put(model, layers)
    return Moved(len(rows), tokens, total_kl / tokens, same / tokens)


def _put(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    for name, layer in layers.items():
        model.set_submodule(name, layer)


def _predictions(model: Any, batch: Batch, kind: str) -> Tensor:
    """Log-probabilities (predictions, vocabulary) of what the rows teach, fp32."""
    if kind == "classification":
        logits = model(input_ids=batch.ids, attention_mask=batch.mask).logits
    else:
        logits, _ = learned_logits(model, batch, kind)
    return F.log_softmax(logits.float(), dim=-1)
