"""The draw itself: one token by its probability, decided by (seed, choice, position) and the candidates alone.

    uniforms(key, position, turn)   two numbers in [0, 1): a hash, no generator with a state
    few candidates                  the first of them, from the best on, at which the summed weights pass u * total
    the whole row                   propose and accept: see `Drawer`

So neither preemption, nor another runner, nor ``n``, nor the batch changes what is drawn.
"""

from __future__ import annotations

import hashlib
import math
import struct
from typing import Final

import numpy as np
from numpy.typing import NDArray

from skulk.engines.llama_cpp.filters import Candidates, weights_of

# Turns of `uniforms`: XTC's chance has its own; draws count from 0.
TURN_XTC: Final = -1
_MAX_TURNS: Final = 64
_UNIT: Final = 2.0**-53
_TWO_NUMBERS: Final = struct.Struct("<QQ")
_DRAW: Final = struct.Struct("<QQq")

# Rows are summed up in blocks of so many.
_BLOCK: Final = 256
# A float32 whose bits, as an integer, are 2**23 * (127 + y) lies between 2**y and 1.0615 * 2**y, for it goes along the
# chords of 2**y: that is an exponential by one multiplication and one addition (Schraudolph, 1999).
_BITS_PER_NAT: Final = 2**23 / math.log(2)
_BITS_OF_ONE: Final = 127 << 23
# Integers of that size are multiples of 64 in float32: what rounding may take from 2**y at the most.
_ROUNDING: Final = 1.0 + 2.0**-15


def uniforms(key: int, position: int, turn: int = 0) -> tuple[float, float]:
    """Two independent numbers in [0, 1) of 53 bits.

    Args:
        key: 64 bits, of seed and choice.
        position: index of the drawn token in its sequence, prompt included.
        turn: which pair.
    """
    digest = hashlib.blake2b(_DRAW.pack(key, position, turn), digest_size=16).digest()
    first, second = _TWO_NUMBERS.unpack(digest)
    return (first >> 11) * _UNIT, (second >> 11) * _UNIT


def pick(weights: NDArray[np.floating], u: float) -> int:
    """The index at which the running sum of ``weights`` passes ``u`` of the total; never one of weight 0."""
    sums = np.cumsum(weights, dtype=np.float64)
    return _passed(sums, u * float(sums[-1]))


def _passed(sums: NDArray[np.float64], target: float) -> int:
    index = int(sums.searchsorted(target, side="right"))
    # Rounding may leave the target at the very end: then the last index that added something.
    return index if index < sums.size else int(sums.searchsorted(sums[-1]))


class Drawer:
    """Draws from rows of one vocabulary size; owns the scratch for it, so one thread at a time.

    Attributes:
        scratch: (n_vocab,) float32, which each draw overwrites.

    The exponential of a whole row costs more than all the rest of a draw. So a token is proposed by weights that are
    0 to 6.15 % too great and cheap to compute, and accepted by what the true weight is of the proposed one: the tokens
    that come out have exactly the true probabilities (rejection sampling), after 1.04 turns on average.
    """

    def __init__(self, vocabulary_size: int) -> None:
        self._size = vocabulary_size
        self.scratch = np.zeros(vocabulary_size, dtype=np.float32)
        # An array: numpy takes three times as long for a maximum with a single number.
        self._zeros = np.zeros(vocabulary_size, dtype=np.float32)
        self._bits = np.zeros(-(-vocabulary_size // _BLOCK) * _BLOCK, dtype=np.int32)

    def draw(self, candidates: Candidates, temperature: float, key: int, position: int) -> int:
        """The token id; ``temperature`` > 0."""
        if candidates.ids is None:
            return self._draw_row(candidates, temperature, key, position)
        return int(candidates.ids[pick(weights_of(candidates, temperature), uniforms(key, position)[0])])

    def _draw_row(self, candidates: Candidates, temperature: float, key: int, position: int) -> int:
        logits, peak, scaled = candidates.logits, candidates.peak, self.scratch
        np.subtract(logits, np.float32(peak), out=scaled)
        np.multiply(scaled, np.float32(_BITS_PER_NAT / temperature), out=scaled)
        np.add(scaled, np.float32(_BITS_OF_ONE), out=scaled)
        # Weights below 1e-38, banned tokens among them, are 0, as a float32 would have it.
        np.maximum(scaled, self._zeros, out=scaled)
        np.copyto(self._bits[: self._size], scaled, casting="unsafe")
        weights = self._bits.view(np.float32)
        blocks = _Blocks(weights)
        for turn in range(_MAX_TURNS):
            u, v = uniforms(key, position, turn)
            index = blocks.pick(u)
            true_weight = math.exp((float(logits[index]) - peak) / temperature)
            if v * float(weights[index]) * _ROUNDING < true_weight:
                return index
        raise AssertionError(f"no token was accepted in {_MAX_TURNS} turns")


class _Blocks:
    """Weights of a row, summed up block by block, so that each draw looks into one block only."""

    def __init__(self, weights: NDArray[np.float32]) -> None:
        self._weights = weights.reshape(-1, _BLOCK)
        # Not `sum`: along short rows that is slower, and a matrix product would wake BLAS's threads.
        self._sums = np.einsum("ij->i", self._weights).cumsum(dtype=np.float64)

    def pick(self, u: float) -> int:
        """As `pick`, of all weights."""
        target = u * float(self._sums[-1])
        block = _passed(self._sums, target)
        before = float(self._sums[block - 1]) if block else 0.0
        within = self._weights[block].cumsum(dtype=np.float64)
        return block * _BLOCK + _passed(within, min(target - before, float(within[-1])))
