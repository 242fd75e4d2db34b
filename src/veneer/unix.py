"""The modules of Python that Linux and macOS have and Windows has not. What needs one takes it from here, so that on
Windows every import of Veneer ends in the same sentence."""

from __future__ import annotations

from veneer.errors import SystemSupportError

try:
    import fcntl as fcntl
    import resource as resource
    import termios as termios
except ModuleNotFoundError:
    raise SystemSupportError("Veneer runs on Linux and macOS; on Windows, use WSL.") from None


def has_line_editor() -> bool:
    """Load Python's line editor, which input() then uses in a terminal; False where this Python has none."""
    try:
        import readline  # noqa: F401
    except ImportError:
        return False
    return True
