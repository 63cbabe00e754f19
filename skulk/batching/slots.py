"""The batch: which sequences run in which slots, and which wait.

waiting ──start_waiting──> running ──apply, close_choice──> (closed ──>) ended
   └────────── end_request, expire, end_all ────────┘──────────────────> ended
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import msgspec

from skulk.batching.admission import BatchShape
from skulk.batching.answer import Vocabulary, draw
from skulk.batching.requests import BatchRequest, Emitted, Ended, Output, Progressed, RequestKey, Sequence
from skulk.batching.tokens import TokenLog
from skulk.wire.base import ErrorBody
from skulk.wire.generation import FinishReason, StreamEnd, Timings, Usage


class BatchState(msgspec.Struct, frozen=True, kw_only=True):
    """Everything open.

    Attributes:
        running: in the order they got their slots; that is the order of prefill.
        waiting: in the order they came.
        closed: choices that ended while others of their request go on.
    """

    shape: BatchShape
    running: tuple[Sequence, ...] = ()
    waiting: tuple[Sequence, ...] = ()
    closed: tuple[Sequence, ...] = ()

    @property
    def is_idle(self) -> bool:
        return not self.running and not self.waiting


class Changed(NamedTuple):
    """A new state, what to tell the requests' streams, and the slots to end in the engine."""

    state: BatchState
    outputs: tuple[Output, ...] = ()
    freed: tuple[int, ...] = ()


class Started(NamedTuple):
    """A new state, what to tell, and the sequences to begin in the engine."""

    state: BatchState
    outputs: tuple[Output, ...]
    sequences: tuple[Sequence, ...]


def add(state: BatchState, request: BatchRequest, vocabulary: Vocabulary, now: float) -> Changed:
    """Puts a request's choices at the end of the waiting queue; `check_room` came before.

    A resumed answer is read again first, from its ids: it goes on where it was, or it had ended already.
    """
    assert len(state.waiting) + request.n <= state.shape.max_open, "admitted without room"
    assert request.cells <= state.shape.n_ctx, "admitted beyond the window"
    if not request.emitted:
        fresh = tuple(Sequence(request=request, choice=choice) for choice in range(request.n))
        return Changed(msgspec.structs.replace(state, waiting=(*state.waiting, *fresh)))
    sequence, text, finish_reason = _replayed(request, vocabulary)
    told = (
        (Emitted(key=request.key, choice=0, text=text, finish_reason=finish_reason),) if text or finish_reason else ()
    )
    if finish_reason is not None:
        return Changed(state, (*told, _ended((sequence,), now, finish_reason, None)))
    return Changed(msgspec.structs.replace(state, waiting=(*state.waiting, sequence)), told)


def start_waiting(state: BatchState, now: float) -> Started:
    """Gives free slots to waiting sequences, first come, first served.

    The first that doesn't fit holds back those behind it, so that none starves. One fits where a slot is free and the
    cells that all running ones may come to need leave room for its own: no running sequence can run out of cells.
    """
    shape = state.shape
    free = [slot for slot in range(shape.n_parallel) if slot not in {seq.slot for seq in state.running}]
    cells = sum(seq.request.cells for seq in state.running)
    started: list[Sequence] = []
    for sequence in state.waiting:
        cells += sequence.request.cells
        if len(started) == len(free) or cells > shape.kv_cells:
            break
        started.append(msgspec.structs.replace(sequence, slot=free[len(started)], started_at=now))
    if not started:
        return Started(state, (), ())
    after = msgspec.structs.replace(
        state,
        running=(*state.running, *started),
        waiting=state.waiting[len(started) :],
    )
    return Started(after, tuple(_progress(seq) for seq in started), tuple(started))


def end_request(
    state: BatchState,
    key: RequestKey,
    now: float,
    *,
    reason: FinishReason = "cancelled",
    error: ErrorBody | None = None,
) -> Changed:
    """Ends a request from outside, wherever it is; an unknown one changes nothing."""
    return _end_where(state, lambda seq: seq.request.key == key, now, reason, error)


def expire(state: BatchState, now: float) -> Changed:
    """Ends the requests whose deadline has passed with ``deadline_exceeded``."""
    if all(seq.request.deadline > now for seq in (*state.running, *state.waiting)):
        return Changed(state)
    error = ErrorBody(
        code="deadline_exceeded",
        detail="the request's time was over before its answer was complete; allow more time or ask for fewer tokens",
        retryable=True,
    )
    return _end_where(state, lambda seq: seq.request.deadline <= now, now, "error", error)


def end_all(state: BatchState, now: float, error: ErrorBody) -> Changed:
    """Ends everything open with one error."""
    return _end_where(state, lambda _: True, now, "error", error)


def close_choice(
    state: BatchState, sequence: Sequence, now: float, reason: FinishReason
) -> tuple[BatchState, Ended | None]:
    """Takes a choice that has ended out of its slot; the last one of a request ends that request, with its reason."""
    key = sequence.request.key
    running = tuple(seq for seq in state.running if seq.slot != sequence.slot)
    if any(seq.request.key == key for seq in (*running, *state.waiting)):
        return msgspec.structs.replace(state, running=running, closed=(*state.closed, sequence)), None
    family = (*(seq for seq in state.closed if seq.request.key == key), sequence)
    closed = tuple(seq for seq in state.closed if seq.request.key != key)
    return msgspec.structs.replace(state, running=running, closed=closed), _ended(family, now, reason, None)


def _end_where(
    state: BatchState,
    is_meant: Callable[[Sequence], bool],
    now: float,
    reason: FinishReason,
    error: ErrorBody | None,
) -> Changed:
    families: dict[RequestKey, list[Sequence]] = {}
    for seq in (*state.running, *state.waiting):
        if is_meant(seq):
            families.setdefault(seq.request.key, []).append(seq)
    if not families:
        return Changed(state)
    for seq in state.closed:
        if seq.request.key in families:
            families[seq.request.key].append(seq)
    after = msgspec.structs.replace(
        state,
        running=tuple(seq for seq in state.running if seq.request.key not in families),
        waiting=tuple(seq for seq in state.waiting if seq.request.key not in families),
        closed=tuple(seq for seq in state.closed if seq.request.key not in families),
    )
    ends = tuple(_ended(tuple(family), now, reason, error) for family in families.values())
    freed = tuple(seq.slot for seq in state.running if seq.request.key in families)
    return Changed(after, ends, freed)


def _ended(family: tuple[Sequence, ...], now: float, reason: FinishReason, error: ErrorBody | None) -> Ended:
    request = family[0].request
    started = min((seq.started_at for seq in family if seq.started_at > 0.0), default=now)
    first = min((seq.first_at for seq in family if seq.first_at > 0.0), default=now)
    return Ended(
        key=request.key,
        end=StreamEnd(
            reason=reason,
            error=error,
            usage=Usage(
                prompt_tokens=len(request.prompt),
                completion_tokens=sum(len(seq.drawn) for seq in family),
            ),
            timings=Timings(
                queue_s=max(0.0, started - request.arrived_at),
                prefill_s=max(0.0, first - started),
                decode_s=max(0.0, now - first),
            ),
        ),
    )


def _progress(sequence: Sequence) -> Progressed:
    return Progressed(
        key=sequence.request.key,
        phase=sequence.phase,
        processed=min(sequence.computed, sequence.known),
        total=sequence.known,
    )


def _replayed(request: BatchRequest, vocabulary: Vocabulary) -> tuple[Sequence, str, FinishReason | None]:
    """The sequence after its emitted ids, the text of them that wasn't sent, and why it had ended, if it had."""
    sequence = Sequence(request=request, drawn=TokenLog(), skip=request.sent_characters)
    parts: list[str] = []
    for token in request.emitted:
        sequence, text, finish_reason = draw(sequence, token, vocabulary)
        parts.append(text)
        if finish_reason is not None:
            return sequence, "".join(parts), finish_reason
    return sequence, "".join(parts), None
