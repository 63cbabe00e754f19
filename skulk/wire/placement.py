"""Requests for placement, and the decision that explains itself: the same value in reply, preview, CLI and log."""

from __future__ import annotations

from typing import Literal

from skulk.wire.base import Wire
from skulk.wire.model import ModelCard

Sharding = Literal["Pipeline", "Tensor"]
InstanceMeta = Literal["MlxRing", "MlxJaccl"]
Outcome = Literal["placed", "pending", "unplaceable"]


class PlacementRequest(Wire, frozen=True, kw_only=True):
    """What was asked for; it stays with the instance, so that a move obeys it too.

    Attributes:
        card: the model.
        min_nodes: over how many nodes to spread it; more than 1 is refused for GGUF.
        excluded_nodes: node ids or names that must not serve it.
        node_ids: if not empty, only these may.
        context_length: window of one request in tokens; None: as much as fits, up to what the card allows.
        n_parallel: sequences served side by side; None: the node's setting.
        force: where no node has the memory by the estimate, take the one that lacks least, with a warning.
    """

    card: ModelCard
    sharding: Sharding = "Pipeline"
    instance_meta: InstanceMeta = "MlxRing"
    min_nodes: int = 1
    excluded_nodes: tuple[str, ...] = ()
    node_ids: tuple[str, ...] = ()
    context_length: int | None = None
    n_parallel: int | None = None
    force: bool = False


class MemoryEstimate(Wire, frozen=True, kw_only=True, gc=False):
    """What an instance will take of one pool, in parts, in bytes; ``need_bytes`` is what is reserved.

    ``process_bytes``: of the runner itself, without the model. ``park_bytes``: host memory of the runner for states
    that are set aside.
    """

    weights_bytes: int
    kv_bytes: int
    compute_bytes: int
    headroom_bytes: int
    need_bytes: int
    park_bytes: int = 0
    process_bytes: int = 0

    @property
    def expected_bytes(self) -> int:
        """What a runner should be seen to take right after its load."""
        return self.weights_bytes + self.kv_bytes + self.compute_bytes + self.process_bytes


class NodeReport(Wire, frozen=True, kw_only=True, gc=False):
    """Why a node was taken, or not: the filter that excluded it with its numbers, or the score in parts.

    Attributes:
        filter: named reason (``lost``, ``incompatible``, ``management``, ``excluded``, ``not_selected``, ``draining``,
            ``facts_pending``, ``backend_mismatch``, ``weights_missing``, ``memory``); None: the node can serve it.
        detail: the reason with numbers, for people.
        context_length: window of one request that would be admitted, tokens; 0 where none is.
        n_parallel: sequences that would be served side by side.
        kv_cells: cells that would be allocated for all of them together.
        available_bytes: room of the node, in the pool of ``backend``, before this placement.
        warning: what a placement there that was forced risks; empty: nothing.
        score: parts by name, higher is better, compared in this order; empty where filtered.
    """

    node_id: str
    name: str = ""
    filter: str | None = None
    detail: str = ""
    backend: str | None = None
    context_length: int = 0
    n_parallel: int = 0
    kv_cells: int = 0
    memory: MemoryEstimate | None = None
    available_bytes: int = 0
    score: dict[str, float] = {}
    warning: str = ""


class PlacementDecision(Wire, frozen=True, kw_only=True):
    """Outcome, chosen nodes, and a report for every node.

    Attributes:
        reason: one sentence that says what was decided, and what to do where nothing fits.
    """

    outcome: Outcome
    nodes: tuple[str, ...] = ()
    reports: tuple[NodeReport, ...] = ()
    reason: str = ""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the placement risks."""
        return tuple(report.warning for report in self.reports if report.warning and report.node_id in self.nodes)

    def report_of(self, node_id: str) -> NodeReport | None:
        """The report on one node."""
        return next((report for report in self.reports if report.node_id == node_id), None)
