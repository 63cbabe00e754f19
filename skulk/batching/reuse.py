"""Whose computed tokens a new sequence can begin with: the longest common beginning over slots and parked states.

    can be cut       any beginning of a running sequence, an idle slot or a parked state
    only whole       an idle slot, a parked state or a running sequence whose every token is wanted
                     (recurrent and hybrid models, sliding windows: what was forgotten can't be cut back to)

The last known token is never taken over: computing it gives the logits that the next token is drawn from.

A beginning of less than a chunk (`MIN_REUSE`), such as what a chat template puts before every prompt, is taken where
that costs next to nothing: cells that are shared, or a state short enough to be copied (`COPIED_PER_TOKEN`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Literal, NamedTuple

import msgspec

from skulk.batching.requests import Sequence
from skulk.batching.state import MIN_REUSE, BatchState

MIN_SHORT_REUSE: Final = 16
"""Tokens below which nothing is taken over."""
COPIED_PER_TOKEN: Final = 16
"""Tokens that may be copied for each one that a short beginning saves: a copy is whole before it is cut."""


class Source(msgspec.Struct, frozen=True):
    """``count`` tokens of a running sequence's or idle slot's, or of a parked state (``id``: slot or parked id).

    ``length``: tokens that are there in all.
    """

    kind: Literal["running", "idle", "parked"]
    id: int
    count: int
    length: int

    @property
    def is_short(self) -> bool:
        """Whether it saves less than a chunk; then taking it mustn't count as a use of what is there."""
        return self.count < MIN_REUSE


class Outlook(NamedTuple):
    """What there is for a waiting sequence now, and what it might take if it waits.

    Attributes:
        source: the longest that can be taken now; None: nothing worth it.
        leader: a running sequence that is about to compute more of what it needs.
        mark: where the leader's state would have to be kept, where states can't be cut; else 0.
    """

    source: Source | None
    leader: Sequence | None = None
    mark: int = 0


def common_beginning(first: tuple[int, ...], second: tuple[int, ...]) -> int:
    """How many tokens two texts have in common from the first one on; O(that), by comparing slices."""
    low, high = 0, min(len(first), len(second))
    if first[:high] == second[:high]:
        return high
    width = MIN_REUSE
    while first[low : low + width] == second[low : low + width]:
        low += width
        width *= 2
    high = min(high, low + width)
    while high - low > 1:
        middle = (low + high) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle
    return low


def outlook(state: BatchState, sequence: Sequence) -> Outlook:
    """What a waiting sequence can take over. O(tokens in common x places to look)."""
    if state.shape.reuse == "none":
        return Outlook(None)
    wanted = sequence.known_tokens(0, sequence.known)
    if sequence.parked:
        own = next((parked for parked in state.parked if parked.id == sequence.parked), None)
        if own is not None:
            return Outlook(Source("parked", own.id, len(own.tokens), len(own.tokens)))
    source = _longest_now(state, sequence, wanted)
    return _with_leader(state, sequence, wanted, source)


def _longest_now(state: BatchState, sequence: Sequence, wanted: tuple[int, ...]) -> Source | None:
    """The longest; of equals what costs least to take: the shortest state, an idle slot, a running one, host memory."""
    offers = (source for source in _offers(state, wanted) if _is_worth_it(state, source))
    best = max(offers, key=_preferred, default=None)
    if best is not None:
        return best
    # A choice forks from its brother however short their prompt is.
    brothers = {other.slot for other in state.running if other.request.key == sequence.request.key}
    offers = (source for source in _offers(state, wanted) if source.kind == "running" and source.id in brothers)
    best = max(offers, key=lambda source: source.count, default=None)
    return best if best is not None and best.count > 0 else None


def _preferred(source: Source) -> tuple[int, int]:
    return source.count, -source.length


def _is_worth_it(state: BatchState, source: Source) -> bool:
    if source.count >= MIN_REUSE:
        return True
    if source.count < MIN_SHORT_REUSE or state.shape.reuse != "cut":
        return False
    is_shared = state.shape.is_unified and state.shape.shares_cells and source.kind != "parked"
    return is_shared or source.length <= COPIED_PER_TOKEN * source.count


def _offers(state: BatchState, wanted: tuple[int, ...]) -> Iterator[Source]:
    most = len(wanted) - 1
    is_cut = state.shape.reuse == "cut"
    for idle in state.idle:
        yield Source("idle", idle.slot, _usable(wanted, idle.tokens, most, is_cut=is_cut), len(idle.tokens))
    for other in state.running:
        tokens = other.known_tokens(0, min(other.computed, most if is_cut else other.computed))
        yield Source("running", other.slot, _usable(wanted, tokens, most, is_cut=is_cut), other.computed)
    for parked in state.parked:
        if not parked.is_owned:
            yield Source("parked", parked.id, _usable(wanted, parked.tokens, most, is_cut=is_cut), len(parked.tokens))


def _usable(wanted: tuple[int, ...], tokens: tuple[int, ...], most: int, *, is_cut: bool) -> int:
    if is_cut:
        return min(common_beginning(wanted, tokens), most)
    is_whole = len(tokens) <= most and wanted[: len(tokens)] == tokens
    return len(tokens) if is_whole else 0


def _with_leader(state: BatchState, sequence: Sequence, wanted: tuple[int, ...], source: Source | None) -> Outlook:
    """Whether a prompt is being computed that begins alike: its turn comes first, so waiting for it costs nothing."""
    most = len(wanted) - 1
    now = source.count if source is not None else 0
    best: Outlook = Outlook(source)
    gain = 0
    for other in state.running:
        if other.is_decoding:
            continue
        target = min(common_beginning(wanted, other.known_tokens(0, other.known)), most)
        is_brother = other.request.key == sequence.request.key
        if target <= max(now, other.computed) or (target < MIN_REUSE and not is_brother):
            continue
        if target - now > gain:
            gain = target - now
            best = Outlook(source, other, 0 if state.shape.reuse == "cut" else target)
    return best
