"""What may be drawn: llama.cpp's filters on one row of logits, in numpy, without a sort of the whole vocabulary.

    keep_top_n_sigma   within n standard deviations of the best
    keep_top_k         the k best; of equal ones the lower ids
    keep_typical       those whose surprise is nearest to the expected one, until their probabilities exceed p
    keep_top_p         the best until their probabilities reach p
    keep_min_p         at least p times as probable as the best
    cut_xtc            with several above a threshold: all of those but the last go

They are those of llama-sampler.cpp, and the tests hold each against the native one. Native ones build an array of
candidates from the whole row at every token (410 us of 49,152 tokens on a small machine), and `typical` there sorts by NaN
where probabilities are 0. Here a filter first takes a superset of what it needs, from maxima of columns of the row.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]
Ids = NDArray[np.intp]

_FEW: Final = 4096
_FIRST_GUESS: Final = 64
_WIDEN: Final = 8


class Candidates(NamedTuple):
    """What is left of a row.

    Attributes:
        logits: (n,) float32, no NaN; -inf is never drawn.
        peak: the greatest of them, finite.
        ids: (n,) token ids, ascending; None: all of the row.
    """

    logits: Logits
    peak: float
    ids: Ids | None = None

    def take(self, indices: Ids) -> Candidates:
        """Those at these ascending indices, at least one."""
        logits = self.logits[indices]
        return Candidates(logits, float(logits.max()), indices if self.ids is None else self.ids[indices])


def keep_top_k(candidates: Candidates, k: int) -> Candidates:
    """The ``k`` best, k >= 1; all where there are fewer."""
    logits = candidates.logits
    if k >= logits.size:
        return candidates
    indices = leading(logits, k)
    if indices.size > k:
        found = logits[indices]
        least = np.partition(found, found.size - k)[found.size - k]
        is_better = found > least
        is_better[np.flatnonzero(found == least)[: k - np.count_nonzero(is_better)]] = True
        indices = indices[is_better]
    return candidates.take(indices)


def keep_top_p(candidates: Candidates, p: float) -> Candidates:
    """The fewest of the best whose probabilities sum up to ``p`` at least; at least one."""
    logits = candidates.logits
    wanted = p * mass(candidates)
    count = _FIRST_GUESS
    while True:
        indices = leading(logits, count)
        found = logits[indices]
        order = np.argsort(-found, kind="stable")
        sums = np.cumsum(np.exp(found[order] - np.float32(candidates.peak)), dtype=np.float64)
        if sums[-1] >= wanted or indices.size == logits.size:
            kept = min(int(np.searchsorted(sums, wanted)) + 1, indices.size)
            return candidates.take(indices[np.sort(order[:kept])])
        count = indices.size * _WIDEN


def keep_min_p(candidates: Candidates, p: float) -> Candidates:
    """Those at least ``p`` times as probable as the best, p > 0; at least that one."""
    least = np.float32(candidates.peak) + np.float32(math.log(p))
    return candidates.take(np.flatnonzero(candidates.logits >= least))


def keep_top_n_sigma(candidates: Candidates, n: float) -> Candidates:
    """Those within ``n`` standard deviations of the best, n > 0; what is banned already doesn't count."""
    logits = candidates.logits
    is_open = logits > -np.inf
    deviation = float(np.std(logits, where=is_open, dtype=np.float64))
    return candidates.take(np.flatnonzero(is_open & (logits >= candidates.peak - n * deviation)))


def keep_typical(candidates: Candidates, p: float) -> Candidates:
    """Locally typical sampling (https://arxiv.org/abs/2202.00666): until the probabilities exceed ``p``; at least one."""
    shifted = candidates.logits - np.float32(candidates.peak)
    weights = np.exp(shifted)
    indices = np.flatnonzero(weights)
    shifted, weights = shifted[indices].astype(np.float64), weights[indices].astype(np.float64)
    total = weights.sum()
    # Of each: log p = shifted - log(total), and the expected surprise is the entropy.
    entropy = math.log(total) - float(weights @ shifted) / total
    distance = np.abs(math.log(total) - shifted - entropy)
    count = _FIRST_GUESS
    while True:
        count = min(count, distance.size)
        near = np.flatnonzero(distance <= np.partition(distance, count - 1)[count - 1])
        order = near[np.argsort(distance[near], kind="stable")]
        sums = np.cumsum(weights[order])
        if sums[-1] > p * total or near.size == distance.size:
            kept = min(int(np.searchsorted(sums, p * total, side="right")) + 1, order.size)
            return candidates.take(indices[np.sort(order[:kept])])
        count = near.size * _WIDEN


def cut_xtc(candidates: Candidates, threshold: float) -> Candidates:
    """Without the tokens of probability ``threshold`` or more, but for the least probable of them ("exclude top choices")."""
    logits = candidates.logits
    weights = np.exp(logits - np.float32(candidates.peak))
    above = np.flatnonzero((weights > 0) & (weights >= threshold * float(weights.sum())))
    if above.size < 2:
        return candidates
    kept = above[above.size - 1 - int(np.argmin(logits[above][::-1]))]
    left = logits.copy()
    left[above] = -np.inf
    left[kept] = logits[kept]
    return Candidates(left, float(left.max()), candidates.ids)


def mass(candidates: Candidates) -> float:
    """Sum of the weights ``exp(logit - peak)``."""
    return float(np.exp(candidates.logits - np.float32(candidates.peak)).sum())


def leading(logits: Logits, count: int) -> Ids:
    """Ascending indices of all logits above some bound: at least the ``count`` greatest, seldom many more.

    The maxima of columns of the row bound the count-th greatest logit from below: so many columns, so many logits.
    """
    size = logits.size
    if count >= size:
        return np.arange(size)
    columns = 1 << (4 * count - 1).bit_length()
    if size <= _FEW or columns * 4 > size:
        bound = np.partition(logits, size - count)[size - count]
    else:
        rows = size // columns
        maxima = logits[: rows * columns].reshape(rows, columns).max(axis=0)
        bound = np.partition(maxima, columns - count)[columns - count]
    return np.flatnonzero(logits >= bound)
