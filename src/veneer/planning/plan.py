"""Will it fit, and how long will it take: the memory and the time of a run, from its model's config alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from veneer.data.labels import IGNORE, Tokens, longest_row
from veneer.data.pairs import Pair
from veneer.device import CPU, is_host, is_present, usable_memory
from veneer.errors import ConfigError
from veneer.frozen.blockwise import PANEL
from veneer.frozen.config import CODE_BITS
from veneer.frozen.layers import name_of_type
from veneer.frozen.text_part import text_config_of
from veneer.kernels import heap
from veneer.models.checkpoint import Checkpoint
from veneer.models.problems import problem_of
from veneer.notebook import html_table
from veneer.options import memory_size
from veneer.planning.config import PlanOptions
from veneer.planning.empty import Base, base_of
from veneer.planning.ledger import SHORT, Stretch
from veneer.planning.machine import Machine
from veneer.planning.step import Step, Weights, trace_step
from veneer.training.config import TrainConfig
from veneer.training.eight_bit import state_bytes
from veneer.training.loss import How, tokens_gone_through
from veneer.training.preference import preference_of
from veneer.units import amount, duration
from veneer.updates.config import LoRA

# The share of the activations that glibc's heap held beyond the blocks: 0.28 to 0.55 in runs of benchmarks/plan.py
# without a heap of our own, whose holes hold nothing. It varies, and is not predicted run by run.
_SYSTEMS_HOLES = 0.4
_MANY_STEPS = 10**9  # in which any schedule has room; to a plan it does not matter
WORDS = 49152  # of the tokenizer that a machine is measured with
_WORD = 900  # bytes that reading one word more takes, with its merge: 43 MB of SmolLM2's 49,152
NO_MACHINE = Machine(rates={}, operation=0.0, runtime=0, loading=0)  # without rates: no time
# Bytes that a GPU has in use beyond the blocks of a step: CUDA's context, its libraries, and what torch's allocator
# keeps; 1.0 to 1.8 GB on an H200 (benchmarks/gpu.py).
_CUDA_RUNTIME = 1200 * 10**6


@dataclass(frozen=True, repr=False)
class Plan:
    """A run's memory, term by term, in bytes, and its time in seconds."""

    model: str
    terms: dict[str, int]
    loading: int  # the peak while the model is loaded
    recomputed: int  # layers whose activations are recomputed
    layers: int
    parameters: int  # trained
    step_seconds: float | None = None
    tokens: int = 0  # of a step
    steps: int | None = None
    shares: dict[str, float] = field(default_factory=dict)  # seconds of a step by part
    mapped: int = 0  # bytes of the base that are a file's pages, which the system may drop and read again
    reference_seconds: float | None = None  # of a step's rows, once, before it; 0 for an objective without a reference
    read: int = 0  # bytes of such pages that are in memory beside the base while it is loaded, and of use no more
    compute: str = "fp32"  # the type of activations and products

    @property
    def training(self) -> int:
        return sum(self.terms.values())

    @property
    def peak(self) -> int:
        return max(self.training, self.loading)

    @property
    def needed(self) -> int:
        """Without the pages that can be read again, or need not be."""
        return max(self.training - self.mapped, self.loading - self.mapped - self.read)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "training": self.training, "peak": self.peak, "needed": self.needed}

    def rows(self) -> list[tuple[str, str]]:
        """What a table of the plan shows: each term's name, and its size for a person."""
        peaks = {"peak of training": self.training, "peak of loading": self.loading}
        return [(name, amount(size)) for name, size in {**self.terms, **peaks}.items()]

    def __repr__(self) -> str:
        step = "" if self.step_seconds is None else f", {duration(self.step_seconds)} a step"
        layers = f", {self.recomputed} of {self.layers} layers recomputed" if self.recomputed else ""
        return f"Plan({self.model!r}: peak {amount(self.peak)}, {amount(self.needed)} needed{step}{layers})"

    def _repr_html_(self) -> str:
        return html_table(("", "memory"), self.rows(), f"{self.model}: memory of a run")


def plan(
    config: TrainConfig, machine: Machine, *, base: Base | None = None, rows: list[Tokens] | None = None,
    how: How | None = None, recomputed: int | None = None, steps: int | None = None, update: LoRA | None = None,
) -> Plan:  # fmt: skip
    """The plan of the run that ``config`` describes.

    ``rows``: those of the step that takes the most memory; without them they are as many and as long as the options
    allow, every token learned. ``how`` the loss is computed, where it is known; ``recomputed``: the number of layers
    whose activations are recomputed, where it is not all or none; ``steps`` of the run, where its epochs say so;
    ``update``: what is trained, where the options do not describe it.

    Raises ModelError where there is no such model, and what the options of its update raise.

    Example:
        plan(PlanOptions(model="smollm2-135m-instruct", storage="nf4", batch_size=8), NO_MACHINE).needed
    """
    base = base_asked(config) if base is None else base
    if config.method == "full":
        base = base._replace(mapped=())  # a trained weight is no page of the file
    on_cpu = is_host(getattr(config, "device", CPU))
    rows = _longest(config, base) if rows is None else rows
    if recomputed is None and not config.gradient_checkpointing:
        recomputed = 0
    steps = config.steps or steps
    passes, largest, count = _passes(config, base, rows, how is not None and how.packed)
    trained = update or (config.method if config.trains_own_weights else config.update(steps or _MANY_STEPS))
    preference = preference_of(config, rows)
    step = trace_step(
        base, trained, largest, recomputed=recomputed, how=how, smoothing=config.label_smoothing,
        noise=config.neftune, on_cpu=on_cpu, preference=preference,
    )  # fmt: skip
    loading, read = _loading(base, step.weights, machine, on_cpu)
    seconds, shares, reference = None, dict[str, float](), None
    if on_cpu and machine.rates:
        shares = _time(step, passes, machine)
        seconds = sum(shares.values())
        refers = preference is not None and preference.has_reference
        reference = sum(_shares(step.forward(), passes, machine).values()) if refers else 0.0
    return Plan(
        base.name, _terms(config, base, step, count, machine, on_cpu), loading,
        step.layers if recomputed is None else min(recomputed, step.layers), step.layers, step.weights.parameters,
        seconds, sum(len(row.ids) for row in rows), steps, shares, _mapped(base, step.weights) if on_cpu else 0,
        reference, read, name_of_type(base.compute if on_cpu else base.dense),
    )  # fmt: skip


def _passes(config: TrainConfig, base: Base, rows: list[Tokens], packed: bool) -> tuple[float, list[Tokens], int]:
    """A step's passes, those of fewer tokens counted in proportion; the rows of the largest; how many there are."""
    size = config.micro_batch_size or config.batch_size
    passes = [rows[start : start + size] for start in range(0, len(rows), size)]
    counts = [tokens_gone_through(some, base.kind, packed) for some in passes]
    return sum(counts) / max(counts), passes[counts.index(max(counts))], len(passes)


def base_asked(config: TrainConfig, checkpoint: Checkpoint | None = None, labels: list[str] | None = None) -> Base:
    """The base that a run loads, from a ``checkpoint`` where it is known, and ``labels`` its classes.

    Raises ModelError where there is no such model.
    """
    on_cpu = is_host(getattr(config, "device", CPU))  # a GPU's type is that of the storage
    return base_of(
        checkpoint or config.model, config.storage, config.block_size, config.double_quantisation, config.task, labels,
        config.dense_storage, "fp32" if config.trains_own_weights or not on_cpu else config.compute,
    )  # fmt: skip


def _longest(config: TrainConfig, base: Base) -> list[Tokens]:
    length = longest_row(config.max_length, base.config)
    labels = [1] * length
    if base.kind == "classification":
        labels = [0] * (len(base.config.id2label) if problem_of(base.config) == "multi-label" else 1)
    if base.kind == "causal":
        labels[0] = IGNORE
    row = Tokens([1] * length, labels, "")
    if config.objective not in ("auto", "likelihood"):
        row = Pair.of(row, row, True if config.objective == "kto" else None)
    return [row] * config.batch_size


def optimizer_states(config: TrainConfig, parameters: int) -> int:
    """Bytes of AdamW's two moments that are in memory; paged, as many as optimizer_memory holds."""
    states = state_bytes(parameters, config.optimizer_bits)
    return min(states, memory_size(config.optimizer_memory)) if config.optimizer == "paged-adamw" else states


def _terms(
    config: TrainConfig, base: Base, step: Step, passes: int, machine: Machine, on_cpu: bool
) -> dict[str, int]:  # fmt: skip
    """Name → bytes at the peak of training."""
    weights = step.weights
    states = optimizer_states(config, weights.parameters)
    gradients = weights.trained if passes > 1 else 0  # else they come as the activations go
    kept, most, where = _live(step.stretches)
    scratch = _scratch(base, weights.largest) if on_cpu else 0
    terms = {
        "base, codes": weights.codes,
        "base, scales": weights.scales,
        "base, dense": weights.dense,
        "trained weights": weights.trained,
        "gradients": gradients,
        "optimizer states": states,
        "importance": weights.importance,
        "saved activations": max(0, kept - scratch),
        where: most - max(kept, scratch),
        "panel buffer": scratch,
    }
    if on_cpu:
        terms["pages beside"] = _pages(base, weights)
        terms["heap's holes"] = 0 if heap.installed() else int(_SYSTEMS_HOLES * kept)
        terms["runtime"] = machine.runtime + _tokenizer(base)
    else:
        terms["runtime"] = _CUDA_RUNTIME
    return {name: size for name, size in terms.items() if size}


def _live(stretches: Sequence[Stretch]) -> tuple[int, int, str]:
    """Bytes that the forward pass keeps, the most that exist at a time, and what is done then."""
    sizes: dict[int, int] = {}
    live = most = kept = 0
    where = "loss chunk"
    for stretch in stretches:
        for event in stretch.events:
            if event.size:
                sizes[event.block] = event.size
                live += event.size
                if live > most:
                    most, where = live, "loss chunk" if stretch.name == "loss" else f"{stretch.name} pass"
            else:
                live -= sizes.pop(event.block, 0)
        if stretch.name == "forward":
            kept = live
    return kept, most, where


def _scratch(base: Base, largest: int) -> int:
    """The buffer that panels of a weight are expanded into."""
    if base.storage not in CODE_BITS and base.dense is base.compute:
        return 0
    return base.compute.itemsize * min(PANEL, largest // base.dense.itemsize)


def _pages(base: Base, weights: Weights) -> int:
    """Bytes of the file's pages that tensors with memory of their own were made from: they stay as long as other
    tensors are pages of that file."""
    return weights.reassembled + weights.whole if "dense" in base.mapped else 0


def _mapped(base: Base, weights: Weights) -> int:
    """Bytes of the file's pages that are in memory, the base's and those beside it."""
    own = weights.frozen_reassembled if "dense" in base.mapped else 0
    mapped: int = sum(getattr(weights, part) for part in base.mapped)
    return mapped - own + _pages(base, weights)


def _loading(base: Base, weights: Weights, machine: Machine, on_cpu: bool) -> tuple[int, int]:
    """Peak bytes while loading, and how many of them are file pages the system may drop, without the largest tensor's.

    A file in another dtype stays mapped until every tensor is converted, but not until the tokenizer is read.
    """
    held = weights.dense + (weights.whole or weights.codes + weights.scales)
    beside, read = weights.largest + _pages(base, weights), 0
    if base.read:
        beside, largest = (base.read * (size // base.dense.itemsize) for size in (held, weights.largest))
        read = max(0, beside - largest)
    return (machine.loading if on_cpu else _CUDA_RUNTIME) + held + beside, read


def _tokenizer(base: Base) -> int:
    """Bytes that reading this model's tokenizer takes beyond that of the machine's measurement."""
    words: int = getattr(text_config_of(base.config), "vocab_size", 0)
    return _WORD * max(0, words - WORDS)


def _time(step: Step, passes: float, machine: Machine) -> dict[str, float]:
    """Seconds of the parts of a step."""
    # Gradient, weight and two moments are read, three of them written.
    optimizer = 7 * 4 * step.weights.parameters / machine.rates["passes"]
    return {**_shares(step.stretches, passes, machine), "optimizer": optimizer}


def _shares(stretches: Sequence[Stretch], passes: float, machine: Machine) -> dict[str, float]:
    """Seconds of each operation's work at the machine's rate for its kind, or for products their bytes at the memory's
    rate, if that takes longer; times ``passes``, those of fewer tokens in proportion."""
    shares: dict[str, float] = {}
    for stretch in stretches:
        for one in stretch.operations:
            rate = machine.rates.get(one.kind) or machine.rates[one.kind.removesuffix(SHORT)]
            seconds = max(one.flops / rate, one.moved / machine.rates["passes"]) if one.flops else one.moved / rate
            what = one.kind if one.flops else "other passes"
            shares[what] = shares.get(what, 0.0) + one.times * (seconds + machine.operation)
    return {name: seconds * passes for name, seconds in shares.items()}


def limit_of(config: TrainConfig, usable: int) -> int:
    """Bytes that the run may take. Raises ConfigError where that is asked of a GPU that is not here."""
    if config.memory is not None:
        return memory_size(config.memory)
    if isinstance(config, PlanOptions) and not is_host(config.device):
        if not is_present(config.device):
            raise ConfigError("There is no GPU here whose memory could be asked; say how much it has: --memory 24GB.")
        return usable_memory(config.device)
    return usable
