"""Which nodes are known, and by which one address each of them is to be dialled. Pure.

    adverts ──┐                                    ┌──> plan      {peer: route}: what the nats-server dials
    beats   ──┼──> Known ──── who is joined ───────┼──> due       routes to ask now (`probe`)
    disk    ──┤      ^                             └──> standings what a person is told of each peer
    answers ──┘      └── SKULK_BOOTSTRAP_PEERS

**One route a peer.** Two addresses of one server are a trap: nats-server closes the second connection as a duplicate
and forgets its address; when the first one's network goes away, it dials that for ever (measured, ADR 6). So each peer
has one route in the configuration, and this module chooses another one when it doesn't lead there.

| a peer's route is                                         | because                                                |
|-----------------------------------------------------------|--------------------------------------------------------|
| the one it has, also one that is no longer told           | it is joined by it: a change would cut the connection  |
| the first that answers as this peer                       | it isn't joined                                        |
| the one it has, else the first                            | none answers: nats-server dials it until it does       |
| none                                                      | refused, or only foreign answers                       |
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from typing import Final, Literal

import msgspec

from skulk.discovery.addresses import usable_routes
from skulk.discovery.adverts import Problem, Refusal, printable

REMEMBERED_S: Final = 30 * 24 * 3600.0
MAX_PEERS: Final = 1_000
NOTED_S: Final = 3600.0
"""Being heard again is noted once an hour: it must not cost a write a second."""
ASKED_S: Final = 2.0
BARRED_S: Final = 10.0
OLD_S: Final = 600.0
RARELY_S: Final = 30.0
SETTLED_S: Final = 3.0
"""A server that starts, or starts again, doesn't answer for a moment: that is no news."""

BARRING: Final = frozenset[str]({"other_cluster", "wrong_token", "other_program", "wrong_tls"})
"""Answers after which an address isn't dialled: nats-server would try, and both logs complain, every second."""


class Neighbour(msgspec.Struct, frozen=True, kw_only=True):
    """A node that was heard of, and may be joined.

    Attributes:
        routes: ``host:port`` each, in the order it told them.
        heard_at: when it was last heard, to the hour; seconds since the epoch.
        name: of its host; empty where nobody said.
    """

    node_id: str
    routes: tuple[str, ...]
    heard_at: float
    name: str = ""


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What came of asking a route.

    Attributes:
        at: when; monotonic seconds, as ``since``.
        node_id: whose server it is; empty where that wasn't told.
        problem: None: a server that would take us.
        since: when asking it began to end like this.
    """

    at: float
    node_id: str = ""
    problem: Problem | None = None
    detail: str = ""
    since: float = 0.0


class Refused(msgspec.Struct, frozen=True, kw_only=True):
    """A node that was seen and must not be joined."""

    refusal: Refusal
    routes: tuple[str, ...]
    name: str = ""


class Known(msgspec.Struct, frozen=True, kw_only=True):
    """All that one node knows of the others.

    Attributes:
        node_id: its own.
        local: the cluster lives on loopback.
        has_token: a stranger's address isn't dialled before its server was asked: dialling shows the routes' password.
        bootstrap: routes that a person gave.
        neighbours: by node id.
        refused: by node id.
        answers: by route.
        chosen: by peer (a node id, or a bootstrap route nobody knows the node of), its route in the configuration.
    """

    node_id: str
    local: bool = False
    has_token: bool = False
    bootstrap: tuple[str, ...] = ()
    neighbours: Mapping[str, Neighbour] = {}
    refused: Mapping[str, Refused] = {}
    answers: Mapping[str, Answer] = {}
    chosen: Mapping[str, str] = {}


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """How it stands with one peer.

    Attributes:
        peer: node id, or the route that a person gave.
        route: by which it is dialled, or was last asked.
        state: ``joined``; ``trying``: nothing is known against it; ``apart``: see ``problem``.
    """

    peer: str
    state: Literal["joined", "trying", "apart"]
    name: str = ""
    route: str = ""
    problem: Problem | None = None
    detail: str = ""


def with_heard(known: Known, node_id: str, routes: tuple[str, ...], now: float, name: str = "") -> Known:
    """After a node told its routes; itself where that is nothing new. ``now``: seconds since the epoch.

    Its latest word replaces the former: an address that it no longer has may be another machine's tomorrow.
    """
    if node_id == known.node_id:
        return known
    usable = usable_routes(routes, local=known.local)
    before = known.neighbours.get(node_id)
    if not usable:
        return known
    if before is not None:
        name = printable(name) or before.name
        if (before.routes, before.name) == (usable, name) and now - before.heard_at < NOTED_S:
            return known if node_id not in known.refused else _without_refusal(known, node_id)
    heard = Neighbour(node_id=node_id, routes=usable, heard_at=now, name=printable(name))
    neighbours = {**known.neighbours, node_id: heard}
    if len(neighbours) > MAX_PEERS:
        oldest = min(neighbours.values(), key=lambda one: (one.heard_at, one.node_id))
        del neighbours[oldest.node_id]
    return _without_refusal(msgspec.structs.replace(known, neighbours=neighbours), node_id)


def with_refused(known: Known, node_id: str, refused: Refused) -> Known:
    """After a node was seen that must not be joined; itself where that is nothing new."""
    is_news = known.refused.get(node_id) != refused
    if node_id == known.node_id or not is_news or (node_id not in known.refused and len(known.refused) >= MAX_PEERS):
        return known
    return msgspec.structs.replace(known, refused={**known.refused, node_id: refused})


def without_seen(known: Known, node_id: str) -> Known:
    """After a node said goodbye: what was held against it is forgotten, its routes are remembered."""
    return _without_refusal(known, node_id)


def with_answer(known: Known, route: str, answer: Answer) -> Known:
    """After a route was asked."""
    before = known.answers.get(route)
    is_same = before is not None and before.problem == answer.problem
    since = before.since if before is not None and is_same else answer.at
    asked = set(_routes(known))
    kept = {other: found for other, found in known.answers.items() if other in asked}
    return msgspec.structs.replace(known, answers={**kept, route: msgspec.structs.replace(answer, since=since)})


def without_old(known: Known, now: float) -> Known:
    """Without those not heard for 30 days; itself where there are none. ``now``: seconds since the epoch."""
    kept = {name: one for name, one in known.neighbours.items() if now - one.heard_at < REMEMBERED_S}
    return known if len(kept) == len(known.neighbours) else msgspec.structs.replace(known, neighbours=kept)


def with_plan(known: Known, joined: Mapping[str, str]) -> Known:
    """With the routes that are to be dialled chosen anew; itself where they stay."""
    chosen = plan(known, joined)
    return known if chosen == known.chosen else msgspec.structs.replace(known, chosen=chosen)


def plan(known: Known, joined: Mapping[str, str]) -> dict[str, str]:
    """The one route of each peer, by the table above.

    Args:
        known: what is known.
        joined: the nodes with a connection now, and by which address we dialled each; empty: it dialled us.
    """
    chosen: dict[str, str] = {}
    for peer, routes in targets(known).items():
        if peer in known.refused and peer not in joined:
            continue
        route = _route_of(known, peer, routes, joined.get(peer))
        if route is not None:
            chosen[peer] = route
    return chosen


def targets(known: Known) -> dict[str, tuple[str, ...]]:
    """Every peer and its routes, those that a person gave first."""
    found: dict[str, list[str]] = {}
    owner = {route: one.node_id for one in known.neighbours.values() for route in one.routes}
    for route in known.bootstrap:
        answer = known.answers.get(route)
        node_id = (answer.node_id if answer is not None else "") or owner.get(route, "")
        if node_id != known.node_id:
            found.setdefault(node_id or route, []).append(route)
    for one in known.neighbours.values():
        routes = found.setdefault(one.node_id, [])
        routes += [route for route in one.routes if route not in routes]
    return {peer: tuple(found[peer]) for peer in sorted(found)}


def due(known: Known, joined: Set[str], now: float) -> tuple[str, ...]:
    """The routes to ask now, the longest waiting first: those of peers that aren't joined.

    Every 2 s; every 10 s after a foreign answer, since asking leaves a line in the other's log; every 30 s where nobody
    has answered for ten minutes.
    """
    found: list[str] = []
    for peer, routes in targets(known).items():
        if peer in joined or peer in known.refused:
            continue
        found += [route for route in routes if _is_due(known.answers.get(route), now)]
    return tuple(sorted(set(found), key=lambda route: (_asked_at(known, route), route)))


def stuck(known: Known, joined: Set[str], now: float) -> tuple[str, ...]:
    """Peers whose route answered a moment ago and that aren't joined all the same: to be dialled anew."""
    found: list[str] = []
    for peer, route in known.chosen.items():
        answer = known.answers.get(route)
        is_open = answer is not None and answer.problem is None and now - answer.at < 2 * ASKED_S
        if is_open and answer is not None and answer.at > answer.since and peer not in joined:
            found.append(peer)
    return tuple(found)


def standings(known: Known, joined: Set[str], now: float) -> tuple[Standing, ...]:
    """What is to be told of every peer, by name; ``now``: monotonic seconds."""
    peers = targets(known)
    found = [_standing(known, peer, routes, now, is_joined=peer in joined) for peer, routes in peers.items()]
    found += [_refused_standing(peer, one) for peer, one in known.refused.items() if peer not in peers]
    unknown = sorted(joined - peers.keys() - known.refused.keys())
    found += [Standing(peer=peer, state="joined") for peer in unknown]
    return tuple(sorted(found, key=lambda one: one.peer))


def _without_refusal(known: Known, node_id: str) -> Known:
    if node_id not in known.refused:
        return known
    kept = {name: one for name, one in known.refused.items() if name != node_id}
    return msgspec.structs.replace(known, refused=kept)


def _routes(known: Known) -> Iterator[str]:
    yield from known.bootstrap
    for one in known.neighbours.values():
        yield from one.routes


def _route_of(known: Known, peer: str, routes: tuple[str, ...], dialled: str | None) -> str | None:
    before = known.chosen.get(peer)
    if dialled is not None and before is not None and (before in routes or before == dialled):
        return before
    allowed = [route for route in routes if not _is_barred(known, peer, route)]
    answering = (route for route in allowed if _is_open(known.answers.get(route)))
    return next(answering, before if before in allowed else next(iter(allowed), None))


def _is_open(answer: Answer | None) -> bool:
    return answer is not None and answer.problem is None


def _is_barred(known: Known, peer: str, route: str) -> bool:
    answer = known.answers.get(route)
    if known.has_token and peer not in known.neighbours and not _is_open(answer):
        return True
    if answer is None:
        return False
    is_foreign = bool(answer.node_id) and peer != route and answer.node_id != peer
    return is_foreign or answer.node_id == known.node_id or answer.problem in BARRING


def _asked_at(known: Known, route: str) -> float:
    answer = known.answers.get(route)
    return -1.0 if answer is None else answer.at


def _is_due(answer: Answer | None, now: float) -> bool:
    if answer is None:
        return True
    if answer.problem in BARRING:
        return now - answer.at >= BARRED_S
    is_old = answer.problem is not None and now - answer.since >= OLD_S
    return now - answer.at >= (RARELY_S if is_old else ASKED_S)


def _standing(known: Known, peer: str, routes: tuple[str, ...], now: float, *, is_joined: bool) -> Standing:
    neighbour = known.neighbours.get(peer)
    name = "" if neighbour is None else neighbour.name
    route = known.chosen.get(peer, "")
    if is_joined:
        return Standing(peer=peer, state="joined", name=name, route=route)
    refused = known.refused.get(peer)
    if refused is not None:
        return _refused_standing(peer, refused)
    answers = [(route, answer) for route in routes if (answer := known.answers.get(route)) is not None]
    if len(answers) < len(routes) or any(_is_open(answer) and not _is_foreign(peer, answer) for _, answer in answers):
        return Standing(peer=peer, state="trying", name=name, route=route)
    if all(_is_soft(peer, answer) and now - answer.since < SETTLED_S for _, answer in answers):
        return Standing(peer=peer, state="trying", name=name, route=route)
    # the most telling one: what says no tells more than what doesn't answer
    asked, answer = max(answers, key=lambda one: (one[1].problem in BARRING, one[0] == route))
    detail = answer.detail if answer.problem else f"another node, {answer.node_id}, answers at {asked}"
    return Standing(
        peer=peer, state="apart", name=name, route=asked, problem=answer.problem or "other_program", detail=detail
    )


def _is_soft(peer: str, answer: Answer) -> bool:
    """Whether it may be another answer in a moment."""
    return answer.problem not in BARRING and not _is_foreign(peer, answer)


def _is_foreign(peer: str, answer: Answer) -> bool:
    return bool(answer.node_id) and answer.node_id != peer


def _refused_standing(peer: str, refused: Refused) -> Standing:
    return Standing(
        peer=peer,
        state="apart",
        name=refused.name,
        route=next(iter(refused.routes), ""),
        problem=refused.refusal.problem,
        detail=refused.refusal.detail,
    )
