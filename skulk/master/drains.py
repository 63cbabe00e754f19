"""What a drain command becomes: pure, from the view to the event to append."""

from __future__ import annotations

from skulk.cluster.view import ClusterView
from skulk.errors import RequestError
from skulk.wire.commands import DrainNode
from skulk.wire.events import NodeDrainEnded, NodeDrainStarted
from skulk.wire.state import Drain


def drained_node(
    view: ClusterView, command: DrainNode, wall: float
) -> tuple[str, NodeDrainStarted | NodeDrainEnded | None]:
    """The node's id, and the event; None where nothing changes. ``wall``: seconds since the epoch.

    A person's drain outlives the stop of the node, so that one doesn't replace it.

    Raises:
        RequestError: ``node_not_found``.
    """
    node_id = _found(view, command.node)
    known = view.state.drains.get(node_id)
    is_held = known is not None and known.active and not known.incarnation
    if command.undo:
        return node_id, NodeDrainEnded(node_id=node_id) if known is not None and known.active else None
    if is_held:
        return node_id, None
    drain = Drain(node_id=node_id, since=wall, reason=command.reason, incarnation=command.incarnation)
    return node_id, NodeDrainStarted(drain=drain)


def _found(view: ClusterView, name: str) -> str:
    """The id of the node that is called so: by id or by a name that only one has."""
    if name in view.nodes or name in view.state.drains:
        return name
    named = sorted(node_id for node_id, node in view.nodes.items() if node.beat.name == name)
    if len(named) == 1:
        return named[0]
    known = ", ".join(sorted(view.nodes)) or "none"
    why = (
        f"{len(named)} nodes are called {name}; give the id"
        if named
        else f"there is no node {name}; there are: {known}"
    )
    raise RequestError("node_not_found", why)
