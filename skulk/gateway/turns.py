"""Whose turn it is: fair shares of a model's slots between API keys, and interactive requests before batch ones. Pure.

    enter    nobody waits and there is a slot     goes
             the queue has room                   waits
             it is full of one key's requests     that key's newest leaves, the newcomer waits
             it is full                           refused
    turn     the next to go: interactive before batch, of these the key that has fewest at work, of these the oldest

So while others wait no key is given a slot that would leave it with more at work than another one that waits; a key
that is alone may have them all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Literal, NamedTuple

import msgspec

from skulk.wire.generation import Priority


class Ticket(msgspec.Struct, frozen=True, kw_only=True):
    """One request. ``number`` grows with arrival; ``weight``: slots that it takes; ``key``: who asks."""

    number: int
    key: str = ""
    priority: Priority = "interactive"
    weight: int = 1


class Turns(msgspec.Struct, frozen=True, kw_only=True):
    """Who is at work and who waits. ``working``: slots by key, none of them 0; ``waiting``: by arrival."""

    working: Mapping[str, int] = {}
    waiting: tuple[Ticket, ...] = ()

    @property
    def busy(self) -> int:
        """Slots in use."""
        return sum(self.working.values())


class Entered(NamedTuple):
    """What became of a newcomer; ``displaced`` had to leave the queue for it."""

    turns: Turns
    outcome: Literal["goes", "waits", "refused"]
    displaced: Ticket | None = None


def enter(turns: Turns, ticket: Ticket, *, window: int, limit: int) -> Entered:
    """A request comes. ``window``: slots there are; ``limit``: of the queue. O(queue)."""
    if not turns.waiting and _fits(turns, ticket, window):
        return Entered(_at_work(turns, ticket), "goes")
    after = msgspec.structs.replace(turns, waiting=(*turns.waiting, ticket))
    if len(turns.waiting) < limit:
        return Entered(after, "waits")
    leaves = _over_its_share(turns, ticket, limit)
    if leaves is None:
        return Entered(turns, "refused")
    return Entered(without(after, leaves), "waits", leaves)


def turn(turns: Turns, *, window: int) -> tuple[Turns, Ticket | None]:
    """The next one goes to work, if its slots are free; None: nobody does. O(queue)."""
    chosen = min(
        turns.waiting,
        key=lambda one: (one.priority == "batch", turns.working.get(one.key, 0), one.number),
        default=None,
    )
    if chosen is None or not _fits(turns, chosen, window):
        return turns, None
    return _at_work(without(turns, chosen), chosen), chosen


def leave(turns: Turns, ticket: Ticket) -> Turns:
    """A request that was at work is done."""
    left = turns.working[ticket.key] - ticket.weight
    assert left >= 0, f"{ticket.key!r} has given back more than it had"
    working = {key: count for key, count in turns.working.items() if key != ticket.key}
    return msgspec.structs.replace(turns, working=working | ({ticket.key: left} if left else {}))


def without(turns: Turns, ticket: Ticket) -> Turns:
    """A request waits no more."""
    return msgspec.structs.replace(turns, waiting=tuple(one for one in turns.waiting if one.number != ticket.number))


def _fits(turns: Turns, ticket: Ticket, window: int) -> bool:
    # one that is wider than the whole window goes alone
    return not turns.working or turns.busy + ticket.weight <= window


def _at_work(turns: Turns, ticket: Ticket) -> Turns:
    mine = turns.working.get(ticket.key, 0) + ticket.weight
    return msgspec.structs.replace(turns, working={**turns.working, ticket.key: mine})


def _over_its_share(turns: Turns, newcomer: Ticket, limit: int) -> Ticket | None:
    """The newest waiting request of the greediest key, where the newcomer's key has less than its share."""
    counts = Counter(one.key for one in turns.waiting)
    share = max(1, limit // len({*counts, newcomer.key}))
    greediest, most = counts.most_common(1)[0]
    if counts[newcomer.key] >= share or most <= share:
        return None
    own = [one for one in turns.waiting if one.key == greediest]
    return max(own, key=lambda one: (one.priority == "batch", one.number))
