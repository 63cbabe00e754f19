"""``python -m skulk`` is ``skulk``."""

from __future__ import annotations

import sys

from skulk.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
