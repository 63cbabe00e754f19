"""A fixed small cluster: a Strix Halo box, two Macs, a box with a discrete GPU, one with a CPU alone; and models."""

from __future__ import annotations

import msgspec

from skulk.cluster.view import ClusterView, NodeView
from skulk.units import GIB
from skulk.wire.beats import DiskFacts, MemoryFacts, NodeBeat, RunnerPhase, RunnerStatus, SystemFacts
from skulk.wire.model import HeldModel, ModelCard, ModelFile, ModelFormat
from skulk.wire.placement import PlacementRequest
from skulk.wire.state import Assignment, ClusterState, Drain, Instance

NOW = 100.0
GGUF_BACKENDS = ("llama_cpp-vulkan", "llama_cpp-rocm", "llama_cpp-cuda", "llama_cpp-cpu")


def model(
    model_id: str,
    *,
    weights_gib: float,
    kv_kib: int,
    context: int,
    embedding: int = 4096,
    vocabulary: int = 128_256,
    backends: tuple[str, ...] = GGUF_BACKENDS,
    format: ModelFormat = "gguf",  # noqa: A002 - the card's own word
) -> ModelCard:
    """A card by its sizes; ``kv_kib``: of one token."""
    weights = int(weights_gib * GIB)
    return ModelCard(
        model_id=model_id,
        name=model_id,
        family="llama",
        format=format,
        backends=backends,
        files=(ModelFile(name="model.gguf", size_bytes=weights),),
        context_length=context,
        weights_bytes=weights,
        kv_bytes_per_token=kv_kib * 1024,
        layers=32,
        embedding_length=embedding,
        vocabulary_size=vocabulary,
    )


TINY = model("tiny", weights_gib=0.09, kv_kib=23, context=8192, embedding=576, vocabulary=49_152)
SMALL = model("small-8b", weights_gib=4.6, kv_kib=128, context=131_072)
LARGE = model("large-70b", weights_gib=39.6, kv_kib=320, context=131_072, embedding=8192)
MLX = model("mlx-8b", weights_gib=4.2, kv_kib=128, context=32_768, backends=("mlx-metal", "mlx"), format="mlx")
MODELS = (TINY, SMALL, LARGE, MLX)


def machine(
    node_id: str,
    tags: tuple[str, ...],
    usable_gib: float,
    *,
    name: str = "",
    load: float = 0.0,
    cores: int = 8,
    models: tuple[ModelCard, ...] = MODELS,
    heard_at: float = NOW,
    measured: bool = True,
) -> NodeView:
    """A node that has spoken at ``heard_at``; with ``measured`` False it has no memory facts yet."""
    usable = int(usable_gib * GIB)
    beat = NodeBeat(
        node_id=node_id,
        incarnation="0001",
        name=name or node_id,
        version="0.1.0",
        at=1_700_000_000.0,
        started_at=1_699_999_000.0,
        tags=tags,
        system=SystemFacts(hostname=node_id, os="Linux", architecture="x86_64", chip="", physical_cores=cores),
        memory=MemoryFacts(total_bytes=usable * 2 if measured else 0, available_bytes=usable, usable_bytes=usable),
        disk=DiskFacts(total_bytes=1000 * GIB, available_bytes=500 * GIB),
        load=load,
        models=tuple(HeldModel(model_id=card.model_id, size_bytes=card.size_bytes) for card in models),
    )
    return NodeView(beat=beat, heard_at=heard_at)


CPU_TAGS = ("llama_cpp", "llama_cpp-cpu")
STRIX = machine("a1", ("llama_cpp", "llama_cpp-vulkan"), 96, name="strix", cores=16)
MAC_SMALL = machine("b1", ("mlx", "mlx-metal"), 12, name="mac-small")
MAC_LARGE = machine("b2", ("mlx", "mlx-metal"), 48, name="mac-large")
GEFORCE = machine("c1", ("llama_cpp", "llama_cpp-cuda"), 10.8, name="geforce")
PLAIN = machine("d1", CPU_TAGS, 24, name="plain", load=1.0)


def cluster(*nodes: NodeView, drained: tuple[str, ...] = ()) -> ClusterView:
    """A view of these nodes, with nothing placed."""
    drains = {name: Drain(node_id=name, since=0.0, reason="maintenance") for name in drained}
    state = ClusterState(cluster="home", drains=drains)
    return ClusterView(state=state, nodes={node.beat.node_id: node for node in nodes})


HOME = cluster(STRIX, MAC_SMALL, MAC_LARGE, GEFORCE, PLAIN)


def with_beat(node: NodeView, **changes: object) -> NodeView:
    """A node whose beat differs in these fields."""
    return NodeView(beat=msgspec.structs.replace(node.beat, **changes), heard_at=node.heard_at)


def with_instance(view: ClusterView, card: ModelCard, assignment: Assignment) -> ClusterView:
    """The view after an instance was assigned."""
    instance_id = assignment.runner_id.rpartition("-")[0]
    instance = Instance(
        instance_id=instance_id, request=PlacementRequest(card=card), assignment=assignment, last_epoch=assignment.epoch
    )
    state = msgspec.structs.replace(view.state, instances={**view.state.instances, instance_id: instance})
    return msgspec.structs.replace(view, state=state)


def runner(
    assignment: Assignment,
    phase: RunnerPhase,
    *,
    memory_bytes: int = 0,
    reserved_bytes: int | None = None,
) -> RunnerStatus:
    """The status of an assignment's runner."""
    return RunnerStatus(
        runner_id=assignment.runner_id,
        instance_id=assignment.runner_id.rpartition("-")[0],
        epoch=assignment.epoch,
        node_id=assignment.node_id,
        model_id="any",
        phase=phase,
        memory_bytes=memory_bytes,
        reserved_bytes=assignment.memory.need_bytes if reserved_bytes is None else reserved_bytes,
    )
