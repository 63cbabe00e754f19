"""A node that is stopped hands over what it has: no new work, its instances moved, its mastership given up.

    SIGTERM ──> drain, until the node returns ──> its instances move ──> retire ──> its runners end ──> the rest stops

Where no other node could take anything over there is nothing to wait for.
"""

from __future__ import annotations

import logging
from typing import Final

from skulk.bus.replica import Replica
from skulk.bus.subjects import MASTER_DRAIN
from skulk.cluster.reconcile import wanted_of
from skulk.cluster.view import ClusterView, peers_of
from skulk.errors import SkulkError
from skulk.gateway.masters import Masters
from skulk.ids import new_id
from skulk.master.master import Master
from skulk.node.identity import NodeIdentity
from skulk.wire.commands import DrainNode

log = logging.getLogger("skulk.launcher")

ASK_S: Final = 3.0
MOVE_S: Final = 10.0
END_S: Final = 30.0
REASON: Final = "it is being stopped"


async def leave(identity: NodeIdentity, replica: Replica, master: Master, masters: Masters) -> None:
    """Returns when this node has nothing left that runs, or its time is up."""
    own = identity.node_id
    if not _could_take_over(replica.view, own):
        return
    command = DrainNode(command_id=new_id(), node=own, reason=REASON, incarnation=identity.incarnation)
    try:
        await masters.ask(MASTER_DRAIN, command, timeout_s=ASK_S)
    except SkulkError as error:
        master.retire()
        log.warning("this node stops without handing over: %s", error)
        return
    is_moved = await replica.wait_until(lambda view: not wanted_of(view.state, own), MOVE_S)
    master.retire()
    if not is_moved:
        log.warning("the instances of this node were not moved within %.0f s", MOVE_S)
        return
    await replica.wait_until(lambda view: not _runs_here(view, own), END_S)


def _could_take_over(view: ClusterView, own: str) -> bool:
    return any(view.nodes[name].beat.role == "full" for name in peers_of(view) - {own})


def _runs_here(view: ClusterView, own: str) -> bool:
    phases = (status.phase for status in view.runners.values() if status.node_id == own)
    return any(phase not in ("stopped", "refused", "failed") for phase in phases)
