"""What others may know of a base by its name: what it is called where everybody finds it, and its licence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from veneer.models.packaged import PACKAGED_MODELS


def is_local(name: str) -> bool:
    """Whether this names a place of this machine, and no model of the hub or of a package."""
    if name in PACKAGED_MODELS:
        return False
    return name.startswith(("/", ".", "~")) or name.endswith(".gguf") or Path(name).exists()


def bare_name(name: str) -> str:
    """A hub id or a packaged name as it is; of a path its last part."""
    return Path(name).resolve().name if is_local(name) else name


def hub_id(name: str) -> str | None:
    """What the base is called on the hub, where that is known."""
    if name in PACKAGED_MODELS:
        return PACKAGED_MODELS[name].hub_id
    repository = name.partition("@")[0]
    return repository if repository.count("/") == 1 and not is_local(name) else None


def license_of(name: str) -> str | None:
    """The licence that a packaged model has, or that a folder's own model card names; None where none is known."""
    if name in PACKAGED_MODELS:
        return PACKAGED_MODELS[name].license
    card = Path(name) / "README.md"
    if not card.is_file():
        return None
    from huggingface_hub import ModelCard

    try:
        license: Any = ModelCard.load(card).data.get("license")
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError):  # anybody's text, of which this is wanted
        return None
    return license if isinstance(license, str) else None
