"""What `veneer plan` says of Llama's sizes on a GPU, against steps taken there. It needs one: not in `make bench`.

    python benchmarks/gpu.py            every size and way that the GPU has room for
    python benchmarks/gpu.py 7B 65B     these sizes

Weights are random and made on the GPU, a tensor at a time; all else is what a run does: LoRA of rank 8 on all linear
layers, a row of 512 tokens, every layer recomputed, AdamW. Printed are the most that torch's tensors took at a time,
and what the GPU had in use in the end: with what torch's allocator keeps, and CUDA itself. Before that a small model in
nf4 takes a step on either, and both must come to the same.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from common import in_a_process, main_or_run

WAYS = ("LoRA, 16 bits", "QLoRA")
STEPS = 3
RESULT = Path(__file__).parent / "results" / "gpu.json"
_TOLERANCE = 1e-4  # of the loss and the gradients in fp32, relative; products are summed in another order


def main() -> None:
    from veneer.planning.sizes import SIZES, sizes

    if not torch.cuda.is_available():
        raise SystemExit("There is no GPU here.")
    torch.cuda.init()
    room = torch.cuda.get_device_properties(0).total_memory
    small = in_a_process(__file__, "--run", "small")
    print(f"A step over nf4: loss {small['loss']:.1e}, gradients {small['gradients']:.1e} from the CPU's")
    assert max(small.values()) < _TOLERANCE
    predicted, found = sizes().plans, {}
    print("Tensors, in use, predicted:")
    for size in sys.argv[1:] or SIZES:
        for way in WAYS:
            made = predicted[size][way]
            if made.training > room:
                continue
            took = in_a_process(__file__, "--run", size, way)
            found[f"{size}, {way}"] = took | {"foreseen": made.training}
            gigabytes = (f"{what / 1e9:6.2f} GB" for what in (took["tensors"], took["used"], made.training))
            print(f"{size:>4} {way:<14}", *gigabytes, f"{took['seconds']:.2f} s a step", flush=True)
            known = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "small": small, "runs": found}
            RESULT.write_text(json.dumps(known, indent=2) + "\n")


def _measure(size: str, way: str = "") -> dict[str, float]:
    return _small() if size == "small" else _large(size, way)


def _large(size: str, way: str) -> dict[str, float]:
    from veneer.data.labels import IGNORE, Tokens
    from veneer.planning.sizes import WAYS as ALL
    from veneer.planning.sizes import config_of

    model = _model(config_of(size), ALL[way].storage, ALL[way].dense, "cuda")
    ids = torch.randint(32000, (512,)).tolist()
    step = _step(model, [Tokens(ids, [IGNORE, *ids[1:]], "")])
    torch.cuda.reset_peak_memory_stats()
    losses, started = [], 0.0
    for number in range(STEPS):
        if number == STEPS - 1:
            torch.cuda.synchronize()
            started = time.perf_counter()
        losses.append(float(step()))
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    assert torch.tensor(losses).isfinite().all(), losses
    free, total = torch.cuda.mem_get_info()
    return {"tensors": torch.cuda.max_memory_allocated(), "used": total - free, "seconds": seconds}


def _small() -> dict[str, float]:
    """The largest relative difference of a step on the GPU from one on the CPU, over 4 bits."""
    from transformers import LlamaConfig

    from veneer.data.labels import Tokens

    config = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    rows = [Tokens(list(range(start, start + 40)), list(range(start, start + 40)), "") for start in (1, 60)]
    found = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = _model(config, "nf4", torch.float32, "cpu").to(device)
        loss = _step(model, rows, optimise=False)()
        grads = [parameter.grad.cpu() for parameter in model.parameters() if parameter.grad is not None]
        found.append((float(loss), torch.cat([grad.flatten() for grad in grads])))
    (one, grad), (other, again) = found
    return {"loss": abs(one - other) / one, "gradients": float((grad - again).norm() / grad.norm())}


def _model(config: Any, storage: str, dense: torch.dtype, device: str) -> Any:
    """Of random weights, made on the device, with LoRA of rank 8 on all linear layers."""
    from torch import nn
    from transformers import AutoModelForCausalLM

    from veneer.frozen.blockwise import NESTED_BLOCK, Quantised
    from veneer.frozen.layers import linear_layers
    from veneer.frozen.weight import QuantisedLinear
    from veneer.updates.attach import attach
    from veneer.updates.config import LoRA

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dense)
    for name in linear_layers(model) if storage == "nf4" else ():
        shape = tuple(model.get_submodule(name).weight.shape)
        blocks = -(-shape[0] * shape[1] // 64)
        quantised = Quantised(
            storage, 64, shape,
            torch.randint(256, (shape[0] * shape[1] // 2,), dtype=torch.uint8, device=device),
            torch.randint(256, (blocks,), dtype=torch.uint8, device=device),
            torch.full((-(-blocks // NESTED_BLOCK),), 0.005, device=device), torch.tensor(0.02, device=device),
        )  # fmt: skip
        model.set_submodule(name, QuantisedLinear(quantised, None, dense))
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            made = torch.empty_like(parameter, device=device)
            made = made.fill_(1) if parameter.dim() == 1 else made.normal_(0, 0.02)
            setattr(module, name, nn.Parameter(made, requires_grad=False))
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    attach(model, LoRA(rank=8))
    return model.train()


def _step(model: Any, rows: list[Any], optimise: bool = True) -> Any:
    from veneer.training.fused import fused_passes
    from veneer.training.loss import Loss
    from veneer.training.recompute import recomputed

    loss = Loss(model, 0, rows[0], kind="causal")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-4, fused=True) if optimise else None

    def step() -> torch.Tensor:
        with ExitStack() as stack:
            for context in (recomputed(model, None), fused_passes(model), loss.attention()):
                stack.enter_context(context)
            value = loss(rows) / sum(row.learned for row in rows)
            value.backward()  # type: ignore[no-untyped-call]
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return value.detach()

    return step


if __name__ == "__main__":
    main_or_run(main, _measure)
