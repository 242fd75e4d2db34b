"""The loss, computed where something is learned and nowhere else.

The output head is applied to the learned positions alone, a chunk at a time; each chunk's gradient is formed in the
forward pass while its logits exist, so the logits of a whole batch never exist.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from veneer.data.labels import IGNORE, Tokens
from veneer.data.pairs import sequences
from veneer.frozen.text_part import text_config_of, text_part
from veneer.frozen.weight import StoredLinear
from veneer.training.batches import Batch, Lengths, by_length, collate
from veneer.training.noise import embedding_of_input, noise_on_embeddings
from veneer.training.packing import are_the_same, attention_by_rows_in, hidden_of_rows, packs
from veneer.updates.layers import AdaptedLinear

_CHUNK = 2**23  # logits of a chunk: 32 MB in fp32
ROWS_AT_ONCE = 8  # of a chunk that are normalised together: 1.5 MB for a vocabulary of 49,152


class How(NamedTuple):
    """What a model's loss is computed by."""

    chunked: bool  # its head, a chunk of hidden states at a time
    packed: bool  # rows that stand back to back


class Measured(NamedTuple):
    """What held-out rows show; None where they have no preferences."""

    loss: float  # mean over learned tokens, or over rows with preferences
    reward_accuracy: float | None = None  # share of rows whose better answer has the higher reward; half for a tie
    reward_margin: float | None = None  # by how much, on average


class Loss:
    """Sum of the cross-entropies of a batch's learned tokens (or classes), for one model.

    ``smoothing``: while the model is in training mode, this share of each target is spread evenly over the vocabulary
    or the classes (Szegedy et al., 2016, arXiv:1512.00567, section 7). ``noise``: meanwhile, too, NEFTune's alpha.

    Whether the model's logits are its head applied to its last hidden states is tried once on ``sample``: some
    architectures scale or cap them, or have no such parts, and are then asked for their logits. So is whether rows may
    stand back to back; if not, they are padded to the longest.
    """

    def __init__(
        self, model: Any, pad: int, sample: Tokens, *, kind: str, smoothing: float = 0.0, noise: float = 0.0,
        how: How | None = None, rows_at_once: int = ROWS_AT_ONCE,
    ) -> None:  # fmt: skip
        self._model, self._pad, self._smoothing, self._rows_at_once = model, pad, smoothing, rows_at_once
        self._noise = noise
        if noise:
            embedding_of_input(model)
        if how is None:
            chunked = kind == "causal" and _head_makes_logits(model, collate([sample], pad))
            how = How(chunked, chunked and packs(model, sample))
        self.how, self.kind = how, kind
        self._chunked, self._packed = how

    def attention(self) -> AbstractContextManager[None]:
        """To be entered around loss *and* backward pass where layers are checkpointed, which attend a second time."""
        return attention_by_rows_in(self._model) if self._packed else nullcontext()

    def __call__(self, rows: list[Tokens]) -> Tensor:
        """The summed loss of ``rows``, fp32 (), differentiable."""
        with self._noisy(rows):
            return self._of(rows)

    def _noisy(self, rows: list[Tokens]) -> AbstractContextManager[None]:
        noise = self._noise if self._model.training else 0.0
        return noise_on_embeddings(self._model, noise, [len(row.ids) for row in rows])

    def _of(self, rows: list[Tokens]) -> Tensor:
        smoothing = self._smoothing if self._model.training else 0.0
        if self._chunked:
            hidden, labels = self._hidden_of(rows)
            return chunked_loss(hidden, self._model.get_output_embeddings(), labels, smoothing, self._rows_at_once)
        batch = self._batch(rows)
        if self.kind == "classification":
            logits = self._model(input_ids=batch.ids, attention_mask=batch.mask).logits
            return _sum(logits, batch.labels, smoothing)
        if self.kind == "seq2seq":
            shifted = self._model.prepare_decoder_input_ids_from_labels(labels=batch.labels)
            logits = self._model(
                input_ids=batch.ids, attention_mask=batch.mask, decoder_input_ids=shifted, use_cache=False
            ).logits
            return _sum(logits.flatten(0, 1), batch.labels.flatten(), smoothing)
        logits, labels = self._logits_of(batch, rows)
        return _sum(logits, labels, smoothing)

    def of_step(self, parts: list[list[Tokens]]) -> Callable[[list[Tokens]], Tensor]:
        """For the parts of a step, what gives each part's share of the mean loss of a learned token."""
        learned = sum(row.learned for part in parts for row in part)
        return lambda part: self(part) / learned

    def log_probabilities(self, rows: list[Tokens]) -> Tensor:
        """Σ log-probability of each row's learned tokens, fp64 (rows,), differentiable; of a causal model."""
        with self._noisy(rows):
            if self._chunked:
                hidden, labels = self._hidden_of(rows)
                found = chunked_log_probabilities(hidden, self._model.get_output_embeddings(), labels)
            else:
                found = _log_probabilities(None, *self._logits_of(self._batch(rows), rows))
        parts = torch.split(found.double(), [row.learned for row in rows])
        return torch.stack([part.sum() for part in parts])

    def _batch(self, rows: list[Tokens]) -> Batch:
        batch = collate(rows, self._pad, classes=self.kind == "classification")
        return Batch(*(tensor.to(self._model.device) for tensor in batch))

    def _hidden_of(self, rows: list[Tokens]) -> tuple[Tensor, Tensor]:
        """Last hidden states (n, dim) before each learned token of ``rows``, in their order, and these tokens (n,)."""
        if self._packed:
            with self.attention():
                return hidden_of_rows(self._model, rows)
        batch = self._batch(rows)
        learned, labels = _learned(rows, batch.ids.device)
        return _hidden(self._model, batch)[:, :-1][learned], labels

    def _logits_of(self, batch: Batch, rows: list[Tokens]) -> tuple[Tensor, Tensor]:
        """Logits (n, vocabulary) before each learned token, and these tokens (n,)."""
        learned, labels = _learned(rows, batch.ids.device)
        logits = self._model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits
        return logits[:, :-1][learned], labels

    def held_out(self, rows: Sequence[Tokens], batch_size: int) -> Measured:
        """What is measured of held-out rows."""
        return Measured(self.mean(rows, batch_size))

    @torch.no_grad()
    def mean(self, rows: Sequence[Tokens], batch_size: int) -> float:
        """Mean loss of a learned token over ``rows``, the model in eval mode meanwhile."""
        training = self._model.training
        self._model.eval()
        try:
            total = sum(float(self(batch)) for batch in by_length(rows, batch_size))
        finally:
            self._model.train(training)
        return total / sum(row.learned for row in rows)


def tokens_gone_through(rows: Sequence[Tokens] | Sequence[Lengths], kind: str, packed: bool) -> int:
    """Tokens that a pass over ``rows`` computes: of an encoder-decoder on either side; of both answers of a
    pair; padding too, where they are not ``packed``."""
    parts = [part for row in rows for part in (row.sequences() if isinstance(row, Lengths) else sequences(row))]
    lengths = [len(part.ids) for part in parts]
    if packed:
        return sum(lengths)
    answer = max(len(part.labels) for part in parts) if kind == "seq2seq" else 0
    return len(parts) * (max(lengths) + answer)


def _learned(rows: list[Tokens], device: torch.device) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Row and place (n,) before each learned token of padded ``rows``, and these tokens (n,)."""
    learned = [
        (number, place, token)
        for number, row in enumerate(rows)
        for place, token in enumerate(row.labels[1:])
        if token != IGNORE
    ]
    numbers, places, tokens = torch.tensor(learned, dtype=torch.long, device=device).view(-1, 3).unbind(1)
    return (numbers, places), tokens


def chunked_loss(
    hidden: Tensor, head: nn.Module, labels: Tensor, smoothing: float = 0.0, rows_at_once: int = ROWS_AT_ONCE
) -> Tensor:
    """Σ cross-entropy of head(hidden) against labels, fp32 (); differentiable in hidden and the head's parameters.

    hidden (n, dim), labels (n,); head maps (m, dim) → (m, vocabulary), each row by itself, adapted or not. As much as
    ``smoothing`` of each target is spread over the vocabulary; ``rows_at_once`` of a chunk's logits are normalised
    together.
    """
    trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
    loss: Tensor = _ChunkedLoss.apply(head, labels, smoothing, rows_at_once, hidden, *trained)  # type: ignore[no-untyped-call]
    return loss


def chunked_log_probabilities(hidden: Tensor, head: Any, labels: Tensor) -> Tensor:
    """Log-probability of each label after its hidden state, fp32 (n,); differentiable as `chunked_loss` is.

    What follows from one may depend on all, so its weight in the gradient is known in the backward pass alone. A frozen
    head's gradient of each token is formed in the forward pass all the same, and weighted then; the logits of a trained
    one are computed once more.
    """
    count = max(1, _CHUNK // int(head.weight.shape[0]))
    chunks = list(zip(torch.split(hidden, count), torch.split(labels, count), strict=True))
    if any(parameter.requires_grad for parameter in head.parameters()):
        return torch.cat([checkpoint(_log_probabilities, head, *chunk, use_reentrant=False) for chunk in chunks])
    return torch.cat([_ByFrozenHead.apply(head, *chunk) for chunk in chunks])  # type: ignore[no-untyped-call]


class _ByFrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, head: Any, hidden: Tensor, labels: Tensor) -> Tensor:
        if not ctx.needs_input_grad[1]:
            return _log_probabilities(head, hidden, labels)
        chunk = hidden.detach().requires_grad_()
        with torch.enable_grad():
            found = _log_probabilities(head, chunk, labels)
            # Each is of its own hidden state alone, so the sum's gradient is that of each.
            ctx.save_for_backward(*torch.autograd.grad(found.sum(), chunk))
        return found.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (of_each,) = ctx.saved_tensors
        return None, (of_each * grad[:, None]).to(of_each.dtype), None


def _log_probabilities(head: nn.Module | None, states: Tensor, labels: Tensor) -> Tensor:
    logits = states if head is None else head(states)
    return -F.cross_entropy(logits.float(), labels, reduction="none")


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, head: Any, labels: Tensor, smoothing: float, rows_at_once: int, hidden: Tensor, *trained: Tensor
    ) -> Tensor:  # fmt: skip
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[4:]) if needed]
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)  # a sum of many parts
        grads = [torch.zeros_like(parameter) for parameter in trained]
        grad_hidden = torch.empty_like(hidden) if 0 in wanted else None
        count = max(1, _CHUNK // head.weight.shape[0])
        for start in range(0, len(hidden), count):
            rows = slice(start, start + count)
            chunk = hidden[rows].detach().requires_grad_(0 in wanted)
            with torch.enable_grad() if wanted else torch.no_grad():
                logits = head(chunk)
            # A linear head keeps no copy of its logits, so that they may be overwritten; another one might.
            own = logits.detach() if type(head) in (nn.Linear, StoredLinear, AdaptedLinear) else logits.detach().clone()
            loss, grad_logits = _cross_entropy(own, labels[rows], smoothing, rows_at_once)
            total += loss
            leaves = [chunk, *trained]
            formed = (
                torch.autograd.grad(logits, [leaves[i] for i in wanted], grad_logits, allow_unused=True)
                if wanted
                else ()
            )
            for i, grad in zip(wanted, formed, strict=True):
                if i == 0 and grad_hidden is not None:
                    grad_hidden[rows] = grad
                elif grad is not None:  # an adapter that is not in force has none
                    grads[i - 1] += grad
            del logits, own, grad_logits, formed  # before the next chunk's logits take as much again
        ctx.save_for_backward(*(tensor for tensor in [grad_hidden, *grads] if tensor is not None))
        ctx.has_hidden = grad_hidden is not None
        return total.float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = [tensor * grad for tensor in ctx.saved_tensors]  # which is a number in fp32, and stays one
        return None, None, None, None, *(saved if ctx.has_hidden else [None, *saved])


def _cross_entropy(logits: Tensor, labels: Tensor, smoothing: float, rows_at_once: int) -> tuple[Tensor, Tensor]:
    """Σ −Σ target · log softmax(logits), fp64 (), and its gradient softmax(logits) − target, where the target is
    (1 − smoothing) · onehot(label) + smoothing / vocabulary.

    The gradient takes the place of ``logits`` (n, vocabulary) where they are fp32. ``rows_at_once``: a few,
    which stay in the cache from pass to pass.
    """
    exact = logits.float()
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    parts = torch.split(exact, rows_at_once), torch.split(labels[:, None], rows_at_once)
    for block, places in zip(*parts, strict=True):
        picked, largest = block.gather(-1, places), block.amax(-1, keepdim=True)
        if smoothing:
            picked = picked.lerp(block.mean(-1, keepdim=True), smoothing)
        sums = block.sub_(largest).exp_().sum(-1, keepdim=True)
        total += (sums.log() + largest - picked).sum()
        block.div_(sums).scatter_add_(-1, places, torch.full_like(picked, smoothing - 1))
        if smoothing:
            block.sub_(smoothing / block.shape[-1])
    return total, exact.to(logits.dtype)


def _sum(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    return F.cross_entropy(
        logits.float(), labels, ignore_index=IGNORE, reduction="sum", label_smoothing=smoothing
    )  # fmt: skip


def _hidden(model: Any, batch: Batch) -> Tensor:
    """Last hidden states (rows, length, dim) of the body under the head."""
    states: Tensor = text_part(model)(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).last_hidden_state
    return states


@torch.no_grad()
def _head_makes_logits(model: Any, batch: Batch) -> bool:
    training = model.training
    model.eval()
    try:
        if text_part(model) is model or model.get_output_embeddings() is None:
            return False
        if getattr(text_config_of(model.config), "final_logit_softcapping", None):
            return False  # a cap on the logits, which does not show where they are small
        batch = Batch(*(tensor[:, :8].to(model.device) for tensor in batch))
        states: list[Tensor] = []  # what the body hands on, of the same pass: a second one makes the start longer
        with _handed_on(text_part(model), states):
            wanted = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits
        made = model.get_output_embeddings()(states[0] if states else _hidden(model, batch))  # OPT calls parts of it
        if wanted.shape != made.shape:
            return False
        exact = min(made.itemsize, wanted.itemsize) > 2
        return torch.allclose(wanted, made, rtol=1e-3, atol=1e-3) if exact else are_the_same(made, wanted)
    except (AttributeError, TypeError):  # a body that takes other inputs, or gives other outputs
        return False
    finally:
        model.train(training)


@contextmanager
def _handed_on(body: nn.Module, states: list[Tensor]) -> Iterator[None]:
    hook = body.register_forward_hook(lambda module, inputs, output: states.append(output.last_hidden_state))
    try:
        yield
    finally:
        hook.remove()
