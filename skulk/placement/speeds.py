"""How fast a node should draw tokens of a model: from what it was measured to do with models near that size. Pure.

    measured, same backend     the speed of the model nearest in size x its weights / these weights
    nothing measured           what backends of this kind usually read of memory a second / these weights

Drawing one token reads all weights once (of a mixture of experts a share that doesn't depend on the node), so speed
goes with the inverse of size; near sizes are asked first because small models are held up by other things.
"""

from __future__ import annotations

import math
from typing import Final

from skulk.units import GIB
from skulk.wire.beats import MeasuredSpeed

USUAL_GIB_S: Final = {"cuda": 400.0, "metal": 200.0, "rocm": 200.0, "vulkan": 200.0, "cpu": 40.0}
"""A guess that holds until the first measurement: the middle of what people have."""
_OTHER_GIB_S: Final = 100.0
MOST_TPS: Final = 4096.0
_FAR: Final = 1000
_SQRT_2: Final = math.sqrt(2.0)


def expected_tps(weights_bytes: int, backend: str, speeds: tuple[MeasuredSpeed, ...]) -> float:
    """Tokens a second for one sequence. O(speeds)."""
    size = weights_bytes.bit_length()
    nearest: MeasuredSpeed | None = None
    least = _FAR
    for speed in speeds:
        if speed.backend == backend:
            distance = abs(speed.weights_bytes.bit_length() - size)
            if distance < least:
                nearest, least = speed, distance
    if nearest is None:
        return usual_tps(weights_bytes, backend)
    return min(MOST_TPS, nearest.decode_tps * nearest.weights_bytes / max(1, weights_bytes))


def usual_tps(weights_bytes: int, backend: str) -> float:
    """Tokens a second where nothing was measured."""
    return min(MOST_TPS, USUAL_GIB_S.get(backend.partition("-")[2], _OTHER_GIB_S) * GIB / max(1, weights_bytes))


def doublings(tps: float) -> float:
    """Speed as a part of a score: whole doublings, so that noise and one busy minute don't decide."""
    # the exponent of tps x sqrt(2) is one more than log2(tps), rounded
    return float(math.frexp(tps * _SQRT_2)[1] - 1) if tps > 0.0 else -99.0
