"""Checkpoints: all that the next step depends on, so that a resumed run takes the same steps to the last bit.

checkpoints/step-000200/  adapter/ (a PEFT folder; or weights/)  optimizer.safetensors  state.json
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from veneer.device import device_of, random_states, set_random_states
from veneer.documents import read_json
from veneer.errors import AdapterFileError, TrainingError
from veneer.files import atomic_folder, remove_folder
from veneer.training.own_weights import restore_trained, trained_tensors, write_trained
from veneer.training.paged_adamw import MOMENTS, Field, PagedAdamW
from veneer.training.seal import seal
from veneer.training.state import STATE_NAME, State, checkpoints_in
from veneer.training.tensor_file import Streamed, TensorFile, write_streamed
from veneer.updates.record import active_allocator, adapters_of

_ALLOCATOR = "allocator."  # begins the names of its state's tensors
_STEP = "step"  # of a parameter: how many updates it had


def save_checkpoint(
    checkpoints: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: State, keep: int
) -> None:
    """Write the checkpoint of ``state.step`` into ``checkpoints``, then delete all but the ``keep`` latest."""
    with atomic_folder(checkpoints / f"step-{state.step:06d}") as folder:
        write_trained(model, folder / _part(model))
        states = _random_states(device_of(model))
        tensors: dict[str, Tensor | Streamed] = {f"random.{name}": value for name, value in states.items()}
        allocator = active_allocator(model)
        if allocator is not None:
            tensors |= {f"{_ALLOCATOR}{name}": value for name, value in allocator.state_dict().items()}
        for key, parameter in trained_tensors(model).items():
            for name, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{key}:{name}"] = value
            if isinstance(optimizer, PagedAdamW) and parameter in optimizer.state:
                for field in optimizer.fields(parameter):
                    parts = partial(optimizer.parts, parameter, field.name)
                    tensors[f"{key}:{field.name}"] = Streamed(_shape(field, parameter), field.dtype, parts)
        write_streamed(tensors, folder / "optimizer.safetensors")
        fields = json.loads(json.dumps({**asdict(state), "random.python": random.getstate()}))
        fields["digest"] = seal(folder, fields, STATE_NAME)
        (folder / STATE_NAME).write_text(json.dumps(fields), encoding="utf-8")
    for old in checkpoints_in(checkpoints)[:-keep]:
        remove_folder(old)


def save_best(best: Path, model: nn.Module, step: int) -> None:
    """Keep what is trained, as it is after ``step``, in the folder ``best``."""
    with atomic_folder(best) as folder:
        write_trained(model, folder)
        (folder / "step").write_text(f"{step}\n", encoding="utf-8")


def forget_lost_best(best: Path, state: State) -> None:
    """Start counting the best again when ``best`` is not the one in ``state``: a killed run went on after it.

    A run that takes the same steps again finds the same best again.
    """
    mark = best / "step"
    if not mark.is_file() or mark.read_bytes() != f"{state.best_step}\n".encode():
        state.best_loss, state.best_step, state.best_value, state.worse = None, 0, None, 0


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> State:
    """Put model, optimizer and every random state back to where the checkpoint was written.

    Raises TrainingError when the checkpoint is damaged, was changed since, or belongs to another run.
    """
    try:
        fields = _fields(folder)
        python = fields.pop("random.python")
        state = State.of(fields)
        if folder.name != f"step-{state.step:06d}":
            raise ValueError(f"its {STATE_NAME} is of step {state.step}")
        file = TensorFile(folder / "optimizer.safetensors")
        allocator = active_allocator(model)
        if allocator is not None:
            # First: where the ranks are fixed, the adapter and the optimizer's states are smaller.
            names = [entry for entry in file.names if entry.startswith(_ALLOCATOR)]
            allocator.load_state_dict({name.removeprefix(_ALLOCATOR): file.tensor(name) for name in names}, optimizer)
        restore_trained(model, folder / _part(model))
        parameters = trained_tensors(model)
        names = [entry for entry in file.names if not entry.startswith(("random.", _ALLOCATOR))]
        _refuse_unfitting(file, names, parameters, optimizer, state.step)
        for entry in names:
            key, _, name = entry.rpartition(":")
            parameter = parameters[key]
            if name != _STEP and isinstance(optimizer, PagedAdamW):
                field = next(field for field in optimizer.fields(parameter) if field.name == name)
                optimizer.fill(parameter, name, file.reader(entry, field.dtype, _shape(field, parameter)))
            else:
                optimizer.state[parameter][name] = _like(file.tensor(entry), parameter)
        names = [entry for entry in file.names if entry.startswith("random.")]
        states = {entry.removeprefix("random."): file.tensor(entry) for entry in names}
        _set_random_states(states, device_of(model), python)
        return state
    except (AdapterFileError, SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError, OverflowError,
            IndexError) as error:  # fmt: skip
        raise TrainingError(
            f"The checkpoint {folder} is damaged ({error}); delete it to go on from the one before."
        ) from None


def _fields(folder: Path) -> dict[str, Any]:
    """What state.json says, once the checkpoint is found to be as it was written. Raises ValueError, OSError."""
    fields = read_json(folder / STATE_NAME)
    if not isinstance(fields, dict):
        raise ValueError(f"its {STATE_NAME} is no mapping")
    digest = fields.pop("digest", None)  # those of 0.1 have none
    if digest is not None and digest != seal(folder, fields, STATE_NAME):
        raise ValueError("its files are not those that were written")
    return fields


def _refuse_unfitting(
    file: TensorFile, names: list[str], parameters: dict[str, Tensor], optimizer: torch.optim.Optimizer, step: int
) -> None:
    """Raises ValueError, KeyError where what is kept of a parameter is not all that its optimizer takes, in its shapes
    and types: nothing behind this looks again."""
    kept: dict[str, set[str]] = {}
    for entry in names:
        key, _, name = entry.rpartition(":")
        kept.setdefault(key, set()).add(name)
    if step and not kept:
        raise ValueError("it holds nothing of the optimizer")
    for key, its in kept.items():
        parameter = parameters[key]
        paged = optimizer.fields(parameter) if isinstance(optimizer, PagedAdamW) else None
        fields = paged or tuple(Field(name, parameter.dtype) for name in MOMENTS)
        wanted = {field.name: (field.dtype, _shape(field, parameter)) for field in fields}
        wanted[_STEP] = (torch.float32, torch.Size([]))
        if its != set(wanted):
            raise ValueError(f"of {key} it holds {', '.join(sorted(its))}, not {', '.join(sorted(wanted))}")
        for name, (dtype, shape) in wanted.items():
            file.reader(f"{key}:{name}", dtype, shape)  # compares the header alone
        if not 0 < file.tensor(f"{key}:{_STEP}").item() <= step:
            raise ValueError(f"{key} is not of step 1 to {step}")


def _part(model: nn.Module) -> str:
    return "adapter" if adapters_of(model).configs else "weights"


def _shape(field: Field, parameter: Tensor) -> torch.Size:
    """A field's shape in a file: a moment has its parameter's; codes and scales are in a row."""
    return parameter.shape if field.name in MOMENTS else torch.Size([field.count(parameter.numel())])


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    # Adam's step counter stays on the CPU as a scalar; the moments are with their parameter.
    return value.to(parameter.device) if value.shape == parameter.shape and value.dim() else value


def _random_states(device: torch.device) -> dict[str, Tensor]:
    _, keys, *rest = np.random.get_state(legacy=True)
    states = {**random_states(device), "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64))}
    states["numpy.position"] = torch.tensor([float(value) for value in rest], dtype=torch.float64)
    return states


def _set_random_states(states: dict[str, Tensor], device: torch.device, python: list[Any]) -> None:
    set_random_states(states, device)
    position, has_gauss, gauss = states["numpy.position"].tolist()
    keys = states["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), gauss))
    version, internal, gaussian = python
    random.setstate((version, tuple(internal), gaussian))
