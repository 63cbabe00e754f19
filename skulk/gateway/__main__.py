"""``python -m skulk.gateway``: how the launcher starts a gateway."""

from __future__ import annotations

import sys

from skulk.gateway.process import main

if __name__ == "__main__":
    sys.exit(main())
