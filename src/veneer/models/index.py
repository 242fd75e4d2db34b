"""The index of a checkpoint in several files: which tensor is in which file, all of them inside its folder."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from veneer.documents import read_json
from veneer.errors import ModelError
from veneer.models.library import unreadable

SAFETENSORS_INDEX = "model.safetensors.index.json"
_INDICES = (SAFETENSORS_INDEX, "pytorch_model.bin.index.json")  # the ones that transformers reads


def weight_map(index: Path, name: str) -> dict[str, str]:
    """Tensor → file, relative to the folder of ``index``, as the index of the model ``name`` says.

    Raises ModelError when it is damaged, or names a file outside of its folder.
    """
    try:
        files = read_json(index).get("weight_map")
    except (OSError, ValueError, AttributeError) as error:  # no JSON, or a list
        raise unreadable(name, error) from error
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise ModelError(f"{index.name} of {name} has no weight_map that says which tensor is in which file.")
    for file in sorted(set(files.values())):
        _refuse_outside(index, file, name)
    return files


def refuse_files_outside(folder: Path, name: str) -> None:
    """Raises ModelError when an index in the folder of the model ``name`` is damaged or names files outside of it,
    which transformers would read."""
    for index in _INDICES:
        if (folder / index).is_file():
            weight_map(folder / index, name)


def _refuse_outside(index: Path, file: str, name: str) -> None:
    path = PurePosixPath(file)
    inside = not path.is_absolute() and ".." not in path.parts
    if inside and any(_holds(place, index.parent / file) for place in _places(index.parent)):
        return
    how = f" (a link to {(index.parent / file).resolve()})" if inside else ""
    raise ModelError(
        f"{index.name} of {name} names {file}{how}, which is outside of its folder and is not read; put the file "
        f"itself into the folder."
    )


def _places(folder: Path) -> list[Path]:
    """Where the files of a model may be: its folder, and of a snapshot in the hub's cache, whose files are links, the
    blobs of the same repository."""
    folder = folder.absolute()
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        return [folder, folder.parent.parent / "blobs"]
    return [folder]


def _holds(place: Path, file: Path) -> bool:
    return file.resolve().is_relative_to(place.resolve())
