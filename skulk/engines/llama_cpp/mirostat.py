"""Mirostat 1 and 2 (https://arxiv.org/abs/2007.14966): keeps the surprise of the text near a target, as llama.cpp does.

``mu``, the surprise allowed at the next token, is all the state there is. It starts at twice the target and moves with
every token drawn, so a sequence that is set aside keeps it. A resumption on another runner starts anew: mu hangs on the
probabilities of tokens that aren't computed again. Draws then differ until it has found back, within some ten tokens.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from skulk.engines.llama_cpp.draw import pick
from skulk.engines.llama_cpp.filters import Candidates, keep_top_k, leading, sorted_part, weights_of

# How many of the best tokens version 1 fits its curve to; llama.cpp's own.
_FITTED: Final = 100
_MAX_EXPONENT: Final = 1000.0


class Mirostat:
    """One sequence's.

    Args:
        version: 1 or 2.
        tau: the target, bits.
        eta: how quickly mu follows.
    """

    def __init__(self, version: int, tau: float, eta: float) -> None:
        self._version = version
        self._tau = tau
        self._eta = eta
        self.mu = 2 * tau

    def draw(self, candidates: Candidates, u: float) -> int:
        """A token id of the row; ``candidates`` after temperature, ``u`` in [0, 1)."""
        kept = self._fitting(candidates) if self._version == 1 else self._probable(candidates)
        weights = weights_of(kept)
        index = pick(weights, u)
        surprise = math.log2(float(weights.sum(dtype=np.float64)) / float(weights[index]))
        self.mu -= self._eta * (surprise - self._tau)
        return index if kept.ids is None else int(kept.ids[index])

    def _probable(self, candidates: Candidates) -> Candidates:
        """Version 2: no token more surprising than mu, or the best one."""
        weights = weights_of(candidates)
        least = 2.0 ** min(max(-self.mu, -_MAX_EXPONENT), _MAX_EXPONENT) * float(weights.sum())
        indices = np.flatnonzero(weights >= least) if least < 1 else np.array([int(np.argmax(weights))])
        return sorted_part(candidates, indices)

    def _fitting(self, candidates: Candidates) -> Candidates:
        """Version 1: the k best, k from the exponent of Zipf's law that the best tokens follow."""
        return keep_top_k(candidates, self._count(candidates))

    def _count(self, candidates: Candidates) -> int:
        size = candidates.logits.size
        best = candidates.logits[leading(candidates.logits, _FITTED)]
        best = np.sort(best[best > -np.inf])[::-1][:_FITTED].astype(np.float64)
        ranks = np.log(np.arange(2, best.size + 1) / np.arange(1, best.size))
        exponent = float(ranks @ -np.diff(best)) / float(ranks @ ranks) if best.size > 1 else math.inf
        epsilon = exponent - 1
        with np.errstate(all="ignore"):
            count = np.float64(epsilon * np.exp2(np.float64(self.mu)) / (1 - np.power(np.float64(size), -epsilon))) ** (
                1 / np.float64(exponent)
            )
        # Not a number: the fit says nothing, and llama.cpp then takes the best token too.
        return 1 if np.isnan(count) else int(min(max(count, 1.0), size))
