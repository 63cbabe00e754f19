"""What happens between two steps: who gets a slot, whose cells are taken over, who yields, what is parked.

    1. marks        a running sequence stands where its state is to be kept      park a copy of it
    2. waiting      in the order of arrival, while slots and cells last:
         a. a running prompt is about to compute what this one begins with       it waits for that, its slot kept free
         b. else it takes over the longest beginning there is                    `skulk.batching.reuse`
         c. the first that has no cells holds back those behind it               none starves
    3. idle cells   they cost the running ones more than allowed (unified)       park, oldest first
    4. room         the next step's cells aren't there (unified)                 idle ones go, then the newest running
                                                                                 sequence yields: parked, or recomputed
    5. holes        running slots aren't neighbours (streams)                    the last ones move into the holes

No sequence ever fails for want of cells: one alone always fits, for a window is no larger than the cache. Parked states
make room in the order of use; one that a waiting sequence goes on from makes room for nobody.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import msgspec

from skulk.batching.cells import NO_CELLS, Cells, Segment, beginning, count_used
from skulk.batching.operations import Begin, End, Forget, Keep, Move, Operation, Park, Restore, Share
from skulk.batching.rate import CHUNK_UNIT
from skulk.batching.requests import Sequence
from skulk.batching.reuse import Source, outlook
from skulk.batching.state import MIN_REUSE, BatchState, Changed, Idle, Parked, progress, used_cells

RESERVE: Final = 64
"""Cells that a sequence should find free for its answer before another is started beside it."""
MAX_PARKED: Final = 256
"""States in host memory; each of them is compared with every new prompt."""


def schedule(state: BatchState, now: float, *, idle_limit: int | None = None) -> Changed:
    """The batch as the next step finds it, and what the engine has to do for that.

    Args:
        state: after the last step and all commands.
        now: seconds of the runner's clock.
        idle_limit: cells that idle slots may hold beside running ones; None: any number.
    """
    if _is_settled(state, idle_limit):
        return Changed(state)
    draft = _Draft(state, now)
    draft.keep_marked()
    if draft.waiting:
        draft.start_waiting()
    if state.shape.is_unified:
        if idle_limit is not None and draft.running:
            draft.limit_idle(idle_limit)
        draft.make_room()
    else:
        draft.close_holes()
    return draft.changed()


def _is_settled(state: BatchState, idle_limit: int | None) -> bool:
    """Whether nothing has to be done, as between most steps; decided without a draft."""
    running, shape = state.running, state.shape
    if state.waiting and len(running) < shape.n_parallel:
        return False
    if shape.reuse == "whole" and any(seq.marks for seq in running):
        return False
    if not shape.is_unified:
        slots = [seq.slot for seq in running]
        return not slots or max(slots) - min(slots) < len(slots)
    by_running = count_used([seq.cells for seq in running])
    used = used_cells(running, state.idle) if state.idle else by_running
    if running and idle_limit is not None and used - by_running > idle_limit:
        return False
    return used + _next_step(running) <= shape.kv_cells


def _next_step(running: Iterable[Sequence]) -> int:
    """The least that the next step needs: a cell for each answer, and one chunk of the oldest prompt."""
    cells = 0
    head: Sequence | None = None
    for seq in running:
        if seq.is_decoding:
            cells += 1
        elif head is None or seq.order < head.order:
            head = seq
    return cells + (min(head.gap, CHUNK_UNIT) if head is not None else 0)


class _Draft:
    """The state while it is being changed; gone when `schedule` returns."""

    def __init__(self, state: BatchState, now: float) -> None:
        self.state = state
        self.shape = state.shape
        self.now = now
        self.running = {seq.slot: seq for seq in state.running}
        self.waiting = list(state.waiting)
        self.idle = {idle.slot: idle for idle in state.idle}
        self.parked = {parked.id: parked for parked in state.parked}
        self.next_id = state.next_id
        self.operations: list[Operation] = []
        self.moved: list[Sequence] = []
        self.source_in_use = 0

    def changed(self) -> Changed:
        return Changed(self.snapshot(), tuple(progress(seq) for seq in self.moved), tuple(self.operations))

    def snapshot(self) -> BatchState:
        return msgspec.structs.replace(
            self.state,
            running=tuple(sorted(self.running.values(), key=_order)),
            waiting=tuple(self.waiting),
            idle=tuple(self.idle.values()),
            parked=tuple(self.parked.values()),
            next_id=self.next_id,
        )

    def fresh_id(self) -> int:
        self.next_id += 1
        return self.next_id - 1

    # 1. marks

    def keep_marked(self) -> None:
        for slot, seq in self.running.items():
            if seq.marks and seq.computed >= seq.marks[0]:
                if seq.computed == seq.marks[0]:
                    self.park(slot, seq.known_tokens(0, seq.computed), seq.request.digests)
                marks = tuple(mark for mark in seq.marks if mark > seq.computed)
                self.running[slot] = msgspec.structs.replace(seq, marks=marks)

    # Host memory

    def park(self, slot: int, tokens: tuple[int, ...], digests: tuple[int, ...], *, owner: int = 0) -> bool:
        """Copies a slot's cells to host memory, if there is room or room can be made.

        ``owner``: the id that a waiting sequence will find it by; 0: it is for whoever begins alike.
        """
        size = self.shape.parked_size(len(tokens))
        if not owner and (len(tokens) < MIN_REUSE or any(one.tokens == tokens for one in self.parked.values())):
            return False
        movable = self.movable()
        stays = sum(one.size_bytes for one in self.parked.values()) - sum(one.size_bytes for one in movable)
        if stays + size > self.shape.park_bytes:
            return False
        if self.shape.reuse == "cut" and not owner:
            self.forget(one.id for one in movable if one.tokens == tokens[: len(one.tokens)])
        self.forget_down_to(self.shape.park_bytes - size)
        parked = owner or self.fresh_id()
        self.parked[parked] = Parked(
            id=parked, tokens=tokens, size_bytes=size, used_at=self.now, is_owned=owner > 0, digests=digests
        )
        self.operations.append(Park(slot=slot, parked=parked))
        return True

    def movable(self) -> list[Parked]:
        """Parked states that make room, the one used longest ago first."""
        return sorted(
            (one for one in self.parked.values() if not one.is_owned and one.id != self.source_in_use),
            key=lambda one: one.used_at,
        )

    def forget(self, parked: Iterable[int]) -> None:
        for one in parked:
            del self.parked[one]
            self.operations.append(Forget(parked=one))

    def forget_down_to(self, size_bytes: int) -> None:
        total = sum(one.size_bytes for one in self.parked.values())
        for one in self.movable():
            if total <= size_bytes and len(self.parked) < MAX_PARKED:
                return
            total -= one.size_bytes
            self.forget((one.id,))

    # Cells

    def used(self) -> int:
        return used_cells(self.running.values(), self.idle.values())

    def used_by_running(self) -> int:
        return count_used(seq.cells for seq in self.running.values())

    def oldest_idle(self, but: int = -1) -> Idle | None:
        return min((one for one in self.idle.values() if one.slot != but), key=lambda one: one.used_at, default=None)

    def evict(self, idle: Idle) -> None:
        """Empties an idle slot; what it held is parked where that has room."""
        self.park(idle.slot, idle.tokens, idle.digests)
        del self.idle[idle.slot]
        self.operations.append(Keep(slot=idle.slot, count=0))

    # 3. idle cells

    def limit_idle(self, limit: int) -> None:
        by_running = self.used_by_running()
        while self.used() - by_running > limit and (oldest := self.oldest_idle()) is not None:
            self.evict(oldest)

    # 4. room

    def make_room(self) -> None:
        while self.used() + _next_step(self.running.values()) > self.shape.kv_cells:
            oldest = self.oldest_idle()
            if oldest is not None:
                self.evict(oldest)
                continue
            assert len(self.running) > 1, "one sequence alone has no room"
            self.yield_slot(max(self.running.values(), key=_order))

    def yield_slot(self, seq: Sequence) -> None:
        """The sequence waits again, where it stood in the order of arrival, parked or to be recomputed."""
        aside = self.fresh_id()
        del self.running[seq.slot]
        tokens = seq.known_tokens(0, seq.computed)
        is_parked = seq.computed > 0 and self.park(seq.slot, tokens, seq.request.digests, owner=aside)
        self.operations += [End(slot=seq.slot, parked=aside), Keep(slot=seq.slot, count=0)]
        waits = msgspec.structs.replace(
            seq, slot=-1, computed=seq.computed if is_parked else 0, cells=NO_CELLS, marks=(), parked=aside
        )
        self.waiting = sorted([*self.waiting, waits], key=_order)
        self.moved.append(waits)

    # 2. waiting

    def start_waiting(self) -> None:
        free = self.shape.n_parallel - len(self.running)
        for seq in tuple(self.waiting):
            if free <= 0:
                return
            free -= 1
            seen = outlook(self.snapshot(), seq)
            if seen.leader is not None:
                self.mark(seen.leader, seen.mark)
                continue
            source = seen.source
            if self.shape.is_unified:
                if source is not None and self.used_by_running() + self.passing(source) > self.shape.kv_cells:
                    source = None
                if not self.has_cells(seq, source):
                    return
            self.start(seq, source)

    def mark(self, leader: Sequence, mark: int) -> None:
        seq = self.running[leader.slot]
        if mark and mark not in seq.marks:
            self.running[seq.slot] = msgspec.structs.replace(seq, marks=tuple(sorted((*seq.marks, mark))))

    def has_cells(self, seq: Sequence, source: Source | None) -> bool:
        """Whether it can begin beside the running ones without making one of them yield soon."""
        if not self.running:
            return True
        is_shared = source is not None and source.kind == "running" and self.shape.shares_cells
        taken = source.count if source is not None and is_shared else 0
        open_prompts = sum(one.gap for one in self.running.values() if not one.is_decoding)
        answers = sum(min(one.may_need, RESERVE) for one in (*self.running.values(), seq))
        return self.used_by_running() + open_prompts + answers + seq.known - taken <= self.shape.kv_cells

    def passing(self, source: Source) -> int:
        """Cells that taking a source fills for a moment: of host memory a state comes back whole and is cut then."""
        return len(self.parked[source.id].tokens) if source.kind == "parked" else 0

    def start(self, seq: Sequence, source: Source | None) -> None:
        self.source_in_use = source.id if source is not None and source.kind == "parked" else 0
        slot, cells = self.take(source)
        self.source_in_use = 0
        count = source.count if source is not None else 0
        parked = seq.parked
        is_new = seq.started_at == 0.0
        after = msgspec.structs.replace(
            seq,
            slot=slot,
            computed=count,
            cells=cells,
            parked=0,
            cached=min(count, len(seq.request.prompt)) if is_new else seq.cached,
            started_at=self.now if is_new else seq.started_at,
            marks=(seq.request.border,) if self.shape.reuse == "whole" and seq.request.border > count else (),
        )
        self.operations.append(Begin(sequence=after, parked=parked))
        if parked in self.parked:
            self.forget((parked,))
        self.running[slot] = after
        self.waiting = [one for one in self.waiting if one.order != seq.order]
        self.moved.append(after)

    def take(self, source: Source | None) -> tuple[int, Cells]:
        """Puts what ``source`` offers into a slot.

        Returns:
            the slot, and the cells of a unified cache that it holds now.
        """
        if source is None:
            return self.empty_slot(), NO_CELLS
        if source.kind == "idle" and self.is_in_place(source):
            idle = self.idle.pop(source.id)
            if source.count == len(idle.tokens):
                return idle.slot, idle.cells
            if source.is_short:
                self.park(idle.slot, idle.tokens, idle.digests)
            self.operations.append(Keep(slot=idle.slot, count=source.count))
            return idle.slot, beginning(idle.cells, source.count)
        slot = self.empty_slot(but=source.id if source.kind == "idle" else -1)
        if source.kind == "parked":
            parked = self.parked[source.id]
            if not source.is_short:
                self.parked[source.id] = msgspec.structs.replace(parked, used_at=self.now)
            cells = self.fresh_cells(source.count, most=self.passing(source))
            self.operations.append(Restore(parked=source.id, slot=slot, count=source.count))
            return slot, cells
        if source.kind == "idle":
            if not source.is_short:
                self.idle[source.id] = msgspec.structs.replace(self.idle[source.id], used_at=self.now)
            held = self.idle[source.id].cells
        else:
            held = self.running[source.id].cells
        if self.shape.shares_cells:
            cells = beginning(held, source.count)
        else:
            cells = self.fresh_cells(source.count, but=source.id if source.kind == "idle" else -1)
        self.operations.append(Share(source=source.id, slot=slot, count=source.count))
        return slot, cells

    def fresh_cells(self, count: int, *, most: int = 0, but: int = -1) -> Cells:
        """Cells that nobody shares, filled at once, so room for them is made, but not in slot ``but``.

        ``most``: cells that have to be free for a moment.
        """
        while self.shape.is_unified and self.used() + max(count, most) > self.shape.kv_cells:
            oldest = self.oldest_idle(but)
            assert oldest is not None, "started without cells"
            self.evict(oldest)
        return Cells((Segment(self.fresh_id(), count),), may_grow=True)

    def is_in_place(self, source: Source) -> bool:
        """Whether an idle slot itself is used, and what it holds beyond ``source.count`` is lost."""
        if all(slot in self.running or slot == source.id for slot in range(self.shape.n_parallel)):
            return True
        length = len(self.idle[source.id].tokens)
        is_copied = self.shape.is_unified and not self.shape.shares_cells
        if is_copied and self.used_by_running() + length + source.count > self.shape.kv_cells:
            return True
        if self.shape.reuse == "whole":
            return False
        return source.count == length if self.shape.is_unified else 2 * source.count >= length

    def empty_slot(self, but: int = -1) -> int:
        """A slot with nothing in it: a free one, the lowest; else the idle one that was used longest ago."""
        free = [slot for slot in range(self.shape.n_parallel) if slot not in self.running and slot != but]
        empty = next((slot for slot in free if slot not in self.idle), None)
        if empty is not None:
            return empty
        oldest = min((self.idle[slot] for slot in free), key=lambda one: one.used_at)
        self.evict(oldest)
        return oldest.slot

    # 5. holes

    def close_holes(self) -> None:
        """Streams are computed from the lowest to the highest in one go; a hole costs a pass of its own."""
        while self.running and max(self.running) - min(self.running) >= len(self.running):
            low, high = min(self.running), max(self.running)
            hole = next(slot for slot in range(low, high) if slot not in self.running)
            if hole in self.idle:
                self.evict(self.idle[hole])
            seq = msgspec.structs.replace(self.running.pop(high), slot=hole)
            self.operations.append(Move(source=high, slot=hole))
            self.running[hole] = seq


def _order(seq: Sequence) -> int:
    return seq.order
