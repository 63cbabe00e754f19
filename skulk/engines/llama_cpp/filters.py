"""What may be drawn: llama.cpp's filters on one row of logits, in numpy, without a sort of the whole vocabulary.

    keep_top_n_sigma   within n standard deviations of the best
    keep_top_k         the k best; of equal ones the lower ids
    keep_typical       those whose surprise is nearest to the expected one, until their probabilities exceed p
    keep_top_p         the best until their probabilities reach p
    keep_min_p         at least p times as probable as the best
    cut_xtc            with several above a threshold: all of those but the last go

They are those of llama-sampler.cpp, and the tests hold each against the native one. Native ones build an array of
candidates from the whole row at every token, and without top_k first compute all of it (410 us of 49,152 tokens on a
small machine); `typical` there sorts by NaN where probabilities are 0. Here a filter first takes a superset of what it
needs, from maxima of columns of the row; what it keeps is sorted, so that most filters after it only cut the tail off.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]
Ids = NDArray[np.intp]

_FEW: Final = 4096
_ARGSORT_BELOW: Final = 1024
_INT32_MAX: Final = 0x7FFF_FFFF
_LOW_BITS: Final = 0xFFFF_FFFF
_FIRST_GUESS: Final = 64
_WIDEN: Final = 8


class Candidates(NamedTuple):
    """What is left of a row.

    Attributes:
        logits: (n,) float32, no NaN; -inf is never drawn.
        peak: the greatest of them, finite.
        ids: (n,) token ids, from the best to the worst; None: all of the row, as it is.
        scratch: (n_vocab,) float32 to compute in, which saves the memory of a row; None: new memory.
    """

    logits: Logits
    peak: float
    ids: Ids | None = None
    scratch: Logits | None = None


def sorted_part(candidates: Candidates, indices: Ids, count: int | None = None) -> Candidates:
    """The ``count`` best of those at ``indices`` (at least one, ascending); None: all of them."""
    found = candidates.logits[indices]
    if candidates.ids is None:
        order = _descending(found)[:count]
        found, ids = found[order], indices[order]
    else:
        found, ids = found[:count], candidates.ids[indices[:count]]
    return Candidates(found, float(found[0]), ids, candidates.scratch)


def _descending(logits: Logits) -> Ids:
    """Indices from the greatest to the least; of equal ones the first comes first."""
    if logits.size <= _ARGSORT_BELOW:
        return (-logits).argsort(kind="stable")
    # numpy sorts numbers five times as fast as it sorts indices by them: so one number of both.
    # The bits of floats are ordered as they are, but for negative ones, and -0.0 becomes 0.0 first.
    keys = (logits + np.float32(0)).view(np.int32).astype(np.int64)
    keys ^= (keys >> 63) & _INT32_MAX
    keys = (keys << 32) | np.arange(logits.size)[::-1]
    keys.sort()
    return (logits.size - 1 - (keys[::-1] & _LOW_BITS)).astype(np.intp, copy=False)


def _head(candidates: Candidates, count: int) -> Candidates:
    """The first so many of sorted ones."""
    assert candidates.ids is not None
    return candidates._replace(logits=candidates.logits[:count], ids=candidates.ids[:count])


def keep_top_k(candidates: Candidates, k: int) -> Candidates:
    """The ``k`` best, k >= 1; all where there are fewer."""
    if k >= candidates.logits.size:
        return candidates
    if candidates.ids is not None:
        return _head(candidates, k)
    return sorted_part(candidates, leading(candidates.logits, k), k)


def keep_top_p(candidates: Candidates, p: float) -> Candidates:
    """The fewest of the best whose probabilities sum up to ``p`` at least; at least one."""
    if candidates.ids is not None:
        sums = running_sums(weights_of(candidates))
        return _head(candidates, int(np.searchsorted(sums, p * float(sums[-1]))) + 1)
    weights = weights_of(candidates)
    wanted = p * float(weights.sum())
    count = _FIRST_GUESS
    while True:
        indices = leading(candidates.logits, count)
        if indices.size == weights.size or float(weights[indices].sum()) >= wanted:
            best = sorted_part(candidates, indices)
            sums = running_sums(weights[best.ids])
            return _head(best, min(int(sums.searchsorted(wanted)) + 1, sums.size))
        count = indices.size * _WIDEN


def keep_min_p(candidates: Candidates, p: float) -> Candidates:
    """Those at least ``p`` times as probable as the best, p > 0; at least that one."""
    is_kept = candidates.logits >= np.float32(candidates.peak) + np.float32(math.log(p))
    if candidates.ids is not None:
        return _head(candidates, int(np.count_nonzero(is_kept)))
    return sorted_part(candidates, is_kept.nonzero()[0])


def keep_top_n_sigma(candidates: Candidates, n: float) -> Candidates:
    """Those within ``n`` standard deviations of the best, n > 0; what is banned already doesn't count."""
    logits = candidates.logits
    is_open = logits > -np.inf
    deviation = float(np.std(logits, where=is_open, dtype=np.float64))
    return sorted_part(candidates, (is_open & (logits >= candidates.peak - n * deviation)).nonzero()[0])


def keep_typical(candidates: Candidates, p: float) -> Candidates:
    """Locally typical sampling (https://arxiv.org/abs/2202.00666): until the probabilities exceed ``p``."""
    weights = weights_of(candidates)
    indices = weights.nonzero()[0]
    weights = weights[indices].astype(np.float64)
    shifted = candidates.logits[indices].astype(np.float64) - candidates.peak
    total = float(weights.sum())
    # Of each: log p = shifted - log(total), and the expected surprise is the entropy.
    entropy = math.log(total) - float((weights * shifted).sum()) / total
    distance = np.abs(math.log(total) - shifted - entropy)
    count = _FIRST_GUESS
    while True:
        count = min(count, distance.size)
        near = (distance <= np.partition(distance, count - 1)[count - 1]).nonzero()[0]
        order = near[distance[near].argsort(kind="stable")]
        sums = np.cumsum(weights[order])
        if sums[-1] > p * total or near.size == distance.size:
            kept = order[: int(sums.searchsorted(p * total, side="right")) + 1]
            return sorted_part(candidates, indices[np.sort(kept)])
        count = near.size * _WIDEN


def cut_xtc(candidates: Candidates, threshold: float) -> Candidates:
    """Without those of probability ``threshold`` or more, but for the least probable of them."""
    weights = weights_of(candidates)
    least = threshold * float(weights.sum())
    if candidates.ids is not None:
        gone = int(np.count_nonzero((weights >= least) & (weights > 0))) - 1
        if gone <= 0:
            return candidates
        left = candidates.logits[gone:]
        return candidates._replace(logits=left, peak=float(left[0]), ids=candidates.ids[gone:])
    above = ((weights >= least) & (weights > 0)).nonzero()[0]
    if above.size < 2:
        return candidates
    best = sorted_part(candidates, above)
    assert best.ids is not None
    left = candidates.logits.copy()
    left[best.ids[:-1]] = -np.inf
    return candidates._replace(logits=left, peak=float(left.max()))


def weights_of(candidates: Candidates, temperature: float = 1.0) -> NDArray[np.float32]:
    """``exp((logit - peak) / temperature)``: probabilities but for their sum. In the scratch, if it is a whole row."""
    out = candidates.scratch if candidates.ids is None else None
    shifted = np.subtract(candidates.logits, np.float32(candidates.peak), out=out)
    if temperature != 1:
        np.multiply(shifted, np.float32(1 / temperature), out=shifted)
    return np.exp(shifted, out=shifted)


def running_sums(weights: NDArray[np.float32]) -> NDArray[np.float64]:
    """Of weights, in double precision; converting first takes half the time of ``cumsum`` with a type."""
    return weights.astype(np.float64).cumsum()


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
        maxima = np.maximum.reduce(logits[: rows * columns].reshape(rows, columns), axis=0)
        maxima.partition(columns - count)
        bound = maxima[columns - count]
    return (logits >= bound).nonzero()[0]
