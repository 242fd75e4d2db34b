"""A checkpoint's tensors by the names that the model has for them, one at a time; the safetensors files of a folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from veneer.models.index import SAFETENSORS_INDEX, weight_map
from veneer.models.library import unreadable


class NotTensorByTensor(Exception):
    """A checkpoint's tensors are not the model's own, one by one; the text says why, of the checkpoint as "it"."""


class Tensors(Protocol):
    """What a checkpoint holds. Names are the file's until `rename`."""

    def names(self) -> set[str]:
        """All tensors that the model has a name for, or that it may refuse."""
        ...

    def rename(self, model: Any) -> None:
        """Call the tensors as the model does, where its checkpoints have other names. Raises NotTensorByTensor."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Without reading the tensor. Raises ModelError for a damaged file."""
        ...

    def read(self, name: str) -> Tensor:
        """The tensor, in memory of its own or mapped: when it goes, no page of the file is left in the process.

        Raises ModelError for a damaged file.
        """
        ...


class SafetensorsFolder:
    """The safetensors files of a folder, of the model ``name``: which holds what, and its tensors, copied or mapped.

    Raises ModelError for a file that is damaged or missing.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._model = name
        self._files: dict[str, Path] = {}  # by the tensor's name
        self._open: dict[Path, Any] = {}
        index, single = folder / SAFETENSORS_INDEX, folder / "model.safetensors"
        if index.is_file():
            self._files = {key: folder / file for key, file in weight_map(index, name).items()}
        elif single.is_file():
            with self._damage(), safe_open(single, "pt") as file:
                self._files = dict.fromkeys(file.keys(), single)
        self._keys: dict[str, str] = {key: key for key in self._files}  # the file's, by the tensor's name

    def names(self) -> set[str]:
        return set(self._files)

    def rename(self, model: Any) -> None:
        renamings = [c for c in get_model_conversion_mapping(model, add_legacy=False) if isinstance(c, WeightRenaming)]
        self._keys = {rename_source_key(key, renamings, [])[0]: key for key in self._files}
        self._files = {name: self._files[key] for name, key in self._keys.items()}

    def shape(self, name: str) -> tuple[int, ...]:
        with self._damage():
            return tuple(self._file(name).get_slice(self._keys[name]).get_shape())

    def mapped(self, name: str) -> Tensor:
        """The tensor in the mapped file; all of a file are parts of one mapping, which lives as long as they do."""
        with self._damage():
            tensor: Tensor = self._file(name).get_tensor(self._keys[name])
        return tensor

    def read(self, name: str) -> Tensor:
        with self._damage(), safe_open(self._files[name], "pt") as file:
            tensor: Tensor = file.get_tensor(self._keys[name])
        return tensor

    def _file(self, name: str) -> Any:
        path = self._files[name]
        if path not in self._open:
            self._open[path] = safe_open(path, "pt").__enter__()  # type: ignore[no-untyped-call]
        return self._open[path]

    @contextmanager
    def _damage(self) -> Iterator[None]:
        """Inside, what safetensors and the system raise is the refusal of this model."""
        try:
            yield
        except (SafetensorError, OSError) as error:
            raise unreadable(self._model, error) from error
