"""Which tokens end a repetition, for DRY: texts of sequence breakers, found in the pieces of a vocabulary.

A breaker may lie inside one token, or begin at the end of one and go on in the next. llama.cpp goes through the whole
vocabulary to find that out (7 to 370 ms a breaker, while everybody waits); here the pieces are searched as one text.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

# llama.cpp's own limit of what follows the first token.
_MAX_TAIL_TOKENS: Final = 20


class Breakers:
    """Sequences that break repetitions.

    Args:
        tails: by first token, what must follow it; an empty tail: the token alone breaks.
        vocabulary_size: ids are below it.
    """

    def __init__(self, tails: dict[int, set[tuple[int, ...]]], vocabulary_size: int) -> None:
        self._tails = {token: sorted(found, key=len, reverse=True) for token, found in tails.items()}
        self._is_head = np.zeros(vocabulary_size, dtype=np.bool_)
        self._is_single = np.zeros(vocabulary_size, dtype=np.bool_)
        for token, found in tails.items():
            self._is_head[token] = True
            self._is_single[token] = () in found

    def is_single(self, tokens: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Which of these ids are breakers all by themselves."""
        return self._is_single[tokens]

    def distance(self, tokens: NDArray[np.int32]) -> int:
        """How many tokens stand after the last breaker in ``tokens``; all of them where there is none."""
        count = tokens.size
        for head in np.flatnonzero(self._is_head[tokens])[::-1].tolist():
            after = count - head - 1
            for tail in self._tails[int(tokens[head])]:
                if len(tail) <= after and tuple(tokens[head + 1 : head + 1 + len(tail)].tolist()) == tail:
                    return after - len(tail)
        return count


class BreakerIndex:
    """Finds breakers in a vocabulary. Made once; `find` takes some milliseconds a text.

    Args:
        pieces: the bytes of each token.
        tokenise: ids of bytes, without special tokens.
    """

    def __init__(self, pieces: Sequence[bytes], tokenise: Callable[[bytes], tuple[int, ...]]) -> None:
        self._tokenise = tokenise
        self._size = len(pieces)
        self._text = b"".join(pieces)
        self._ends = np.cumsum([len(piece) for piece in pieces])
        self._backwards = sorted((piece[::-1], token) for token, piece in enumerate(pieces) if piece)

    def find(self, texts: Sequence[bytes]) -> Breakers:
        """The breakers of these texts, none empty."""
        tails: dict[int, set[tuple[int, ...]]] = {}
        for text in texts:
            inside = self._holding(text)
            for token in inside:
                tails.setdefault(token, set()).add(())
            for length in range(1, len(text)):
                heads = self._ending_with(text[:length]) - inside
                if heads:
                    tail = self._tokenise(text[length:])[:_MAX_TAIL_TOKENS]
                    for token in heads:
                        tails.setdefault(token, set()).add(tail)
        return Breakers(tails, self._size)

    def _holding(self, text: bytes) -> set[int]:
        """Tokens whose pieces hold the text."""
        starts: list[int] = []
        start = self._text.find(text)
        while start >= 0:
            starts.append(start)
            start = self._text.find(text, start + 1)
        found = np.array(starts, dtype=np.int64)
        tokens = np.searchsorted(self._ends, found, side="right")
        is_whole = found + len(text) <= self._ends[tokens]
        return {int(token) for token in tokens[is_whole]}

    def _ending_with(self, text: bytes) -> set[int]:
        """Tokens whose pieces end with the text."""
        prefix = text[::-1]
        start = bisect.bisect_left(self._backwards, (prefix, -1))
        found: set[int] = set()
        for piece, token in self._backwards[start:]:
            if not piece.startswith(prefix):
                break
            found.add(token)
        return found
