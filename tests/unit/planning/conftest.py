"""Models that several tests of the planner ask about."""

from __future__ import annotations

import pytest
import transformers as tf


@pytest.fixture
def looking_at_values(tmp_path) -> str:
    """A folder without weights, of a model whose passes ask a tensor for its values: it cannot be planned."""
    folder = tmp_path / "modernbert"
    config = tf.ModernBertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        architectures=["ModernBertForSequenceClassification"],
    )  # fmt: skip
    config.save_pretrained(folder)
    return str(folder)
