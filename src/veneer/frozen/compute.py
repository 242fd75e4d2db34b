"""What a base kept in 16 bits is multiplied in on this machine: fp32, or bf16 where that was measured to be faster.

A CPU without bf16 instructions takes about nine times as long for a bf16 product as for an fp32 one. Which one this is
shows in a tenth of a second, once: the measurement is kept in the user's cache folder.
"""

from __future__ import annotations

import time
from functools import cache

import torch

from veneer.remembered import machine_key, recall, remember

_FASTER = 0.8  # share of fp32's time: for less gain, its 24 bits of precision are worth more than bf16's 8
_SHAPE = (256, 1024, 1024)  # tokens, in, out of the product that is measured
_RUNS = 8
_FILE = "bf16.json"


def compute_name() -> str:
    """The type for the products of bf16 and fp16 weights, forward and backward, on the CPU: fp32 or bf16."""
    return "bf16" if bf16_time() < _FASTER else "fp32"


def bf16_time() -> float:
    """Time of a product and its transposed in bf16, as a multiple of fp32's, on this CPU with torch's threads."""
    return _remembered(torch.get_num_threads())


def compute_line() -> str:
    """The choice and its reason, for a person."""
    return f"{compute_name()} (a bf16 product takes {bf16_time():.2g} × the time of an fp32 one)"


@cache
def _remembered(threads: int) -> float:
    """From the cache file, else measured and put there. A file that cannot be read or written is no error."""
    key = machine_key(torch.__version__, threads)
    if isinstance(ratio := recall(_FILE, key), float) and ratio > 0:
        return ratio
    measured = _measured()
    remember(_FILE, key, measured)
    return measured


def _measured() -> float:
    """The shortest time of a bf16 product over that of an fp32 one, taken in turn: a busy machine slows both."""
    tokens, columns, rows = _SHAPE
    # Not random: a measurement must leave a run's random state alone.
    fp32 = [torch.linspace(-1, 1, n * columns).view(n, columns) for n in (tokens, rows)]
    times: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    for _ in range(_RUNS + 1):  # the first one warms up
        for dtype, seconds in times.items():
            x, weight = (tensor.to(dtype) for tensor in fp32)
            started = time.perf_counter()
            torch.mm(torch.mm(x, weight.t()), weight)
            seconds.append(time.perf_counter() - started)
    return min(times[torch.bfloat16][1:]) / min(times[torch.float32][1:])
