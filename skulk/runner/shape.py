"""What a runner's batch may hold: the engine's own word, within what was asked for."""

from __future__ import annotations

from skulk.batching.admission import BatchShape
from skulk.engines.protocol import EngineInfo
from skulk.wire.runner import RunnerSpec


def shape_of(info: EngineInfo, spec: RunnerSpec) -> BatchShape:
    """What the loaded engine can hold, by its own word where it differs from what was asked."""
    load = spec.load
    n_batch = max(info.n_batch, 2)
    return BatchShape(
        n_ctx=info.n_ctx,
        kv_cells=max(info.kv_cells, info.n_ctx),
        n_parallel=min(info.n_parallel, n_batch - 1),
        n_batch=n_batch,
        n_ubatch=min(load.n_ubatch, n_batch),
        max_waiting=spec.max_waiting,
        vocabulary_size=info.vocabulary_size,
        is_unified=info.is_unified,
        reuse=info.reuse,
        shares_cells=info.shares_cells,
        park_bytes=load.park_bytes,
        state_bytes=info.state_bytes,
        token_bytes=info.token_bytes,
    )
