"""The kernels compiled for cards that are not there: whether they fit, and whether they round as they promise."""

from __future__ import annotations

import re
import subprocess
from typing import NamedTuple

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
pytestmark = pytest.mark.unit

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from veneer.kernels.triton import adamw, cross_entropy, expand, few_rows, gates, norm, quantise, rotation  # noqa: E402

# By compute capability, bytes of shared memory that a block may have (CUDA C++ Programming Guide, technical
# specifications); by AMD architecture, of its LDS.
CARDS = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99, "gfx942": 64, "gfx1100": 64}
WEIGHT = {
    "codes": "*u8", "table": "*fp32", "scales": "*u8", "nested_table": "*fp32", "nested_scales": "*fp32",
    "offset": "*fp32",
}  # fmt: skip
NF4 = {"FOUR": True, "BLOCK": 64, "NESTED_BLOCK": 256}
INT8 = {"FOUR": False, "BLOCK": 64, "NESTED_BLOCK": 256}


class Case(NamedTuple):
    kernel: object
    arguments: dict[str, str]
    constants: dict[str, object]
    warps: int = 4
    exact: bool = False  # whether it promises the definition's bits


def many(kind: str, names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), kind)


_EXPANDED = WEIGHT | many("*bf16", "out") | many("i32", "first row_blocks stride")
_NORM = (
    many("*bf16", "x residual weight total y grad beside out")
    | many("*fp32", "inverse")
    | many("i32", "dim")
    | {"eps": "fp32"}
)
_GATE = many("*bf16", "gate up y grad grad_gate grad_up") | many("i32", "elements")
_QUANTISE = (
    many("*fp32", "weight boundaries scales values") | many("*u8", "codes order") | many("i32", "elements blocks")
)
CASES = {
    "expand nf4": Case(expand.expand_blocks, _EXPANDED, NF4 | {"BLOCKS": 16}, exact=True),
    "expand int8": Case(expand.expand_blocks, _EXPANDED, INT8 | {"BLOCKS": 16}, exact=True),
    "expand any": Case(
        expand.expand_rows, WEIGHT | many("*bf16", "out") | many("i32", "first columns stride"), NF4 | {"WIDTH": 1024},
        exact=True,
    ),
    "quantise 4": Case(quantise.quantise_4_bits, _QUANTISE, {"BLOCK": 64, "HALF": 32, "BLOCKS": 32}, exact=True),
    "quantise 8": Case(quantise.quantise_8_bits, _QUANTISE, {"BLOCK": 64, "WIDTH": 64, "BLOCKS": 32}, exact=True),
    "quantise 4 of blocks of 4,096": Case(
        quantise.quantise_4_bits, _QUANTISE, {"BLOCK": 4096, "HALF": 2048, "BLOCKS": 1}, exact=True
    ),
    "nearest 8": Case(quantise.nearest_code, _QUANTISE, {"WIDTH": 1024}, exact=True),
    "few rows": Case(
        few_rows.few_rows_by_codes,
        WEIGHT | many("*bf16", "x y") | many("i32", "tokens columns rows"),
        NF4 | {"FEW": 16, "OUT": 16, "COLUMNS": 128},
    ),
    "few rows in fp32": Case(
        few_rows.few_rows_by_codes,
        WEIGHT | many("*fp32", "x y") | many("i32", "tokens columns rows"),
        INT8 | {"FEW": 16, "OUT": 16, "COLUMNS": 32},
    ),
    "norm": Case(norm.rms_norm_rows, _NORM, {"ADDS": True, "ONCE": False, "WIDTH": 4096}, warps=8),
    "longest norm": Case(norm.rms_norm_rows, _NORM, {"ADDS": True, "ONCE": False, "WIDTH": 16384}, warps=16),
    "norm's gradient": Case(norm.rms_norm_gradient, _NORM, {"ADDS": True, "ONCE": False, "WIDTH": 4096}, warps=8),
    "longest norm's gradient": Case(
        norm.rms_norm_gradient, _NORM, {"ADDS": True, "ONCE": False, "WIDTH": 16384}, warps=16
    ),
    "SwiGLU": Case(gates.gated, _GATE, {"GELU": False, "WIDTH": 1024}),
    "GeGLU's gradient": Case(gates.gated_gradient, _GATE, {"GELU": True, "WIDTH": 1024}),
    "rotation": Case(
        rotation.rotate_heads,
        many("*bf16", "x cosines sines out")
        | many("i32", "batch_stride head_stride token_stride table_stride tokens heads half"),
        {"TRANSPOSED": False, "HEADS": 32, "HALF": 64}, exact=True,
    ),
    "AdamW": Case(
        adamw.adamw_step,
        many("*fp32", "values gradient mean square")
        | many("fp32", "keep_share rate beta1 rest1 beta2 rest2 root_factor eps") | many("i32", "elements"),
        {"WIDTH": 1024}, exact=True,
    ),
    "cross-entropy": Case(
        cross_entropy.cross_entropy_rows,
        {"logits": "*bf16", "labels": "*i64", "losses": "*fp64", "width": "i32", "stride": "i32", "smoothing": "fp32"},
        {"GRADIENT": True, "WIDTH": 4096}, warps=8,
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compiled(case, card, divisible=True):
    """As the launcher compiles it, for pointers and sizes that are multiples of 16 or not."""
    names = case.kernel.arg_names
    signature = {name: "constexpr" if name in case.constants else case.arguments[name] for name in names}
    aligned = {
        (names.index(name),): [["tt.divisibility", 16]] for name, kind in signature.items()
        if divisible and (kind.startswith("*") or kind == "i32")
    }  # fmt: skip
    source = ASTSource(
        fn=case.kernel, signature=signature, attrs=aligned,
        constexprs={(names.index(name),): value for name, value in case.constants.items()},
    )  # fmt: skip
    nvidia = isinstance(card, int)
    target = GPUTarget("cuda", card, 32) if nvidia else GPUTarget("hip", card, 64 if card == "gfx942" else 32)
    options = {"num_warps": case.warps} | ({"enable_fp_fusion": False} if case.exact else {})
    return triton.compile(source, target=target, options=options)


def spilled(kernel, card, folder):
    """Bytes or registers that it keeps in memory for want of registers."""
    if not isinstance(card, int):
        return sum(int(count) for count in re.findall(r"[sv]gpr_spill_count:\s*(\d+)", kernel.asm["amdgcn"]))
    file = folder / "kernel.cubin"
    file.write_bytes(kernel.asm["cubin"])
    used = subprocess.run(
        [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file], capture_output=True, text=True, check=True
    )
    return sum(int(count) for count in re.findall(r"STACK:(\d+)|LOCAL:(\d+)", used.stdout) for count in count if count)


def contracted(ptx):
    """Products and sums made into one. Before sm_90, a product of bf16 alone is one with −0 added, and a sum one with a
    factor of 1: these round as they should."""
    plain = set(re.findall(r"mov\.b16\s+(%rs\d+), (?:0x8000|0x3F80|0xBF80|-32768|16256|-16512);", ptx))
    fused = re.findall(r"\bfma\.rn\S*\s+([^;]+);", ptx)
    return [one for one in fused if plain.isdisjoint(one.split(", "))]


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("name", CASES)
def test_it_fits_the_card_and_rounds_as_promised(name, card, tmp_path):
    case = CASES[name]
    kernel = compiled(case, card)
    assert kernel.metadata.shared <= CARDS[card] * 1024
    assert spilled(kernel, card, tmp_path) == 0
    if case.exact and isinstance(card, int):
        assert not contracted(kernel.asm["ptx"])
        assert not re.findall(r"div\.(?:full|approx)\S*", kernel.asm["ptx"])
    elif case.exact and "v_div_fixup" not in kernel.asm["amdgcn"]:  # a division that rounds right is made of these
        assert not re.findall(r"v_(?:pk_)?(?:fma|fmac|mad|mac)_(?:f|mix)\S*", kernel.asm["amdgcn"])


def test_an_expanded_weight_is_stored_16_bytes_at_a_time():
    assert "st.global.v4.b32" in compiled(CASES["expand nf4"], 90).asm["ptx"]


def test_with_fusion_a_nested_scale_would_round_once():
    """What the check above looks for is there where it is not asked away."""
    assert contracted(compiled(CASES["expand nf4"]._replace(exact=False), 90).asm["ptx"])
