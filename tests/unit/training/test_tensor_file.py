"""A safetensors file in parts: what safetensors itself reads, and back."""

from __future__ import annotations

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from veneer.training.tensor_file import Streamed, TensorFile, write_streamed

pytestmark = pytest.mark.unit

TENSORS = {
    "b": torch.arange(5, dtype=torch.uint8),
    "a": torch.randn(7, 9, generator=torch.Generator().manual_seed(0)),
    "step": torch.tensor(3.0),
    "none": torch.zeros(0, 4),
    "turned": torch.arange(6.0, dtype=torch.float64).view(2, 3).t(),
    "half": torch.ones(3, dtype=torch.bfloat16),
}


@pytest.fixture
def path(tmp_path):
    whole = TENSORS["a"]
    streamed = Streamed(whole.shape, whole.dtype, lambda: whole.reshape(-1).split(10))
    write_streamed({**TENSORS, "a": streamed}, tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


def test_safetensors_reads_what_was_written_in_parts(path):
    found = load_file(path)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_parts_are_read_back(path):
    file = TensorFile(path)
    assert sorted(file.names) == sorted(TENSORS)
    assert torch.equal(file.tensor("turned"), TENSORS["turned"])
    read, parts = file.reader("a", torch.float32, torch.Size([7, 9])), [torch.empty(40), torch.empty(23)]
    for part in parts:
        read(part)
    assert torch.equal(torch.cat(parts).view(7, 9), TENSORS["a"])


def test_a_damaged_file_or_another_tensor_is_refused(path):
    with pytest.raises(ValueError, match=r"^a is F32 \[7, 9\], not BF16 \[7, 9\]$"):
        TensorFile(path).reader("a", torch.bfloat16, torch.Size([7, 9]))
    with pytest.raises(ValueError, match=r"^a is F32 \[7, 9\], not F32 \[9, 7\]$"):
        TensorFile(path).reader("a", torch.float32, torch.Size([9, 7]))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SafetensorError):
        TensorFile(path)
