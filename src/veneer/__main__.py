"""The ``veneer`` command, also ``python -m veneer``: one sentence on a system that it does not run on."""

from __future__ import annotations

import sys

from veneer.errors import SystemSupportError


def main() -> None:
    """Run the command."""
    try:
        from veneer.cli import main as run
    except SystemSupportError as error:
        sys.exit(f"Error: {error}")
    run()


if __name__ == "__main__":
    main()
