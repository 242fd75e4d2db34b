"""Where a run is, and which of its checkpoints are complete. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

STATE_NAME = "state.json"  # of a checkpoint, written last
_Count = Annotated[int, Field(ge=0, strict=True)]
_Number = Annotated[float, Field(strict=True)]


@dataclass
class State:
    """Where a run is."""

    step: _Count = 0  # optimizer steps done
    best_loss: _Number | None = None  # held-out loss of what is kept: the lowest so far, unless best_by says otherwise
    best_step: _Count = 0
    best_value: _Number | None = None  # what best_by says, at that step, where that is not the loss
    worse: _Count = 0  # evaluations since then
    tokens: _Count = 0  # trained on so far, without padding
    seconds: _Number = 0.0  # spent in steps
    data: str = ""  # digest of the rows, to notice that they changed

    __pydantic_config__ = ConfigDict(extra="forbid")

    @classmethod
    def of(cls, fields: dict[str, Any]) -> State:
        """The state of its fields, as a checkpoint keeps them. Raises ValueError for another type or name."""
        try:
            state: State = TypeAdapter(cls).validate_python(fields)
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        return state


def checkpoints_in(folder: Path) -> list[Path]:
    """The complete checkpoints in a run's folder of them, the latest last."""
    return sorted(path.parent for path in folder.glob(f"step-*/{STATE_NAME}"))
