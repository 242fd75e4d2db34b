"""Run as a program: train a model of no size to speak of and print the process's largest memory, in bytes.

It is what Python, torch, transformers, the tokenizer and the kernels take, whatever is trained.
"""

from __future__ import annotations

import io
import json
import tempfile
from pathlib import Path

from veneer.threads import settle

_SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def main() -> None:
    settle()
    from rich.console import Console
    from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

    from veneer.training.metrics import peak_memory
    from veneer.training.run import train

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        tokenizer = ByT5Tokenizer()
        LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **_SIZES)).save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        text = "A row of sixty-four letters, which are as many tokens, or nearly."
        (folder / "rows.jsonl").write_text((json.dumps({"text": text}) + "\n") * 8)
        train(
            str(folder / "model"), data=str(folder / "rows.jsonl"), output=str(folder / "run"), held_out=0, steps=2,
            console=Console(file=io.StringIO()),
        )  # fmt: skip
        print(peak_memory())


if __name__ == "__main__":
    main()
