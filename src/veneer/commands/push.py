"""A run's or a folder's adapter, or a model, uploaded to the Hugging Face hub."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from veneer.arguments import folder_given
from veneer.commands.card import card_text, is_edited
from veneer.commands.config import PushOptions
from veneer.errors import AdapterFileError, ConfigError, HubError, did_you_mean
from veneer.models.origin import is_local
from veneer.models.source import client_errors, hub_unreachable
from veneer.options import shows
from veneer.runs.facts import CARD_NAME, FACTS_NAME
from veneer.runs.folder import RunFolder
from veneer.terminal import terminal
from veneer.units import amount
from veneer.updates.adapter_file import WEIGHTS_NAME
from veneer.updates.peft_config import CONFIG_NAME, read_fields

if TYPE_CHECKING:
    from huggingface_hub import HfApi

TOKEN = "HF_TOKEN"
_SETTINGS = "https://huggingface.co/settings/tokens"
_MUCH = 1e6  # bytes, from which a size is in MB
_REPO = re.compile(r"[\w.-]+/[\w.-]+")
_ANY = (
    *(
        CARD_NAME,
        FACTS_NAME,
        "LICENSE*",
        "NOTICE*",
        ".gitattributes",
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer.model",
    ),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("spiece.model", "sentencepiece.bpe.model"),
)
_ADAPTER = (CONFIG_NAME, WEIGHTS_NAME)
_MODEL = ("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json")
_REFUSED = (
    (("*.jsonl", "*.csv", "*.tsv", "*.parquet", "*.arrow", "rows.json", "evaluation.json"), "which is or quotes rows"),
    (("optimizer*", "checkpoints", "state.json", "trained.safetensors"), "which is the state of a training"),
    (("*.bin", "*.pt", "*.pth", "*.pkl"), "a pickle, which can run code"),
)


@shows(PushOptions, PushOptions.model_fields)
def push(source: str | Path, repo: str, *, console: Console | None = None, **options: Any) -> str:
    """Upload the adapter of a finished run, an adapter's folder, or a model's folder to the Hugging Face hub.

    Every file is listed on ``console`` before anything is sent. A base that is a path of this machine is left out of
    what is uploaded. The token is read from the environment, HF_TOKEN.

    ``source``: the folder; ``repo``: OWNER/NAME, which is made. Returns the address of the repository. Raises
    AdapterFileError for a folder that holds rows, the state of a training or anything else that is no part of an
    adapter; ConfigError for a ``repo`` that is no name, or an option that does not exist; HubError where the hub cannot
    be reached or refuses; TrainingError for a run that has not finished.

    Example:
        >>> veneer.push("adapter", "somebody/first-adapter", console=quiet)
        Traceback (most recent call last):
            ...
        veneer.errors.HubError: HF_TOKEN is not set: make a token that may write at ...
    """
    asked, folder = PushOptions(**options), _folder(folder_given("push", source, "source"))
    if not isinstance(repo, str) or not _REPO.fullmatch(repo):
        raise ConfigError(f"{repo!r} is not the name of a repository on the hub; write OWNER/NAME.")
    files = _uploaded(folder, repo)
    token = os.environ.get(TOKEN, "").strip()
    if not token:
        raise HubError(
            f"{TOKEN} is not set: make a token that may write at {_SETTINGS}, and set it in the environment."
        )
    say = console or terminal()
    say.print(f"To {repo}, from {folder}:", highlight=False, markup=False, soft_wrap=True)
    for name, content in files.items():
        say.print(f"  {name} ({_described(name, content)})", highlight=False, markup=False, soft_wrap=True)
    offline = hub_unreachable()
    if offline:
        raise HubError(f"Nothing was uploaded. {offline}")
    with _without_bars():
        return _upload(files, repo, token, asked)


def _described(name: str, content: Path | bytes) -> str:
    size = content.stat().st_size if isinstance(content, Path) else len(content)
    changed = name == CONFIG_NAME and not isinstance(content, Path)
    how = ", without the base's path on this machine" if changed else ""
    return f"{amount(size) if size > _MUCH else f'{size:,} bytes'}{how}"


@contextmanager
def _without_bars() -> Iterator[None]:
    """Inside, the hub's library draws no bars: the files are listed already."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()


def _folder(source: Path) -> Path:
    """The folder that is uploaded. Raises AdapterFileError where it is none of an adapter or a model."""
    run = RunFolder(source)
    if run.exists:
        run.finished_config()
        result = run.result()
        assert result is not None
        return result
    if not source.is_dir():
        near = [str(path) for path in source.parent.iterdir()] if source.parent.is_dir() else []
        raise AdapterFileError(f"There is no folder {source}.{did_you_mean(str(source), near)}")
    if not any((source / name).is_file() for name in (CONFIG_NAME, "config.json")):
        raise AdapterFileError(f"{source} is no run, adapter or model: it has no {CONFIG_NAME} and no config.json.")
    return source


def _uploaded(folder: Path, repo: str) -> dict[str, Path | bytes]:
    """Name → file, or what is uploaded in its place. Raises AdapterFileError for what has no place there."""
    adapter = (folder / CONFIG_NAME).is_file()
    known = (*_ANY, *(_ADAPTER if adapter else _MODEL))
    files: dict[str, Path | bytes] = {}
    for path in sorted(folder.iterdir()):
        if not path.is_file() or not any(fnmatch(path.name, pattern) for pattern in known):
            why = next((why for patterns, why in _REFUSED if any(fnmatch(path.name, p) for p in patterns)),
                       "which is no part of an adapter or a model")  # fmt: skip
            raise AdapterFileError(f"{folder} holds {path.name}, {why}: it is not uploaded; move it out of the folder.")
        files[path.name] = path
    if (adapter or FACTS_NAME in files) and not is_edited(folder / CARD_NAME):
        files[CARD_NAME] = card_text(folder, repo).encode()
    if not adapter:
        return dict(sorted(files.items()))
    fields = read_fields(folder)
    base = fields.get("base_model_name_or_path")
    if base and is_local(str(base)):
        text = json.dumps({**fields, "base_model_name_or_path": None}, indent=2, sort_keys=True) + "\n"
        files[CONFIG_NAME] = text.encode()
    return dict(sorted(files.items()))


def _upload(files: dict[str, Path | bytes], repo: str, token: str, asked: PushOptions) -> str:
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(token=token)
    made = False
    caught: tuple[type[Exception], ...] = (*client_errors(), ValueError)
    try:
        _refuse_owner(api, repo)
        if api.repo_exists(repo):
            if not asked.update:
                raise HubError(
                    f"{repo} already exists on the hub; choose another name, or give --update to replace its files."
                )
            if asked.private:
                raise HubError(
                    f"{repo} already exists on the hub, and --private is for a new one; change it in its settings."
                )
        else:
            api.create_repo(repo, private=asked.private)
            made = True
        operations = [CommitOperationAdd(name, content) for name, content in files.items()]
        api.create_commit(repo, operations, commit_message="Upload by Veneer")
    except caught as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        left = f" {repo} was made and may be empty: push again with --update." if made else ""
        raise HubError(f"The hub refused the upload to {repo}: {reason.rstrip('.')}.{left}") from None
    return f"{api.endpoint}/{repo}"


def _refuse_owner(api: HfApi, repo: str) -> None:
    """Raises HubError for a token that the hub does not know, and for an owner who is not the token's."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        who = api.whoami()
    except HfHubHTTPError as error:
        if error.response is None or error.response.status_code not in (401, 403):
            raise
        raise HubError(f"The hub does not accept the token in {TOKEN}; make another one at {_SETTINGS}.") from None
    owners = [who["name"], *(group["name"] for group in who.get("orgs", []))]
    owner = repo.partition("/")[0]
    if owner not in owners:
        raise HubError(
            f"The token in {TOKEN} may not write to {owner}: it is for {', '.join(owners)}."
            f"{did_you_mean(owner, owners)}"
        )
