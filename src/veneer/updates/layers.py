"""The layers that stand where a base module stood: the base, frozen, and the named updates on top of it.

Every one of them returns exactly what its base returns while no update is active.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.errors import ModelError
from veneer.frozen.called import only_multiplies, place_of_update
from veneer.frozen.experts import Stack
from veneer.frozen.weight import DenseWeight, FrozenWeight, frozen_product, frozen_weight
from veneer.kernels.dense import Multiply
from veneer.updates.magnitudes import exact_weight, refuse_away, row_norms
from veneer.updates.product import Factors, adapted_product, drawn_seed, mask_of, product_alone
from veneer.updates.rows import Names, Off, Own, RowAdapters


class LowRank(nn.Module, ABC):
    """ΔW = s · B A with A (rank, in) and B (out, rank), however a method makes the two: one named update of one module.

    Its parameters are kept in fp32 over a half-precision base: steps of 1e-4 vanish in bf16.
    """

    def __init__(self, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.scale = scale
        self.dropout = dropout

    @property
    @abstractmethod
    def rank(self) -> int: ...

    @abstractmethod
    def matrices(self) -> tuple[Tensor, Tensor]:
        """A (rank, in) and B (out, rank), differentiable in the parameters."""

    def factors(self) -> list[Factors]:
        """What the product adds, one after another."""
        return [Factors(*self.matrices(), self.scale, self.drops)]

    @property
    def drops(self) -> float:
        """The probability with which elements of the input are dropped now."""
        return self.dropout if self.training else 0.0

    def forward(self) -> list[Factors]:
        """`factors`, by a call, with which what offloads a module's tensors brings them into memory."""
        return self.factors()

    def delta(self, dtype: torch.dtype, weight: Tensor | None = None) -> Tensor:
        """ΔW (out, in), formed in the given type, over W0 = ``weight`` of that type; for merging only."""
        A, B = (matrix.detach().to(dtype) for matrix in self.matrices())
        return (B @ A).mul_(self.scale)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scale={self.scale:g}, dropout={self.dropout:g}"


class Pair(LowRank):
    """LoRA's update: A and B are the parameters themselves."""

    def __init__(self, A: Tensor, B: Tensor, scale: float, dropout: float = 0.0) -> None:
        super().__init__(scale, dropout)
        self.A = nn.Parameter(A)
        self.B = nn.Parameter(B)

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def matrices(self) -> tuple[Tensor, Tensor]:
        return self.A, self.B


class Dora(Pair):
    """DoRA's update (Liu et al., 2024, arXiv:2402.09353, equation 5): W = m ∘ (W0 + s · B A) / ‖W0 + s · B A‖.

    ``m`` (out,) is trained beside A and B; the norm is each row's, a constant to the gradient (section 4.3). It begins
    as that norm, so W begins as W0 + s · B A.
    """

    squares: Tensor

    def __init__(self, A: Tensor, B: Tensor, scale: float, dropout: float, base: nn.Module) -> None:
        super().__init__(A, B, scale, dropout)
        self.register_buffer("squares", exact_weight(base).row_squares(A.dtype).to(A.device), persistent=False)
        self.m = nn.Parameter(self._norms(exact_weight(base)))
        self._seen: tuple[tuple[int, ...], Tensor] | None = None

    def growth(self, base: nn.Module) -> Tensor:
        """m / ‖W0 + s · B A‖ − 1 (out,), by which each output grows; differentiable in m."""
        refuse_away(base, self.A)
        if self.training or self.A.is_inference() or torch.compiler.is_compiling():
            return self.m / self._norms(exact_weight(base)) - 1
        # While nothing is trained the norms stay: generation would form them again for every token.
        now = (self.A._version, self.B._version, id(self.A), id(self.B))
        if self._seen is None or self._seen[0] != now or self._seen[1].device != self.m.device:
            self._seen = now, self._norms(exact_weight(base))
        return self.m / self._seen[1] - 1

    def grown(self, y: Tensor, bias: Tensor | None, base: nn.Module) -> Tensor:
        """(W0 + s · B A) x + b, as ``y`` (…, out), with what is not b grown."""
        growth = self.growth(base).to(y.dtype)
        return torch.addcmul(y, y if bias is None else y - bias.to(y.dtype), growth)

    def added(self, x: Tensor, y: Tensor, base: nn.Module, draw: Callable[[], int]) -> Tensor:
        """``y`` (…, out) and what this update adds to W0 x, of x (…, in) with some of its elements dropped."""
        if self.drops:
            x = x * mask_of(x, self.drops, draw())
        frozen, factors = exact_weight(base), Factors(self.A, self.B, self.scale)
        whole = adapted_product(x, frozen, None, [factors])
        part = torch.addcmul(whole - frozen_product(x, frozen, None), whole, self.growth(base).to(whole.dtype))
        return y + part

    def delta(self, dtype: torch.dtype, weight: Tensor | None = None) -> Tensor:
        assert weight is not None, "its rows are scaled, too"
        grown = weight + super().delta(dtype)
        norms = self._norms(DenseWeight(weight)).to(weight.dtype)
        return grown.mul_((self.m.detach().to(weight.dtype) / norms)[:, None]).sub_(weight)

    def train(self, mode: bool = True) -> Dora:
        self._seen = None
        return super().train(mode)

    def _norms(self, frozen: FrozenWeight) -> Tensor:
        return row_norms(frozen, self.squares, self.A, self.B, self.scale)

    def _apply(self, fn: Any, recurse: bool = True) -> Dora:
        # As of codes, the type of all else is not theirs: in 16 bits every row would grow by its rounding.
        squares, self._seen = self.squares, None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.squares = squares.to(self.A.device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_seen": None}


class Triplets(LowRank):
    """AdaLoRA's update, P diag(λ) Q (arXiv:2303.10512, equation 3): A is λ ∘ Q, B is P.

    P (out, rank), λ (rank, 1) as ``lam``, Q (rank, in). ``kept`` (initial rank,) says which of the triplets that it
    began with these are; the scale is that of the beginning.
    """

    kept: Tensor

    def __init__(self, P: Tensor, lam: Tensor, Q: Tensor, scale: float, dropout: float = 0.0) -> None:
        super().__init__(scale, dropout)
        self.P = nn.Parameter(P)
        self.lam = nn.Parameter(lam)
        self.Q = nn.Parameter(Q)
        self.register_buffer("kept", torch.ones(len(lam), dtype=torch.bool), persistent=False)

    @property
    def rank(self) -> int:
        return self.lam.shape[0]

    def matrices(self) -> tuple[Tensor, Tensor]:
        return self.lam * self.Q, self.P

    def factors(self) -> list[Factors]:
        return [Factors(self.Q, self.P, self.scale, self.drops, self.lam)]


class NewRows(nn.Module):
    """Vocabulary rows that are trained in place of the frozen ones: ``rows[i]`` stands for token ``ids[i]``.

    A tied embedding and head hold the same NewRows, so that they stay tied.
    """

    ids: Tensor
    slot: Tensor

    def __init__(self, ids: list[int], weight: Tensor) -> None:
        super().__init__()
        index = torch.tensor(ids, device=weight.device)
        self.register_buffer("ids", index, persistent=False)
        # slot[token] is the token's place in rows, or -1: one gather decides for a whole batch.
        slot = torch.full((weight.shape[0],), -1, device=weight.device)
        slot[index] = torch.arange(len(ids), device=weight.device)
        self.register_buffer("slot", slot, persistent=False)
        self.rows = nn.Parameter(weight.detach()[index].to(training_dtype(weight)))

    def embed(self, tokens: Tensor, frozen: Tensor, factor: float) -> Tensor:
        """``frozen`` (…, dim), what the base gives for ``tokens`` (…), with factor · trained rows in their places."""
        slot = self.slot[tokens]
        rows = F.embedding(slot.clamp_min(0), self.rows).to(frozen.dtype) * factor
        return torch.where((slot >= 0).unsqueeze(-1), rows, frozen)

    def put_logits(self, x: Tensor, logits: Tensor, weight: Tensor) -> Tensor:
        """``logits`` (…, vocab) of x (…, dim) over the frozen ``weight`` (vocab, dim), with the trained rows' instead.

        Their difference is added: while a row is what it was, its logit is the base's own, bit for bit.
        """
        moved = self.rows - weight.detach()[self.ids].to(self.rows.dtype)
        return logits.index_add(-1, self.ids, F.linear(x, moved.to(x.dtype)))

    def merged(self, weight: Tensor) -> Tensor:
        """``weight`` (vocab, dim) with the trained rows in it."""
        return weight.detach().index_copy(0, self.ids, self.rows.detach().to(weight.dtype))


class Adapted(nn.Module):
    """A base module and its named updates, of which ``active`` are in force; or, in a pass whose rows have adapters of
    their own, those that ``rows`` names. Both are a thread's: others may ask the base meanwhile."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.updates = nn.ModuleDict()
        self.chosen: tuple[str, ...] = ()  # by `activate`
        self.off = Off()  # the model's, by `disabled`
        self.own_rows: Own[RowAdapters] = Own()  # for one pass, by `row_adapters`
        self.train(base.training)

    @property
    def active(self) -> tuple[str, ...]:
        return () if self.off.get() else self.chosen

    @property
    def rows(self) -> RowAdapters | None:
        return self.own_rows.get()

    def __getstate__(self) -> dict[str, Any]:
        """What a copy gets: it stays as it is in this thread."""
        return {**self.__dict__, "chosen": self.active}

    def _replicate_for_data_parallel(self) -> Any:
        """A replica runs in a thread of its own."""
        replica = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica.chosen, replica.off = self.active, Off()
        return replica

    # Models look at these of the modules they hold: T5 at the type of a projection's weight, a tied head at the tensor.
    @property
    def weight(self) -> Tensor:
        return cast(Tensor, self.base.weight)

    @property
    def bias(self) -> Tensor | None:
        return cast("Tensor | None", self.base.bias)

    def in_force(self, names: Names | None = None) -> list[nn.Module]:
        """The updates that these adapters have here, by default the active ones."""
        return [self.updates[name] for name in (self.active if names is None else names) if name in self.updates]

    def by_rows(self, shape: torch.Size, device: torch.device) -> list[tuple[nn.Module, Tensor | None]]:
        """The updates of a pass over vectors of ``shape``, each with the places in it, flattened, or None for all."""
        if self.rows is None:
            return [(update, None) for update in self.in_force()]
        places = self.rows.places(shape, device)
        return [(update, rows) for names, rows in places for update in self.in_force(names)]


class AdaptedLinear(Adapted):
    """y = W0 x + b + Σ s · B A x over nn.Linear, GPT-2's Conv1D or a quantised linear layer.

    The base is called where more hangs on its call than this product (`only_multiplies`), such as hooks.
    ``multiply``: the product by a W0 in x's own type beside updates; nn.Linear's own by default, and the training
    loop's, of other last bits, while it trains this layer. ``draw``: gives dropout's seeds.
    """

    def forward(self, x: Tensor, multiply: Multiply = F.linear, draw: Callable[[], int] = drawn_seed) -> Tensor:
        updates = self.by_rows(x.shape[:-1], x.device)
        # DoRA's scales all that is under it, and is taken apart from others, which it does not scale.
        scaled = [(update, rows) for update, rows in updates if isinstance(update, Dora)]
        alone = len(updates) == 1 and all(rows is None and not update.drops for update, rows in scaled)
        low_rank = [
            factors._replace(rows=rows) for update, rows in updates
            if isinstance(update, LowRank) and update.rank and (alone or not isinstance(update, Dora))
            for factors in update()
        ]  # fmt: skip
        if low_rank and only_multiplies(self.base, x):
            y = adapted_product(x, frozen_weight(self.base, multiply), self.bias, low_rank, draw)
        else:
            y = self.base(x)
            if low_rank:
                y = y + product_alone(x, low_rank, draw)
        for dora, rows in scaled:
            y = dora.grown(y, self.bias, self.base) if alone else _at(rows, dora.added, x, y, self.base, draw)
        for update, rows in updates:
            if isinstance(update, NewRows):
                y = _at(rows, update.put_logits, x, y, self.weight)
        return y


class AdaptedEmbedding(Adapted):
    """h = E[i] + Σ s · A[:, i]ᵀ Bᵀ with A (rank, vocab) and B (dim, rank); or with new rows in place of frozen ones."""

    def forward(self, tokens: Tensor) -> Tensor:
        h: Tensor = self.base(tokens)
        # Gemma's embedding multiplies what it looks up; an update of the matrix is multiplied with it.
        factor = embedding_factor(self.base)
        for update, rows in self.by_rows(tokens.shape, tokens.device):
            if isinstance(update, NewRows):
                h = _at(rows, update.embed, tokens, h, factor)
            elif isinstance(update, Dora):
                h = _at(rows, _add_grown, tokens, h, factor, update, self.base)
            elif isinstance(update, LowRank):
                (factors,) = update()
                h = _at(rows, _add_looked_up, tokens, h, factor, factors)
        return h


def _add_grown(tokens: Tensor, h: Tensor, factor: float, update: Dora, base: nn.Module) -> Tensor:
    own = base(tokens)
    (factors,) = update()
    added = _add_looked_up(tokens, torch.zeros_like(own), factor, factors)
    return h + torch.addcmul(added, own + added, update.growth(base).to(h.dtype))


def _add_looked_up(tokens: Tensor, h: Tensor, factor: float, factors: Factors) -> Tensor:
    low = F.dropout(F.embedding(tokens, factors.A.t()), factors.dropout)
    return h + ((low @ factors.B.t()) * (factors.scale * factor)).to(h.dtype)


def _at(places: Tensor | None, change: Callable[..., Tensor], x: Tensor, y: Tensor, *more: Any) -> Tensor:
    """y (…, out) with ``change(x, y, *more)`` at these places, flattened; None: all. x is what the layer is given."""
    if places is None:
        return change(x, y, *more)
    flat = y.flatten(0, -2)
    given = x.reshape(len(flat), *x.shape[y.dim() - 1 :])  # vectors, or tokens
    return flat.index_copy(0, places, change(given[places], flat[places], *more)).view_as(y)


class Replaced(Adapted):
    """A module trained whole: each adapter has its own copy of it, and the base stays as it was."""

    def copy(self, names: Names | None = None) -> nn.Module:
        """The copy that these adapters have, by default the active ones, or the base."""
        copies = self.in_force(names)  # one at most: `activate` refuses more
        return copies[0] if copies else self.base

    @property
    def weight(self) -> Tensor:
        return cast(Tensor, self.copy().weight)

    @property
    def bias(self) -> Tensor | None:
        return cast("Tensor | None", self.copy().bias)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.rows is None:
            return self.copy()(*args, **kwargs)
        groups = self.rows.groups()
        if len({id(self.copy(names)) for names in groups}) == 1:
            return self.copy(next(iter(groups)))(*args, **kwargs)
        x, *more = *args, *kwargs.values()
        if more or not isinstance(x, Tensor) or x.dim() < 2 or len(x) != len(self.rows.names):
            raise ModelError(
                f"A {type(self.base).__name__} of this model is trained whole and takes more than a batch of vectors, "
                f"so it cannot compute each row with its own adapter; generate with one adapter at a time."
            )
        parts = [(rows, self.copy(names)(x[rows])) for names, rows in groups.items()]
        y = parts[0][1].new_empty(len(x), *parts[0][1].shape[1:])
        for rows, part in parts:
            y = y.index_copy(0, torch.tensor(rows, device=y.device), part)
        return y


def training_dtype(weight: Tensor) -> torch.dtype:
    """The type in which an update of ``weight`` is trained: at least fp32."""
    if not weight.is_floating_point():
        return torch.float32
    return torch.promote_types(weight.dtype, torch.float32)


def embedding_factor(embedding: nn.Module) -> float:
    """What the embedding multiplies its rows by (Gemma: √dim, a tensor; BART: a number), else 1."""
    factor = getattr(embedding, "embed_scale", None)
    if isinstance(factor, Tensor):
        factor = factor.to(cast(Tensor, embedding.weight).dtype)
    return 1.0 if factor is None else float(factor)


def new_factors(base: nn.Module, rank: int, init: str) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank) whose product is zero, for a linear layer or an embedding (in = vocabulary).

    A linear layer's A is random and its B zero. An embedding is the other way round, as in microsoft/LoRA: its A is
    looked up, not multiplied by, so zeros there give a zero update and a random B gives A its first gradient.
    """
    like = cast(Tensor, base.weight)
    out_features, in_features = weight_shape(base)
    A = torch.zeros(rank, in_features, dtype=training_dtype(like), device=place_of_update(base))
    B = torch.zeros(out_features, rank, dtype=A.dtype, device=A.device)
    if isinstance(base, nn.Embedding):
        nn.init.normal_(B)
    elif init == "gaussian":
        nn.init.normal_(A, std=1 / rank)
    else:  # also where loftq finds nothing that was lost
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    return A, B


def new_triplets(base: nn.Module, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """P (out, rank), λ (rank, 1) and Q (rank, in) of a linear layer: λ zero, P and Q normal of deviation 0.02."""
    like = cast(Tensor, base.weight)
    out_features, in_features = weight_shape(base)
    shapes = (out_features, rank), (rank, 1), (rank, in_features)
    P, lam, Q = (torch.zeros(shape, dtype=training_dtype(like), device=place_of_update(base)) for shape in shapes)
    nn.init.normal_(Q, std=0.02)
    nn.init.normal_(P, std=0.02)
    return P, lam, Q


def weight_shape(base: nn.Module) -> tuple[int, int]:
    """(out, in) of what an update of ``base`` adds to: (dim, vocabulary) for an embedding; of experts one's."""
    if isinstance(base, nn.Embedding):
        return base.embedding_dim, base.num_embeddings
    if isinstance(base, Stack):
        return base.shape
    if isinstance(base, nn.Conv1d | nn.Conv2d | nn.Conv3d):  # (out, in · kernel)
        return base.out_channels, base.in_channels * math.prod(base.kernel_size)
    return frozen_weight(base).shape
