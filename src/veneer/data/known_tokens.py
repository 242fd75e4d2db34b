"""Token ids that a model has no embedding for: of another model's tokenizer, or added and never given a row."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from veneer.data.labels import Renderer
from veneer.data.token_rows import TokenRows, Tokens
from veneer.errors import ModelError


def known_pad(model: Any, renderer: Renderer) -> int:
    """The token that fills up short rows: the tokenizer's, or 0, masked as it is, where the model has no embedding for
    that one because it was added to the tokenizer alone. Raises ModelError for a classifier, which reads the class
    where the padding begins."""
    pad, rows = renderer.pad, model.get_input_embeddings().weight.shape[0]
    if pad < rows:
        return pad
    if renderer.classes:
        raise ModelError(
            f"The tokenizer's pad token is {pad}, but the model's embedding has {rows} rows: choose another pad token, "
            f"or call model.resize_token_embeddings(len(tokenizer))."
        )
    return 0


def refuse_unknown_tokens(model: Any, where: str, ids: Sequence[int]) -> None:
    """Raises ModelError when one of ``ids``, tokens of what is called ``where``, is beyond the input embedding."""
    rows, highest = model.get_input_embeddings().weight.shape[0], max(ids, default=0)
    if highest >= rows:
        raise ModelError(
            f"{where} holds token {highest}, but the model's embedding has {rows} rows: the tokenizer is another "
            f"model's, or lacks model.resize_token_embeddings(len(tokenizer))."
        )


def refuse_unknown_tokens_in(model: Any, rows: Iterable[Tokens]) -> None:
    """`refuse_unknown_tokens` of rows' inputs, by where the one with the highest token stands."""
    if isinstance(rows, TokenRows):
        row = rows.with_highest_token()
    else:
        row = max(rows, key=lambda row: max(row.ids, default=0), default=None)
    if row is not None:
        refuse_unknown_tokens(model, row.where, row.ids)
