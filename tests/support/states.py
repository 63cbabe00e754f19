"""Small states, cards, beats and records for tests of the control plane."""

from __future__ import annotations

from skulk.wire.beats import DiskFacts, MemoryFacts, NodeBeat, RunnerPhase, RunnerStatus, SystemFacts
from skulk.wire.events import Event, EventRecord
from skulk.wire.model import HeldModel, ModelCard, ModelFile
from skulk.wire.placement import MemoryEstimate, PlacementRequest
from skulk.wire.state import Assignment, ClusterState, Instance, Position, Term

GIB = 1024**3
TERM = Term(number=1, node_id="aaaa", incarnation="0001")


def card(model_id: str = "org/model", *, weights_bytes: int = 100_000_000) -> ModelCard:
    """A small GGUF model that any llama.cpp backend runs."""
    return ModelCard(
        model_id=model_id,
        name=model_id,
        family="llama",
        backends=("llama_cpp-vulkan", "llama_cpp-rocm", "llama_cpp-cuda", "llama_cpp-cpu"),
        files=(ModelFile(name="model.gguf", size_bytes=weights_bytes),),
        quantization="Q4_K_M",
        context_length=8192,
        weights_bytes=weights_bytes,
        kv_bytes_per_token=23_040,
        layers=30,
        embedding_length=576,
        vocabulary_size=49_152,
    )


def estimate(need_bytes: int = 300_000_000) -> MemoryEstimate:
    """An estimate that only says its sum."""
    return MemoryEstimate(
        weights_bytes=need_bytes, kv_bytes=0, compute_bytes=0, headroom_bytes=0, need_bytes=need_bytes
    )


def assignment(instance_id: str = "i1", *, epoch: int = 1, node_id: str = "aaaa") -> Assignment:
    """An assignment on one node's CPU."""
    return Assignment(
        epoch=epoch,
        node_id=node_id,
        runner_id=f"{instance_id}-{epoch}",
        backend="llama_cpp-cpu",
        context_length=4096,
        n_parallel=4,
        kv_cells=4096,
        memory=estimate(),
    )


def instance(
    instance_id: str = "i1",
    *,
    model_id: str = "org/model",
    assigned: Assignment | None = None,
    last_epoch: int | None = None,
    position: Position | None = None,
) -> Instance:
    """An instance, pending unless it is given an assignment."""
    epoch = 0 if assigned is None else assigned.epoch
    return Instance(
        instance_id=instance_id,
        request=PlacementRequest(card=card(model_id)),
        assignment=assigned,
        last_epoch=epoch if last_epoch is None else last_epoch,
        position=position or Position(term=TERM, seq=0),
    )


def state_of(*instances: Instance, seq: int = 0, term: Term = TERM) -> ClusterState:
    """A state that holds these instances."""
    return ClusterState(
        cluster="test",
        position=Position(term=term, seq=seq),
        instances={found.instance_id: found for found in instances},
    )


def record(event: Event, seq: int, term: Term = TERM) -> EventRecord:
    """An event at its place in the log."""
    return EventRecord(position=Position(term=term, seq=seq), at=1_000.0 + seq, event=event)


def beat(
    node_id: str = "aaaa",
    *,
    name: str = "",
    tags: tuple[str, ...] = ("llama_cpp", "llama_cpp-cpu"),
    memory_bytes: int = 16 * GIB,
    models: tuple[str, ...] = ("org/model",),
    runners: tuple[RunnerStatus, ...] = (),
) -> NodeBeat:
    """A beat of a node that holds these models."""
    return NodeBeat(
        node_id=node_id,
        incarnation="0001",
        name=name or f"host-{node_id}",
        version="0.1.0",
        commit="0123abcd",
        at=1_000.0,
        started_at=900.0,
        tags=tags,
        system=SystemFacts(hostname=node_id, os="Linux", architecture="x86_64", chip="test", physical_cores=2),
        memory=MemoryFacts(total_bytes=memory_bytes, available_bytes=memory_bytes, usable_bytes=memory_bytes),
        disk=DiskFacts(total_bytes=100 * GIB, available_bytes=50 * GIB),
        models=tuple(HeldModel(model_id=model_id, size_bytes=100_000_000) for model_id in models),
        runners=runners,
    )


def status(
    assigned: Assignment,
    phase: RunnerPhase = "ready",
    *,
    instance_id: str = "i1",
    model_id: str = "org/model",
    active: int = 0,
    since: float = 1.0,
) -> RunnerStatus:
    """A runner's status."""
    return RunnerStatus(
        runner_id=assigned.runner_id,
        instance_id=instance_id,
        epoch=assigned.epoch,
        node_id=assigned.node_id,
        model_id=model_id,
        phase=phase,
        active=active,
        since=since,
    )
