"""A mixture's experts, which transformers keeps as one 3-D parameter for each projection: their products, a panel of an
expert at a time, over weights in codes or in a type of their own.

The definition is transformers' own forward of them (``experts_implementation="eager"``): each expert that got tokens
computes these alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.frozen.blockwise import Quantised, quantise
from veneer.frozen.weight import BlockwiseWeight, DenseWeight, FrozenWeight, InCodes, frozen_product

Products = Callable[[int, Tensor], Tensor]  # an expert's number and its x (n, in) → y (n, out)
_TENSORS = ("codes", "scales", "nested_scales", "offset")  # of a Quantised, here one row for each expert


class Stack(nn.Module):
    """W (experts, out, in) of one projection of all experts; frozen, differentiable in x.

    ``transposed``: the model stores it as (experts, in, out); ``shape`` is (out, in) all the same.
    """

    transposed: bool
    experts: int
    shape: tuple[int, int]  # of one expert

    def frozen(self, expert: int) -> FrozenWeight:
        """The weight (out, in) of one expert, as it is kept."""
        raise NotImplementedError

    def products(self, bias: Tensor | None) -> Products:
        """The products by the experts' weights; ``bias`` (experts, out)."""
        return lambda expert, x: frozen_product(x, self.frozen(expert), None if bias is None else bias[expert])

    def plain(self) -> nn.Parameter | None:
        """The model's own parameter, where that is all there is to this."""
        return None

    def dense(self) -> Tensor:
        """A new tensor of all experts' weights, laid out as the model has them."""
        parts = [self.frozen(expert).dense() for expert in range(self.experts)]
        return torch.stack([part.t() if self.transposed else part for part in parts])


class DenseStack(Stack):
    """The parameter itself, (experts, out, in) or transposed."""

    def __init__(self, weight: nn.Parameter, transposed: bool) -> None:
        super().__init__()
        self.transposed = transposed
        self.experts, rows, columns = weight.shape
        self.shape = (columns, rows) if transposed else (rows, columns)
        self.weight = weight

    def plain(self) -> nn.Parameter:
        return self.weight

    def frozen(self, expert: int) -> DenseWeight:
        return DenseWeight(self.weight[expert], self.transposed)

    def products(self, bias: Tensor | None) -> Products:
        if not (self.weight.requires_grad and torch.is_grad_enabled()):
            return super().products(bias)
        parts = self.weight.unbind(0)  # once: each index of its own would have a gradient as large as all experts

        def product(expert: int, x: Tensor) -> Tensor:
            part = parts[expert].t() if self.transposed else parts[expert]
            return F.linear(x, part.to(x.dtype), None if bias is None else bias[expert].to(x.dtype))

        return product


class QuantisedStack(InCodes, Stack):
    """The experts of one projection in codes, each quantised by itself."""

    codes: Tensor  # uint8 (experts, ⌈out · in · bits / 8⌉)
    scales: Tensor  # (experts, blocks)
    nested_scales: Tensor | None  # (experts, ⌈blocks / 256⌉)
    offset: Tensor | None  # (experts,)

    def __init__(self, experts: list[Quantised], dtype: torch.dtype, transposed: bool = False) -> None:
        super().__init__()
        first = experts[0]
        self.transposed, self.dtype = transposed, dtype
        self.experts, self.shape = len(experts), first.shape
        self.storage, self.block_size = first.storage, first.block_size
        for name in _TENSORS:
            parts = [getattr(quantised, name) for quantised in experts]
            self.register_buffer(name, None if parts[0] is None else torch.stack(parts))

    @classmethod
    def of(
        cls, experts: Iterable[Tensor], name: str, dtype: torch.dtype, transposed: bool, **how: Any
    ) -> QuantisedStack:
        """``experts``: each one's matrix, (out, in) or transposed, which is not needed once it is quantised; ``how``:
        the options of `quantise`. Raises ModelError for a value that is not finite."""
        parts = [
            quantise(part.t() if transposed else part, f"expert {number} of {name}", **how)
            for number, part in enumerate(experts)
        ]
        return cls(parts, dtype, transposed)

    def quantised(self, expert: int) -> Quantised:
        """The codes and scales of one expert: views."""
        tensors = (getattr(self, name) for name in _TENSORS)
        return Quantised(
            self.storage, self.block_size, self.shape, *(None if t is None else t[expert] for t in tensors)  # type: ignore[arg-type]
        )  # fmt: skip

    @property
    def weight(self) -> Tensor:
        """An empty stand-in of W0's type and device, as a QuantisedLinear has."""
        return torch.empty(0, self.shape[1], dtype=self.dtype, device=self.codes.device)

    def frozen(self, expert: int) -> FrozenWeight:
        return BlockwiseWeight(self.quantised(expert), self.dtype)

    def extra_repr(self) -> str:
        return f"experts={self.experts}, shape={self.shape}, storage={self.storage}"


class Experts(nn.Module):
    """What `own_experts` makes of transformers' module of all experts, in place: the same attributes and parameters.

    Each projection is the model's parameter or a module in its place with `products`: a `Stack`, or what an adapter
    puts around it. ``kind`` is the class that it was.
    """

    kind: type[nn.Module]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """x (tokens, in), each token's experts (tokens, k) and their weights (tokens, k) → Σ weight · expert(x)."""
        its = cast(Any, self)
        if (as_it_was := self._as_it_was()) is not None:
            y: Tensor = as_it_was.forward(hidden_states, top_k_index, top_k_weights)  # the caller's hooks are done once
            return y
        into, down = (products(self, name) for name in projections(self))
        y = torch.zeros_like(hidden_states)
        for expert, tokens, places in self.groups(top_k_index):
            h = into(expert, hidden_states[tokens])
            h = its.kind._apply_gate(self, h) if its.has_gate else its.act_fn(h)
            h = down(expert, h)
            if its.has_post_expert_norm:
                h = its.post_expert_norm(h)
            y.index_add_(0, tokens, (h * top_k_weights[tokens, places, None]).to(y.dtype))
        return y

    def _as_it_was(self) -> nn.Module | None:
        """The module with its parameters in their places, where adapters are around them and none is in force: its own
        class computes what it did, to the last bit."""
        held = {name: self._modules[name] for name in projections(self) if name in self._modules}
        parts = {name: cast(Any, module).plain() for name, module in held.items()}
        if not parts or "stored" in self.__dict__ or any(part is None for part in parts.values()):
            return None
        made = own_copy(self)
        for name, part in parts.items():
            put_stack(made, name, part)
        return plain_experts(made)

    def groups(self, top_k_index: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Each expert that got tokens, which tokens, and at which of their k places it is."""
        its, chosen = cast(Any, self), top_k_index.shape[-1]
        pairs = top_k_index.reshape(-1)
        order = pairs.argsort(stable=True)
        start = 0
        # One transfer for all. Beyond the last expert is who got none, when experts are on several devices.
        for expert, count in enumerate(pairs.bincount(minlength=its.num_experts).tolist()[: its.num_experts]):
            if count:
                own = order[start : start + count]
                yield expert, own // chosen, own % chosen
            start += count


def is_experts(module: nn.Module) -> bool:
    """Whether this is one of transformers' modules of experts whose forward is the common one, or is already ours."""
    its = cast(Any, module)
    if isinstance(module, Experts):
        return True
    if not {"has_gate", "has_bias", "is_transposed", "_is_expert_parallel"} <= set(module.__dict__):
        return False
    held = [its._parameters.get(name) for name in projections(module)]
    return all(isinstance(weight, nn.Parameter) and weight.dim() == 3 for weight in held)


def experts_of(model: nn.Module) -> dict[str, nn.Module]:
    """Each module of experts by its name."""
    return {name: module for name, module in model.named_modules() if is_experts(module)}


def projections(module: nn.Module) -> tuple[str, str]:
    """The names of the two projections of a module of experts: into the hidden layer, and out of it."""
    return ("gate_up_proj" if cast(Any, module).has_gate else "up_proj", "down_proj")


def own_experts(module: nn.Module) -> Experts:
    """Make a module of transformers' experts an `Experts`, in place: what else holds it, holds it still."""
    if not isinstance(module, Experts):
        module.__dict__["kind"] = type(module)
        module.__class__ = Experts
    return cast(Experts, module)


def own_copy(module: Experts) -> Experts:
    """A shallow copy with dictionaries of its own for what it holds."""
    made = Experts.__new__(Experts)
    made.__dict__ = {**module.__dict__, "_parameters": {**module._parameters}, "_modules": {**module._modules}}
    return made


def plain_experts(module: Experts) -> nn.Module:
    """The module as it was before `own_experts`, in place; its projections are parameters again."""
    module.__class__ = module.__dict__.pop("kind")
    return module


def stack_of(module: nn.Module, name: str) -> nn.Module:
    """What one projection of the experts is kept as: the module in its place, or a `DenseStack` of the parameter."""
    held = getattr(module, name)
    return DenseStack(held, cast(Any, module).is_transposed) if isinstance(held, nn.Parameter) else held


def put_stack(module: nn.Module, name: str, stack: nn.Module | nn.Parameter) -> None:
    """Put a module, or again a parameter, in the place of one projection; parameters keep their order."""
    order = [*projections(module), *(key for key in module._parameters if key not in projections(module))]
    module._parameters.pop(name, None)
    module._modules.pop(name, None)
    if isinstance(stack, nn.Parameter):
        module._parameters[name] = stack
        for key in [key for key in order if key in module._parameters]:
            module._parameters[key] = module._parameters.pop(key)
    else:
        module._modules[name] = stack


def products(module: nn.Module, name: str) -> Products:
    """The products by one projection, biases included."""
    bias = getattr(module, f"{name}_bias") if cast(Any, module).has_bias else None
    stack: Any = stack_of(module, name)
    if bias is not None and bias.requires_grad:
        plain, parts = stack.products(None), bias.unbind(0)
        return lambda expert, x: plain(expert, x) + parts[expert]
    return cast(Products, stack.products(bias))


def quantise_experts(module: nn.Module, name: str, **how: Any) -> None:
    """Keep the experts of the module called ``name`` in codes, in place; ``how``: as `quantise`."""
    experts = own_experts(module)
    for projection in projections(module):
        weight = getattr(module, projection)
        if isinstance(weight, nn.Parameter):
            transposed = cast(Any, module).is_transposed
            made = QuantisedStack.of(weight.detach(), f"{name}.{projection}", weight.dtype, transposed, **how)
            put_stack(experts, projection, made)


def unknown_experts(model: nn.Module) -> dict[str, int]:
    """Class of each kind of module that has 3-D parameters and is not known here → how many parameters these are."""
    kinds: dict[str, int] = {}
    for module in model.modules():
        known = is_experts(module) or isinstance(module, Stack)
        if not known and not type(module).__module__.startswith("torch."):
            size = sum(p.numel() for p in module.parameters(recurse=False) if p.dim() == 3)
            if size:
                kinds[type(module).__name__] = kinds.get(type(module).__name__, 0) + size
    return kinds
