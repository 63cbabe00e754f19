"""Requests come in and end: into the waiting queue, and out of it or of their slots.

waiting ──schedule──> running ──apply, close_choice──> (closed ──>) ended
   └────────── end_request, expire, end_all ────────┘──────────────────> ended

A slot that is left keeps its cells for who begins alike (`Idle`).
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from skulk.batching.answer import Drawn, Vocabulary, draw
from skulk.batching.operations import End, Forget, Keep, Operation
from skulk.batching.requests import LANE_WIDTH, BatchRequest, Emitted, Ended, Output, RequestKey, Sequence
from skulk.batching.state import MIN_REUSE, BatchState, Changed, Idle
from skulk.wire.base import ErrorBody
from skulk.wire.generation import FinishReason, ResumedChoice, StreamEnd, Timings, Usage


def add(state: BatchState, request: BatchRequest, vocabulary: Vocabulary, now: float) -> Changed:
    """Puts a request's choices at the end of their lane of the waiting queue; `check_room` came before.

    A resumed answer is read again first, from its ids: each choice goes on where it was, or it had ended already.
    """
    assert len(state.waiting) + request.n <= state.shape.max_resumed, "admitted without room"
    assert request.cells <= state.shape.n_ctx, "admitted beyond the window"
    order = state.next_id + request.lane * LANE_WIDTH
    fresh: list[Sequence] = []
    closed: list[Sequence] = []
    told: list[Output] = []
    reason: FinishReason | None = None
    for choice, begun in enumerate(request.begun):
        sequence, text, finish_reason = _replayed(request, choice, begun, vocabulary)
        sequence = msgspec.structs.replace(sequence, order=order + choice)
        if text or finish_reason is not None:
            told.append(Emitted(key=request.key, choice=choice, text=text, finish_reason=finish_reason))
        (fresh if finish_reason is None else closed).append(sequence)
        reason = finish_reason or reason
    if not fresh:
        assert reason is not None, "a request has a choice"
        return Changed(state, (*told, _ended(tuple(closed), now, reason, None)))
    waiting = sorted((*state.waiting, *fresh), key=lambda sequence: sequence.order)
    after = msgspec.structs.replace(
        state, waiting=tuple(waiting), closed=(*state.closed, *closed), next_id=state.next_id + request.n
    )
    return Changed(after, tuple(told))


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
) -> tuple[BatchState, Ended | None, tuple[Operation, ...]]:
    """Takes a choice that has ended out of its slot; the last one of a request ends that request, with its reason."""
    key = sequence.request.key
    state, operations = _vacated(state, (sequence,), now)
    if any(seq.request.key == key for seq in (*state.running, *state.waiting)):
        return msgspec.structs.replace(state, closed=(*state.closed, sequence)), None, operations
    family = (*(seq for seq in state.closed if seq.request.key == key), sequence)
    closed = tuple(seq for seq in state.closed if seq.request.key != key)
    return msgspec.structs.replace(state, closed=closed), _ended(family, now, reason, None), operations


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
    state, operations = _vacated(state, tuple(seq for seq in state.running if seq.request.key in families), now)
    dropped = {seq.parked for seq in state.waiting if seq.request.key in families and seq.parked}
    after = msgspec.structs.replace(
        state,
        waiting=tuple(seq for seq in state.waiting if seq.request.key not in families),
        closed=tuple(seq for seq in state.closed if seq.request.key not in families),
        parked=tuple(parked for parked in state.parked if parked.id not in dropped),
    )
    ends = tuple(_ended(tuple(family), now, reason, error) for family in families.values())
    return Changed(after, ends, (*operations, *(Forget(parked=one) for one in sorted(dropped))))


def _vacated(state: BatchState, leaving: tuple[Sequence, ...], now: float) -> tuple[BatchState, tuple[Operation, ...]]:
    """Running sequences leave their slots; what they computed stays there while it may be of use."""
    slots = {seq.slot for seq in leaving}
    idle: list[Idle] = []
    operations: list[Operation] = []
    for seq in leaving:
        operations.append(End(slot=seq.slot))
        if state.shape.reuse == "none" or seq.computed < MIN_REUSE:
            operations.append(Keep(slot=seq.slot, count=0))
        else:
            tokens = seq.known_tokens(0, seq.computed)
            digests = seq.request.digests
            idle.append(Idle(slot=seq.slot, tokens=tokens, cells=seq.cells, used_at=now, digests=digests))
    running = tuple(seq for seq in state.running if seq.slot not in slots)
    return msgspec.structs.replace(state, running=running, idle=(*state.idle, *idle)), tuple(operations)


def _ended(family: tuple[Sequence, ...], now: float, reason: FinishReason, error: ErrorBody | None) -> Ended:
    request = family[0].request
    started = min((seq.started_at for seq in family if seq.started_at > 0.0), default=now)
    first = min((seq.first_at for seq in family if seq.first_at > 0.0), default=now)
    usage = Usage(
        prompt_tokens=len(request.prompt),
        completion_tokens=sum(len(seq.drawn) for seq in family),
        cached_tokens=min(family, key=lambda seq: seq.choice).cached,
    )
    prefill_s, decode_s = max(0.0, first - started), max(0.0, now - first)
    # The first token of a choice comes with its prompt.
    begun = request.begun
    later = sum(max(0, len(seq.drawn) - len(begun[seq.choice].emitted_tokens) - 1) for seq in family)
    timings = Timings(
        queue_s=max(0.0, started - request.arrived_at),
        prefill_s=prefill_s,
        decode_s=decode_s,
        prefill_tps=_rate(usage.prompt_tokens - usage.cached_tokens, prefill_s),
        decode_tps=_rate(later, decode_s),
    )
    return Ended(key=request.key, end=StreamEnd(reason=reason, error=error, usage=usage, timings=timings))


def _rate(tokens: int, elapsed_s: float) -> float:
    return round(tokens / elapsed_s, 3) if elapsed_s > 0.0 else 0.0


def _replayed(request: BatchRequest, choice: int, begun: ResumedChoice, vocabulary: Vocabulary) -> Drawn:
    """The sequence after its emitted ids, the text of them that wasn't sent, and why it had ended, if it had."""
    sequence = Sequence(request=request, choice=choice, skip=begun.sent_characters)
    return draw(sequence, begun.emitted_tokens, vocabulary)
