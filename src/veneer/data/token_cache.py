"""The tokens of a large set, made once and kept: a run that is resumed, or a second one over the rows, finds them.

A file in the cache folder is named by all that its tokens depend on: the rows, the tokenizer, the template, the
options, and the versions. It is renamed into its place when it is whole; two runs that make it at a time both do, of
the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, fields
from pathlib import Path

import tokenizers
import transformers

from veneer import __version__
from veneer.data.bad import BadRows
from veneer.data.dates import pinned_date
from veneer.data.formats import Example
from veneer.data.kept import Kept
from veneer.data.labels import Renderer
from veneer.data.pairs import PairRows, Watched, to_judged, to_pairs
from veneer.data.report import Report
from veneer.data.token_rows import TokenRows
from veneer.documents import parsed_json
from veneer.files import atomic_file, cache_folder, remove_leftovers

_FORM = 1  # raised when the same rows become other tokens than before, within a version, too
_KILLED = 3600  # seconds: a write that did nothing for so long was
_UNUSED = 30 * 24 * 3600  # seconds: tokens that nobody has used for so long go
_ROOM = 2  # times the file's size must be free on the disk: a cache is no reason to fill it


def kept_tokens(
    renderer: Renderer, examples: Sequence[Example], watched: Watched = iter, bad: BadRows | None = None
) -> tuple[TokenRows, Report]:
    """`Renderer.all`, from the file of an earlier time where there is one. Rows of which some are bad have none."""
    return _kept(renderer, examples, lambda: renderer.all(examples, watched, bad), TokenRows, "", bad)


def kept_pairs(
    renderer: Renderer, examples: Sequence[Example], first: int = 0, watched: Watched = iter, *, judged: bool = False
) -> tuple[TokenRows, Report]:
    """`to_judged` or `to_pairs`, from the file of an earlier time where there is one."""
    make = to_judged if judged else to_pairs
    what = f"{'judged' if judged else 'pairs'} from {first}"
    return _kept(renderer, examples, lambda: make(renderer, examples, first, watched), PairRows, what)


def _kept(
    renderer: Renderer, examples: Sequence[Example], make: Callable[[], tuple[TokenRows, Report]],
    kind: type[TokenRows], what: str, bad: BadRows | None = None,
) -> tuple[TokenRows, Report]:  # fmt: skip
    """What ``make`` makes of the examples, of a ``kind``; ``what`` distinguishes it from other tokens of these
    examples."""
    name = _name(renderer, examples, what)
    if name is None:
        return make()
    path = cache_folder() / "tokens" / name
    there = _read(path, kind)
    if there is not None:
        return there
    before = len(bad or ())
    made = make()
    if len(bad or ()) > before:
        return made
    _keep(path, *made)
    return _read(path, kind) or made


def _name(renderer: Renderer, examples: Sequence[Example], what: str) -> str | None:
    """None where there are few rows, or the tokenizer is not one whose every setting is known."""
    rows = examples.digest() if isinstance(examples, Kept) else None
    tokenizer = renderer.tokenizer
    if rows is None or not getattr(tokenizer, "is_fast", False):
        return None
    options = {field.name: getattr(renderer, field.name) for field in fields(renderer) if field.name != "tokenizer"}
    depends_on = [
        _FORM, __version__, transformers.__version__, tokenizers.__version__, rows, what, repr(options),
        pinned_date(tokenizer), type(tokenizer).__name__, tokenizer.chat_template, repr(tokenizer.special_tokens_map),
        tokenizer.backend_tokenizer.to_str(),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()[:32]


def _read(path: Path, kind: type[TokenRows]) -> tuple[TokenRows, Report] | None:
    with ExitStack() as opened:
        try:
            file = opened.enter_context(path.open("rb"))
            rows, note = kind.read(file)
            report = Report(**parsed_json(note))
        except (OSError, ValueError, TypeError, EOFError, KeyError):
            return None
        opened.pop_all()  # the rows read from it
    with suppress(OSError):
        os.utime(path)
    return rows, report


def _keep(path: Path, rows: TokenRows, report: Report) -> None:
    """Where it cannot be written, it is not."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent, age=_KILLED)
        for old in path.parent.iterdir():
            if time.time() - old.stat().st_mtime > _UNUSED:
                old.unlink()
        if shutil.disk_usage(path.parent).free < _ROOM * rows.nbytes:
            return
        with atomic_file(path) as temporary, temporary.open("wb") as file:
            rows.write(file, json.dumps(asdict(report)))
