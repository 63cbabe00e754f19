"""The draw itself: one token by its probability, decided by (seed, choice, position) and the candidates alone.

    uniform(key, position, place)   numbers in [0, 1): a hash, no generator with a state
    few candidates                  the first of them, from the best on, at which the summed weights pass u * total
    the whole row                   head and tail of it: see `Drawer`

So neither preemption, nor another runner, nor ``n``, nor the batch changes what is drawn.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

from skulk.engines.llama_cpp.filters import Candidates, running_sums, weights_of

# Places of `uniform`: XTC's chance has its own; draws count from 0, three a turn.
PLACE_XTC: Final = -1
_MAX_TURNS: Final = 512
_PLACES: Final = 3 * _MAX_TURNS + 1
_UNIT: Final = 2.0**-53
_BITS: Final = 2**64 - 1

# Rows are summed up in blocks of so many.
_BLOCK: Final = 256
# A head of more than this share of a row isn't worth being taken out of it.
_DENSE_SHARE: Final = 0.25
# What the tail is assumed to weigh, in weights of the peak: more makes the head shorter and more turns vain.
_TAIL_WEIGHT: Final = 4.0


def uniform(key: int, position: int, place: int = 0) -> float:
    """A number in [0, 1) of 53 bits: SplitMix64 (Steele, Lea, Flood 2014) at a state that nothing else has.

    Args:
        key: 64 bits, of seed and choice.
        position: index of the drawn token in its sequence, prompt included.
        place: which of the numbers of that position.
    """
    bits = (key + (position * _PLACES + place + 2) * 0x9E37_79B9_7F4A_7C15) & _BITS
    bits = ((bits ^ (bits >> 30)) * 0xBF58_476D_1CE4_E5B9) & _BITS
    bits = ((bits ^ (bits >> 27)) * 0x94D0_49BB_1331_11EB) & _BITS
    return ((bits ^ (bits >> 31)) >> 11) * _UNIT


def pick(weights: NDArray[np.float32], u: float) -> int:
    """The index at which the running sum of ``weights`` passes ``u`` of the total; never one of weight 0."""
    sums = running_sums(weights)
    return _passed(sums, u * float(sums[-1]))


def _passed(sums: NDArray[np.float64], target: float) -> int:
    index = int(sums.searchsorted(target, side="right"))
    # Rounding may leave the target at the very end: then the last index that added something.
    return index if index < sums.size else int(sums.searchsorted(float(sums[-1])))


class Drawer:
    """Draws from rows of one vocabulary size; owns the scratch for it, so one thread at a time.

    The exponential of a whole row costs more than all the rest of a draw, and most of it is of tokens that together
    weigh next to nothing. So the row is parted some way below its peak:

        head   what lies above, seldom more than a thousand tokens, with its true weights
        tail   the others; each weighs less than ``4 / n_vocab``, all of them less than four times as much as the peak

    A turn draws from the head and a tail that is taken for as heavy as that. Where the tail comes out, one token of the
    vocabulary is looked at: it is taken with the share that its true weight has of the assumed one, else the next turn
    begins. What comes out has exactly the true probabilities (rejection sampling), after a few turns: fewer the flatter
    the row, and never more than five on average.

    Attributes:
        scratch: (n_vocab,) float32, which each draw overwrites.
    """

    def __init__(self, vocabulary_size: int) -> None:
        self._size = vocabulary_size
        self._padded = np.zeros(-(-vocabulary_size // _BLOCK) * _BLOCK, dtype=np.float32)
        self.scratch = self._padded[:vocabulary_size]

    def draw(self, candidates: Candidates, temperature: float, key: int, position: int) -> int:
        """The token id; ``temperature`` > 0."""
        if candidates.ids is not None:
            return int(candidates.ids[pick(weights_of(candidates, temperature), uniform(key, position))])
        bound = np.float32(candidates.peak - math.log(max(self._size / _TAIL_WEIGHT, 1)) * temperature)
        # Of one token; more than it should be where the logits are so great that float32 has no number just there.
        tail_weight = math.exp((float(bound) - candidates.peak) / temperature)
        is_head = candidates.logits >= bound
        head = is_head.nonzero()[0]
        if tail_weight * self._size > 2 * _TAIL_WEIGHT or head.size > _DENSE_SHARE * self._size:
            weights_of(candidates._replace(scratch=self.scratch), temperature)
            return _pick_in_blocks(self._padded, uniform(key, position))
        return self._draw_parted(candidates, temperature, head, tail_weight, key, position)

    def _draw_parted(
        self,
        row: Candidates,
        temperature: float,
        head: NDArray[np.intp],
        tail_weight: float,
        key: int,
        position: int,
    ) -> int:
        sums = running_sums(weights_of(Candidates(row.logits[head], row.peak, head), temperature))
        head_mass = float(sums[-1])
        for turn in range(_MAX_TURNS):
            target = uniform(key, position, 3 * turn) * (head_mass + tail_weight * self._size)
            if target < head_mass:
                return int(head[_passed(sums, target)])
            token = int(uniform(key, position, 3 * turn + 1) * self._size)
            true_weight = math.exp((float(row.logits[token]) - row.peak) / temperature)
            taken_at = uniform(key, position, 3 * turn + 2) * tail_weight
            if taken_at < true_weight and not _holds(head, token):
                return token
        raise AssertionError(f"no token was accepted in {_MAX_TURNS} turns")


def _holds(ascending: NDArray[np.intp], index: int) -> bool:
    at = int(ascending.searchsorted(index))
    return at < ascending.size and int(ascending[at]) == index


def _pick_in_blocks(weights: NDArray[np.float32], u: float) -> int:
    """As `pick`, of a row of whole blocks: it is summed up block by block, and only one block is looked into."""
    blocks = weights.reshape(-1, _BLOCK)
    # Not `sum`: along short rows that is slower, and a matrix product would wake BLAS's threads.
    sums = running_sums(np.einsum("ij->i", blocks))
    target = u * float(sums[-1])
    block = _passed(sums, target)
    within = running_sums(blocks[block])
    before = float(sums[block - 1]) if block else 0.0
    return block * _BLOCK + _passed(within, min(target - before, float(within[-1])))
