"""Work in a forked process, which may be killed on the way."""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections.abc import Callable

from veneer.errors import VeneerError


def in_a_fork(do: Callable[[], None], seconds: float | None = None) -> str | None:
    """How ``do()`` ended in a forked process: "killed" after ``seconds``; "refused" with a sentence; else None, or a
    traceback."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        said = ""
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            do()
        except VeneerError:
            said = "refused"
        except BaseException:
            said = traceback.format_exc()
        os.write(writing, said.encode()[-4000:])
        os._exit(0)
    os.close(writing)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)  # of one that has ended already: it is not waited for yet
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read().decode(errors="replace")
    _, status = os.waitpid(child, 0)
    return "killed" if os.WIFSIGNALED(status) else said or None
