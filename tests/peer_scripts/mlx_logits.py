"""mlx_logits.py MODEL ADAPTER TOKENS: logits of mlx-lm, after each of the tokens (a JSON list), on its CPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mlx.core as mx
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model

mx.set_default_device(mx.cpu)
folder, adapter, tokens = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
model, _ = load_model(Path(folder))
if adapter != "none":
    model = load_adapters(model, adapter)
logits = model(mx.array([tokens]))[0].astype(mx.float32)
print(json.dumps(logits.tolist()))
