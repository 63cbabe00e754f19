"""Heartbeats: what is known only as long as its sender speaks. Never logged."""

from __future__ import annotations

from typing import Literal

from skulk.wire.base import ErrorBody, Wire
from skulk.wire.model import HeldModel
from skulk.wire.state import ORIGIN, Position, Term
from skulk.wire.store import DownloadStatus

Role = Literal["full", "management"]
RunnerPhase = Literal["accepted", "refused", "starting", "loading", "warming", "ready", "draining", "stopped", "failed"]


class MemoryFacts(Wire, frozen=True, kw_only=True):
    """A node's memory in bytes.

    Attributes:
        usable_bytes: what models may take now, before reservations, of the pool that the node's best backend uses.
        cpu_usable_bytes: the same of main memory for ``-cpu`` backends, where that is another pool (a discrete GPU
            has its own); None: there is one pool.
    """

    total_bytes: int
    available_bytes: int
    usable_bytes: int
    cpu_usable_bytes: int | None = None


class DiskFacts(Wire, frozen=True, kw_only=True):
    """The disk that holds the models, in bytes."""

    total_bytes: int
    available_bytes: int


class EngineFacts(Wire, frozen=True, kw_only=True):
    """What a node's llama.cpp adds to the memory of an instance.

    Attributes:
        process_bytes: of a runner before it loads a model, measured once for a build; 0: not measured yet.
        ubatch: rows of one native step.
        kv_type: of the cache's values.
    """

    process_bytes: int = 0
    ubatch: int = 512
    kv_type: str = "f16"


class MeasuredSpeed(Wire, frozen=True, kw_only=True):
    """How fast a node has drawn tokens of a model of this size, for one sequence."""

    backend: str
    weights_bytes: int
    decode_tps: float


class Accelerator(Wire, frozen=True, kw_only=True):
    """A GPU. Bytes; zero where unknown."""

    vendor: str
    name: str
    vram_total_bytes: int = 0
    vram_used_bytes: int = 0
    gtt_total_bytes: int = 0
    gtt_used_bytes: int = 0


class SystemFacts(Wire, frozen=True, kw_only=True):
    """What a node is."""

    hostname: str
    os: str
    architecture: str
    chip: str
    physical_cores: int
    accelerators: tuple[Accelerator, ...] = ()


class RunnerStatus(Wire, frozen=True, kw_only=True):
    """What one runner is doing; also published at once when it changes.

    Attributes:
        progress: of the load, 0.0 to 1.0.
        active: requests being generated.
        waiting: requests queued.
        n_ctx: window of one request that the engine really has, tokens.
        memory_bytes: resident memory of the process; 0 where unknown.
        expected_bytes: what the placement estimated that it takes right after its load, headroom not counted.
        loaded_bytes: what it was measured to take then; 0 before.
        prefill_tps: prompt tokens that it computed a second lately; 0: not measured.
        decode_tps: tokens that it drew a second lately for one sequence; 0: not measured.
        request_s: seconds that requests kept their slots lately; 0: not measured.
        prefixes: Bloom filter of the prompts whose beginnings it can take over (`skulk.placement.prefixes`).
        error: why it was refused or failed.
        restarts: how often this assignment's process was started again.
        idle_s: seconds since the last request ended, or since it was ready; 0 while any is open.
        backend: resolved tag that it computes on; runners on ``-cpu`` share their node's cores.
    """

    runner_id: str
    instance_id: str
    epoch: int
    node_id: str
    model_id: str
    phase: RunnerPhase
    progress: float = 0.0
    active: int = 0
    waiting: int = 0
    n_ctx: int = 0
    memory_bytes: int = 0
    reserved_bytes: int = 0
    error: ErrorBody | None = None
    restarts: int = 0
    since: float = 0.0
    backend: str = ""
    idle_s: float = 0.0
    expected_bytes: int = 0
    loaded_bytes: int = 0
    prefill_tps: float = 0.0
    decode_tps: float = 0.0
    request_s: float = 0.0
    prefixes: str = ""


class HealthReason(Wire, frozen=True, kw_only=True):
    """Something an operator should know: level, code, message, remediation."""

    level: Literal["warn", "error"]
    code: str
    message: str
    remediation: str = ""


class NodeBeat(Wire, frozen=True, kw_only=True):
    """A node's beat, every second.

    Attributes:
        incarnation: new at each start of the node.
        protocol: major version of the bus contract; another one takes no placements.
        commit: that it runs from, where it runs from a git checkout; else empty.
        tags: compute backends, ``<engine>`` and ``<engine>-<compute>``.
        load: the one-minute load average.
        models: weights that lie on its disk.
        runners: every runner it has, with its status.
        position: of its state; ``state_hash`` is that state's digest.
        route: the first of ``routes``; None where it has none.
        routes: ``host:port`` of each address by which servers of other nodes reach its nats-server.
        api: ``host:port`` of its gateway; None without one.
        hears: the nodes whose beats it hears.
        files: ``host:port`` where it serves its weights to neighbours; None: it doesn't.
        hub: it may fetch weights from the hub.
        downloads: the weights on their way to its disk, and those that failed lately.
        engine: what its llama.cpp adds to the memory of an instance.
        speeds: what its runners were measured to do, one for each backend and doubling of size, the newest.
        unmerged: its state holds what the master's lacks; the master's next round takes it in.
        leaving: its last beat: it stops in order and is not to be waited for.
        closed: seconds since its routes to these nodes closed; only of late, and while they are.
    """

    node_id: str
    incarnation: str
    name: str
    version: str
    protocol: int = 1
    role: Role = "full"
    at: float
    started_at: float
    tags: tuple[str, ...]
    system: SystemFacts
    memory: MemoryFacts
    disk: DiskFacts
    load: float = 0.0
    models: tuple[HeldModel, ...] = ()
    runners: tuple[RunnerStatus, ...] = ()
    warnings: tuple[HealthReason, ...] = ()
    position: Position = ORIGIN
    state_hash: str = ""
    master: str | None = None
    route: str | None = None
    api: str | None = None
    hears: tuple[str, ...] = ()
    routes: tuple[str, ...] = ()
    files: str | None = None
    hub: bool = False
    downloads: tuple[DownloadStatus, ...] = ()
    unmerged: bool = False
    leaving: bool = False
    engine: EngineFacts = EngineFacts()
    speeds: tuple[MeasuredSpeed, ...] = ()
    commit: str = ""
    closed: dict[str, float] = {}


class MasterBeat(Wire, frozen=True, kw_only=True):
    """The master's beat, every 0.5 s: its term, position, and the digest of its state.

    ``followers``: live nodes whose beats name it; decides who leads when two masters meet.
    """

    node_id: str
    term: Term
    position: Position
    state_hash: str
    at: float
    followers: int = 0


class GatewayBeat(Wire, frozen=True, kw_only=True):
    """A gateway's beat, every second, so that runners cancel the requests of one that is gone.

    ``waiting``: models that requests wait for because no instance of them is ready.
    """

    gateway_id: str
    incarnation: str
    node_id: str
    at: float
    open_streams: int = 0
    waiting: tuple[str, ...] = ()
