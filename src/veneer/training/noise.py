"""NEFTune: noise on the embeddings of a training pass (Jain et al., 2023, arXiv:2310.05914, algorithm 1)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from veneer.errors import TargetError
from veneer.frozen.text_part import end_of


@contextmanager
def noise_on_embeddings(model: Any, alpha: float, lengths: Sequence[int]) -> Iterator[None]:
    """Inside, the first time that ``model`` embeds its input, each element gets uniform noise of ±alpha / √(L · dim).

    L is the row's own length, as in the authors' code: neither the padding nor the row that stands next to it changes
    the noise. ``lengths``: of the rows, which stand below each other, padded, or back to back. An encoder-decoder's
    answer gets none. Drawn from torch's generator of the model's device. ``alpha`` = 0: nothing is done.
    """
    if not alpha:
        yield
        return
    handle: Any = None

    def with_noise(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        handle.remove()  # of the encoder alone, where a decoder has the same embedding
        sizes = torch.tensor(lengths, dtype=torch.float32, device=output.device)
        bounds = alpha / (sizes * output.shape[-1]).sqrt()
        if len(output) == len(lengths):
            bounds = bounds[:, None, None]
        else:
            bounds = bounds.repeat_interleave(torch.tensor(lengths, device=output.device), output_size=sum(lengths))
            bounds = bounds[None, :, None]
        return output + torch.empty_like(output).uniform_(-1, 1) * bounds.to(output.dtype)

    handle = embedding_of_input(model).register_forward_hook(with_noise)
    try:
        yield
    finally:
        handle.remove()


def embedding_of_input(model: Any) -> nn.Module:
    """The module that embeds what ``model`` reads. Raises TargetError where there is none."""
    pair = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    module = end_of(model.get_encoder() if pair else model, "input")
    if not isinstance(module, nn.Module):
        raise TargetError(
            f"neftune puts noise on the embeddings of tokens, and a {type(model).__name__} has none; leave it out."
        )
    return module
