"""What is known now: the replicated state and what heartbeats say. Placement and ``/state`` read it; never logged."""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from skulk.cluster.liveness import NODE_LOST_S, NodeLiveness, node_liveness
from skulk.wire.beats import MasterBeat, NodeBeat, RunnerStatus
from skulk.wire.state import ClusterState, Instance

MAX_RUNNERS: Final = 100_000
"""More than any cluster has; what would exceed it is nonsense."""
InstancePhase = Literal["pending", "placing", "loading", "ready", "failed"]


class NodeView(msgspec.Struct, frozen=True, kw_only=True):
    """A node's last beat and when it was heard (monotonic seconds of the observer)."""

    beat: NodeBeat
    heard_at: float


class ClusterView(msgspec.Struct, frozen=True, kw_only=True):
    """State and beats as one observer has them.

    Attributes:
        nodes: by node id; gone when lost.
        runners: the newest status of each runner, by runner id.
        master: the last beat of the master that is followed; None while there is none.
    """

    state: ClusterState
    nodes: dict[str, NodeView] = {}
    runners: dict[str, RunnerStatus] = {}
    master: MasterBeat | None = None
    master_heard_at: float = 0.0


def with_state(view: ClusterView, state: ClusterState) -> ClusterView:
    """The view over another state; statuses of runners that nobody wants any more are dropped."""
    wanted = {instance.assignment.runner_id for instance in state.instances.values() if instance.assignment is not None}
    held = {status.runner_id for node in view.nodes.values() for status in node.beat.runners}
    runners = {name: status for name, status in view.runners.items() if name in wanted or name in held}
    return msgspec.structs.replace(view, state=state, runners=runners)


def with_node_beat(view: ClusterView, beat: NodeBeat, now: float) -> ClusterView:
    """The view after a node's beat. Its list of runners is whole: what it no longer names is gone.

    Of a node that was started again (another incarnation) nothing older is kept, whatever its clock says.
    """
    before = view.nodes.get(beat.node_id)
    known = view.runners if before is None or before.beat.incarnation == beat.incarnation else {}
    runners = {name: status for name, status in view.runners.items() if status.node_id != beat.node_id}
    runners.update({status.runner_id: _newer(known.get(status.runner_id), status) for status in beat.runners})
    nodes = {**view.nodes, beat.node_id: NodeView(beat=beat, heard_at=now)}
    return msgspec.structs.replace(view, nodes=nodes, runners=runners)


def with_runner_status(view: ClusterView, status: RunnerStatus) -> ClusterView:
    """The view after a runner's own word, or its supervisor's."""
    known = view.runners.get(status.runner_id)
    if known is None and len(view.runners) >= MAX_RUNNERS:
        return view
    kept = _newer(known, status)
    return msgspec.structs.replace(view, runners={**view.runners, status.runner_id: kept})


def _newer(known: RunnerStatus | None, heard: RunnerStatus) -> RunnerStatus:
    """The later of two words: a beat may have been written before the last status message.

    A life that began later counts more than the time, for a clock may be set back.
    """
    if known is None or (heard.restarts, heard.since) >= (known.restarts, known.since):
        return heard
    return known


def with_master_beat(view: ClusterView, beat: MasterBeat, now: float) -> ClusterView:
    """The view after a master's beat; one of an older term is not followed."""
    if view.master is not None and beat.term < view.master.term:
        return view
    return msgspec.structs.replace(view, master=beat, master_heard_at=now)


def without_lost(view: ClusterView, now: float, listening_since: float = 0.0) -> ClusterView:
    """The view without nodes that were silent for too long, and without their runners; itself where none is.

    Silence before ``listening_since`` doesn't count: the observer couldn't hear.
    """
    lost = {name for name, node in view.nodes.items() if now - max(node.heard_at, listening_since) >= NODE_LOST_S}
    if not lost:
        return view
    nodes = {name: node for name, node in view.nodes.items() if name not in lost}
    runners = {name: status for name, status in view.runners.items() if status.node_id not in lost}
    return msgspec.structs.replace(view, nodes=nodes, runners=runners)


def without_master(view: ClusterView) -> ClusterView:
    """The view after the master fell silent or stepped down."""
    return msgspec.structs.replace(view, master=None)


def liveness_of(view: ClusterView, node_id: str, now: float) -> NodeLiveness:
    """What is to be thought of a node now."""
    node = view.nodes.get(node_id)
    return "lost" if node is None else node_liveness(now - node.heard_at)


def runner_of(view: ClusterView, instance: Instance) -> RunnerStatus | None:
    """The status of the runner that serves an instance's present assignment."""
    if instance.assignment is None:
        return None
    return view.runners.get(instance.assignment.runner_id)


def phase_of(view: ClusterView, instance: Instance) -> InstancePhase:
    """An instance's phase in one word."""
    if instance.assignment is None:
        return "pending"
    status = runner_of(view, instance)
    if status is None:
        return "placing"
    match status.phase:
        case "ready":
            return "ready"
        case "accepted" | "starting" | "loading" | "warming":
            return "loading"
        case "failed" | "refused":
            return "failed"
        case "draining" | "stopped":
            return "placing"


def instances_of(view: ClusterView, model_id: str) -> tuple[Instance, ...]:
    """The instances of a model, by id."""
    found = (instance for instance in view.state.instances.values() if instance.model_id == model_id)
    return tuple(sorted(found, key=lambda instance: instance.instance_id))


def ready_instances(view: ClusterView, model_id: str) -> tuple[Instance, ...]:
    """Those that can take a request now, the least loaded first."""
    ready = [instance for instance in instances_of(view, model_id) if phase_of(view, instance) == "ready"]

    def load(instance: Instance) -> tuple[int, str]:
        status = runner_of(view, instance)
        assert status is not None
        return status.active + status.waiting, instance.instance_id

    return tuple(sorted(ready, key=load))
