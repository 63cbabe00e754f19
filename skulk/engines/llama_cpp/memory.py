"""The cells of a llama context, by slot: what is computed there, what others take of it, and copies in host memory.

    unified    share: the same cells get a second sequence id; nothing is copied (``llama_memory_seq_cp``)
               with a sliding window: as in streams, for cells of two ids are never used again behind the window,
               and the window's cache, which is small, would fill up
    streams    share and move: the source's state is copied through host memory and cut there: a partial
               ``llama_memory_seq_cp`` between streams aborts the process, and a whole one copies the whole buffer

Whether states can be cut is found out at load and by position: some models' memory answers "removed" or "copied" and
then computes wrong logits. A beginning of ``count`` tokens is good when memory holds the positions 0 to ``count - 1``,
a whole state when it has the positions that it was copied at, but for those behind a sliding window. Models whose
window is shorter than the context forget what lies before it, so they are whole states too.
"""

from __future__ import annotations

import ctypes
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from skulk.batching.admission import Reuse
from skulk.engines.llama_cpp.native import library
from skulk.errors import ServiceError

_ALL: Final = -1


class Span(NamedTuple):
    """First and last position that memory tells of a sequence; -1: it is empty."""

    first: int
    last: int


class State(NamedTuple):
    """A sequence's cells in host memory, how many tokens they are, and the positions they were copied at."""

    data: NDArray[np.uint8]
    length: int
    span: Span


class SequenceMemory:
    """The memory of one context; the engine thread owns it.

    Args:
        context: the ``llama_context``.
        n_parallel: slots.
        is_unified: the layout.
        forgets: the model has a sliding window that is shorter than the context.
    """

    def __init__(self, context: int, *, n_parallel: int, is_unified: bool, forgets: bool) -> None:
        self._lib: Any = library()
        self._context = context
        self._memory: int = self._lib.llama_get_memory(context)
        self._is_unified = is_unified
        self._forgets = forgets
        self._positions = [0] * n_parallel
        self._parked: dict[int, State] = {}

    @property
    def shares_cells(self) -> bool:
        """Whether sequences of a unified cache hold the same cells after `share`."""
        return not self._forgets

    def position(self, slot: int) -> int:
        """Tokens computed in this slot."""
        return self._positions[slot]

    def computed(self, slot: int, count: int) -> None:
        """A step has computed so many tokens more."""
        self._positions[slot] += count

    def clear(self) -> None:
        """Forgets all cells and all copies."""
        self._lib.llama_memory_clear(self._memory, False)
        self._positions = [0] * len(self._positions)
        self._parked.clear()

    def size(self, slot: int) -> int:
        """Bytes that a copy of the slot's cells takes."""
        return int(self._lib.llama_state_seq_get_size(self._context, slot))

    def keep(self, slot: int, count: int) -> None:
        """Frees the slot's cells from position ``count`` on."""
        assert 0 <= count <= self._positions[slot], f"slot {slot} has {self._positions[slot]} tokens, not {count}"
        if not self._cut(slot, count):
            raise _broken(f"slot {slot} could not be cut to {count} tokens")

    def share(self, source: int, slot: int, count: int) -> None:
        """Gives the empty ``slot`` the first ``count`` tokens of ``source``."""
        assert source != slot
        assert 0 < count <= self._positions[source]
        self._check_empty(slot)
        if not (self._is_unified and self.shares_cells):
            self._put(self._copied(source), slot, count)
        elif not self._copy(source, slot, count):
            raise _broken(f"slot {slot} could not take {count} tokens of slot {source}")

    def move(self, source: int, slot: int) -> None:
        """Gives the cells of ``source`` to the empty ``slot``."""
        if self._positions[source]:
            self.share(source, slot, self._positions[source])
            self.keep(source, 0)

    def park(self, slot: int, parked: int) -> None:
        """Copies the slot's cells to host memory."""
        assert parked not in self._parked, f"{parked} was used before"
        self._parked[parked] = self._copied(slot)

    def restore(self, parked: int, slot: int, count: int) -> None:
        """Gives the empty ``slot`` the first ``count`` tokens of what was parked, which stays there."""
        self._check_empty(slot)
        self._put(self._parked[parked], slot, count)

    def forget(self, parked: int) -> None:
        """Frees what was parked there, if anything was."""
        self._parked.pop(parked, None)

    def tried(self) -> Reuse:
        """Tries on slot 0, whose tokens are lost by it, what can be taken over of a sequence.

        Some tokens have to be computed there. Slot 1, where there is one, must be empty.
        """
        length = self._positions[0]
        state = self._copied(0)
        self._cut(0, 0)
        try:
            self._put(state, 0, length)
        except ServiceError:
            return "none"
        if self._forgets or length < 2:
            return "whole"
        half = length // 2
        if self._is_unified and len(self._positions) > 1:
            is_copied = self._copy(0, 1, half)
            self._cut(1, 0)
            if not is_copied:
                return "whole"
        return "cut" if self._cut(0, half) else "whole"

    def _cut(self, slot: int, count: int) -> bool:
        """Cuts and gives whether memory then holds just the beginning."""
        was_removed = self._lib.llama_memory_seq_rm(self._memory, slot, count or _ALL, _ALL)
        self._positions[slot] = count
        return bool(was_removed) and self._span(slot) == (Span(0, count - 1) if count else _EMPTY)

    def _copy(self, source: int, slot: int, count: int) -> bool:
        """Shares cells of a unified cache and gives whether memory then holds them under both."""
        is_whole = count == self._positions[source]
        end = _ALL if is_whole else count
        self._lib.llama_memory_seq_cp(self._memory, source, slot, _ALL if is_whole else 0, end)
        self._positions[slot] = count
        return self._span(slot) == (self._span(source) if is_whole else Span(0, count - 1))

    def _copied(self, slot: int) -> State:
        size = self.size(slot)
        data = np.empty(size, dtype=np.uint8)
        written: int = self._lib.llama_state_seq_get_data(self._context, _bytes(data), size, slot)
        if written != size:
            raise _broken(f"of the {size} bytes of slot {slot} {written} could be copied")
        return State(data, self._positions[slot], self._span(slot))

    def _put(self, state: State, slot: int, count: int) -> None:
        if not self._lib.llama_state_seq_set_data(self._context, _bytes(state.data), len(state.data), slot):
            raise _broken(f"a state of {state.length} tokens found no room in slot {slot}")
        self._positions[slot] = state.length
        if not self._is_back(slot, state.span):
            raise _broken(f"slot {slot} did not come back to its {state.length} tokens")
        if count < state.length:
            self.keep(slot, count)

    def _is_back(self, slot: int, copied: Span) -> bool:
        """Whether the slot has the positions that were copied, but for those that no later token sees.

        A sliding window's cells stay until their place is needed; a copy leaves out those behind the window.
        """
        span = self._span(slot)
        return span.last == copied.last and (
            span.first == copied.first or (self._forgets and copied.first < span.first <= span.last)
        )

    def _span(self, slot: int) -> Span:
        return Span(
            self._lib.llama_memory_seq_pos_min(self._memory, slot),
            self._lib.llama_memory_seq_pos_max(self._memory, slot),
        )

    def _check_empty(self, slot: int) -> None:
        assert self._positions[slot] == 0, f"slot {slot} holds {self._positions[slot]} tokens"


_EMPTY: Final = Span(-1, -1)


def _bytes(data: NDArray[np.uint8]) -> Any:
    return data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))


def _broken(what: str) -> ServiceError:
    return ServiceError("runner_failed", f"llama.cpp's memory did not do what was asked: {what}.")
