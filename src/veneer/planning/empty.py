"""A model from its config alone: every module in its place, of its shape, kept as a run would keep it; no values.

Its tensors are fake ones (`torch._subclasses.fake_tensor`): operations on them give fake results of the right shape and
type, and take no memory. All of this happens within `no_values`.
"""

from __future__ import annotations

import copy
import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.pytorch_utils import Conv1D

from veneer.device import CPU
from veneer.errors import ModelError
from veneer.frozen.blockwise import NESTED_BLOCK, PANEL, Quantised, expand, table_of
from veneer.frozen.codebook import dynamic8
from veneer.frozen.compute import computing
from veneer.frozen.config import CODE_BITS
from veneer.frozen.experts import Experts, QuantisedStack, experts_of, own_experts, projections, put_stack
from veneer.frozen.layers import DTYPES, compute_in, head_in_fp32, linear_layers
from veneer.frozen.weight import BlockwiseWeight, QuantisedLinear, frozen_weight
from veneer.kernels.dense import linear
from veneer.models.checkpoint import Checkpoint, Task, checkpoint_of, name_classes
from veneer.models.composite import class_for
from veneer.models.library import call_library, quiet
from veneer.models.load import dense_dtype, storage_named
from veneer.models.stream import is_read_whole
from veneer.planning.ledger import Times

_T = TypeVar("_T")


class _Mode(FakeTensorMode):  # type: ignore[no-untyped-call]
    """Copied with a tensor of its own, a mode would free its weak references to storages twice, and with them storages
    that are in use."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Mode:
        return self

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._grouped_mm.default:  # torch's own fake one refuses what is not bf16 and a GPU's
            return _grouped_product(*args, **(kwargs or {}))
        return super().dispatch(func, types, args, kwargs)


def _grouped_product(
    left: Tensor, right: Tensor, offs: Tensor | None = None, bias: None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """What `torch.nn.functional.grouped_mm` makes, the products of a mixture of experts: a matrix for each group where
    both are matrices whose inner dimension is grouped, or both are stacks of them, else one for all."""
    groups = () if left.dim() != right.dim() else (len(left if offs is None else offs),)
    return left.new_empty(*groups, left.shape[-2], right.shape[-1], dtype=out_dtype or left.dtype)


class Base(NamedTuple):
    """What a model is before it is loaded: its config, what it is for, and how its weights will be kept."""

    name: str
    config: Any  # transformers'
    kind: str  # causal, seq2seq or classification
    storage: str  # of the linear layers
    block_size: int
    double_quantisation: bool
    dense: torch.dtype  # of all else
    mapped: tuple[str, ...] = ()  # which of its codes, scales, dense are a file's pages, to be dropped and read again
    read: int = 0  # bytes of a number in a file of another type, whose pages stay beside the weights while it is read
    compute: torch.dtype = torch.float32  # of activations and products on the CPU; a GPU's are in `dense`

    def kept_as(self, storage: str, dense_storage: str = "fp32") -> Base:
        """The same model loaded with another ``storage``, and of codes another ``dense_storage``.

        Raises ModelError for one that has codes already.
        """
        if self.storage in CODE_BITS:
            raise ModelError(f"{self.name} is kept as {self.storage}, and cannot be loaded as {storage}.")
        dense = DTYPES[storage if storage in DTYPES else dense_storage]
        written = getattr(self.config, "dtype", None)
        whole = storage in DTYPES or is_read_whole(self.config)
        mapped = ("dense",) if whole and written is dense else ()
        read = written.itemsize if whole and isinstance(written, torch.dtype) and not mapped else 0
        return self._replace(storage=storage, dense=dense, mapped=mapped, read=read)


def base_of(
    source: str | Checkpoint, storage: str, block_size: int, double_quantisation: bool, task: Task = "auto",
    labels: list[str] | None = None, dense_storage: str = "fp32", compute: str = "auto",
) -> Base:  # fmt: skip
    """The base that `veneer.load` would make of a model; only its config is read.

    One that writes no text becomes a classifier, of the classes that ``labels`` name, or else its config; of two where
    that names none.

    Raises ModelError where there is no such model, ConfigError for a ``dense_storage`` that `load` would refuse.
    """
    checkpoint = checkpoint_of(source)
    config = copy.deepcopy(checkpoint.config)
    name_classes(config, labels, task)
    kind = checkpoint.task(task, labels or (None if checkpoint.generates_text else [*config.id2label.values()]))
    plain = Base(
        checkpoint.called, config, kind, "fp32", block_size, double_quantisation, torch.float32,
        compute=computing(compute, storage_named(checkpoint, storage)).dtype,
    )  # fmt: skip
    dense_dtype(checkpoint, storage, dense_storage)
    base = plain.kept_as(storage, dense_storage)
    if not checkpoint.is_bitsandbytes:
        return base
    if storage == "fp32" and dense_storage != "fp32":
        base = base.kept_as(dense_storage)
    said = config.quantization_config
    said = said if isinstance(said, dict) else said.to_dict()
    del config.quantization_config
    dense = ("dense",) if getattr(config, "dtype", None) is base.dense else ()
    return base._replace(
        storage=said.get("bnb_4bit_quant_type", "fp4"), block_size=64,
        double_quantisation=bool(said.get("bnb_4bit_use_double_quant")), mapped=("codes", "scales", *dense), read=0,
    )  # fmt: skip


def no_values(work: Callable[[], _T]) -> _T:
    """``work()``, in which new tensors have shapes and no values.

    In a thread of its own, which has no expanding buffer yet: the next real product would expand into a fake one.
    """
    for storage in (name for name, bits in CODE_BITS.items() if bits == 4):  # tables that are made once, for real
        table_of(storage, torch.device(CPU))
    dynamic8()
    results: list[_T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            with _unlogged(), warnings.catch_warnings(), _Mode(allow_non_fake_inputs=True):
                warnings.simplefilter("ignore")
                results.append(work())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return results[0]


@contextmanager
def _unlogged() -> Iterator[None]:
    """Inside, an operation that has no fake result is an exception alone; torch would print its traceback besides."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def empty_model(base: Base, on_cpu: bool = True, times: Times | None = None) -> Any:
    """The model, in eval mode, as it is kept for products ``on_cpu`` or on a GPU. Within `no_values`.

    ``times``: of the ledger that counts its operations, of which those of many panels are done once.
    """
    times = times or Times()
    with quiet():
        model = call_library(
            class_for(base.kind, base.config, base.name).from_config, f"{base.name} cannot be planned", base.config,
            trust_remote_code=False, dtype=base.dense,
        )  # fmt: skip
    if base.storage in CODE_BITS:
        for name in linear_layers(model):
            model.set_submodule(name, _in_codes(model.get_submodule(name), base, times))
        for module in experts_of(model).values():
            for projection in projections(module):
                put_stack(own_experts(module), projection, _stack_in_codes(module, projection, base, times))
    if on_cpu and base.compute is not base.dense:
        compute_in(model, base.compute)
    elif on_cpu and base.compute is not torch.float32:
        head_in_fp32(model)
    plan_experts(model)
    return model.eval()


def plan_experts(model: nn.Module) -> None:
    """Which tokens an expert gets is in no plan: one of them gets all, of which it makes what all of them make."""
    for module in model.modules():
        if isinstance(module, Experts):
            module.__dict__["groups"] = _one_group


def _one_group(top_k_index: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    pairs = torch.arange(top_k_index.numel(), device=top_k_index.device)
    yield 0, pairs // top_k_index.shape[-1], pairs % top_k_index.shape[-1]


def _stack_in_codes(module: Any, projection: str, base: Base, times: Times) -> QuantisedStack:
    experts, *shape = getattr(module, projection).shape
    rows, columns = reversed(shape) if module.is_transposed else shape
    one = _quantised(rows, columns, base)
    made = QuantisedStack([one], base.dense, module.is_transposed)
    for name, tensor in made.named_buffers():
        setattr(made, name, tensor.new_empty(experts, *tensor.shape[1:]))
    made.experts = experts
    made.__dict__["frozen"] = lambda expert: _OnePanel(one, base.dense, times, experts)
    return made


def _in_codes(layer: nn.Module, base: Base, times: Times) -> QuantisedLinear:
    quantised = _quantised(*frozen_weight(layer).shape, base)
    bias = cast("Tensor | None", layer.bias)
    made = QuantisedLinear(quantised, bias, base.dense, isinstance(layer, Conv1D))
    made.__dict__["frozen"] = lambda: _OnePanel(made.quantised, made.dtype, times)
    return made


def _quantised(rows: int, columns: int, base: Base) -> Quantised:
    size = rows * columns
    blocks = -(-size // base.block_size)
    double = base.double_quantisation
    return Quantised(
        base.storage, base.block_size, (rows, columns),
        torch.empty(-(-size * CODE_BITS[base.storage] // 8), dtype=torch.uint8),
        torch.empty(blocks, dtype=torch.uint8 if double else torch.float32),
        torch.empty(-(-blocks // NESTED_BLOCK)) if double else None,
        torch.empty(()) if double else None,
    )  # fmt: skip


class _OnePanel(BlockwiseWeight):
    """Makes what a product by panels makes, but expands one of them for all: a large weight has many.

    ``experts``: how many weights share the rows of a product, each of which is expanded once if it gets one.
    """

    def __init__(self, quantised: Quantised, dtype: torch.dtype, times: Times, experts: int = 1) -> None:
        super().__init__(quantised, dtype)
        self._times, self._experts = times, experts

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        rows, height = self.shape[0], self._height()
        y = x.new_empty(len(x), rows) if height < rows else None
        panel = self._panel(x, rows / height)
        with self._times.repeated(rows / height):
            part = linear(x, panel)
            if y is None:
                y = part
            else:
                y[:, :height] = part
        return y if bias is None else y.add_(bias.detach())

    def product_transposed(self, grad: Tensor) -> Tensor:
        rows, height = self.shape[0], self._height()
        panel = self._panel(grad, rows / height)
        y = linear(grad[:, :height], panel.t())
        if height < rows:
            y = y.to(torch.promote_types(y.dtype, torch.float32))
            with self._times.repeated(rows / height - 1):
                y.add_(linear(grad[:, :height], panel.t()))
        return y.to(grad.dtype)

    def _panel(self, rows: Tensor, panels: float) -> Tensor:
        with self._times.repeated(panels * max(1, min(self._experts, len(rows)))):
            return expand(self._quantised, 0, self._height(), rows.dtype)

    def _height(self) -> int:
        return min(self.shape[0], max(1, PANEL // self.shape[1]))
