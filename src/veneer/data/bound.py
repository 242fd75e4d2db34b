"""Limits for chat templates: they are programs of others, which may run for ever or fill the memory."""

from __future__ import annotations

import ctypes
import re
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from veneer.host_memory import resident_memory

SECONDS = 20.0  # of one text
MEMORY = 2 * 2**30  # bytes that the process may grow by meanwhile
LARGEST = 1_000_000  # number in a template
_EVERY = 0.1  # seconds between two looks
_IDLE = 2.0  # seconds after which nobody looks any longer
_GENERATION = re.compile(r"{%-?\s*(end)?generation\s*-?%}")  # a tag of transformers alone
_T = TypeVar("_T")


class LimitError(Exception):
    """Raised inside what ran for too long or took too much."""

    def __init__(self, *said: object) -> None:
        super().__init__(*(said or (f"it ran for over {SECONDS:.0f} s, or took over {MEMORY >> 30} GB",)))


class Bound:
    """Runs functions in Python one after the other, each within `SECONDS` and `MEMORY`.

    A thread looks at the clock and at the memory, and raises `LimitError` in the one that runs the function, which gets
    it between two of its steps: one step in C is not ended, and its memory may be more.

    Example:
        >>> from veneer.data.bound import Bound
        >>> Bound().run(lambda: 1 + 1)
        2
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: tuple[int, float] | None = None  # the thread, and when it began
        self._ended = 0.0  # when the last one ended
        self._watched = False

    def run(self, function: Callable[[], _T]) -> _T:
        """What ``function()`` returns. Raises LimitError, and what it raises."""
        try:
            with self._lock:
                self._running = threading.get_ident(), time.monotonic()
                if not self._watched:
                    self._watched = True
                    threading.Thread(target=self._watch, name="veneer-bound", daemon=True).start()
            return function()
        finally:
            with self._lock:  # a limit is not raised any longer once this is had
                self._running, self._ended = None, time.monotonic()

    def _watch(self) -> None:
        seen: tuple[tuple[int, float], int] | None = None  # what ran at the last look, and the memory when first seen
        while True:
            time.sleep(_EVERY)
            with self._lock:
                if self._running is None:
                    if time.monotonic() - self._ended > _IDLE:
                        self._watched = False
                        return
                    continue
                if seen is None or seen[0] != self._running:
                    seen = self._running, resident_memory()
                (thread, began), memory = seen
                if time.monotonic() - began > SECONDS or resident_memory() - memory > MEMORY:
                    self._running = None
                    self._ended = time.monotonic()
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(LimitError))

    def __reduce__(self) -> tuple[type[Bound], tuple[Any, ...]]:
        return Bound, ()


def excess_of(template: str) -> str | None:
    """What in a chat template makes more than memory holds in one step, which nothing can end: a power, a number above
    `LARGEST`, or a text times what is not known. None where there is nothing, or the text is no template.

    Example:
        >>> from veneer.data.bound import excess_of
        >>> excess_of("{{ 'x' * 10**10 }}")
        'a power'
        >>> excess_of("{{ messages[0].content * 2 }}") is None
        True
    """
    from jinja2 import Environment, TemplateError, nodes

    env = Environment(extensions=["jinja2.ext.loopcontrols"], optimized=False)
    try:
        tree = env.parse(_GENERATION.sub("", template))
        if next(tree.find_all(nodes.Pow), None) is not None:
            return "a power"
        for number in tree.find_all(nodes.Const):
            if isinstance(number.value, int) and abs(number.value) > LARGEST:
                return f"a number above {LARGEST:,}"
        for product in tree.find_all(nodes.Mul):
            sides = (product.left, product.right)
            kinds = [type(side.value) if isinstance(side, nodes.Const) else None for side in sides]
            if str in kinds and int not in kinds:
                return "a text times a number that is not known"
    except (TemplateError, RecursionError):
        pass  # what renders it says so
    return None
