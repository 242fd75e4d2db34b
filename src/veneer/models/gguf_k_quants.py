"""K-quants: a GGUF file whose matrices llama.cpp itself rounds, where llama-cpp-python is installed.

gguf reads these types and does not make them. llama.cpp does it in a process of its own: whatever ends that process is
a sentence here.
"""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import gguf
import torch

from veneer.errors import ModelError
from veneer.models.gguf_header import GgufHeader

# Veneer's names of storages → the mixture of types that llama.cpp knows by this number.
K_QUANTS = {
    "q6_k": gguf.LlamaFileType.MOSTLY_Q6_K,
    "q5_k_m": gguf.LlamaFileType.MOSTLY_Q5_K_M,
    "q5_k_s": gguf.LlamaFileType.MOSTLY_Q5_K_S,
    "q4_k_m": gguf.LlamaFileType.MOSTLY_Q4_K_M,
    "q4_k_s": gguf.LlamaFileType.MOSTLY_Q4_K_S,
    "q3_k_m": gguf.LlamaFileType.MOSTLY_Q3_K_M,
    "q2_k": gguf.LlamaFileType.MOSTLY_Q2_K,
}
_BLOCK = 256  # values that are rounded together, all of one row
_LIBRARY = "llama_cpp"
# Run with FILE, OUT, the mixture's number and how many threads. llama.cpp's own words go to standard error.
_PROGRAM = """
import ctypes, sys
import llama_cpp
source, out, mixture, threads = sys.argv[1:]
params = llama_cpp.llama_model_quantize_default_params()
params.ftype, params.nthread = int(mixture), int(threads)
sys.exit(llama_cpp.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(params)))
"""


def refuse_without_llama_cpp(storage: str) -> None:
    """Raises ModelError where llama-cpp-python is not installed."""
    if importlib.util.find_spec(_LIBRARY) is None:
        raise ModelError(
            f"{storage} is rounded by llama.cpp, which is not installed here: pip install llama-cpp-python (it "
            f"compiles some minutes), or choose q8_0 or q4_0, which need nothing."
        )


def write_k_quants(source: Path, out: Path, storage: str) -> list[str]:
    """Write the GGUF file ``source``, of fp32, fp16 or bf16, to ``out`` with its matrices rounded as ``storage`` (of
    `K_QUANTS`). What a person may want to know of the file, as sentences.

    Raises ModelError where llama.cpp does not do it.
    """
    command = [sys.executable, "-c", _PROGRAM, source, out, int(K_QUANTS[storage]), torch.get_num_threads()]
    ran = subprocess.run(list(map(str, command)), capture_output=True, text=True, errors="replace", check=False)
    if ran.returncode:
        raise ModelError(f"llama.cpp did not write {storage}: {_why(ran)}. q8_0 and q4_0 do not need it.")
    return _kept_otherwise(GgufHeader(out, out.name), storage)


def _why(ran: subprocess.CompletedProcess[str]) -> str:
    if ran.returncode < 0:
        return f"its process ended by {signal.Signals(-ran.returncode).name}"
    said = [line.strip() for line in ran.stderr.splitlines() if line.strip()]
    return said[-1].rstrip(".")[:300] if said else f"it returned {ran.returncode}"


def _kept_otherwise(header: GgufHeader, storage: str) -> list[str]:
    """A sentence about the matrices whose rows are no multiple of a block, which llama.cpp keeps in other types."""
    short = [its for its in header.tensors.values() if len(its.shape) > 1 and its.shape[-1] % _BLOCK]
    if not short:
        return []
    types = ", ".join(f"{count} in {kind}" for kind, count in Counter(its.type.name for its in short).most_common())
    return [
        f"{len(short)} matrices have rows of no multiple of {_BLOCK} values, so llama.cpp keeps them in types of more "
        f"bits than {storage}: {types}."
    ]
