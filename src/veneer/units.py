"""Bytes and seconds for a person."""

from __future__ import annotations

_MOST_DIGITS = 7  # beyond the usual ones, by which GB show a single byte


def amount(size: int, more_digits: int = 0) -> str:
    """Bytes for a person."""
    if size >= 1e9:
        return f"{size / 1e9:,.{2 + more_digits}f} GB"
    return f"{size / 1e6:,.{1 + more_digits}f} MB"


def compared(bound: int, *sizes: int) -> list[str]:
    """``bound`` and ``sizes``, in bytes, as texts to print in one message.

    A size that is larger than the bound has a larger number in print, too, and one that fits has none that is larger:
    all have as many digits as that takes.

    >>> compared(8_000_000_000, 7_996_000_000, 8_001_000_000)
    ['8.000 GB', '7.996 GB', '8.001 GB']
    """
    digits = 0
    larger = [size for size in sizes if size > bound]
    while digits < _MOST_DIGITS and any(_printed(size, digits) <= _printed(bound, digits) for size in larger):
        digits += 1
    return [amount(size, digits) for size in (bound, *sizes)]


def _printed(size: int, digits: int) -> float:
    """The bytes that a reader of the text has in mind."""
    number, unit = amount(size, digits).replace(",", "").split()
    return float(number) * {"GB": 1e3, "MB": 1}[unit]


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.3g} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
