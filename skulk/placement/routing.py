"""Which ready replica takes a request: the one that is expected to give its first token soonest. Pure.

    expected = wait + prefill
    wait       (requests ahead + 1 - slots) / slots x a request's time, where no slot is free; else none
    prefill    tokens of the prompt that aren't in its cache / prompt tokens a second x (1 + busy slots / slots)

    1. two replicas are drawn from the seed           two gateways that see the same figures draw differently, so a
                                                      replica that looks idle isn't overrun before its status says so
    2. a third joins them: of those that hold most    a beginning that is there is worth more than chance finding it;
       of the prompt, the soonest                     where that replica is busy its wait says so
    3. the soonest of these comes first; equals in    so that replicas of which nothing is known yet share the work
       the order in which they were drawn
    4. behind it all others, the soonest first        asked where the first refuses

Requests ahead are those that its status tells or, where that is more, those that this gateway itself has sent there: a
status is up to a second old.
"""

from __future__ import annotations

from typing import Final

import msgspec

from skulk.placement.prefixes import NOTHING_HELD, Held, Prefix

PREFILL_TPS: Final = 200.0
"""Prompt tokens a second where no replica has measured its own."""
REQUEST_S: Final = 5.0
"""A request's time in a slot where none was measured."""
_STEP: Final = 0x9E3779B97F4A7C15
_64: Final = 2**64 - 1


class Replica(msgspec.Struct, frozen=True, kw_only=True):
    """One ready replica as a gateway knows it.

    Attributes:
        name: the runner's id.
        slots: requests that it serves side by side.
        active: requests that have a slot; ``waiting``: those that have none yet.
        sent: requests that this gateway has open there.
        prefill_tps: prompt tokens a second, as measured lately; 0: not yet.
        request_s: how long a request keeps its slot, as measured lately; 0: not yet.
        held: beginnings of prompts that it has computed.
    """

    name: str
    slots: int = 1
    active: int = 0
    waiting: int = 0
    sent: int = 0
    prefill_tps: float = 0.0
    request_s: float = 0.0
    held: Held = NOTHING_HELD


class Expected(msgspec.Struct, frozen=True, kw_only=True):
    """What a request has to expect at a replica; ``cached``: the share of its prompt that is there. Seconds."""

    name: str
    wait_s: float
    prefill_s: float
    cached: float

    @property
    def first_token_s(self) -> float:
        """Until the first token."""
        return self.wait_s + self.prefill_s


def expected_at(replica: Replica, prefix: Prefix) -> Expected:
    """What a prompt has to expect at one replica."""
    ahead = max(replica.active + replica.waiting, replica.sent)
    slots = max(1, replica.slots)
    wait_s = max(0, ahead + 1 - slots) / slots * (replica.request_s or REQUEST_S)
    cached = replica.held.share_of(prefix)
    shared = 1 + min(ahead, slots) / slots
    # one row is always computed: it gives the logits of the first token
    tokens = max(1.0, prefix.tokens * (1.0 - cached))
    return Expected(
        name=replica.name,
        wait_s=wait_s,
        prefill_s=tokens / (replica.prefill_tps or PREFILL_TPS) * shared,
        cached=cached,
    )


def route(replicas: tuple[Replica, ...], prefix: Prefix, seed: int) -> tuple[Expected, ...]:
    """All replicas in the order in which to ask them; see the module. O(replicas x (marks + log replicas)).

    Args:
        replicas: in any order.
        prefix: of the request's prompt.
        seed: any integer; equal input, equal order.
    """
    ordered = sorted(_with_usual(replicas), key=lambda replica: replica.name)
    expected = [expected_at(replica, prefix) for replica in ordered]
    if len(expected) < 2:
        return tuple(expected)
    drawn = _two_of(len(expected), seed)
    considered = [expected[place] for place in drawn]
    most = max(one.cached for one in expected)
    if most > 0.0:
        considered.append(min((one for one in expected if one.cached == most), key=_soonest))
    first = min(considered, key=lambda one: one.first_token_s)
    return (first, *sorted((one for one in expected if one is not first), key=_soonest))


def _with_usual(replicas: tuple[Replica, ...]) -> tuple[Replica, ...]:
    """What a replica hasn't measured yet is taken to be as the others', so that a guess doesn't beat a measurement."""
    speeds = [replica.prefill_tps for replica in replicas if replica.prefill_tps > 0.0]
    times = [replica.request_s for replica in replicas if replica.request_s > 0.0]
    tps = sum(speeds) / len(speeds) if speeds else PREFILL_TPS
    time_s = sum(times) / len(times) if times else REQUEST_S
    return tuple(
        msgspec.structs.replace(replica, prefill_tps=replica.prefill_tps or tps, request_s=replica.request_s or time_s)
        for replica in replicas
    )


def _soonest(one: Expected) -> tuple[float, str]:
    return one.first_token_s, one.name


def _two_of(count: int, seed: int) -> tuple[int, int]:
    """Two different places out of ``count``, each pair in each order as likely as any other."""
    first = _mixed(seed) % count
    second = _mixed(seed + _STEP) % (count - 1)
    return first, second + (second >= first)


def _mixed(seed: int) -> int:
    """The seed's bits, spread (splitmix64's finalizer): ids that differ little draw unlike."""
    seed = seed + _STEP & _64
    seed = (seed ^ seed >> 30) * 0xBF58476D1CE4E5B9 & _64
    seed = (seed ^ seed >> 27) * 0x94D049BB133111EB & _64
    return seed ^ seed >> 31
