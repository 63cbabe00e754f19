"""Whether a node has a model's files, or could fetch them: from the hub, or from a node that serves them."""

from __future__ import annotations

from typing import Final, NamedTuple

from skulk.cluster.view import ClusterView, NodeView
from skulk.units import MIB, format_bytes
from skulk.wire.model import ModelCard
from skulk.wire.state import Instance

DISK_MARGIN: Final = 512 * MIB
"""What stays free on a disk that weights are fetched to."""


class Sources(NamedTuple):
    """Where a model's files are. ``holders``: nodes that have them; ``servers``: those that also serve them."""

    holders: frozenset[str]
    servers: frozenset[str]
    is_on_hub: bool
    size_bytes: int


def sources_of(view: ClusterView, card: ModelCard) -> Sources:
    """Looked up once for a placement. Another revision counts: the node itself looks closer. O(models held)."""
    model_id = card.model_id
    holders: list[NodeView] = []
    for node in view.nodes.values():
        for held in node.beat.models:
            if held.model_id == model_id:
                holders.append(node)
                break
    return Sources(
        frozenset(node.beat.node_id for node in holders),
        frozenset(node.beat.node_id for node in holders if node.beat.files is not None),
        bool(card.repo and card.revision),
        card.size_bytes,
    )


def why_not_fetched(sources: Sources, card: ModelCard, node: NodeView) -> str:
    """Why the files are not there and can't come, with the numbers; empty: they are there, or can come."""
    if node.beat.node_id in sources.holders:
        return ""
    missing = f"has no files of {card.model_id}"
    if not _has_source(sources, node):
        return missing
    need, have = sources.size_bytes + DISK_MARGIN, node.beat.disk.available_bytes
    return (
        ""
        if need <= have
        else f"{missing}; to fetch them its disk needs {format_bytes(need)} have {format_bytes(have)}"
    )


def _has_source(sources: Sources, node: NodeView) -> bool:
    if node.beat.hub and sources.is_on_hub:
        return True
    # a node that fetches nothing at all has neither an address nor a hub, and is not sent for weights
    return bool(sources.servers) and (node.beat.hub or node.beat.files is not None)


def weights_of(view: ClusterView, instance: Instance) -> str:
    """What tells the weights that an instance serves from others: equal text, equal weights.

    The hash that its card pins or that its node has taken, with the sizes of all parts; where there is none, the very
    file on the very node.
    """
    card, assigned = instance.request.card, instance.assignment
    sizes = ",".join(str(file.size_bytes) for file in card.files)
    node = None if assigned is None else view.nodes.get(assigned.node_id)
    held = () if node is None else node.beat.models
    digest = card.files[0].sha256 or next((one.sha256 for one in held if one.model_id == card.model_id), None)
    if digest is not None:
        return f"{digest.lower()} {sizes}"
    return f"{'' if assigned is None else assigned.node_id} {card.model_id} {sizes}"
