"""``skulk version``."""

from __future__ import annotations

import sys

from skulk import __version__
from skulk.cli.context import Context


def run(context: Context) -> int:  # noqa: ARG001, RUF100 - every command is called alike
    """Prints the version."""
    sys.stdout.write(f"skulk {__version__}\n")
    return 0
