"""The C++ kernels, csrc/module.cpp; absent where the install found no compiler. Tensors come as addresses."""

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
def nearest8(variant: str, values: int, count: int, boundaries: int, found: int, threads: int, /) -> None: ...
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
