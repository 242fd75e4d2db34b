"""The reference of a run with preferences: computed while the model is as the run begins with it, kept with the run.

A resumed run reads it. Where it takes steps over rows that it has not, the model is built as at the start once more,
and they are computed before its checkpoint is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from veneer.data.labels import Tokens
from veneer.errors import TrainingError
from veneer.files import atomic_file
from veneer.runs.begin import Begun
from veneer.training.batches import by_length
from veneer.training.fused import fused_passes
from veneer.training.preference import PreferenceLoss
from veneer.updates.record import adapters_of

_NAME = "log_probabilities"


def compute_reference(begun: Begun, say: Callable[[str], None], *, resumed: bool, measures: bool) -> None:
    """Fill the reference of the rows that the run's steps take, and of the held-out ones where it ``measures`` them.

    To be called before a checkpoint is loaded. Raises TrainingError where a ``resumed`` run's is missing or damaged, or
    lacks rows for which the model cannot be built as it was.
    """
    loss = begun.loss
    if not isinstance(loss, PreferenceLoss) or not loss.has_reference:
        return
    again = _read(begun.folder.reference_file, loss.reference, begun.digest()) if resumed else True
    missing = sum(map(loss.without_reference, _parts(begun, measures)))
    if not missing:
        return
    if not again:
        raise TrainingError(
            f"{begun.folder} would take steps over {missing} rows more, whose reference is the model that it began "
            f"with, and that is not kept; take no more steps than it was started with, or start a new run."
        )
    say(f"Reference: the log-probabilities of {missing:,} rows, before training.")
    with fused_passes(begun.model), loss.attention():
        loss.refer(_parts(begun, measures))


def write_reference(begun: Begun) -> None:
    """Write the reference into the run's folder. Raises OSError."""
    loss = begun.loss
    if isinstance(loss, PreferenceLoss) and loss.has_reference:
        own = begun.with_adapter or bool(adapters_of(begun.model).changed_base)
        facts = {"data": begun.digest(), "again": "no" if own else "yes"}
        with atomic_file(begun.folder.reference_file) as temporary:
            save_file({_NAME: loss.reference}, temporary, facts)


def _parts(begun: Begun, measures: bool) -> Iterator[list[Tokens]]:
    """The rows as the steps of the first epoch take them, each row once: so a run that is given more steps later has
    computed each in the same company. Then the held-out rows, as they are measured."""
    for step in range(min(begun.total, begun.batches.per_epoch)):
        yield from begun.steps.passes(step)
    if measures:
        yield from by_length(begun.held_out, begun.config.micro_batch_size or begun.config.batch_size)


def _read(file: Path, reference: Tensor, digest: str) -> bool:
    """Fill ``reference`` with what is kept; whether the model can be built once more as it was.

    Raises TrainingError for a file that is missing or damaged; other rows are refused with the checkpoint."""
    try:
        with safe_open(file, "pt") as opened:
            facts, kept = opened.metadata() or {}, opened.get_tensor(_NAME)
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            f"{file} cannot be read ({str(error).splitlines()[0]}): the run's reference, which cannot be made again "
            f"now that it has trained. Restore the file, or start a new run."
        ) from None
    if facts.get("data") == digest and kept.shape == reference.shape:
        reference.copy_(kept)
    return facts.get("again") == "yes"
