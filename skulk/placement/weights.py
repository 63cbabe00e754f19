"""Whether a node has a model's files, or could fetch them: from the hub, or from a node that serves them."""

from __future__ import annotations

from typing import Final

from skulk.cluster.view import ClusterView, NodeView
from skulk.units import MIB, format_bytes
from skulk.wire.model import ModelCard
from skulk.wire.state import Instance

DISK_MARGIN: Final = 512 * MIB
"""What stays free on a disk that weights are fetched to."""


def holds(node: NodeView, card: ModelCard) -> bool:
    """Whether the files lie on the node's disk; another revision counts: the node itself looks closer."""
    return any(held.model_id == card.model_id for held in node.beat.models)


def why_not_fetched(view: ClusterView, card: ModelCard, node: NodeView) -> str:
    """Why the files are not there and can't come, with the numbers; empty: they are there, or can come."""
    if holds(node, card):
        return ""
    missing = f"has no files of {card.model_id}"
    if not _has_source(view, card, node):
        return missing
    need, have = card.size_bytes + DISK_MARGIN, node.beat.disk.available_bytes
    return (
        ""
        if need <= have
        else f"{missing}; to fetch them its disk needs {format_bytes(need)} have {format_bytes(have)}"
    )


def _has_source(view: ClusterView, card: ModelCard, node: NodeView) -> bool:
    if node.beat.hub and card.repo and card.revision:
        return True
    # a node that fetches nothing at all has neither an address nor a hub, and is not sent for weights
    fetches = node.beat.hub or node.beat.files is not None
    return fetches and any(
        other is not node and other.beat.files is not None and holds(other, card) for other in view.nodes.values()
    )


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
