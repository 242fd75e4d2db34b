"""What a person calls a model → the files on this disk: a folder, a GGUF file, a packaged name, or a hub id."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from veneer.errors import ModelError, did_you_mean
from veneer.models.packaged import PACKAGED_MODELS, packaged_path

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_WEIGHTS = "*.safetensors"
_FILES = ["*.json", _WEIGHTS, "*.txt", "*.model", "*.jinja"]
_SECONDS = 5.0


def resolve(source: str | Path, *, config_alone: bool = False) -> tuple[Path, str]:
    """The model's folder or GGUF file, and the name under which others find the same base again. With ``config_alone``
    a folder that holds its config.json will do: of a hub id no weights are fetched.

    Raises ModelError when there is none.
    """
    text = os.fspath(source)
    path = Path(text).expanduser()
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelError(f"{path} is a file, but not a GGUF one; a model is a folder, a .gguf file or a hub id.")
        return path.resolve(), str(path.resolve())
    if path.is_dir():
        _refuse_other_folders(path)
        return path.resolve(), str(path.resolve())
    if text in PACKAGED_MODELS:
        return packaged_path(text), text
    if not _HUB_ID.fullmatch(text) or text.startswith("."):
        siblings = [str(path.parent / p.name) for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ModelError(f"There is no model at {text}.{did_you_mean(text, siblings)}")
    return _from_hub(text, *((["config.json"], "config.json") if config_alone else (_FILES, _WEIGHTS))), text


def _refuse_other_folders(path: Path) -> None:
    if (path / "config.json").is_file():
        return
    if (path / "adapter_config.json").is_file():
        raise ModelError(
            f"{path} is an adapter, not a model: load its base, then veneer.load_adapter(model, {str(path)!r})."
        )
    ggufs = sorted(path.glob("*.gguf"))
    hint = f" It holds {ggufs[0].name}: name that file." if ggufs else ""
    if (path / "adapter" / "adapter_config.json").is_file():
        hint = " It looks like a run: evaluate, generate, chat and merge take it as it is."
    raise ModelError(f"{path} is not a model folder: it has no config.json.{hint}")


def tokenizer_folder(name: str) -> Path:
    """The folder of a hub id's tokenizer: no weights are fetched. Raises ModelError when there is none."""
    return _from_hub(name, [pattern for pattern in _FILES if pattern != _WEIGHTS], "tokenizer*")


def _from_hub(name: str, wanted: list[str], needed: str) -> Path:
    """The snapshot of a hub id in the standard cache; fetched when it is not there and the hub can be reached."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, allow_patterns=wanted, local_files_only=True))
        if any(folder.glob(needed)):  # else only a part of it was fetched before
            return folder
    except (LocalEntryNotFoundError, OSError):
        pass
    offline = hub_unreachable()
    if offline:
        raise ModelError(f"{_not_here(name)} {offline}")
    caught: tuple[type[Exception], ...] = (
        *client_errors(),
        ValueError,
        RuntimeError,
    )  # the last two: bad names
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except caught as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"{_not_here(name)} The hub answered: {reason}") from None


def hub_unreachable() -> str:
    """Why nothing can be fetched from the hub, as a sentence; empty when it can.

    One quick request: the client itself tries again for half a minute before it gives up.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils._http import get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set, so the hub was not asked."
    caught = client_errors()
    try:
        get_session().head(constants.ENDPOINT, timeout=_SECONDS)
    except caught as error:
        return f"The hub cannot be reached from here ({error})."
    return ""


def client_errors() -> tuple[type[Exception], ...]:
    """What the hub's client raises: the system's errors, and those of its HTTP library, httpx or another by version."""
    from huggingface_hub.errors import HfHubHTTPError

    homes = {base.__module__.partition(".")[0] for base in HfHubHTTPError.__mro__}
    http = next(sys.modules[home] for home in homes if hasattr(sys.modules[home], "InvalidURL"))
    return OSError, http.HTTPError, http.InvalidURL


def _not_here(name: str) -> str:
    known = did_you_mean(name, PACKAGED_MODELS)
    return f"{name!r} is no folder, packaged model ({', '.join(PACKAGED_MODELS)}) or cached hub id.{known}"
