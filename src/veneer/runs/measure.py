"""Run as a program: measure the machine by training a small model of Llama's kind; print what a `Machine` is made of.

The runtime: what a run on rows of many lengths took beyond what is predicted for its tensors, which is the memory of
Python, torch, transformers, the tokenizer, the kernels and the plan itself; and what loading it took. The rates: each
kind of operation's work over its time in steps over a base in 4 bits, where the operations wait for memory and for one
another as they do in any step; and in steps over 16 bits, too, where products in 16 bits are faster than in 32.
"""

from __future__ import annotations

import io
import itertools
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.threads import settle

if TYPE_CHECKING:
    from veneer.training.callbacks import EvaluationRecord, StepRecord

_SIZES = {
    "vocab_size": 2**15, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4,
    "num_attention_heads": 8, "tie_word_embeddings": True,
}  # fmt: skip
_TOKENS, _ROWS = 512, 2  # of a row, and of a step
_DATA = "rows.jsonl"
_LENGTHS = 24  # steps of a run on rows of other lengths
_STEPS = 10  # of each kind that are timed, in as far as there is time for them
_FEWEST = 2
_SECONDS, _OF_THE_RUN = 45.0, 20.0  # for all of it, and for what comes before the rates
_SURE = 6  # steps of the run, among which one is of the longest rows
_LARGE = 2**18  # bytes from which on an operation's work is what takes its time


def main() -> None:
    """``PLACE``: an empty folder to work in. After a part of the time the runtime is printed, without rates, in case
    that the whole takes too long; the last line printed counts."""
    settle()
    from veneer.kernels.heap import own_heap

    own_heap()
    place, started = Path(sys.argv[1]), time.monotonic()
    if sys.argv[2:]:
        print(_beyond(place))
        return
    _save(place)
    # In another process: a process has one peak of its memory, and making a model takes some, too.
    command = [sys.executable, "-m", __spec__.name, str(place), "loading"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        runtime = _beyond(place, started + _OF_THE_RUN)
        loading = int(other.communicate()[0])
    known = {"runtime": runtime, "loading": loading}
    print(json.dumps({"rates": {}, "operation": 0.0, **known}), flush=True)
    rates, operation = _rates(started + _SECONDS)
    print(json.dumps({"rates": rates, "operation": operation, **known}))


class _Enough(Exception):
    """The run has taken its time."""


class _UntilTimeIsUp:
    """Ends a run, once it has taken the steps that it must, when the clock (`time.monotonic`) passes ``until``."""

    def __init__(self, until: float) -> None:
        self._until = until

    def on_step(self, record: StepRecord) -> None:
        if record.step >= _SURE and time.monotonic() > self._until:
            raise _Enough

    def on_evaluation(self, record: EvaluationRecord) -> None:
        pass


def _beyond(place: Path, until: float | None = None) -> int:
    """Bytes that a run takes beyond what is predicted for it, ended early when its time is up; without ``until`` those
    that loading its model takes, in another type than the file's, so that the whole file is read."""
    from rich.console import Console

    from veneer.device import CPU, peak_memory
    from veneer.runs.prepare import prepare
    from veneer.runs.train import train
    from veneer.training.config import TrainConfig

    trained = until is not None
    options: dict[str, Any] = {
        "model": str(place / "model"), "storage": "fp32" if trained else "bf16", "batch_size": _ROWS,
        "max_length": _TOKENS, "steps": _LENGTHS, "compute": "fp32",
    }  # fmt: skip
    more: dict[str, Any] = {
        "data": str(place / _DATA), "output": str(place / "run"), "held_out": 0, "check_memory": False,
    }  # fmt: skip
    if until is not None:
        with suppress(_Enough):
            train(**options, **more, console=Console(file=io.StringIO()), callbacks=[_UntilTimeIsUp(until)])
    else:
        prepare(TrainConfig(**options, **more))
    peak = peak_memory(CPU)  # before what plans needs memory, too

    from veneer.planning.config import PlanOptions
    from veneer.planning.machine import Machine
    from veneer.planning.plan import plan

    predicted = plan(PlanOptions(**options), Machine({}, 0.0, 0, 0))
    return peak - (predicted.training if trained else predicted.loading)


def _save(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from veneer.planning.plan import WORDS

    draw, known = random.Random(1), words(_SIZES["vocab_size"])
    texts = (" ".join(draw.choices(known[1:], k=length - 1)) for length in _lengths())  # an end comes behind them
    Path(folder, _DATA).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    LlamaForCausalLM(LlamaConfig(**_SIZES)).save_pretrained(folder / "model")
    tokenizer_of(words(WORDS)).save_pretrained(folder / "model")  # what it takes depends on their number


def _lengths() -> list[int]:
    """Tokens of each row."""
    draw = random.Random(0)
    return [_TOKENS] * 2 * _ROWS + [draw.randrange(8, _TOKENS) for _ in range((_LENGTHS - 2) * _ROWS)]


def words(count: int) -> list[str]:
    """The first ``count`` words of a vocabulary: 256 characters and all pairs of them, which a tokenizer merges."""
    characters = [chr(0x4E00 + number) for number in range(256)]
    pairs = map("".join, itertools.product(characters, repeat=2))
    return [*characters, *itertools.islice(pairs, count - len(characters))]


def tokenizer_of(known: list[str]) -> Any:
    """A tokenizer in transformers' form that merges as many words as a real one; the first is the end of a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(known)}
    merges = [(word[0], word[1]) for word in known if len(word) == 2]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=known[0], pad_token=known[0])


def _rates(until: float) -> tuple[dict[str, float], float]:
    """Kind → rate, and the seconds that an operation takes beside its work; of fewer steps where the clock
    (`time.monotonic`) would pass ``until``."""
    from veneer.frozen.compute import has_bf16
    from veneer.planning.ledger import SHORT

    short = has_bf16()
    step, watches, beside = _sample("nf4"), [], []
    for _ in _while_there_is_time(until - (until - time.monotonic()) * short / 3):
        started = time.perf_counter()
        step(nullcontext())
        plain = time.perf_counter() - started
        watches.append(_watched(step))
        beside.append(plain - sum(watches[-1].seconds.values()))
    rates = _rates_of(watches)
    if short:
        step = _sample("bf16")
        others = _rates_of([_watched(step) for _ in _while_there_is_time(until)])
        rates |= {kind: rate for kind, rate in others.items() if kind.endswith(SHORT)}
    return rates, max(0.0, statistics.median(beside)) / watches[0].count


def _while_there_is_time(until: float) -> Iterator[int]:
    for number in range(_STEPS):
        if number >= _FEWEST and time.monotonic() > until:
            return
        yield number


def _watched(step: Callable[[Any], None]) -> Any:
    watch = _stopwatch()
    step(watch)
    return watch


def _rates_of(watches: Sequence[Any]) -> dict[str, float]:
    """Kind of operation → its rate in steps that do the same work."""
    work = watches[0].work
    return {kind: work[kind] / statistics.median(watch.seconds[kind] for watch in watches) for kind in work}


def _sample(storage: str) -> Callable[[Any], None]:
    """A step of the small model, forward and backward, within a context."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from veneer.data.labels import Tokens
    from veneer.frozen.config import CODE_BITS
    from veneer.frozen.layers import DTYPES, quantise_linear_layers
    from veneer.training.fused import fused_passes
    from veneer.training.loss import Loss
    from veneer.updates.attach import attach
    from veneer.updates.config import LoRA

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**_SIZES))
    if storage in CODE_BITS:
        quantise_linear_layers(model, storage=storage, block_size=64, double_quantisation=True)
    else:
        model.to(DTYPES[storage])
    attach(model, LoRA())
    model.train()
    rows = [Tokens(list(range(1, _TOKENS + 1)), list(range(1, _TOKENS + 1)), "")] * _ROWS
    loss = Loss(model, 0, rows[0], kind="causal")

    def step(watched: Any) -> None:
        model.zero_grad(set_to_none=True)
        with ExitStack() as stack:
            for context in (fused_passes(model), loss.attention(), watched):
                stack.enter_context(context)
            loss(rows).backward()  # type: ignore[no-untyped-call]
            torch.empty(2**20).bernoulli_(0.9)  # as dropout would draw

    return step


def _stopwatch() -> Any:
    from torch import Tensor
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    from veneer.planning.ledger import cost

    class Stopwatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
        """Adds up the work and the seconds of the operations within it, except small ones, and counts all."""

        def __init__(self) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self.work: dict[str, float] = {}
            self.seconds: dict[str, float] = {}
            self.count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            started = time.perf_counter()
            result = func(*args, **(kwargs or {}))
            taken = time.perf_counter() - started
            if not func.is_view:
                given, made = (
                    [leaf for leaf in tree_leaves(leaves) if isinstance(leaf, Tensor)]
                    for leaves in ((args, kwargs), result)
                )
                one = cost(func, given, made)
                self.count += 1
                if one.moved >= _LARGE:
                    self.work[one.kind] = self.work.get(one.kind, 0.0) + (one.flops or one.moved)
                    self.seconds[one.kind] = self.seconds.get(one.kind, 0.0) + taken
            return result

    return Stopwatch()


if __name__ == "__main__":
    main()
