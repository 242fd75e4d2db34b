"""The loss, computed where something is learned and nowhere else.

The output head is applied to the learned positions alone, a chunk at a time; each chunk's gradient is formed in the
forward pass while its logits exist, so the logits of a whole batch never exist.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from veneer.data.labels import IGNORE, Tokens
from veneer.data.pairs import sequences
from veneer.device import exact_dtype
from veneer.frozen.text_part import text_config_of, text_part
from veneer.frozen.weight import StoredLinear
from veneer.kernels.operations.cross_entropy import cross_entropy, cross_entropy_gradient
from veneer.models.problems import Problem, problem_of
from veneer.training.batches import Batch, Lengths, by_length, collate
from veneer.training.noise import embedding_of_input, noise_on_embeddings
from veneer.training.packing import are_the_same, attention_by_rows_in, hidden_of_rows, packs
from veneer.updates.layers import AdaptedLinear

_CHUNK = 2**23  # logits of a chunk: 32 MB in fp32


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
    """Sum of the cross-entropies of a batch's learned tokens (or classes), for one model; of a classifier of texts with
    several labels each, of each label's binary cross-entropy; of one that gives a number, of the squared errors. All in
    fp32, as transformers' own losses of these three problems are.

    ``smoothing``: while the model is in training mode, this share of each target is spread evenly over the vocabulary
    or the classes (Szegedy et al., 2016, arXiv:1512.00567, section 7). ``noise``: meanwhile, too, NEFTune's alpha.
    ``class_weights``: of each class of a classifier, by which its rows count, in means too, as those of
    ``torch.nn.CrossEntropyLoss``; where a row has several labels, by how much a label counts in the rows that have it,
    as the ``pos_weight`` of ``torch.nn.BCEWithLogitsLoss``, whose mean is over all labels alike.

    Whether the model's logits are its head applied to its last hidden states is tried once on ``sample``: some
    architectures scale or cap them, or have no such parts, and are then asked for their logits. So is whether rows may
    stand back to back; if not, they are padded to the longest.
    """

    def __init__(
        self, model: Any, pad: int, sample: Tokens, *, kind: str, smoothing: float = 0.0, noise: float = 0.0,
        class_weights: Sequence[float] = (), how: How | None = None,
    ) -> None:  # fmt: skip
        self._class_weights = torch.tensor(class_weights, device=model.device) if class_weights else None
        self._model, self._pad, self._smoothing = model, pad, smoothing
        self._noise = noise
        if noise:
            embedding_of_input(model)
        if how is None:
            chunked = kind == "causal" and _head_makes_logits(model, collate([sample], pad))
            how = How(chunked, chunked and packs(model, sample))
        self.how, self.kind = how, kind
        self._problem = problem_of(model.config) if kind == "classification" else None
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
            return chunked_loss(hidden, self._model.get_output_embeddings(), labels, smoothing)
        batch = self._batch(rows)
        if self.kind == "classification":
            logits = self._model(input_ids=batch.ids, attention_mask=batch.mask).logits
            return _of_classifier(logits, batch.labels, self._problem, smoothing, self._class_weights)
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
        counted = sum(map(self._counts, parts))
        return lambda part: self(part) / counted

    def _counts(self, rows: Iterable[Tokens]) -> float:
        """What the sum of the losses of ``rows`` is divided by in a mean: learned tokens; of a classifier whose classes
        weigh differently, the weights of the rows, but the labels where they have several."""
        if self._class_weights is None or self._problem == "multi-label":
            return sum(row.learned for row in rows)
        return float(self._class_weights[[row.labels[0] for row in rows]].cpu().double().sum())

    def log_probabilities(self, rows: list[Tokens]) -> Tensor:
        """Σ log-probability of each row's learned tokens (rows,), fp64 where the device has it, differentiable; of a
        causal model."""
        with self._noisy(rows):
            if self._chunked:
                hidden, labels = self._hidden_of(rows)
                found = chunked_log_probabilities(hidden, self._model.get_output_embeddings(), labels)
            else:
                found = _log_probabilities(None, *self._logits_of(self._batch(rows), rows))
        parts = torch.split(found.to(exact_dtype(found.device)), [row.learned for row in rows])
        return torch.stack([part.sum() for part in parts])

    def _batch(self, rows: list[Tokens]) -> Batch:
        batch = collate(rows, self._pad, problem=self._problem)
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
        return total / self._counts(rows)


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


def chunked_loss(hidden: Tensor, head: nn.Module, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Σ cross-entropy of head(hidden) against labels, fp32 (); differentiable in hidden and the head's parameters.

    hidden (n, dim), labels (n,); head maps (m, dim) → (m, vocabulary), each row by itself, adapted or not. As much as
    ``smoothing`` of each target is spread over the vocabulary.
    """
    trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
    loss: Tensor = _ChunkedLoss.apply(head, labels, smoothing, hidden, *trained)  # type: ignore[no-untyped-call]
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
            return -cross_entropy(head(hidden), labels, 0.0).float()
        chunk = hidden.detach().requires_grad_()
        with torch.enable_grad():
            logits = head(chunk)
        gradient = _to_overwrite(head, logits)
        losses = cross_entropy_gradient(gradient, labels, 0.0)
        # Each is of its own hidden state alone, so the sum's gradient is that of each.
        (of_losses,) = torch.autograd.grad(logits, chunk, gradient)
        ctx.save_for_backward(of_losses)
        return -losses.float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (of_losses,) = ctx.saved_tensors
        return None, (of_losses * -grad[:, None]).to(of_losses.dtype), None


def _log_probabilities(head: nn.Module | None, states: Tensor, labels: Tensor) -> Tensor:
    logits = states if head is None else head(states)
    return -F.cross_entropy(logits.float(), labels, reduction="none")


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, head: Any, labels: Tensor, smoothing: float, hidden: Tensor, *trained: Tensor
    ) -> Tensor:  # fmt: skip
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[3:]) if needed]
        total = torch.zeros((), dtype=exact_dtype(hidden.device), device=hidden.device)  # a sum of many parts
        grads = [torch.zeros_like(parameter) for parameter in trained]
        grad_hidden = torch.empty_like(hidden) if 0 in wanted else None
        count = max(1, _CHUNK // head.weight.shape[0])
        for start in range(0, len(hidden), count):
            rows = slice(start, start + count)
            chunk = hidden[rows].detach().requires_grad_(0 in wanted)
            if not wanted:
                total += cross_entropy(head(chunk), labels[rows], smoothing).sum()
                continue
            with torch.enable_grad():
                logits = head(chunk)
            gradient = _to_overwrite(head, logits)
            total += cross_entropy_gradient(gradient, labels[rows], smoothing).sum()
            leaves = [chunk, *trained]
            formed = torch.autograd.grad(logits, [leaves[i] for i in wanted], gradient, allow_unused=True)
            for i, grad in zip(wanted, formed, strict=True):
                if i == 0 and grad_hidden is not None:
                    grad_hidden[rows] = grad
                elif grad is not None:  # an adapter that is not in force has none
                    grads[i - 1] += grad
            del logits, gradient, formed  # before the next chunk's logits take as much again
        ctx.save_for_backward(*(tensor for tensor in [grad_hidden, *grads] if tensor is not None))
        ctx.has_hidden = grad_hidden is not None
        return total.float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = [tensor * grad for tensor in ctx.saved_tensors]  # which is a number in fp32, and stays one
        return None, None, None, *(saved if ctx.has_hidden else [None, *saved])


def _to_overwrite(head: nn.Module, logits: Tensor) -> Tensor:
    """The logits themselves where ``head`` is linear, which keeps no copy of them; another one might."""
    own = logits.detach()
    return own if type(head) in (nn.Linear, StoredLinear, AdaptedLinear) else own.clone()


def _of_classifier(
    logits: Tensor, labels: Tensor, problem: Problem | None, smoothing: float, weights: Tensor | None
) -> Tensor:
    """Sum of the losses of (rows, classes) ``logits``, fp32 ()."""
    if problem == "multi-label":
        return F.binary_cross_entropy_with_logits(logits.float(), labels, reduction="sum", pos_weight=weights)
    if problem == "regression":
        return F.mse_loss(logits.float().squeeze(-1), labels, reduction="sum")
    return _sum(logits, labels, smoothing, weights)


def _sum(logits: Tensor, labels: Tensor, smoothing: float, weights: Tensor | None = None) -> Tensor:
    return F.cross_entropy(
        logits.float(), labels, weights, ignore_index=IGNORE, reduction="sum", label_smoothing=smoothing
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
