"""Low-rank updates of a mixture's experts: each expert of a projection has its own A and B, as PEFT has them with
``target_parameters``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from veneer.errors import ModelError, TargetError
from veneer.frozen.experts import (
    DenseStack,
    Experts,
    Products,
    Stack,
    experts_of,
    is_experts,
    own_copy,
    own_experts,
    plain_experts,
    projections,
    put_stack,
    stack_of,
    unknown_experts,
)
from veneer.updates.config import AdaLoRA, LoRA
from veneer.updates.layers import Adapted, LowRank
from veneer.updates.product import Factors, adapted_product


class ExpertPairs(LowRank):
    """ΔW_e = s · B_e A_e of each expert e, in PEFT's layout: A (experts · rank, in), an expert below the other, and
    B (out, rank · experts), whose column r · experts + e is column r of B_e."""

    def __init__(self, A: Tensor, B: Tensor, scale: float, experts: int) -> None:
        super().__init__(scale)
        self.experts = experts
        self.A = nn.Parameter(A)
        self.B = nn.Parameter(B)

    @property
    def rank(self) -> int:
        return self.A.shape[0] // self.experts

    def matrices(self) -> tuple[Tensor, Tensor]:
        """A (experts, rank, in) and B (experts, out, rank)."""
        A = self.A.view(self.experts, self.rank, -1)
        return A, self.B.view(-1, self.rank, self.experts).permute(2, 0, 1)

    def pairs(self) -> list[Factors]:
        """Each expert's."""
        A, B = self.matrices()
        # Apart at once: an index for each expert would make as many gradients of the whole.
        both = zip(A.unbind(0), B.contiguous().unbind(0), strict=True)
        return [Factors(*pair, self.scale) for pair in both]


class AdaptedStack(Adapted):
    """One projection of all experts and its updates: y = W_e x + b_e + Σ s · B_e A_e x for the tokens of expert e."""

    def products(self, bias: Tensor | None) -> Products:
        """As a `Stack`'s. Raises ModelError where rows of a pass have adapters of their own, as experts mix rows."""
        base = cast(Stack, self.base)
        updates = [update.pairs() for update in self._in_force() if isinstance(update, ExpertPairs)]
        if not updates:
            return base.products(bias)

        def product(expert: int, x: Tensor) -> Tensor:
            own = None if bias is None else bias[expert]
            return adapted_product(x, base.frozen(expert), own, [pairs[expert] for pairs in updates])

        return product

    def plain(self) -> nn.Parameter | None:
        """As a `Stack`'s, while no update is in force."""
        return None if self._in_force() else cast(Stack, self.base).plain()

    def _in_force(self) -> list[nn.Module]:
        groups = [()] if self.rows is None else list(self.rows.groups())
        if len({tuple(map(id, self.in_force(names))) for names in groups}) > 1:
            raise ModelError(
                "The experts of this model are adapted, and they compute tokens of all rows together, so rows cannot "
                "have adapters of their own; generate with one adapter at a time."
            )
        return self.in_force(None if self.rows is None else groups[0])


def expert_stacks(name: str, module: nn.Module) -> Iterator[tuple[str, Stack]]:
    """The projections of a module of experts called ``name`` that are its parameters, each by its own name."""
    if is_experts(module):
        for projection in projections(module):
            held = module._parameters.get(projection)
            if held is not None:
                yield f"{name}.{projection}" if name else projection, DenseStack(held, bool(module.is_transposed))


def hold_stack(model: nn.Module, path: str) -> None:
    """Make the parameter of experts that ``path`` names a module that can be wrapped; one that is a module stays."""
    parent, _, projection = path.rpartition(".")
    module = model.get_submodule(parent)
    held = module._parameters.get(projection)
    if held is not None and is_experts(module):
        put_stack(own_experts(module), projection, DenseStack(held, bool(module.is_transposed)))


def give_back_stacks(model: nn.Module) -> None:
    """Undo `hold_stack` where nothing wraps the module any more."""
    for module in experts_of(model).values():
        if isinstance(module, Experts):
            for projection in projections(module):
                held = module._modules.get(projection)
                if isinstance(held, DenseStack):
                    put_stack(module, projection, held.weight)
            if not module.__dict__.get("stored") and all(name in module._parameters for name in projections(module)):
                plain_experts(module)


def new_pairs(stack: Stack, rank: int, init: str, scale: float) -> ExpertPairs:
    """The update of a new adapter: A random for each expert, B zero."""
    (rows, columns), experts = stack.shape, stack.experts
    like = cast(Tensor, stack.weight)
    dtype = torch.promote_types(like.dtype, torch.float32)
    A = torch.zeros(experts * rank, columns, dtype=dtype, device=like.device)
    if init == "gaussian":
        nn.init.normal_(A, std=1 / rank)
    else:
        nn.init.kaiming_uniform_(A, a=5**0.5)
    return ExpertPairs(A, A.new_zeros(rows, rank * experts), scale, experts)


def adapter_keys(paths: list[str], modules: dict[str, nn.Module]) -> dict[str, str]:
    """The name of each experts' projection of an adapter → what PEFT calls it. PEFT wraps a module of experts once for
    each of its parameters, in their order, and the last wrapper is the outermost one."""
    keys: dict[str, str] = {}
    by_module: dict[str, list[str]] = {}
    for path in paths:
        by_module.setdefault(path.rpartition(".")[0], []).append(path)
    for parent, own in by_module.items():
        order = [f"{parent}.{name}" for name in projections(modules[parent])]
        for depth, path in enumerate(reversed([name for name in order if name in own])):
            keys[path] = parent + ".base_layer" * depth
    return keys


def merged_experts(module: Experts) -> nn.Module:
    """A module of experts like this one with the active updates in its weights, which are parameters again."""
    plain = own_copy(module)
    for name in projections(module):
        held = module._modules.get(name)
        if held is not None:
            put_stack(plain, name, nn.Parameter(_sum(held), requires_grad=False))
    in_fp32 = all(plain._parameters[name].dtype is torch.float32 for name in projections(plain))  # type: ignore[union-attr]
    # What experts in 16 bits are given may be in fp32.
    return plain_experts(plain) if in_fp32 else plain


def _sum(held: nn.Module) -> Tensor:
    """W0 + Σ ΔW of all experts in the layout and type of the base's own; an expert at a time."""
    base = cast(Stack, held.base if isinstance(held, Adapted) else held)
    updates = list(held.in_force()) if isinstance(held, Adapted) else []
    whole: Tensor | None = None
    with torch.no_grad():
        pairs = [update.pairs() for update in updates if isinstance(update, ExpertPairs)]
        for expert in range(base.experts):
            weight = base.frozen(expert).dense()
            exact = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
            for its in pairs:
                exact += (its[expert].B.to(exact.dtype) @ its[expert].A.to(exact.dtype)).mul_(its[expert].scale)
            own = exact.t() if base.transposed else exact
            whole = own.new_empty(base.experts, *own.shape, dtype=weight.dtype) if whole is None else whole
            whole[expert] = own
    assert whole is not None
    return whole


def experts_left_out(model: nn.Module, adapted: set[str], by_lora: bool) -> str:
    """What of a mixture's experts no active adapter adapts, in a sentence for each kind; "" where there is none.

    ``adapted``: the names of the modules that are; ``by_lora``: whether one of the adapters could adapt experts.
    """
    frozen: dict[str, int] = {}
    for path, module in experts_of(model).items():
        if path.endswith(".base") or ".updates." in path:  # trained whole
            continue
        for name in projections(module):
            full = f"{path}.{name}"
            if full not in adapted:
                held = stack_of(module, name)
                stack = cast(Stack, held.base if isinstance(held, Adapted) else held)
                ending = ".".join(full.rsplit(".", 2)[-2:])
                frozen[ending] = frozen.get(ending, 0) + stack.experts * stack.shape[0] * stack.shape[1]
    remedy = "to adapt them, name them in target_parameters" if by_lora else "AdaLoRA adapts no experts, LoRA does"
    sentences = (
        [f"{sum(frozen.values()):,} parameters of {', '.join(frozen)} are not adapted; {remedy}."] if frozen else []
    )
    if unknown := unknown_experts(model):
        sentences.append(
            f"{sum(unknown.values()):,} parameters of {', '.join(unknown)} are not adapted, as these are no linear "
            f"layers of a known kind."
        )
    return " ".join(sentences)


def refuse_for_experts(names: list[str], config: LoRA | AdaLoRA) -> None:
    """Raises TargetError where ``config`` adapts these projections of experts in a way that they cannot be."""
    if names and isinstance(config, AdaLoRA):
        raise TargetError(f"{names[0]} is a parameter of experts, which AdaLoRA does not adapt; use LoRA.")
    if names and isinstance(config, LoRA) and config.init in ("loftq", "pissa"):
        raise TargetError(
            f"{names[0]} is a parameter of experts, whose updates do not start from their weights; use init = "
            f"'kaiming', or leave the experts out."
        )
    if names and isinstance(config, LoRA) and config.dora:
        raise TargetError(
            f"{names[0]} is a parameter of experts, whose outputs have no magnitudes, here as in PEFT; leave dora out, "
            f"or the experts."
        )
    if names and config.dropout:
        raise TargetError(
            f"{names[0]} is a parameter of experts, whose updates have no dropout in PEFT, which could not load the "
            f"adapter; use dropout = 0, or leave the experts out."
        )
