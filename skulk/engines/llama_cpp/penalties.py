"""What lowers or raises single logits before anything is left out: biases, and penalties for what was said already.

Each edits a row in place, in the order of llama.cpp's common sampler: `Biases`, `Penalties`, `Dry`. They look back on
the tokens that they were told of (``accept``), so one that is told prompt and answer again is as it was.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from skulk.engines.llama_cpp.breakers import Breakers
from skulk.engines.llama_cpp.filters import Logits

# The logarithm of the greatest float32: exponents of DRY's base that would pass it are cut, as llama.cpp does.
_LOG_MAX: Final = 88.7228391
_LEAST_BASE: Final = 1.000001


class Edit(Protocol):
    """One of the module's."""

    def apply(self, logits: Logits) -> None:
        """Edits a row, (n_vocab,) float32, in place."""
        ...

    def accept(self, token: int) -> None:
        """Takes the next token of the sequence into account."""
        ...


class Biases:
    """Constant offsets; -inf bans a token."""

    def __init__(self, biases: Sequence[tuple[int, float]]) -> None:
        self._ids = np.array([token for token, _ in biases], dtype=np.intp)
        self._offsets = np.array([offset for _, offset in biases], dtype=np.float32)

    def apply(self, logits: Logits) -> None:
        logits[self._ids] += self._offsets

    def accept(self, token: int) -> None:
        pass


class Penalties:
    """Repetition, frequency and presence penalties over the last ``look_back`` tokens.

    Args:
        history: tokens before the answer.
        repeat: divides positive logits and multiplies others; 1 is neutral.
        frequency: taken off once for each time a token was said; ``presence``: if it was said at all.
    """

    def __init__(
        self, history: Sequence[int], *, look_back: int, repeat: float, frequency: float, presence: float
    ) -> None:
        self._look_back = look_back
        self._repeat = np.float32(repeat)
        self._frequency = np.float32(frequency)
        self._presence = np.float32(presence)
        self._recent = list(history[max(0, len(history) - look_back) :])
        self._start = 0
        ids, counts = np.unique(np.array(self._recent, dtype=np.intp), return_counts=True)
        self._count = ids.size
        self._ids = np.zeros(max(64, 2 * ids.size), dtype=np.intp)
        self._times = np.zeros(self._ids.size, dtype=np.float32)
        self._ids[: self._count], self._times[: self._count] = ids, counts
        self._places = {int(token): place for place, token in enumerate(ids)}

    def apply(self, logits: Logits) -> None:
        times = self._times[: self._count]
        # Tokens that left the window stay in their places, with a count of 0.
        ids, times = self._ids[: self._count][times > 0], times[times > 0]
        found = logits[ids]
        found = np.where(found <= 0, found * self._repeat, found / self._repeat)
        logits[ids] = found - (times * self._frequency + self._presence)

    def accept(self, token: int) -> None:
        place = self._places.setdefault(token, self._count)
        if place == self._count:
            self._grow()
            self._ids[place] = token
            self._count += 1
        self._times[place] += 1
        self._recent.append(token)
        if len(self._recent) - self._start > self._look_back:
            self._times[self._places[self._recent[self._start]]] -= 1
            self._start += 1

    def _grow(self) -> None:
        if self._count == self._ids.size:
            self._ids = np.concatenate((self._ids, np.zeros_like(self._ids)))
            self._times = np.concatenate((self._times, np.zeros_like(self._times)))


class Dry:
    """DRY (https://github.com/oobabooga/text-generation-webui/pull/5677): don't repeat yourself.

    A token that would make a repetition longer pays ``multiplier * base ** (its length so far - allowed)``, once the
    repetition has ``allowed`` tokens.

    For each earlier token the length of the common end, up to it and up to the last token, is kept and brought forward
    by one step at each token: O(``look_back``), where llama.cpp computes all of them anew.

    Args:
        history: tokens before the answer.
        look_back: at least 1.
        breakers: sequences that repetitions don't reach across.
    """

    def __init__(
        self,
        history: Sequence[int],
        *,
        look_back: int,
        multiplier: float,
        base: float,
        allowed: int,
        breakers: Breakers,
    ) -> None:
        self._look_back = look_back
        self._multiplier = multiplier
        self._base = base
        self._allowed = allowed
        self._breakers = breakers
        self._longest = int(_LOG_MAX / math.log(base)) if base > _LEAST_BASE else None
        recent = np.array(history[max(0, len(history) - look_back) :], dtype=np.int32)
        self._tokens: NDArray[np.int32] = recent
        # One fewer than the tokens: the last one's is the whole window.
        self._common = _common_ends(recent)

    def accept(self, token: int) -> None:
        before = np.concatenate((np.zeros(1, dtype=np.int32), self._common)) if self._tokens.size else self._common
        common = np.where(self._tokens == token, before + 1, 0).astype(np.int32)
        tokens = np.append(self._tokens, np.int32(token))
        self._tokens = tokens[-self._look_back :]
        self._common = common[common.size - self._tokens.size + 1 :]

    def apply(self, logits: Logits) -> None:
        count = self._tokens.size
        if count <= self._allowed:
            return
        limit = self._breakers.distance(self._tokens)
        if limit < self._allowed:
            return
        # A common end neither begins before the window nor reaches across a breaker.
        lengths = np.minimum(np.minimum(self._common, np.arange(1, count)), limit)
        repeating = np.flatnonzero(lengths >= self._allowed)
        following = self._tokens[repeating + 1]
        is_free = ~self._breakers.is_single(following)
        following, lengths = following[is_free], lengths[repeating][is_free]
        if not following.size:
            return
        # Of several earlier places the longest repetition counts: it comes last.
        order = np.argsort(lengths, kind="stable")
        exponents = lengths[order] - self._allowed
        if self._longest is not None and self._longest > 0:
            exponents = np.minimum(exponents, self._longest)
        penalties = dict(zip(following[order].tolist(), exponents.tolist(), strict=True))
        ids = np.array(list(penalties), dtype=np.intp)
        costs = self._multiplier * np.power(np.float64(self._base), np.array(list(penalties.values())))
        with np.errstate(over="ignore"):
            logits[ids] -= costs.astype(np.float32)


def _common_ends(tokens: NDArray[np.int32]) -> NDArray[np.int32]:
    """For all tokens but the last: how many tokens up to it equal those up to the last one. The Z algorithm, O(n)."""
    backwards = tokens[::-1].tolist()
    count = len(backwards)
    lengths = [0] * count
    left = right = 0
    for place in range(1, count):
        length = min(right - place, lengths[place - left]) if place < right else 0
        while place + length < count and backwards[length] == backwards[place + length]:
            length += 1
        lengths[place] = length
        if place + length > right:
            left, right = place, place + length
    return np.array(lengths[:0:-1], dtype=np.int32)
