"""The modules of Python that Linux and macOS have and Windows has not. What needs one takes it from here, so that on
Windows every import of Veneer ends in the same sentence."""

from __future__ import annotations

from veneer.errors import SystemSupportError

try:
    import fcntl as fcntl
    import resource as resource
except ModuleNotFoundError:
    raise SystemSupportError("Veneer runs on Linux and macOS; on Windows, use WSL.") from None
