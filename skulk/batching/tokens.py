"""An append-only list of token ids as a value: appending copies one short block, not the whole history."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import msgspec

BLOCK: Final = 256


class TokenLog(msgspec.Struct, frozen=True, kw_only=True):
    """Token ids in order. ``blocks`` are full (`BLOCK` ids each), ``tail`` holds fewer; ``count``: of all."""

    blocks: tuple[tuple[int, ...], ...] = ()
    tail: tuple[int, ...] = ()
    count: int = 0

    def __len__(self) -> int:
        return self.count

    @property
    def last(self) -> int:
        """The newest id; there must be one."""
        return self.tail[-1] if self.tail else self.blocks[-1][-1]

    @classmethod
    def of(cls, tokens: Iterable[int]) -> TokenLog:
        """A log that holds ``tokens``."""
        ids = tuple(tokens)
        full = len(ids) // BLOCK * BLOCK
        return cls(blocks=tuple(ids[at : at + BLOCK] for at in range(0, full, BLOCK)), tail=ids[full:], count=len(ids))

    def extended(self, tokens: tuple[int, ...]) -> TokenLog:
        """The log with these ids behind the others; O(`BLOCK` + ids)."""
        tail = self.tail + tokens
        count = self.count + len(tokens)
        if len(tail) < BLOCK:
            return TokenLog(blocks=self.blocks, tail=tail, count=count)
        more = TokenLog.of(tail)
        return TokenLog(blocks=self.blocks + more.blocks, tail=more.tail, count=count)

    def slice(self, start: int, stop: int) -> tuple[int, ...]:
        """The ids from ``start`` up to ``stop``; touches only the blocks that hold them."""
        if start >= len(self.blocks) * BLOCK:
            base = len(self.blocks) * BLOCK
            return self.tail[start - base : stop - base]
        first, last = start // BLOCK, (stop + BLOCK - 1) // BLOCK
        parts = [*self.blocks[first:last], self.tail] if last > len(self.blocks) else list(self.blocks[first:last])
        base = first * BLOCK
        return tuple(token for part in parts for token in part)[start - base : stop - base]
