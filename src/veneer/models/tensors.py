"""A checkpoint's tensors by the names that the model has for them, one at a time; the safetensors files of a folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from veneer.errors import ModelError
from veneer.models.index import SAFETENSORS_INDEX, weight_map
from veneer.models.joined import Names, names_for
from veneer.models.library import unreadable

_POINTER = b"version https://git-lfs"


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

    def matrices(self, name: str) -> Iterator[Tensor]:
        """The matrices of a 3-D tensor, each read when it is asked for, as by `read`."""
        ...


class SafetensorsFolder:
    """The safetensors files of a folder, of the model ``name``: which holds what, and its tensors, copied or mapped.

    Raises ModelError for a file that is damaged or missing.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._model = name
        self._files: dict[str, Path] = {}  # by the file's own key
        self._open: dict[Path, Any] = {}
        _refuse_pointers(folder, name)
        index, single = folder / SAFETENSORS_INDEX, folder / "model.safetensors"
        if index.is_file():
            self._files = {key: folder / file for key, file in weight_map(index, name).items()}
        elif single.is_file():
            with self._damage(), safe_open(single, "pt") as file:
                self._files = dict.fromkeys(file.keys(), single)
        self._names = Names({key: key for key in self._files})

    def names(self) -> set[str]:
        return {*self._names.alone, *self._names.joined}

    def rename(self, model: Any) -> None:
        self._names = names_for(model, self._files)

    def pieces(self, name: str) -> tuple[list[list[str]], dict[str, set[str]]]:
        """The keys of a tensor's parts, expert by expert, where the files have it in pieces, and what describes each
        one that is kept in codes; nothing for another tensor."""
        joined = self._names.joined.get(name, [])
        return joined, {key: self._names.beside[key] for own in joined for key in own if key in self._names.beside}

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._names.joined:
            return self._shape(self._names.alone[name])
        experts = self._names.joined[name]
        shapes = {tuple(map(self._shape, own)) for own in experts}
        first = next(iter(shapes))
        if len(shapes) > 1 or len({shape[1:] for shape in first}) > 1:
            return ()
        return (len(experts), sum(shape[0] for shape in first), *first[0][1:])

    def mapped(self, name: str) -> Tensor:
        """The tensor in the mapped file; all of a file are parts of one mapping, which lives as long as they do. One
        that is in pieces has memory of its own."""
        if name in self._names.joined:
            return self.read(name)
        return self.stored(self._names.alone[name])

    def stored(self, key: str) -> Tensor:
        """The tensor of the files' own key, mapped."""
        with self._damage():
            tensor: Tensor = self._file(key).get_tensor(key)
        return tensor

    def read(self, name: str) -> Tensor:
        if name in self._names.joined:
            return self._stacked(name)
        return self._read(self._names.alone[name])

    def matrices(self, name: str) -> Iterator[Tensor]:
        if name in self._names.joined:
            for own in self._names.joined[name]:
                parts = [self._read(key) for key in own]
                yield parts[0] if len(parts) == 1 else torch.cat(parts)
            return
        key = self._names.alone[name]
        for number in range(self._shape(key)[0]):
            with self._damage(), safe_open(self._files[key], "pt") as file:
                matrix: Tensor = file.get_slice(key)[number]
            yield matrix

    def _stacked(self, name: str) -> Tensor:
        whole: Tensor | None = None
        for number, matrix in enumerate(self.matrices(name)):
            whole = matrix.new_empty(len(self._names.joined[name]), *matrix.shape) if whole is None else whole
            whole[number] = matrix
        assert whole is not None
        return whole

    def _shape(self, key: str) -> tuple[int, ...]:
        with self._damage():
            return tuple(self._file(key).get_slice(key).get_shape())

    def _read(self, key: str) -> Tensor:
        with self._damage(), safe_open(self._files[key], "pt") as file:
            tensor: Tensor = file.get_tensor(key)
        return tensor

    def _file(self, key: str) -> Any:
        path = self._files[key]
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


def _refuse_pointers(folder: Path, name: str) -> None:
    """Raises ModelError for what a clone without Git LFS has in place of large files."""
    for file in sorted(folder.glob("*.safetensors")):
        if file.is_file() and file.stat().st_size < 1024 and file.read_bytes().startswith(_POINTER):
            raise ModelError(
                f"{file.name} of {name} is a Git LFS pointer, and not the file itself; run git lfs pull in the folder."
            )
