"""A training step that is taken without values: what it makes, keeps and frees, shown by the training code itself.

The model is the one that a run would train, with its adapters, its fused passes and its checkpointed layers; only its
tensors have no values. Five of many equal layers in a row are run, and what the middle one does is repeated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from veneer.data.labels import Tokens
from veneer.data.pairs import Pair, sequences
from veneer.frozen.exact import kept_values
from veneer.frozen.experts import QuantisedStack
from veneer.frozen.text_part import text_config_of, text_part
from veneer.frozen.weight import QuantisedLinear
from veneer.models.stream import is_read_whole, reassembled_names
from veneer.planning.empty import Base, empty_model, no_values, plan_experts
from veneer.planning.ledger import Ledger, Stretch, Times
from veneer.planning.repeat import Kinds, repeated
from veneer.training.fused import fused_passes
from veneer.training.loss import How, Loss
from veneer.training.objective import Objective
from veneer.training.own_weights import train_own_weights
from veneer.training.preference import Preference, loss_of
from veneer.training.recompute import keeping_layers, stacks_of
from veneer.training.recompute import recomputed as recomputing
from veneer.updates.attach import attach
from veneer.updates.config import AdaLoRA, LoRA
from veneer.updates.record import active_allocator


class Weights(NamedTuple):
    """Bytes of what exists before the first step."""

    codes: int
    scales: int
    dense: int  # all of the base that is in 16 or 32 bits
    trained: int  # adapters, or the model's own weights
    importance: int  # AdaLoRA's
    parameters: int  # that are trained
    largest: int  # tensor of the base, as it is read
    reassembled: int  # what the file has in other pieces, in the file's type: none of it is the file's pages
    frozen_reassembled: int  # the part of dense that was made of it
    whole: int  # matrices in codes, in the type of all else, as they are loaded where the file has other pieces


@dataclass(frozen=True)
class Step:
    """One pass of some rows through the model, forward and backward."""

    weights: Weights
    layers: int  # that may be checkpointed, from the lowest that keeps anything on
    stretches: list[Stretch]

    def forward(self) -> list[Stretch]:
        """The stretches before the backward pass."""
        names = [stretch.name for stretch in self.stretches]
        return self.stretches[: names.index("backward") if "backward" in names else None]


def trace_step(
    base: Base, update: LoRA | AdaLoRA | str, rows: Sequence[Tokens], *, recomputed: int | None = 0,
    how: How | None = None, smoothing: float = 0.0, noise: float = 0.0, on_cpu: bool = True,
    preference: Preference | None = None,
) -> Step:  # fmt: skip
    """The step of a run over ``base`` that trains ``update``, or the model's own weights by the method so named.

    ``rows``: those that pass through the model together; ``recomputed``: the number of layers whose activations are
    recomputed (None: all). ``how`` the loss is computed, where that is known. ``on_cpu``: weights in 16 bits are
    multiplied in what this machine's CPU is faster in, else in 16 bits. ``preference``: of rows that are pairs.
    """
    return no_values(lambda: _take(base, update, list(rows), recomputed, how, smoothing, noise, on_cpu, preference))


def how_of(base: Base, sample: Tokens) -> How:
    """How a run over ``base`` computes its loss, as far as shapes show it."""
    return no_values(lambda: _how(empty_model(base), base.kind, sequences(sample)[0]))


def _take(
    base: Base, update: LoRA | AdaLoRA | str, rows: list[Tokens], recomputed: int | None, how: How | None,
    smoothing: float, noise: float, on_cpu: bool, preference: Preference | None,
) -> Step:  # fmt: skip
    times = Times()
    model, weights = _begun(base, update, on_cpu, times)
    keeping = keeping_layers(model)
    kinds, count = _shown(model, keeping, keeping if recomputed is None else keeping[:recomputed])
    sample = sequences(rows[0])[0]
    how = how or _how(model, base.kind, sample)
    likelihood = Loss(model, 0, sample, kind=base.kind, smoothing=smoothing, noise=noise, how=how)
    numbered = [replace(row, number=0) if isinstance(row, Pair) else row for row in rows]
    loss = loss_of(likelihood, preference, model, torch.zeros((1, 2), dtype=torch.float64))
    ledger = Ledger([*model.parameters(), *model.buffers()], times)
    _write_down(ledger, model, loss, numbered, kinds.shown, count)
    return Step(weights, len(keeping), repeated(ledger.stretches, kinds))


def _begun(base: Base, update: LoRA | AdaLoRA | str, on_cpu: bool, times: Times) -> tuple[Any, Weights]:
    """The model in training mode, with its adapters, and what it takes before the first step."""
    model = empty_model(base, on_cpu, times)
    before = _distinct(model)
    reassembled = [model.get_parameter(name) for name in reassembled_names(model)]
    if isinstance(update, str):
        train_own_weights(model, update)
    else:
        attach(model, _without_values(model, update))
        plan_experts(model)
    weights = _weights(model, before, reassembled, base.dense)
    model.train()
    return model, weights


def _shown(model: Any, keeping: Sequence[nn.Module], again: Sequence[nn.Module]) -> tuple[Kinds, int]:
    """Leaves the layers that are run in ``model``; which these are, and how many of them are recomputed."""
    marks = set(map(id, again)), set(map(id, keeping))
    stacks = stacks_of(model)
    layers = [layer for stack in stacks for layer in stack]
    kinds = Kinds.of(layers, lambda layer: tuple(id(layer) in mark for mark in marks), whole=len(stacks) != 1)
    _put_layers(model, kinds.shown)
    return kinds, sum(id(layer) in marks[0] for layer in kinds.shown)


def _write_down(
    ledger: Ledger, model: Any, loss: Objective, rows: list[Tokens], layers: Sequence[nn.Module], recomputed: int
) -> None:
    """Take the step within ``ledger``."""
    with ExitStack() as stack:
        for context in (
            # The random state, which dropout would need, has no values to be kept.
            recomputing(model, recomputed, preserve_rng_state=False),
            # Nor has a seed that is drawn: all are the same, for masks take as much whatever is in them.
            fused_passes(model, draw=lambda: 0),
            loss.attention(),
            _marked(ledger, layers),
            ledger,
        ):
            stack.enter_context(context)
        ledger.begin("forward")
        value = loss.of_step([rows])(rows)
        ledger.begin("backward")
        value.backward()  # type: ignore[no-untyped-call]
        del value
        ledger.begin("after")


def _without_values(model: nn.Module, update: LoRA | AdaLoRA) -> LoRA | AdaLoRA:
    """The update, begun from nothing that is read from the disk."""
    in_codes = any(isinstance(module, QuantisedLinear) for module in model.modules())
    if not isinstance(update, LoRA) or (update.init == "pissa" and not in_codes):  # whose first directions are kept
        return update
    return update.model_copy(update={"init": "kaiming", "loftq_iterations": 1})


def _put_layers(model: Any, layers: Sequence[nn.Module]) -> None:
    stacks = stacks_of(model)
    if len(stacks) != 1 or len(layers) == len(stacks[0]):
        return
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if child is stacks[0]:
                setattr(module, name, nn.ModuleList(layers))


def _how(model: Any, kind: str, sample: Tokens) -> How:
    """What `Loss` finds out by trying, as far as shapes show it."""
    if kind != "causal" or text_part(model) is model or model.get_output_embeddings() is None:
        return How(False, False)
    if getattr(text_config_of(model.config), "final_logit_softcapping", None):
        return How(False, False)
    short = Tokens(sample.ids[:2], sample.labels[:2], sample.where)
    how = How(True, getattr(text_part(model).config, "_attn_implementation", None) == "sdpa")
    if how.packed:
        try:
            with torch.no_grad():
                Loss(model, 0, short, kind=kind, how=how)([short])
        except (AttributeError, TypeError, ValueError, RuntimeError, IndexError):
            return How(True, False)
    return how


def _distinct(model: nn.Module) -> dict[int, Tensor]:
    """Parameters and buffers, one for each piece of memory."""
    return {
        tensor.untyped_storage()._cdata: tensor
        for tensor in (*model.parameters(), *model.buffers(), *kept_values(model))
    }


def _weights(model: Any, base: dict[int, Tensor], reassembled: list[Tensor], dense: torch.dtype) -> Weights:
    codes = scales = whole = 0
    for module in model.modules():
        if isinstance(module, QuantisedLinear | QuantisedStack):
            count = module.experts if isinstance(module, QuantisedStack) else 1
            shape = module.shape if isinstance(module, QuantisedStack) else module.quantised.shape
            whole += count * math.prod(shape) * module.dtype.itemsize
            codes += module.codes.nbytes
            scales += sum(t.nbytes for t in (module.scales, module.nested_scales, module.offset) if t is not None)
    trained = {key: tensor for key, tensor in _distinct(model).items() if tensor.requires_grad}
    frozen = sum(tensor.untyped_storage().nbytes() for key, tensor in base.items() if key not in trained)
    allocator = active_allocator(model)
    held = sum(tensor.nbytes for tensor in trained.values())
    return Weights(
        codes, scales, frozen - codes - scales, held, 2 * held if allocator is not None else 0,
        sum(tensor.numel() for tensor in trained.values()), max(tensor.nbytes for tensor in base.values()),
        dense.itemsize * sum(tensor.numel() for tensor in reassembled),
        sum(tensor.nbytes for tensor in reassembled if not tensor.requires_grad),
        whole if is_read_whole(model.config) else 0,
    )  # fmt: skip


@contextmanager
def _marked(ledger: Ledger, layers: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, the ledger begins a new stretch at each layer, forward and backward."""
    backward = False

    def into(number: int) -> Any:
        def enter(module: nn.Module, arguments: Any) -> None:
            if not backward:
                ledger.begin("forward", number)

        return enter

    def out_of(number: int) -> Any:
        def leave(module: nn.Module, arguments: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if not backward and hidden.requires_grad:
                hidden.register_hook(arrived(number))
            if not backward and number == len(layers) - 1:
                ledger.begin("loss")

        return leave

    def arrived(number: int) -> Any:
        def note(grad: Tensor) -> None:
            nonlocal backward
            backward = True
            ledger.begin("backward", number)

        return note

    handles = [layer.register_forward_pre_hook(into(number)) for number, layer in enumerate(layers)]
    handles += [layer.register_forward_hook(out_of(number)) for number, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
