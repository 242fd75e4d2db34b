"""Adapters as PEFT folders, in and out: ``adapter_config.json`` beside ``adapter_model.safetensors``.

A file is checked whole, every key and shape, before the model is touched.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from veneer.arguments import folder_given, refuse_no_model, refuse_no_name
from veneer.device import CPU
from veneer.errors import AdapterFileError, ConfigError, TargetError, nearest
from veneer.files import atomic_file, atomic_folder, write_text
from veneer.models.finite import LARGEST, is_finite
from veneer.models.library import reason_of
from veneer.updates.config import LoRA
from veneer.updates.declared import Declared, refuse_header, takes
from veneer.updates.experts import ExpertPairs, adapter_keys
from veneer.updates.inner import inner_model
from veneer.updates.layers import Dora, LowRank, NewRows, Pair, Triplets
from veneer.updates.offloaded import refuse_offloaded
from veneer.updates.peft_config import CONFIG_NAME, to_peft
from veneer.updates.pissa import PARTS, Pissa, written_config
from veneer.updates.reached import warn
from veneer.updates.record import adapters_of, refuse_merged, refuse_unknown, untrained, updates_of
from veneer.updates.select import Chosen, modules_of
from veneer.updates.wrappers import plain_name

WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
ROWS = ".token_adapter.trainable_tokens_delta"
MAGNITUDES = ".lora_magnitude_vector"
_LONG = 200  # characters of a name that a file may have of any length
_STORAGE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def save(model: nn.Module, folder: str | Path, *, name: str | None = None, dtype: str | None = None) -> None:
    """Write an adapter as a PEFT folder; where one stands, its two files are replaced and all else is left.

    PEFT loads an adapter that has targets; one of new_tokens or train_also alone it refuses.
    ``name``: which adapter; by default the one that is active. ``dtype``: fp32, bf16 or fp16; by default as trained,
    which DoRA's magnitudes are in any case.
    Raises AdapterFileError when the folder cannot be written to, or a value is too large for ``dtype``. A
    `VeneerWarning` names the updates that training never reached.

    Example:
        >>> model = veneer.attach(model, veneer.LoRA(rank=4))
        >>> veneer.save(model, "my-adapter", dtype="bf16")
        >>> sorted(os.listdir("my-adapter"))
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    refuse_no_model("save", model)
    model = inner_model(model)
    path = folder_given("save", folder)
    if name is not None:
        refuse_no_name("save", name)
    try:
        write_adapter(model, path, name, dtype)
    except OSError as error:
        raise AdapterFileError(f"{path} cannot be written to: {error.strerror or error}.") from None
    for sentence in untrained(model, name):
        warn(sentence)


def write_adapter(
    model: nn.Module, folder: Path, name: str | None = None, dtype: str | None = None,
    state: dict[str, Tensor] | None = None,
) -> None:  # fmt: skip
    """`save`, with the system's own error for a disk that is full. ``state``: a state dict of the model, of which the
    values are taken instead of the model's own."""
    record = adapters_of(model)
    refuse_merged(record, "save an adapter")
    if name is None:
        if len(record.active) != 1:
            raise TargetError(
                f"save needs one adapter's name: {len(record.active)} are active, attached are "
                f"{', '.join(record.configs) or 'none'}."
            )
        (name,) = record.active
    refuse_unknown(record, name)
    if record.changed_base:
        raise TargetError(
            f"{record.changed_base} changed the base, which this adapter needs; save it first: "
            f"veneer.save_base(model, tokenizer, folder)."
        )
    if dtype is not None and dtype not in _STORAGE:
        raise ConfigError(f"dtype = {dtype!r} is not one of {', '.join(_STORAGE)}.")
    if folder.is_file():
        raise AdapterFileError(f"{folder} is a file; an adapter is saved as a folder.")
    refuse_offloaded(model, list(updates_of(model, name).values()), "be saved")
    to = _STORAGE.get(dtype or "")
    own = adapter_tensors(model, name)
    own = own if state is None else tensors_of_state(model, own, state)
    own, config = _written(model, name, own), record.configs[name]
    if isinstance(config, LoRA) and any(isinstance(update, Pissa) for update in updates_of(model, name).values()):
        config = written_config(config)
    # Magnitudes are of whole weights: rounded to 16 bits, they would move the base more than the update does.
    types = {key: None if key.endswith(MAGNITUDES) else to for key in own}
    tensors = {key: tensor.detach().to(CPU, types[key]).contiguous() for key, tensor in own.items()}
    rows = list({id(update): path for path, update in reversed(_rows_of(model, name))}.values())[::-1]
    modules = modules_of(model)
    chosen = [Chosen(path, modules[path]) for path, u in updates_of(model, name).items() if isinstance(u, LowRank)]
    fields = to_peft(model, config, chosen, rows, _kept(model, name))
    refuse_not_finite(tensors, f"The adapter {name!r} as {dtype or 'trained'}")
    # Keys in one order: the same adapter is the same bytes.
    tensors = dict(sorted(tensors.items()))
    text = plain_name(json.dumps(fields, indent=2, sort_keys=True)) + "\n"
    if folder.is_dir():
        with atomic_file(folder / WEIGHTS_NAME) as path:
            write_tensors(tensors, path)
        write_text(folder / CONFIG_NAME, text)
    else:
        with atomic_folder(folder) as temporary:
            write_tensors(tensors, temporary / WEIGHTS_NAME)
            (temporary / CONFIG_NAME).write_text(text, encoding="utf-8")


def _rows_of(model: nn.Module, name: str) -> list[tuple[str, NewRows]]:
    return [(path, update) for path, update in updates_of(model, name).items() if isinstance(update, NewRows)]


def tensors_of_state(model: nn.Module, own: dict[str, Tensor], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """``own``, tensors of the model by any keys, with the values that a state dict of the model has for them.

    Raises AdapterFileError where it lacks one, or has it in another shape.
    """
    places: dict[int, list[str]] = {}
    for place, tensor in model.state_dict(keep_vars=True).items():
        places.setdefault(id(tensor), []).append(place)
    values: dict[str, Tensor] = {}
    for key, tensor in own.items():
        if not tensor.numel():  # of a matrix that has no triplet left; not in a state dict
            values[key] = tensor
            continue
        value = next((state[place] for place in places.get(id(tensor), []) if place in state), None)
        if value is None or value.shape != tensor.shape:
            raise AdapterFileError(
                f"The state_dict given lacks {places.get(id(tensor), [key])[0]} in the shape {tuple(tensor.shape)}; "
                f"give the whole model's, as model.state_dict() has it, or none."
            )
        values[key] = value
    return values


def _kept(model: nn.Module, name: str) -> dict[str, list[bool]]:
    """Module name → which of its first triplets are left, of an AdaLoRA adapter whose ranks are fixed."""
    allocator = adapters_of(model).allocators.get(name)
    if allocator is None or not allocator.fixed:
        return {}
    return {path: update.kept.tolist() for path, update in allocator.triplets.items()}


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """A safetensors file, with PyTorch's mark. Raises OSError, where safetensors has an error of its own."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from None


def refuse_not_finite(tensors: dict[str, Tensor], what: str) -> None:
    bad = [key for key, tensor in tensors.items() if not is_finite(tensor)]
    if bad:
        raise AdapterFileError(f"{what} has values that are not finite, or larger than {LARGEST:.0e}, in {_some(bad)}.")


def restore(model: nn.Module, folder: str | Path) -> None:
    """Copy the tensors of a folder that `save` wrote for the active adapter back into it."""
    (name,) = adapters_of(model).active
    own = adapter_tensors(model, name)
    tensors = read_checked(Path(folder), WEIGHTS_NAME, _written(model, name, own))
    for (A, B), update in _begun(model, name).items():
        update.take(tensors[A], tensors[B])
        del own[A], own[B]
    copy_tensors(tensors, own)


def _begun(model: nn.Module, name: str) -> dict[tuple[str, str], Pissa]:
    """The keys of A and B → the update, of those that began as directions of their weight."""
    updates = {path: update for path, update in updates_of(model, name).items() if isinstance(update, Pissa)}
    A, B = PARTS
    return {(plain_name(f"{PREFIX}{path}.{A}"), plain_name(f"{PREFIX}{path}.{B}")): u for path, u in updates.items()}


def _written(model: nn.Module, name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an adapter, by PEFT's keys, as its file has them."""
    written = dict(tensors)
    for (A, B), update in _begun(model, name).items():
        written[A], written[B] = update.written(tensors[A], tensors[B])
    return written


def read_checked(folder: Path, name: str, own: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file, of the names and shapes of ``own``. Raises AdapterFileError when it has others."""
    tensors = read_tensors(folder, name)
    problems = mismatches(tensors, own, set())
    if problems:
        what = "adapter" if name == WEIGHTS_NAME else "model"
        raise AdapterFileError(f"{folder} does not hold this {what}: {'; '.join(problems)}.")
    return tensors


def copy_tensors(tensors: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(tensors[key])


def active_tensors(model: nn.Module) -> dict[str, Tensor]:
    """`adapter_tensors` of the one adapter that is active."""
    (name,) = adapters_of(model).active
    return adapter_tensors(model, name)


def adapter_tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """PEFT's key → the adapter's own tensor (not a copy)."""
    modules = modules_of(model)
    tensors: dict[str, Tensor] = {}
    updates = updates_of(model, name)
    experts = adapter_keys([path for path, update in updates.items() if isinstance(update, ExpertPairs)], modules)
    for path, update in updates.items():
        if isinstance(update, ExpertPairs):
            parts = {"A": update.A, "B": update.B}
            tensors |= {f"{PREFIX}{experts[path]}.lora_{part}.weight": tensor for part, tensor in parts.items()}
        elif isinstance(update, Triplets):
            parts = {"A": update.Q, "B": update.P, "E": update.lam}
            tensors |= {f"{PREFIX}{path}.lora_{part}": tensor for part, tensor in parts.items()}
        elif isinstance(update, Pair):
            embedding = isinstance(modules[path], nn.Embedding)
            pattern = "lora_embedding_{}" if embedding else "lora_{}.weight"
            tensors[f"{PREFIX}{path}.{pattern.format('A')}"] = update.A
            tensors[f"{PREFIX}{path}.{pattern.format('B')}"] = update.B
            if isinstance(update, Dora):
                tensors[f"{PREFIX}{path}{MAGNITUDES}"] = update.m
        elif isinstance(update, NewRows):
            # A tied head shares the embedding's rows: PEFT stores them once, with the embedding.
            if all(tensor is not update.rows for tensor in tensors.values()):
                tensors[f"{PREFIX}{path}{ROWS}"] = update.rows
        else:
            tensors.update(
                {f"{PREFIX}{path}.{key}": tensor for key, tensor in update.state_dict(keep_vars=True).items()}
            )
    return {plain_name(key): tensor for key, tensor in tensors.items()}


def read_tensors(folder: Path, name: str = WEIGHTS_NAME) -> dict[str, Tensor]:
    """The tensors of an adapter folder, on the CPU."""
    path = folder / name
    if not path.is_file():
        pickled = folder / "adapter_model.bin"
        hint = (
            f" {pickled.name} is a pickle, which can run code; convert it to safetensors." if pickled.exists() else ""
        )
        raise AdapterFileError(f"{folder} holds no {name}.{hint}")
    try:
        refuse_header(path)
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterFileError(f"{path} is damaged or cut short and cannot be read: {reason_of(error)}.") from None
    return tensors


def mismatches(tensors: dict[str, Tensor], own: Mapping[str, Tensor | Declared], ignorable: set[str]) -> list[str]:
    """What is wrong with a file's tensors, a clause for each kind of fault."""
    missing = [key for key in own if key not in tensors]
    surplus = [key for key in tensors if key not in own and key not in ignorable]
    shapes = [
        f"{key} is {tuple(tensors[key].shape)} in the file and {tuple(own[key].shape)} here"
        for key in own
        if key in tensors and tensors[key].shape != own[key].shape
    ]
    types = [
        f"{key} is {_said(tensors[key].dtype)} in the file and {_said(own[key].dtype)} here"
        for key in own
        if key in tensors and not takes(own[key].dtype, tensors[key].dtype)
    ]
    large = [
        key for key, there in own.items()
        if key in tensors and tensors[key].dtype is not there.dtype and takes(there.dtype, tensors[key].dtype)
        and not bool(torch.isfinite(tensors[key].to(there.dtype)).all())
    ]  # fmt: skip
    problems = []
    if missing:
        problems.append(f"missing {_some(missing)}")
    if surplus:
        close = nearest(surplus[0], own, count=1)
        problems.append(f"no place for {_some(surplus)}" + (f" (nearest: {close[0]})" if close else ""))
    if shapes:
        problems.append(f"wrong shape: {_some(shapes)}")
    if types:
        problems.append(f"wrong type: {_some(types)}")
    if large:
        problems.append(f"values that are not finite in the type used here: {_some(large)}")
    return problems


def _said(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _some(items: list[str]) -> str:
    rest = f" and {len(items) - 4} more" if len(items) > 4 else ""
    return ", ".join(item[:_LONG] for item in items[:4]) + rest
