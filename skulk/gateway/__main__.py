"""``python -m skulk.gateway``: how the launcher starts a gateway."""

from __future__ import annotations

from skulk.gateway.process import main

main()
