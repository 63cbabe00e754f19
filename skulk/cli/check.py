"""One finding of ``skulk doctor``."""

from __future__ import annotations

from typing import Literal

import msgspec


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One finding. ``verdict``: ``ok``; ``warn``: a node runs, with less; ``fail``: it can't start or serve."""

    check: str
    verdict: Literal["ok", "warn", "fail"]
    detail: str
    remedy: str = ""
