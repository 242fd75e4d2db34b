"""A training step that is taken without values: what it makes, keeps and lets go, found by the training code itself.

The model is the one that a run would train, with its adapters, its fused passes and its checkpointed layers; only its
tensors have no values. Of many equal layers in a row five are gone through, and what the middle one does is repeated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from veneer.data.labels import Tokens
from veneer.frozen.weight import QuantisedLinear
from veneer.models.stream import made_anew
from veneer.planning.empty import Base, empty_model, no_values
from veneer.planning.ledger import Ledger, Stretch
from veneer.planning.repeat import Kinds, repeated
from veneer.training import loss as losses
from veneer.training.fused import fused_passes
from veneer.training.loss import How, Loss
from veneer.training.own_weights import train_own_weights
from veneer.training.recompute import keeping_layers, stacks_of
from veneer.training.recompute import recomputed as recomputing
from veneer.updates import product
from veneer.updates.attach import attach
from veneer.updates.config import AdaLoRA, LoRA
from veneer.updates.record import active_allocator


class Weights(NamedTuple):
    """Bytes of what stands before the first step."""

    codes: int
    scales: int
    dense: int  # all of the base that is in 16 or 32 bits
    trained: int  # adapters, or the model's own weights
    importance: int  # AdaLoRA's
    parameters: int  # that are trained
    largest: int  # tensor of the base, as it is read
    anew: int  # what the file has in other pieces, in the file's type: none of it is the file's pages
    frozen_anew: int  # of dense, what was made of it
    whole: int  # matrices in codes, in the type of all else, as they are loaded where the file has other pieces


@dataclass(frozen=True)
class Step:
    """One pass of some rows through the model, forward and backward."""

    weights: Weights
    layers: int  # that may be checkpointed, from the lowest that keeps anything on
    stretches: list[Stretch]


def take_step(
    base: Base, update: LoRA | AdaLoRA | str, rows: Sequence[Tokens], *, recomputed: int | None = 0,
    how: How | None = None, smoothing: float = 0.0, on_cpu: bool = True,
) -> Step:  # fmt: skip
    """The step of a run over ``base`` that trains ``update``, or the model's own weights by the method so named.

    ``rows``: those that go through the model together; ``recomputed``: of so many layers the activations are computed
    again (None: of all). ``how`` the loss is computed, where that is known. ``on_cpu``: weights in 16 bits are
    multiplied in what this machine's CPU is faster in, else in 16 bits.
    """
    return no_values(lambda: _take(base, update, list(rows), recomputed, how, smoothing, on_cpu))


def _take(
    base: Base, update: LoRA | AdaLoRA | str, rows: list[Tokens], recomputed: int | None, how: How | None,
    smoothing: float, on_cpu: bool,
) -> Step:  # fmt: skip
    model = empty_model(base, on_cpu)
    before = _distinct(model)
    anew = [model.get_parameter(name) for name in made_anew(model)]
    if isinstance(update, str):
        train_own_weights(model, update)
    else:
        attach(model, _without_values(update))
    weights = _weights(model, before, anew, base.dense)
    model.train()
    keeping = keeping_layers(model)
    again = keeping if recomputed is None else keeping[:recomputed]
    marks = set(map(id, again)), set(map(id, keeping))
    layers = [layer for stack in stacks_of(model) for layer in stack]
    kinds = Kinds.of(layers, lambda layer: tuple(id(layer) in mark for mark in marks), whole=len(stacks_of(model)) != 1)
    _put_layers(model, kinds.shown)
    loss = Loss(model, 0, rows[0], kind=base.kind, smoothing=smoothing, how=how or _how(model, base.kind, rows[0]))
    ledger = Ledger([*model.parameters(), *model.buffers()])
    with ExitStack() as stack:
        stack.enter_context(_one_block_of_loss())
        stack.enter_context(_one_seed())
        count = sum(id(layer) in marks[0] for layer in kinds.shown)
        # The random state, which dropout would need, is not there to be kept.
        stack.enter_context(recomputing(model, count, preserve_rng_state=False))
        for context in (fused_passes(model), loss.attention(), _marked(ledger, kinds.shown), ledger):
            stack.enter_context(context)
        ledger.begin("forward")
        value = loss(rows)
        ledger.begin("backward")
        value.backward()  # type: ignore[no-untyped-call]
        del value
        ledger.begin("after")
    return Step(weights, len(keeping), repeated(ledger.stretches, kinds))


def _without_values(update: LoRA | AdaLoRA) -> LoRA | AdaLoRA:
    """The update, begun from nothing that weights would have to be there for."""
    begun = {"init": "kaiming", "loftq_iterations": 1} if isinstance(update, LoRA) else {}
    return update.model_copy(update=begun)


def _put_layers(model: Any, layers: Sequence[nn.Module]) -> None:
    stacks = stacks_of(model)
    if len(stacks) != 1 or len(layers) == len(stacks[0]):
        return
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if child is stacks[0]:
                setattr(module, name, nn.ModuleList(layers))


def _how(model: Any, kind: str, sample: Tokens) -> How:
    """What `Loss` finds out by trying, as far as shapes tell."""
    if kind != "causal" or model.base_model is model or model.get_output_embeddings() is None:
        return How(False, False)
    if getattr(model.config, "final_logit_softcapping", None):
        return How(False, False)
    short = Tokens(sample.ids[:2], sample.labels[:2], sample.where)
    how = How(True, getattr(model.config, "_attn_implementation", None) == "sdpa")
    if how.packed:
        try:
            with torch.no_grad():
                Loss(model, 0, short, kind=kind, how=how)([short])
        except (AttributeError, TypeError, ValueError, RuntimeError, IndexError):
            return How(True, False)
    return how


def _distinct(model: nn.Module) -> dict[int, Tensor]:
    """Parameters and buffers, one for each piece of memory."""
    return {tensor.untyped_storage()._cdata: tensor for tensor in (*model.parameters(), *model.buffers())}


def _weights(model: Any, base: dict[int, Tensor], anew: list[Tensor], dense: torch.dtype) -> Weights:
    codes = scales = whole = 0
    for module in model.modules():
        if isinstance(module, QuantisedLinear):
            whole += math.prod(module.quantised.shape) * module.dtype.itemsize
            codes += module.codes.nbytes
            scales += sum(t.nbytes for t in (module.scales, module.nested_scales, module.offset) if t is not None)
    trained = {key: tensor for key, tensor in _distinct(model).items() if tensor.requires_grad}
    frozen = sum(tensor.untyped_storage().nbytes() for key, tensor in base.items() if key not in trained)
    allocator = active_allocator(model)
    held = sum(tensor.nbytes for tensor in trained.values())
    return Weights(
        codes, scales, frozen - codes - scales, held, 2 * held if allocator is not None else 0,
        sum(tensor.numel() for tensor in trained.values()), max(tensor.nbytes for tensor in base.values()),
        dense.itemsize * sum(tensor.numel() for tensor in anew),
        sum(tensor.nbytes for tensor in anew if not tensor.requires_grad), whole if anew else 0,
    )  # fmt: skip


@contextmanager
def _one_block_of_loss() -> Iterator[None]:
    """A chunk of logits is gone through in one piece instead of eight rows at a time: the same memory, fewer calls."""
    before = losses._ROWS
    losses._ROWS = losses._CHUNK
    try:
        yield
    finally:
        losses._ROWS = before


@contextmanager
def _one_seed() -> Iterator[None]:
    """Dropout's seeds, which would be values, are all the same: the masks take as much whatever is in them."""
    before = product._seed
    product._seed = lambda: 0
    try:
        yield
    finally:
        product._seed = before


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
