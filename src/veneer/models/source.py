"""What a person calls a model → the files on this disk: a folder, a GGUF file, a packaged name, or a hub id."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from veneer.errors import ModelError, did_you_mean
from veneer.models.hub_cache import CONFIG, TOKENIZER, WEIGHTS, HubId, cached_folder, lacks, listed, patterns_of
from veneer.models.packaged import PACKAGED_MODELS, packaged_path

_SECONDS = 5.0


def resolve(source: str | Path, *, config_alone: bool = False) -> tuple[Path, str]:
    """The model's folder or GGUF file, and the name under which others find the same base again. With ``config_alone``
    a folder that holds its config.json will do: of a hub id no weights are fetched. A hub id with a revision,
    ``owner/name@revision``, is named by the commit that it is now.

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
    asked = HubId.of(text)
    if asked is None:
        if text.startswith(("http://", "https://")):
            raise ModelError(f"{text} is an address; give the hub id alone: owner/name, or owner/name@revision.")
        siblings = [str(path.parent / p.name) for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ModelError(f"There is no model at {text}.{did_you_mean(text, siblings)}")
    folder = _from_hub(asked, CONFIG if config_alone else WEIGHTS)
    return folder, asked.at(folder)


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
    asked = HubId.of(name)
    assert asked is not None
    return _from_hub(asked, TOKENIZER)


def _from_hub(asked: HubId, part: str) -> Path:
    """The snapshot of a hub id in the standard cache; what it lacks is fetched when the hub can be reached."""
    from huggingface_hub import HfApi, snapshot_download

    folder = cached_folder(asked)
    missing = ["all of it"] if folder is None else lacks(folder, part)
    if folder is not None and not missing:
        return folder
    known = _not_here(asked) if folder is None else f"The copy of {asked} in the hub's cache lacks {listed(missing)}."
    offline = hub_unreachable()
    if offline:
        raise ModelError(f"{known} {offline}")
    caught: tuple[type[Exception], ...] = (
        *client_errors(),
        ValueError,
        RuntimeError,
    )  # the last two: bad names
    try:
        files = HfApi().list_repo_files(asked.repository, revision=asked.revision) if part == WEIGHTS else []
        fetched = Path(
            snapshot_download(asked.repository, revision=asked.revision, allow_patterns=patterns_of(part, files))
        )
    except caught as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"{known} The hub answered: {reason}") from None
    missing = lacks(fetched, part)
    if missing:
        raise ModelError(f"{asked} lacks {listed(missing)}, on the hub as well, so that it cannot be loaded.")
    return fetched


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


def _not_here(asked: HubId) -> str:
    name = str(asked)
    known = did_you_mean(name, PACKAGED_MODELS)
    return f"{name!r} is no folder, packaged model ({', '.join(PACKAGED_MODELS)}) or cached hub id.{known}"
