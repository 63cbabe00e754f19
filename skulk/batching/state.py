"""The batch as a value: what runs, what waits, and whose cells are still there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

import msgspec

from skulk.batching.admission import BatchShape
from skulk.batching.cells import NO_CELLS, Cells, count_used
from skulk.batching.operations import Operation
from skulk.batching.requests import Output, Progressed, Sequence

MIN_REUSE: Final = 64
"""Tokens from which on another request's cells are always worth taking: one prefill chunk."""


class Idle(msgspec.Struct, frozen=True, kw_only=True):
    """A slot in which nothing runs and whose cells are kept: ``tokens`` computed there, of use to who begins alike.

    ``digests``: of the prompt that they begin with.
    """

    slot: int
    tokens: tuple[int, ...]
    cells: Cells = NO_CELLS
    used_at: float
    digests: tuple[int, ...] = ()


class Parked(msgspec.Struct, frozen=True, kw_only=True):
    """A state in host memory. ``is_owned``: a waiting sequence goes on from it, so it makes room for nobody."""

    id: int
    tokens: tuple[int, ...]
    size_bytes: int
    used_at: float
    is_owned: bool = False
    digests: tuple[int, ...] = ()


class BatchState(msgspec.Struct, frozen=True, kw_only=True):
    """Everything open, and what is kept of what was.

    Attributes:
        running: by arrival; that is the order of prefill, and the last is the first to yield.
        waiting: by arrival.
        closed: choices that ended while others of their request go on.
        idle: by slot.
        next_id: for orders, segments and parked states; never used twice.
    """

    shape: BatchShape
    running: tuple[Sequence, ...] = ()
    waiting: tuple[Sequence, ...] = ()
    closed: tuple[Sequence, ...] = ()
    idle: tuple[Idle, ...] = ()
    parked: tuple[Parked, ...] = ()
    next_id: int = 1

    @property
    def is_idle(self) -> bool:
        return not self.running and not self.waiting


class Changed(NamedTuple):
    """A new state, what to tell the requests' streams, and what the engine has to do before the next step."""

    state: BatchState
    outputs: tuple[Output, ...] = ()
    operations: tuple[Operation, ...] = ()


def used_cells(running: Iterable[Sequence], idle: Iterable[Idle]) -> int:
    """How many cells of a unified cache are in use, those that several hold counted once."""
    return count_used((*(seq.cells for seq in running), *(one.cells for one in idle)))


def held_digests(state: BatchState) -> tuple[int, ...]:
    """The digests of all prompts whose computed beginnings can be taken over, the ones used last first."""
    if state.shape.reuse == "none":
        return ()
    kept = sorted((*state.idle, *state.parked), key=lambda one: -one.used_at)
    running = (sequence.request.digests for sequence in reversed(state.running))
    return tuple(dict.fromkeys(digest for digests in (*running, *(one.digests for one in kept)) for digest in digests))


def progress(sequence: Sequence) -> Progressed:
    """Where a sequence stands, for its stream."""
    return Progressed(
        key=sequence.request.key,
        phase=sequence.phase,
        processed=min(sequence.computed, sequence.known),
        total=sequence.known,
    )
