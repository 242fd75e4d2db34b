"""Writing so that a reader, or a run killed at any instant, finds the old file or the new one, never half of one.

Everything is written under a temporary name beside its goal, which nobody can guess or has put there before, flushed
to the disk, and renamed. It has the mode of any new file, as the umask says. A folder that is replaced steps aside
first, since no rename puts one onto a full one: after a kill between these two renames, `remove_leftovers` puts it
back.

What the system refuses, a full disk above all, is an OSError that names the goal.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from veneer.errors import VeneerError
from veneer.unix import fcntl

TEMPORARY = ".veneer-tmp-"
_ASIDE = f"{TEMPORARY}old-"
# Errors of a write, as Rust's libraries and shutil have them; numpy says no more than how much was written.
_TOLD = re.compile(r"\(os error (\d+)\)|\[Errno (\d+)\]|\d+ requested and \d+ written")
_OF_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """A temporary path to write to; it takes ``path``'s place when the block ends well, and goes when it does not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        with errors_of(path):
            mode = _mode_of_new_file(temporary)
            yield temporary
            temporary.chmod(mode)
            _flush(temporary)
            os.replace(temporary, path)
            _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder to fill; it takes ``path``'s place, replacing the old one, when the block ends well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        with errors_of(path):
            temporary.mkdir()
            mode, inner = _mode_of_new_file(temporary / TEMPORARY), temporary.stat().st_mode & 0o7777
            (temporary / TEMPORARY).unlink()
            yield temporary
            for file in temporary.rglob("*"):
                if not file.is_symlink():
                    file.chmod(inner if file.is_dir() else mode)
                _flush(file)
            _flush(temporary)
            if path.exists():
                old = _temporary(path, _ASIDE)
                os.replace(path, old)
                os.replace(temporary, path)
                shutil.rmtree(old)
            else:
                os.replace(temporary, path)
            _flush(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def errors_of(path: Path) -> Iterator[None]:
    """Inside, what the system refuses names ``path``; libraries name a temporary file, or none, or have errors of
    their own."""
    try:
        yield
    except Exception as error:
        if (code := _refusal(error)) is not None:
            raise OSError(code, os.strerror(code), str(path)) from error
        raise


def _refusal(error: Exception) -> int | None:
    """The system's number for an error that does not say of which file it is, or of a temporary one; else None."""
    if isinstance(error, VeneerError):
        return None
    if isinstance(error, OSError) and error.errno:
        return error.errno if error.filename is None or TEMPORARY in str(error.filename) else None
    told = _TOLD.search(str(error))
    code = int(told[1] or told[2] or errno.ENOSPC) if told else None
    return code if code in _OF_WRITING else None


@contextmanager
def locked(folder: Path, *, wait: bool) -> Iterator[None]:
    """Hold ``folder``, made where it is missing, against the other processes that do so. The system takes it back from
    one that ends, however it does; on a file system without locks nothing is held.

    Raises BlockingIOError when another process holds it, and not ``wait``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise
        except OSError:
            pass
        yield
    finally:
        os.close(descriptor)


def cache_folder() -> Path:
    """Where Veneer keeps what it can make again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "veneer"


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` as UTF-8, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def remove_folder(folder: Path) -> None:
    """Delete a folder so that a process killed on the way leaves nothing under its name."""
    aside = _temporary(folder)
    os.replace(folder, aside)
    shutil.rmtree(aside)


def remove_leftovers(folder: Path, age: float = 0.0) -> None:
    """Put back the folder that a killed write had moved aside, and delete all else that it left in ``folder``.

    Where others may be writing, too, what was changed within the last ``age`` seconds is left to them.
    """
    for leftover in folder.glob(f"{TEMPORARY}*"):
        if age and time.time() - _changed(leftover) < age:
            continue
        name = leftover.name.removeprefix(_ASIDE).partition("-")[2]
        if leftover.name.startswith(_ASIDE) and not (folder / name).exists():
            os.replace(leftover, folder / name)
            continue
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def _temporary(path: Path, beginning: str = TEMPORARY) -> Path:
    """A name beside ``path`` that nothing has: `remove_leftovers` finds it, and the name after its second part."""
    return path.with_name(f"{beginning}{secrets.token_hex(8)}-{path.name}")


def _mode_of_new_file(path: Path) -> int:
    """Make the file ``path``, and give the mode that the system gave it, as the umask says; safetensors writes its
    files for their owner alone, by temporary files of its own. The umask itself cannot be read without changing it for
    other threads."""
    path.touch(exist_ok=False)
    return path.stat().st_mode & 0o777


def _changed(path: Path) -> float:
    return max(part.stat().st_mtime for part in (path, *path.rglob("*")))


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
