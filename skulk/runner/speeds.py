"""How fast a runner has been lately: running means over the requests that came to their own end. Pure."""

from __future__ import annotations

from typing import Final

from skulk.wire.beats import RunnerStatus
from skulk.wire.generation import StreamEnd

MIN_PREFILL: Final = 64
"""Fewer computed prompt tokens than one chunk tell the step's fixed cost, not a speed."""
MIN_DRAWN: Final = 8
NEW_SHARE: Final = 0.2
"""Of a new figure in the mean."""


def speeds_after(status: RunnerStatus, end: StreamEnd, n: int) -> dict[str, float]:
    """The status's figures that an ended request changes; ``n``: its choices, that were drawn side by side."""
    usage, timings = end.usage, end.timings
    if usage is None or timings is None or end.reason not in ("stop", "length"):
        return {}
    figures = {"request_s": _mean(status.request_s, timings.prefill_s + timings.decode_s)}
    if usage.prompt_tokens - usage.cached_tokens >= MIN_PREFILL and timings.prefill_tps > 0.0:
        figures["prefill_tps"] = _mean(status.prefill_tps, timings.prefill_tps)
    if usage.completion_tokens >= MIN_DRAWN * n and timings.decode_tps > 0.0:
        figures["decode_tps"] = _mean(status.decode_tps, timings.decode_tps / n)
    return figures


def _mean(old: float, new: float) -> float:
    """Three digits: what is told to everybody needn't change with each request's noise."""
    return float(f"{new if old <= 0.0 else old + NEW_SHARE * (new - old):.3g}")
