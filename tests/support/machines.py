"""A fixed small cluster: a Strix Halo box, two Macs, a box with a discrete GPU, one with a CPU alone; and models."""

from __future__ import annotations

import msgspec

from skulk.cluster.view import ClusterView, NodeView
from skulk.units import GIB
from skulk.wire.beats import (
    Accelerator,
    DiskFacts,
    MeasuredSpeed,
    MemoryFacts,
    NodeBeat,
    RunnerPhase,
    RunnerStatus,
    SystemFacts,
)
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


def shaped(card: ModelCard, **changes: object) -> ModelCard:
    """A card with another shape."""
    return msgspec.structs.replace(card, **changes)


TINY = model("tiny", weights_gib=0.09, kv_kib=23, context=8192, embedding=576, vocabulary=49_152)
SMALL = model("small-8b", weights_gib=4.6, kv_kib=128, context=131_072)
LARGE = model("large-70b", weights_gib=39.6, kv_kib=320, context=131_072, embedding=8192)
MLX = model("mlx-8b", weights_gib=4.2, kv_kib=128, context=32_768, backends=("mlx-metal", "mlx"), format="mlx")
MODELS = (TINY, SMALL, LARGE, MLX)
# layers with a window of 1,024 in five of six, as Gemma's
WINDOW = shaped(
    model("window-12b", weights_gib=6.8, kv_kib=384, context=131_072, embedding=3840, vocabulary=262_208),
    window=1024,
    window_kv_bytes_per_token=320 * 1024,
)
# 128 experts, of which 8 compute
EXPERTS = model("experts-30b", weights_gib=17.3, kv_kib=96, context=40_960, embedding=2048, vocabulary=151_936)
# state-space layers: a state of its own for each sequence, and hardly any cache
HYBRID = shaped(model("hybrid-9b", weights_gib=5.2, kv_kib=16, context=131_072), recurrent_bytes=96 * 2**20)
EMBEDDER = shaped(
    model("embedder", weights_gib=0.3, kv_kib=12, context=512, embedding=384, vocabulary=30_522),
    tasks=("TextEmbedding",),
)
GPU_ONLY = shaped(model("gpu-only-27b", weights_gib=15.4, kv_kib=184, context=32_768), min_vram_gib=16.0)
FAMILIES = (*MODELS, WINDOW, EXPERTS, HYBRID, EMBEDDER, GPU_ONLY)


def machine(
    node_id: str,
    tags: tuple[str, ...],
    usable_gib: float,
    *,
    name: str = "",
    load: float = 0.0,
    cores: int = 8,
    models: tuple[ModelCard, ...] = FAMILIES,
    heard_at: float = NOW,
    measured: bool = True,
    ram_gib: float | None = None,
    gpus: tuple[Accelerator, ...] = (),
    speeds: tuple[MeasuredSpeed, ...] = (),
) -> NodeView:
    """A node that has spoken at ``heard_at``; with ``measured`` False it has no memory facts yet.

    ``ram_gib``: usable by the processor, where ``usable_gib`` is a discrete GPU's.
    """
    usable = int(usable_gib * GIB)
    beat = NodeBeat(
        node_id=node_id,
        incarnation="0001",
        name=name or node_id,
        version="0.1.0",
        at=1_700_000_000.0,
        started_at=1_699_999_000.0,
        tags=tags,
        system=SystemFacts(
            hostname=node_id, os="Linux", architecture="x86_64", chip="", physical_cores=cores, accelerators=gpus
        ),
        memory=MemoryFacts(
            total_bytes=usable * 2 if measured else 0,
            available_bytes=usable,
            usable_bytes=usable,
            cpu_usable_bytes=None if ram_gib is None else int(ram_gib * GIB),
        ),
        speeds=speeds,
        disk=DiskFacts(total_bytes=1000 * GIB, available_bytes=500 * GIB),
        load=load,
        models=tuple(HeldModel(model_id=card.model_id, size_bytes=card.size_bytes) for card in models),
    )
    return NodeView(beat=beat, heard_at=heard_at)


CPU_TAGS = ("llama_cpp", "llama_cpp-cpu")
STRIX_GPU = Accelerator(vendor="amd", name="Radeon 8060S", vram_total_bytes=512 * 2**20, gtt_total_bytes=120 * GIB)
GEFORCE_GPU = Accelerator(vendor="nvidia", name="GeForce RTX 4070", vram_total_bytes=12 * GIB)
STRIX = machine("a1", ("llama_cpp", "llama_cpp-vulkan"), 96, name="strix", cores=16, gpus=(STRIX_GPU,))
MAC_SMALL = machine("b1", ("mlx", "mlx-metal"), 12, name="mac-small")
MAC_LARGE = machine("b2", ("mlx", "mlx-metal"), 48, name="mac-large")
GEFORCE = machine(
    "c1", ("llama_cpp", "llama_cpp-cuda", "llama_cpp-cpu"), 10.8, name="geforce", ram_gib=20, gpus=(GEFORCE_GPU,)
)
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
