"""How fast placement decides: unlike nodes, 500 models, one decision after another on one core.

    tools/bench_placement.py                   10, 100 and 1,000 nodes with five instances each, as a table
    tools/bench_placement.py --nodes 3000      another size

Each decision is for a model drawn from the 500 (weights from 0.1 to 400 GiB) and looks at every node: a report for each
stands in its result. The bar is p99 <= 10 ms at 1,000 nodes.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import time
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench_figures import percentile, table

from skulk.cluster.view import ClusterView, NodeView
from skulk.placement.decision import assign, place
from skulk.units import GIB, MIB
from skulk.wire.beats import (
    Accelerator,
    DiskFacts,
    EngineFacts,
    MeasuredSpeed,
    MemoryFacts,
    NodeBeat,
    RunnerStatus,
    SystemFacts,
)
from skulk.wire.model import HeldModel, ModelCard, ModelFile
from skulk.wire.placement import PlacementRequest
from skulk.wire.state import ClusterState, Instance

SIZES: Final = (10, 100, 1000)
MODELS: Final = 500
PER_NODE: Final = 5
DECISIONS: Final = 300
NOW: Final = 100.0
SEED: Final = 20


class Kind(NamedTuple):
    """A kind of machine: its tags, and the most that models may take there, GiB.

    ``ram_gib``: of main memory, where a discrete GPU has a pool of its own.
    """

    name: str
    tags: tuple[str, ...]
    usable_gib: float
    vram_gib: float = 0.0
    ram_gib: float = 0.0


KINDS: Final = (
    Kind("strix", ("llama_cpp", "llama_cpp-vulkan", "llama_cpp-cpu"), 96, 96),
    Kind("mac", ("mlx", "mlx-metal", "llama_cpp", "llama_cpp-metal"), 24),
    Kind("studio", ("mlx", "mlx-metal", "llama_cpp", "llama_cpp-metal"), 160),
    Kind("geforce", ("llama_cpp", "llama_cpp-cuda", "llama_cpp-cpu"), 22, 24, 16),
    Kind("plain", ("llama_cpp", "llama_cpp-cpu"), 12),
)
GGUF: Final = ("llama_cpp-metal", "llama_cpp-cuda", "llama_cpp-vulkan", "llama_cpp-cpu")
MLX: Final = ("mlx-metal",)


class Row(NamedTuple):
    """One size's figures; milliseconds."""

    nodes: int
    per_s: float
    p50_ms: float
    p99_ms: float
    placed: int


def models(dice: random.Random) -> tuple[ModelCard, ...]:
    """Cards of all sizes; every fourth is an MLX one, every fifth of the others has a sliding window."""
    cards: list[ModelCard] = []
    for number in range(MODELS):
        is_mlx = number % 4 == 3
        weights = int(GIB * 0.1 * 4000.0 ** dice.random())
        kv = 1024 * dice.choice((24, 64, 128, 192, 320))
        cards.append(
            ModelCard(
                model_id=f"org/model-{number}",
                name=f"model-{number}",
                family="llama",
                format="mlx" if is_mlx else "gguf",
                backends=MLX if is_mlx else GGUF,
                files=(ModelFile(name="model.gguf", size_bytes=weights, sha256=f"{number:064x}"),),
                context_length=dice.choice((8192, 32_768, 131_072, 262_144)),
                weights_bytes=weights,
                kv_bytes_per_token=kv,
                window=1024 if number % 5 == 0 else 0,
                window_kv_bytes_per_token=kv * 3 // 4 if number % 5 == 0 else 0,
                layers=32,
                embedding_length=4096,
                vocabulary_size=128_256,
                repo=f"org/model-{number}",
                revision="0" * 40,
            )
        )
    return tuple(cards)


def node(number: int, cards: tuple[ModelCard, ...], dice: random.Random) -> NodeView:
    """One machine, with some of its memory in use and 20 of the models on its disk."""
    kind = KINDS[number % len(KINDS)]
    usable = int(kind.usable_gib * GIB * dice.uniform(0.2, 1.0))
    gpu = Accelerator(vendor="", name=kind.name, vram_total_bytes=int(kind.vram_gib * GIB))
    beat = NodeBeat(
        node_id=f"node{number:05}",
        incarnation="00000001",
        name=f"{kind.name}-{number}",
        version="0.1.0",
        at=1_700_000_000.0,
        started_at=1_699_999_000.0,
        tags=kind.tags,
        system=SystemFacts(
            hostname=kind.name,
            os="Linux",
            architecture="x86_64",
            chip="",
            physical_cores=8,
            accelerators=(gpu,) if kind.vram_gib else (),
        ),
        memory=MemoryFacts(
            total_bytes=int(kind.usable_gib * GIB),
            available_bytes=usable,
            usable_bytes=usable,
            cpu_usable_bytes=int(kind.ram_gib * GIB) or None,
        ),
        speeds=tuple(
            MeasuredSpeed(backend=kind.tags[-1], weights_bytes=size * GIB, decode_tps=dice.uniform(5, 80) / size)
            for size in (1, 4, 16)
        ),
        disk=DiskFacts(total_bytes=2000 * GIB, available_bytes=int(dice.uniform(20, 1000) * GIB)),
        load=dice.uniform(0, 8),
        models=tuple(HeldModel(model_id=card.model_id, size_bytes=card.size_bytes) for card in dice.sample(cards, 20)),
        hub=True,
        engine=EngineFacts(process_bytes=dice.randrange(80, 101, 4) * MIB),
    )
    return NodeView(beat=beat, heard_at=NOW)


def with_instances(view: ClusterView, cards: tuple[ModelCard, ...], count: int, dice: random.Random) -> ClusterView:
    """The view with instances of small models that run, each placed once and then spread over the nodes."""
    small = [card for card in cards if card.weights_bytes < GIB // 2 and card.format == "gguf"]
    decided = {card.model_id: place(view, PlacementRequest(card=card, context_length=4096), NOW) for card in small}
    instances: dict[str, Instance] = {}
    runners: dict[str, RunnerStatus] = {}
    names = sorted(view.nodes)
    for number in range(count):
        card, instance_id = dice.choice(small), f"i{number}"
        node_id = names[number % len(names)]
        assigned = msgspec.structs.replace(assign(decided[card.model_id], instance_id, 1), node_id=node_id)
        instances[instance_id] = Instance(
            instance_id=instance_id, request=PlacementRequest(card=card), assignment=assigned, last_epoch=1
        )
        runners[assigned.runner_id] = RunnerStatus(
            runner_id=assigned.runner_id,
            instance_id=instance_id,
            epoch=1,
            node_id=node_id,
            model_id=card.model_id,
            phase="ready",
            memory_bytes=assigned.memory.need_bytes,
            reserved_bytes=assigned.memory.need_bytes,
        )
    told: dict[str, list[RunnerStatus]] = {}
    for status in runners.values():
        told.setdefault(status.node_id, []).append(status)
    nodes = {
        name: NodeView(beat=msgspec.structs.replace(one.beat, runners=tuple(told.get(name, ()))), heard_at=NOW)
        for name, one in view.nodes.items()
    }
    return ClusterView(state=ClusterState(cluster="home", instances=instances), nodes=nodes, runners=runners)


def measure(nodes: int, decisions: int) -> Row:
    """One size."""
    dice = random.Random(SEED)
    cards = models(dice)
    found = [node(number, cards, dice) for number in range(nodes)]
    empty = ClusterView(state=ClusterState(cluster="home"), nodes={one.beat.node_id: one for one in found})
    view = with_instances(empty, cards, nodes * PER_NODE, dice)
    took: list[float] = []
    placed = 0
    gc.collect()
    for _ in range(decisions):
        request = PlacementRequest(card=dice.choice(cards))
        began = time.perf_counter()
        decision = place(view, request, NOW)
        took.append((time.perf_counter() - began) * 1e3)
        placed += decision.outcome == "placed"
    return Row(nodes, 1e3 * decisions / sum(took), percentile(took, 0.5), percentile(took, 0.99), placed)


def main(arguments: list[str]) -> int:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(
        prog="tools/bench_placement.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, nargs="+", default=list(SIZES), help="numbers of nodes")
    parser.add_argument("--decisions", type=int, default=DECISIONS, help=f"a size (default: {DECISIONS})")
    flags = parser.parse_args(arguments)
    rows = [measure(nodes, flags.decisions) for nodes in flags.nodes]
    header = ("nodes", "decisions/s", "p50 ms", "p99 ms", "placed of all")
    print(
        table(
            header,
            [
                (f"{row.nodes:,}", f"{row.per_s:,.0f}", f"{row.p50_ms:.2f}", f"{row.p99_ms:.2f}", f"{row.placed}")
                for row in rows
            ],
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
