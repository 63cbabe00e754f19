"""``python -m skulk.runner``: how a node starts a runner."""

from __future__ import annotations

from skulk.runner.process import main

main()
