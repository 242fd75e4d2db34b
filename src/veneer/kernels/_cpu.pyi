"""The C++ kernels, csrc/module.cpp; absent where the install found no compiler. Tensors come as addresses."""

from collections.abc import Callable

_Heads = tuple[int, int, int]  # an address, and how many elements lie between tokens and between heads

def variants() -> list[str]:
    """The variants that this machine runs, the fastest last."""

def quantise4(
    variant: str,
    source: int,
    count: int,
    boundaries: int,
    order: int,
    block: int,
    codes: int,
    absmax: int,
    threads: int,
    /,
) -> None: ...
def quantise8(
    variant: str, source: int, count: int, boundaries: int, block: int, codes: int, absmax: int, threads: int, /
) -> None: ...
def nearest8(variant: str, values: int, count: int, boundaries: int, found: int, threads: int, /) -> None: ...
def round_blocks(variant: str, values: int, blocks: int, bits: int, least: bool, out: int, threads: int, /) -> None: ...
def dequantise4(
    variant: str,
    codes: int,
    table: int,
    scales: int,
    nested_table: int,
    nested_scales: int,
    offset: int,
    block: int,
    nested_shift: int,
    start: int,
    stop: int,
    out: int,
    bf16: bool,
    threads: int,
    /,
) -> None: ...
def dequantise8(
    variant: str,
    codes: int,
    scales: int,
    nested_table: int,
    nested_scales: int,
    offset: int,
    block: int,
    nested_shift: int,
    start: int,
    stop: int,
    out: int,
    bf16: bool,
    threads: int,
    /,
) -> None: ...
def product4(
    variant: str,
    x: int,
    tokens: int,
    codes: int,
    table: int,
    scales: int,
    nested_table: int,
    nested_scales: int,
    offset: int,
    block: int,
    nested_shift: int,
    rows: int,
    columns: int,
    out: int,
    threads: int,
    /,
) -> None: ...
def product8(
    variant: str,
    x: int,
    tokens: int,
    codes: int,
    scales: int,
    nested_table: int,
    nested_scales: int,
    offset: int,
    block: int,
    nested_shift: int,
    rows: int,
    columns: int,
    out: int,
    threads: int,
    /,
) -> None: ...
def product4_int8(
    variant: str,
    x: int,
    tokens: int,
    codes: int,
    levels: int,
    step: float,
    scales: int,
    nested_table: int,
    nested_scales: int,
    offset: int,
    block: int,
    nested_shift: int,
    rows: int,
    columns: int,
    out: int,
    threads: int,
    /,
) -> None: ...
def product8_int8(
    variant: str, x: int, tokens: int, codes: int, scales: int, rows: int, columns: int, out: int, threads: int, /
) -> None: ...
def rms_norm(
    variant: str,
    x: int,
    weight: int,
    eps: float,
    once: bool,
    rows: int,
    width: int,
    out: int,
    inverses: int,
    bf16: bool,
    threads: int,
    /,
) -> None: ...
def rms_norm_backward(
    variant: str,
    grad: int,
    x: int,
    inverses: int,
    weight: int,
    once: bool,
    rows: int,
    width: int,
    out: int,
    bf16: bool,
    threads: int,
    /,
) -> None: ...
def gated(variant: str, gate: int, up: int, count: int, gelu: bool, out: int, bf16: bool, threads: int, /) -> None: ...
def gated_backward(
    variant: str,
    grad: int,
    gate: int,
    up: int,
    count: int,
    gelu: bool,
    grad_gate: int,
    grad_up: int,
    bf16: bool,
    threads: int,
    /,
) -> None: ...
def cross_entropy(
    variant: str,
    logits: int,
    labels: int,
    rows: int,
    width: int,
    smoothing: float,
    gradient: bool,
    losses: int,
    bf16: bool,
    threads: int,
    /,
) -> None: ...
def update_product(
    variant: str,
    x: int,
    A: int,
    B: int,
    scale: float,
    tokens: int,
    into: int,
    out: int,
    rank: int,
    low: int,
    y: int,
    threads: int,
    /,
) -> None: ...
def update_product_backward(
    variant: str,
    grad: int,
    x: int,
    low: int,
    A: int,
    B: int,
    scale: float,
    tokens: int,
    into: int,
    out: int,
    rank: int,
    grad_x: int,
    grad_A: int,
    grad_B: int,
    threads: int,
    /,
) -> None: ...
def rotate(
    variant: str,
    x: int,
    of_batch: int,
    of_head: int,
    of_token: int,
    cosines: int,
    sines: int,
    for_all: bool,
    batch: int,
    heads: int,
    tokens: int,
    dim: int,
    transposed: bool,
    out: int,
    bf16: bool,
    threads: int,
    /,
) -> None: ...
def has_tiles(variant: str, /) -> bool: ...

class Weight16:
    """A frozen weight as products in bf16 take it."""

    @staticmethod
    def dense(kind: int, values: int, rows: int, columns: int, stride: int, /) -> Weight16: ...
    @staticmethod
    def four_bits(
        codes: int,
        table: int,
        scales: int,
        nested_table: int,
        nested_scales: int,
        offset: int,
        block: int,
        nested_shift: int,
        rows: int,
        columns: int,
        /,
    ) -> Weight16: ...
    @staticmethod
    def int8(
        codes: int,
        scales: int,
        nested_table: int,
        nested_scales: int,
        offset: int,
        block: int,
        nested_shift: int,
        rows: int,
        columns: int,
        /,
    ) -> Weight16: ...

def adapted_room(variant: str, tokens: int, weight: Weight16, transposed: bool, rank: int, threads: int, /) -> int: ...
def adapted(
    variant: str,
    x: int,
    tokens: int,
    weight: Weight16,
    transposed: bool,
    bias: int,
    A: int,
    B: int,
    rank: int,
    scale: float,
    low: int,
    y: int,
    room: int,
    threads: int,
    /,
) -> None: ...
def adapted_backward(
    variant: str,
    grad: int,
    x: int,
    tokens: int,
    weight: Weight16,
    transposed: bool,
    A: int,
    B: int,
    rank: int,
    scale: float,
    low: int,
    grad_x: int,
    grad_A: int,
    grad_B: int,
    room: int,
    threads: int,
    /,
) -> None: ...
def attention(
    queries: _Heads,
    keys: _Heads,
    values: _Heads,
    lengths: list[int],
    heads: int,
    key_heads: int,
    dim: int,
    scaling: float,
    causal: bool,
    window: int,
    out: int,
    lse: int,
    threads: int,
    /,
) -> None: ...
def attention_backward(
    grad: _Heads,
    queries: _Heads,
    keys: _Heads,
    values: _Heads,
    out: _Heads,
    lse: int,
    lengths: list[int],
    heads: int,
    key_heads: int,
    dim: int,
    scaling: float,
    causal: bool,
    window: int,
    grad_queries: int,
    grad_keys: int,
    grad_values: int,
    threads: int,
    /,
) -> None: ...
def use_heap() -> str: ...

class Heap:
    def __init__(self, size: int, page: int, give_back: Callable[[int, int], None]) -> None: ...
    def take(self, size: int) -> int: ...
    def let_go(self, start: int) -> None: ...
    @property
    def held(self) -> int: ...

class Linear:
    @staticmethod
    def four_bits(
        codes: int,
        table: int,
        scales: int,
        nested_table: int,
        nested_scales: int,
        offset: int,
        block: int,
        nested_shift: int,
        rows: int,
        columns: int,
        levels: int,
        step: float,
        /,
    ) -> Linear: ...
    @staticmethod
    def int8(
        codes: int,
        scales: int,
        nested_table: int,
        nested_scales: int,
        offset: int,
        block: int,
        nested_shift: int,
        rows: int,
        columns: int,
        /,
    ) -> Linear: ...
    @staticmethod
    def eight_bits(codes: int, scales: int, rows: int, columns: int, /) -> Linear: ...
    @staticmethod
    def dense(weight: int, rows: int, columns: int, /) -> Linear: ...
    def set_bias(self, bias: int, /) -> None: ...
    def add_update(self, A: int, B: int, rank: int, scale: float, /) -> None: ...

class Decoder:
    def __init__(
        self,
        variant: str,
        heads: int,
        key_heads: int,
        dim: int,
        room: int,
        scaling: float,
        eps: float,
        cosines: int,
        sines: int,
        norm: int,
        head: Linear,
        /,
    ) -> None: ...
    def add_layer(self, norms: list[int], linears: list[Linear], keys: int, values: int, /) -> None: ...
    def step(self, x: int, sequences: int, positions: int, count: int, logits: int, threads: int, /) -> None: ...
