"""``skulk doctor`` on the other nodes: which are joined, which aren't, and why.

| a node runs in this home | what is told                                                                       |
|--------------------------|------------------------------------------------------------------------------------|
| yes                      | what its launcher knows (`skulk.cli.mesh_file`)                                    |
| no                       | who answers by mDNS within 2 s, or at a route that was named: would it be joined?  |
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import msgspec

from skulk.cli.check import Check
from skulk.cli.mesh import known_at_start
from skulk.cli.mesh_file import read_mesh_file
from skulk.cli.nats_settings import server_config
from skulk.cli.node_file import NodeFile
from skulk.clock import Clock, SystemClock
from skulk.discovery.adverts import Problem, proof_key, refusal_of
from skulk.discovery.mdns import browse_once
from skulk.discovery.peers import Known, Refused, Standing, standings, targets, with_answer, with_heard, with_refused
from skulk.discovery.probe import Caller, ask_route
from skulk.errors import StartError
from skulk.settings import Settings
from skulk.wire.base import PROTOCOL

BROWSE_S: Final = 2.0
NOBODY: Final = "_nobody"
_REMEDIES: Final[dict[Problem, str]] = {
    "other_cluster": "Give both the same --cluster NAME, where they belong together.",
    "wrong_token": "Set the same SKULK_CLUSTER_TOKEN on every node.",
    "incompatible_version": "Upgrade the older one.",
    "no_usable_address": "Give it a network address, or name it by SKULK_BOOTSTRAP_PEERS.",
    "port_closed": "Start a node there, or correct the port in SKULK_BOOTSTRAP_PEERS.",
    "no_answer": "Check that it runs, and that its firewall lets the route port in.",
    "unknown_host": "Correct the name in SKULK_BOOTSTRAP_PEERS.",
    "other_program": "Correct the address in SKULK_BOOTSTRAP_PEERS.",
    "wrong_tls": "Set SKULK_TLS_CERT, SKULK_TLS_KEY and SKULK_TLS_CA on every node or on none.",
}


def check_peers(settings: Settings, node: NodeFile | None) -> Iterable[Check]:
    """A line for each other node that is known, or that can be seen now; takes up to 4 s where no node runs here."""
    if settings.nats_url or (settings.local and not settings.bootstrap_peers):
        return
    found = None if node is None else read_mesh_file(Path(settings.home))
    is_running = found is not None
    if found is None:
        try:
            found = asyncio.run(look_around(settings, NOBODY, SystemClock()))
        except (OSError, StartError) as error:
            yield Check(check="peers", verdict="warn", detail=f"they can't be looked for: {error}")
            return
    if not found:
        yield Check(check="peers", verdict="ok", detail="no other node is seen")
    for one in found:
        yield check_peer(one, is_running=is_running)


def check_peer(one: Standing, *, is_running: bool) -> Check:
    """How it stands with one peer."""
    check = f"peer {one.name or one.peer}"
    where = f" at {one.route}" if one.route else ""
    match one.state:
        case "joined":
            return Check(check=check, verdict="ok", detail=f"node {one.peer} is joined{where}")
        case "trying" if is_running:
            return Check(check=check, verdict="warn", detail=f"{one.peer} is being dialled{where}, no answer yet.")
        case "trying":
            return Check(check=check, verdict="ok", detail=f"node {one.peer} answers{where} and will be joined")
        case "apart":
            remedy = "" if one.problem is None else _REMEDIES[one.problem]
            return Check(check=check, verdict="warn", detail=f"not joined: {one.detail}.", remedy=remedy)


async def look_around(settings: Settings, node_id: str, clock: Clock) -> tuple[Standing, ...]:
    """Who can be seen without a node of one's own.

    Raises:
        OSError: mDNS can't be used here.
        StartError: ``config_invalid``.
    """
    known, _ = known_at_start(settings, node_id)
    config = server_config(settings, node_id, "doctor", ())
    caller = Caller(
        cluster=config.cluster_name,
        user=config.route_user,
        password=config.route_password,
        tls=None if config.tls is None else (config.tls.cert_file, config.tls.key_file, config.tls.ca_file),
    )
    if settings.mdns and not settings.local:
        known = await _with_adverts(known, settings, clock)
    routes = [route for routes in targets(known).values() for route in routes]
    answers = await asyncio.gather(*(ask_route(route, caller, clock.now()) for route in routes))
    for route, answer in zip(routes, answers, strict=True):
        known = with_answer(known, route, answer)
    known = msgspec.structs.replace(known, chosen={peer: each[0] for peer, each in targets(known).items()})
    # Long after: whoever doesn't answer once isn't there.
    return standings(known, frozenset(), clock.now() + 60.0)


async def _with_adverts(known: Known, settings: Settings, clock: Clock) -> Known:
    key = await asyncio.to_thread(proof_key, settings.cluster_token, settings.cluster)
    for advert in await browse_once(BROWSE_S):
        refusal = refusal_of(advert, cluster=settings.cluster, protocol=PROTOCOL, key=key)
        if refusal is None:
            known = with_heard(known, advert.node_id, advert.routes, clock.wall(), advert.name)
        else:
            known = with_refused(
                known, advert.node_id, Refused(refusal=refusal, routes=advert.routes, name=advert.name)
            )
    return known
