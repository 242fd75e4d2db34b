"""A hub id → its files in the Hugging Face cache: what of them is here, and what is still to be fetched."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from veneer.documents import read_json
from veneer.errors import ModelError

_HUB_ID = re.compile(r"(?P<repository>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[\w./-]+))?")
CONFIG, TOKENIZER, WEIGHTS = "config", "tokenizer", "weights"
_PATTERNS = {
    CONFIG: ("config.json",),
    TOKENIZER: ("*.json", "*.txt", "*.model", "*.jinja"),
    WEIGHTS: ("*.json", "*.txt", "*.model", "*.jinja", "*.safetensors"),
}
_VOCABULARIES = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt", "tokenizer_config.json")
_FORMS = (("model.safetensors.index.json", "*.safetensors"), ("pytorch_model.bin.index.json", "*.bin"))


class HubId(NamedTuple):
    """A repository of the hub, and a branch, tag or commit of it; without one, its main branch."""

    repository: str
    revision: str | None = None

    @classmethod
    def of(cls, name: str) -> HubId | None:
        """What ``name`` asks for: "owner/name" or "owner/name@revision"; None where it is neither."""
        parts = _HUB_ID.fullmatch(name)
        return None if parts is None or name.startswith(".") else cls(parts["repository"], parts["revision"])

    def at(self, folder: Path) -> str:
        """Its name, with the commit that ``folder`` is of where a revision was asked for."""
        return self.repository if self.revision is None else f"{self.repository}@{folder.name}"

    def __str__(self) -> str:
        return self.repository if self.revision is None else f"{self.repository}@{self.revision}"


def cached_folder(asked: HubId) -> Path | None:
    """The snapshot of ``asked`` in the cache, whole or not; None where there is none.

    A cache that was copied without its refs has one snapshot that is the only one. Raises ModelError where it has
    several.
    """
    from huggingface_hub import constants

    home = Path(constants.HF_HUB_CACHE) / f"models--{asked.repository.replace('/', '--')}"
    snapshots = {path.name: path for path in sorted((home / "snapshots").glob("*")) if path.is_dir()}
    reference = home / "refs" / (asked.revision or "main")
    if reference.is_file():
        return snapshots.get(reference.read_text(encoding="utf-8").strip())
    if asked.revision is not None:
        return snapshots.get(asked.revision)
    if len(snapshots) > 1:
        raise ModelError(
            f"The cache has several commits of {asked.repository} and does not say which is its main branch; name one: "
            f"{', '.join(f'{asked.repository}@{commit}' for commit in snapshots)}."
        )
    return next(iter(snapshots.values()), None)


def lacks(folder: Path, part: str) -> list[str]:
    """What of a ``part`` (CONFIG, TOKENIZER, WEIGHTS; the last is all three) is not in a folder, by name."""
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    if part == CONFIG or missing:
        return missing
    if part == WEIGHTS:
        missing = _missing_weights(folder)
    if not any(path.is_file() for pattern in _VOCABULARIES for path in folder.glob(pattern)):
        missing.append("its tokenizer (tokenizer.json)")
    return missing


def _missing_weights(folder: Path) -> list[str]:
    for index, pattern in _FORMS:
        if (folder / index).is_file():
            try:
                files = set(read_json(folder / index)["weight_map"].values())
            except (OSError, ValueError, KeyError, TypeError, AttributeError):  # damaged, which loading refuses
                return []
            return sorted(file for file in files if not (folder / str(file)).is_file())
        if any(path.is_file() for path in folder.glob(pattern)):
            return []
    return ["its weights (*.safetensors)"]


def patterns_of(part: str, files: list[str]) -> list[str]:
    """Which of a repository's ``files`` are fetched for a ``part``; pickled weights where it has no others."""
    pickled = part == WEIGHTS and not any(file.endswith(".safetensors") for file in files)
    return [*_PATTERNS[part], *(["*.bin", "*.bin.index.json"] if pickled else [])]


def listed(names: list[str]) -> str:
    """The first three, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
