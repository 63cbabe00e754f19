"""What one master's core can take: many nodes and instances, without a network, each step timed.

    tools/simulate_scale.py                      10 to 1,000 nodes with five instances each, as a table
    tools/simulate_scale.py --nodes 100 300      these sizes

Per size: a node's beat taken into the view (decoding included), a runner's status, an event folded with the hash of the
state taken, a placement, a look of the upkeep (at rest, and after an event), a snapshot encoded and decoded, a round's
merge with another node's state; and the memory that state and view take. "beats/s" is how many beats one core takes in
each second; a cluster of n nodes sends n.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
import tracemalloc
from collections.abc import Callable
from typing import Final, NamedTuple

import msgspec

from skulk.cluster.fold import StateHash, fold
from skulk.cluster.merge import merge
from skulk.cluster.view import ClusterView, with_node_beat, with_runner_status, with_state
from skulk.ids import runner_id
from skulk.master.upkeep import Rules, Upkeep, next_event, with_missing
from skulk.placement.decision import place
from skulk.units import GIB, MIB
from skulk.wire.base import decode, encode
from skulk.wire.beats import DiskFacts, MemoryFacts, NodeBeat, RunnerStatus, SystemFacts
from skulk.wire.events import EventRecord, InstanceUnassigned
from skulk.wire.model import HeldModel, ModelCard, ModelFile
from skulk.wire.placement import MemoryEstimate, PlacementRequest
from skulk.wire.state import Assignment, ClusterState, Instance, Position, Term

SIZES: Final = (10, 30, 100, 300, 1000)
PER_NODE: Final = 5
NEED: Final = 400 * MIB
TERM: Final = Term(number=1, node_id="node0000", incarnation="00000001")
SPENT_S: Final = 0.4
TAGS: Final = ("llama_cpp", "llama_cpp-cpu")
CARD: Final = ModelCard(
    model_id="org/model",
    name="model",
    family="llama",
    backends=("llama_cpp-vulkan", "llama_cpp-cpu"),
    files=(ModelFile(name="model.gguf", size_bytes=100_000_000, sha256="0" * 64),),
    context_length=8192,
    weights_bytes=89_000_000,
    kv_bytes_per_token=23_040,
    layers=30,
    embedding_length=576,
    vocabulary_size=49_152,
)


class Row(NamedTuple):
    """One size's figures; times in microseconds."""

    nodes: int
    instances: int
    beat_us: float
    status_us: float
    fold_us: float
    place_us: float
    upkeep_us: float
    change_us: float
    snapshot_us: float
    merge_us: float
    memory_mib: float
    snapshot_mib: float

    @property
    def beats_per_s(self) -> float:
        return 1e6 / self.beat_us


def main(arguments: list[str]) -> int:
    """Measures and prints the table, and by what power each figure grows from the smallest to the largest size."""
    parser = argparse.ArgumentParser(
        prog="tools/simulate_scale.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, nargs="+", default=list(SIZES), help="numbers of nodes")
    parser.add_argument("--per-node", type=int, default=PER_NODE, help=f"instances a node (default: {PER_NODE})")
    flags = parser.parse_args(arguments)
    rows = [measure(nodes, flags.per_node) for nodes in flags.nodes]
    print(
        "| nodes | instances | beat us | beats/s | status us | fold us | place ms | upkeep ms | changed ms "
        "| snapshot ms | merge ms | MiB |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row.nodes:,} | {row.instances:,} | {row.beat_us:,.0f} | {row.beats_per_s:,.0f} | {row.status_us:,.0f} "
            f"| {row.fold_us:,.0f} | {row.place_us / 1e3:.2f} | {row.upkeep_us / 1e3:.2f} "
            f"| {row.change_us / 1e3:.2f} "
            f"| {row.snapshot_us / 1e3:.1f} | {row.merge_us / 1e3:.1f} | {row.memory_mib:.1f} |"
        )
    if len(rows) > 1:
        print_growth(rows[0], rows[-1])
    return 0


def print_growth(first: Row, last: Row) -> None:
    """How each figure grew beside the number of nodes."""
    times = last.nodes / first.nodes
    print(f"\nFrom {first.nodes:,} to {last.nodes:,} nodes ({times:,.0f} times) the time of one step grew")
    for name in Row._fields[2:]:
        grown = getattr(last, name) / getattr(first, name)
        print(f"  {name:12} {grown:8.1f} times{'' if grown <= times * 1.1 else '   more than linear'}")


def measure(nodes: int, per_node: int) -> Row:
    """One size."""
    gc.collect()
    tracemalloc.start()
    view = view_of(nodes, per_node)
    memory_mib = tracemalloc.get_traced_memory()[0] / MIB
    tracemalloc.stop()
    state = view.state
    body = encode(state)
    told = encode(next(iter(view.nodes.values())).beat)
    status = next(iter(view.runners.values()))
    request = PlacementRequest(card=CARD, context_length=2048, n_parallel=1)
    # another node's: nothing in it is the same object
    other = msgspec.structs.replace(decode(body, ClusterState), position=Position(term=TERM, seq=1))
    upkeep = with_missing(Upkeep(), view, 1.0)
    record = EventRecord(
        position=Position(term=TERM, seq=state.position.seq + 1),
        at=0.0,
        event=InstanceUnassigned(instance_id=status.instance_id, reason="measured"),
    )
    hashes = StateHash()
    hashes.of(state)
    return Row(
        nodes=nodes,
        instances=len(state.instances),
        beat_us=timed(lambda: with_node_beat(view, decode(told, NodeBeat), 1.0)),
        status_us=timed(lambda: with_runner_status(view, status)),
        fold_us=timed(lambda: hashes.of(fold(state, record))),
        place_us=timed(lambda: place(view, request, 1.0)),
        upkeep_us=timed(lambda: looked(upkeep, view)),
        change_us=timed(lambda: looked(Upkeep(heard=upkeep.heard), with_state(view, same(state)))),
        snapshot_us=timed(lambda: decode(encode(state), ClusterState)),
        merge_us=timed(lambda: merge(state, other)),
        memory_mib=memory_mib,
        snapshot_mib=len(body) / MIB,
    )


def looked(upkeep: Upkeep, view: ClusterView) -> object:
    """One look of the upkeep, which finds nothing to do."""
    return next_event(with_missing(upkeep, view, 1.0), with_state(view, view.state), 1.0, 0.0, Rules())


def same(state: ClusterState) -> ClusterState:
    """An equal state that is another object, as each event makes one."""
    return msgspec.structs.replace(state)


def timed(step: Callable[[], object]) -> float:
    """Microseconds of one step on the processor: the fastest of five series, without the collector's pauses."""
    gc.collect()
    gc.disable()
    began = time.thread_time()
    step()
    count = max(1, int(SPENT_S / 5 / max(time.thread_time() - began, 1e-6)))
    best = float("inf")
    for _ in range(5):
        began = time.thread_time()
        for _ in range(count):
            step()
        best = min(best, (time.thread_time() - began) / count)
    gc.enable()
    return best * 1e6


def view_of(nodes: int, per_node: int) -> ClusterView:
    """A cluster at rest: every instance is ready."""
    instances: dict[str, Instance] = {}
    view = ClusterView(state=ClusterState(cluster="home"))
    for number in range(nodes):
        node_id = f"node{number:04d}"
        here = [instance_on(node_id, f"{node_id}-i{index}") for index in range(per_node)]
        instances.update({found.instance_id: found for found in here})
        view = with_node_beat(view, beat_of(node_id, here), 0.0)
    state = ClusterState(cluster="home", position=Position(term=TERM, seq=len(instances) * 2), instances=instances)
    return with_state(view, state)


def instance_on(node_id: str, instance_id: str) -> Instance:
    """An assigned instance."""
    memory = MemoryEstimate(
        weights_bytes=CARD.weights_bytes, kv_bytes=0, compute_bytes=0, headroom_bytes=0, need_bytes=NEED
    )
    assignment = Assignment(
        epoch=1,
        node_id=node_id,
        runner_id=runner_id(instance_id, 1),
        backend="llama_cpp-cpu",
        context_length=2048,
        n_parallel=4,
        kv_cells=8192,
        memory=memory,
    )
    return Instance(
        instance_id=instance_id,
        request=PlacementRequest(card=msgspec.structs.replace(CARD, name=instance_id)),
        assignment=assignment,
        last_epoch=1,
    )


def beat_of(node_id: str, here: list[Instance]) -> NodeBeat:
    """The beat of a node that runs these."""
    return NodeBeat(
        node_id=node_id,
        incarnation="00000001",
        name=node_id,
        version="0.1.0",
        at=0.0,
        started_at=0.0,
        tags=TAGS,
        system=SystemFacts(hostname=node_id, os="Linux", architecture="x86_64", chip="", physical_cores=8),
        memory=MemoryFacts(total_bytes=64 * GIB, available_bytes=32 * GIB, usable_bytes=32 * GIB),
        disk=DiskFacts(total_bytes=1000 * GIB, available_bytes=500 * GIB),
        models=(HeldModel(model_id=CARD.model_id, size_bytes=100_000_000),),
        runners=tuple(
            RunnerStatus(
                runner_id=runner_id(found.instance_id, 1),
                instance_id=found.instance_id,
                epoch=1,
                node_id=node_id,
                model_id=found.model_id,
                phase="ready",
                memory_bytes=NEED,
                reserved_bytes=NEED,
            )
            for found in here
        ),
        hears=tuple(f"node{number:04d}" for number in range(10)),
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
