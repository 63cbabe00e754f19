"""What is known now: the replicated state and what heartbeats say. Placement and ``/state`` read it; never logged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal, TypeVar

import msgspec

from skulk.cluster.liveness import NODE_CLOSED_S, NODE_LOST_S, NodeLiveness, node_liveness
from skulk.wire.base import PROTOCOL
from skulk.wire.beats import MasterBeat, NodeBeat, RunnerStatus
from skulk.wire.state import ClusterState, Drain, Instance

T = TypeVar("T")

MAX_RUNNERS: Final = 100_000
"""More than any cluster has; what would exceed it is nonsense."""
KNOWN_S: Final = 24 * 3600.0
InstancePhase = Literal["pending", "placing", "loading", "ready", "failed"]


class NodeView(msgspec.Struct, frozen=True, kw_only=True):
    """A node's last beat and when it was heard (monotonic seconds of the observer).

    ``told``: runners of it that have spoken since, and that the beat doesn't name. ``doubted``: those whose word in the
    beat was older than what was known of them.
    """

    beat: NodeBeat
    heard_at: float
    told: tuple[str, ...] = ()
    doubted: frozenset[str] = frozenset()


class ClusterView(msgspec.Struct, frozen=True, kw_only=True):
    """State and beats as one observer has them.

    Attributes:
        nodes: by node id; gone when lost. Those of another version of the bus contract too: see `peers_of`.
        runners: the newest status of each runner, by runner id.
        master: the last beat of the master that is followed; None while there is none.
        known: when each node that runs models was last heard, lost ones included, for a day; those that left are out.
    """

    state: ClusterState
    nodes: dict[str, NodeView] = {}
    runners: dict[str, RunnerStatus] = {}
    master: MasterBeat | None = None
    master_heard_at: float = 0.0
    known: dict[str, float] = {}


def with_state(view: ClusterView, state: ClusterState) -> ClusterView:
    """The view over another state; statuses of runners that nobody wants any more and no node has are dropped.

    One that has spoken since its node's beat is there: until it says that it has stopped, its memory isn't free.
    Cost: nothing where it is the view's own state; else a look at each status.
    """
    if state is view.state:
        return view
    if all(_is_wanted(state, status) for status in view.runners.values()):
        return msgspec.structs.replace(view, state=state)
    wanted = {instance.assignment.runner_id for instance in state.instances.values() if instance.assignment is not None}
    held = {status.runner_id for node in view.nodes.values() for status in node.beat.runners}
    held.update(name for node in view.nodes.values() for name in node.told)
    runners = {name: status for name, status in view.runners.items() if name in wanted or name in held}
    return msgspec.structs.replace(view, state=state, runners=runners)


def _is_wanted(state: ClusterState, status: RunnerStatus) -> bool:
    instance = state.instances.get(status.instance_id)
    assigned = None if instance is None else instance.assignment
    return assigned is not None and assigned.runner_id == status.runner_id


def with_node_beat(view: ClusterView, beat: NodeBeat, now: float) -> ClusterView:
    """The view after a node's beat. Its list of runners is whole: what it no longer names is gone.

    A runner's own later word stands against one beat, which may have been written before it; what the second one
    says is so, whatever the clocks say: the later word may be another process's (a cloned home's) that is gone. Of a
    node that was started again (another incarnation) nothing older is kept. One that leaves is gone at once. One that
    speaks another version of the bus contract is shown, and what it says of runners is none of ours.
    """
    if beat.leaving:
        return _without_left(view, beat)
    if beat.protocol != PROTOCOL:
        return msgspec.structs.replace(
            view,
            nodes={**view.nodes, beat.node_id: NodeView(beat=beat, heard_at=now)},
            runners=_without_runners_of(view, beat.node_id),
            known=_without(view.known, beat.node_id),
        )
    before = view.nodes.get(beat.node_id)
    before_runners = view.runners if before is None or before.beat.incarnation == beat.incarnation else {}
    runners = _without_runners_of(view, beat.node_id)
    doubted: list[str] = []
    for status in beat.runners:
        name = status.runner_id
        other = runners.get(name)
        newest = _newer(before_runners.get(name), status) if other is None else status
        if newest is not status and before is not None and name in before.doubted:
            newest = status
        if newest is not status:
            doubted.append(name)
        runners[name] = _chosen(view.state, other, newest)
    nodes = {**view.nodes, beat.node_id: NodeView(beat=beat, heard_at=now, doubted=frozenset(doubted))}
    known = view.known if beat.role != "full" else {**view.known, beat.node_id: now}
    return msgspec.structs.replace(view, nodes=nodes, runners=runners, known=known)


def _without_runners_of(view: ClusterView, node_id: str) -> dict[str, RunnerStatus]:
    """The statuses without those of a node. Cost: a copy, and a look at the node's own; at all for an unknown node."""
    node = view.nodes.get(node_id)
    if node is None:
        return {name: status for name, status in view.runners.items() if status.node_id != node_id}
    runners = dict(view.runners)
    for name in (*node.told, *(status.runner_id for status in node.beat.runners)):
        if name in runners and runners[name].node_id == node_id:
            del runners[name]
    return runners


def _without_left(view: ClusterView, beat: NodeBeat) -> ClusterView:
    before = view.nodes.get(beat.node_id)
    if before is not None and before.beat.incarnation != beat.incarnation:
        # the last word of an earlier life
        return view
    is_master = view.master is not None and view.master.node_id == beat.node_id
    return msgspec.structs.replace(
        view,
        nodes=_without(view.nodes, beat.node_id),
        runners=_without_runners_of(view, beat.node_id),
        master=None if is_master else view.master,
        known=_without(view.known, beat.node_id),
    )


def _without(items: dict[str, T], gone: str) -> dict[str, T]:
    return {name: item for name, item in items.items() if name != gone}


def with_runner_status(view: ClusterView, status: RunnerStatus) -> ClusterView:
    """The view after a runner's own word, or its supervisor's.

    What comes late of a node that speaks another version of the bus contract by now is none of ours.
    """
    node = view.nodes.get(status.node_id)
    if node is not None and node.beat.protocol != PROTOCOL:
        return view
    known = view.runners.get(status.runner_id)
    if known is None and len(view.runners) >= MAX_RUNNERS:
        return view
    kept = _chosen(view.state, known, status)
    runners = {**view.runners, status.runner_id: kept}
    if known is not None or node is None:
        return msgspec.structs.replace(view, runners=runners)
    told = msgspec.structs.replace(node, told=(*node.told, status.runner_id))
    return msgspec.structs.replace(view, runners=runners, nodes={**view.nodes, status.node_id: told})


def _chosen(state: ClusterState, known: RunnerStatus | None, heard: RunnerStatus) -> RunnerStatus:
    """Of two words about one runner the assigned node's: two sides may have placed it apart; else the later one."""
    if known is None or known.node_id == heard.node_id:
        return _newer(known, heard)
    instance = state.instances.get(heard.instance_id)
    assigned = None if instance is None else instance.assignment
    return heard if assigned is not None and assigned.node_id == heard.node_id else known


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


def without_lost(
    view: ClusterView, now: float, listening_since: float = 0.0, closed: Mapping[str, float] | None = None
) -> ClusterView:
    """The view without nodes that were silent for too long, and without their runners; itself where none is.

    Silence before ``listening_since`` doesn't count: the observer couldn't hear. ``closed``: since when a node's
    routes are closed; one that comes back at once, as after the death of its nats-server, isn't lost.
    """

    def is_lost(name: str, heard_at: float) -> bool:
        silent_from = max(heard_at, listening_since)
        closed_at = None if closed is None else closed.get(name)
        return now - silent_from >= NODE_LOST_S or (
            closed_at is not None and now - max(silent_from, closed_at) >= NODE_CLOSED_S
        )

    lost = {name for name, node in view.nodes.items() if is_lost(name, node.heard_at)}
    if not lost:
        return view
    known = {name: at for name, at in view.known.items() if now - at < KNOWN_S}
    nodes = {name: node for name, node in view.nodes.items() if name not in lost}
    runners = {name: status for name, status in view.runners.items() if status.node_id not in lost}
    return msgspec.structs.replace(view, nodes=nodes, runners=runners, known=known)


def closed_as_told(view: ClusterView, node_id: str) -> Mapping[str, float]:
    """Since when the routes from a node to others are closed, by its last beat; in the seconds of ``heard_at``."""
    told = view.nodes.get(node_id)
    return {} if told is None else {name: told.heard_at - seconds for name, seconds in told.beat.closed.items()}


def without_master(view: ClusterView) -> ClusterView:
    """The view after the master fell silent or stepped down."""
    return msgspec.structs.replace(view, master=None)


def liveness_of(view: ClusterView, node_id: str, now: float) -> NodeLiveness:
    """What is to be thought of a node now."""
    node = view.nodes.get(node_id)
    return "lost" if node is None else node_liveness(now - node.heard_at)


def drain_of(view: ClusterView, node_id: str) -> Drain | None:
    """The drain that holds a node now; one of a node that was being stopped is over when it is back."""
    drain = view.state.drains.get(node_id)
    if drain is None or not drain.active:
        return None
    node = view.nodes.get(node_id)
    is_back = bool(drain.incarnation) and node is not None and node.beat.incarnation != drain.incarnation
    return None if is_back else drain


def runner_of(view: ClusterView, instance: Instance) -> RunnerStatus | None:
    """The status of the runner that serves an instance's present assignment."""
    if instance.assignment is None:
        return None
    status = view.runners.get(instance.assignment.runner_id)
    # while two sides that placed it apart come together, a runner of this name may still live on another node
    return status if status is not None and status.node_id == instance.assignment.node_id else None


def peers_of(view: ClusterView) -> set[str]:
    """The nodes that speak this version of the bus contract: one of another version is shown, and part of nothing."""
    return {name for name, node in view.nodes.items() if node.beat.protocol == PROTOCOL}


def followers_of(view: ClusterView, node_id: str) -> int:
    """How many live nodes follow this master by their own word. O(nodes)."""
    return sum(1 for node in view.nodes.values() if node.beat.master == node_id and node.beat.protocol == PROTOCOL)


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
