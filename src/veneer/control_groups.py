"""Where the system says what the control groups of this process may have: memory, and time on the cores. No torch."""

from __future__ import annotations

from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")


def control_groups(controller: str) -> list[Path]:
    """The folders of the group that this process is in, as far as ``controller`` (memory, cpu) is concerned, and of its
    parents, whose limits hold for it, too; some of them may not exist, or may have no limits.

    Version 1 has a tree of folders for each controller, version 2 one for all. The roots are always among them: in a
    container its own group is mounted there, and the path that the system reports may be the host's.
    """
    folders = []
    for line in _lines():
        _, controllers, path = line.split(":", 2)  # those of a tree of version 1; none: the one of version 2
        root = _ROOT / controller if controllers else _ROOT
        if not controllers or controller in controllers.split(","):
            here = root / path.lstrip("/")
            folders += [folder for folder in (here, *here.parents) if folder.is_relative_to(root)]
    return list(dict.fromkeys([*folders, _ROOT / controller, _ROOT]))


def _lines() -> list[str]:
    try:
        return _OWN.read_text(encoding="utf-8").splitlines()
    except OSError:  # no Linux
        return []
