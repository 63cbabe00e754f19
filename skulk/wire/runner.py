"""What a node tells a runner at its start: one JSON line on the runner's standard input.

It never crosses the bus, for it holds the bus's password; environment and command line would show it to ``ps``.
"""

from __future__ import annotations

from typing import Final, Literal

from skulk.wire.base import Wire
from skulk.wire.model import SamplingDefaults

EXIT_STOPPED: Final = 0
"""It was asked to stop and did."""
EXIT_FAILED: Final = 1
"""It failed while it served, could not reach the bus, or found no memory: starting it again may help."""
EXIT_SPEC: Final = 2
"""Its specification can't be read: a defect of whoever started it."""
EXIT_REFUSED: Final = 3
"""The model can't be loaded, and couldn't the next time: the file, the engine or a setting has to change first."""


class RunnerLoad(Wire, frozen=True, kw_only=True):
    """What to load and how; the engines' ``LoadSpec`` field by field. Lengths in tokens.

    Attributes:
        path: the (first part of the) weights file.
        sha256: what the file must hash to; None where nothing pins it.
        backend: resolved tag, ``llama_cpp-cpu``; what stands before the first ``-`` names the engine.
        context_length: window of one request that was admitted.
        n_parallel: sequences served side by side.
        kv_cells: cells allocated for all sequences together.
        n_batch: the most tokens of one step.
        n_ubatch: the most prefill tokens of one step.
        n_threads: 0: physical cores.
        gpu_layers: -1: all where the backend is a GPU.
        park_bytes: host memory for states that are set aside.
        embeds: the model gives vectors or scores, no text.
    """

    path: str
    sha256: str | None = None
    backend: str
    context_length: int
    n_parallel: int = 1
    kv_cells: int
    n_batch: int = 2048
    n_ubatch: int = 512
    n_threads: int = 0
    gpu_layers: int = -1
    flash_attention: Literal["auto", "on", "off"] = "auto"
    kv_type: str = "f16"
    park_bytes: int = 0
    embeds: bool = False


class RunnerSpec(Wire, frozen=True, kw_only=True):
    """One runner's whole instruction.

    Attributes:
        runner_id: ``<instance>-<epoch>``.
        restarts: how often this assignment's process was started before.
        reserved_bytes: memory that the node keeps for it.
        expected_bytes: what the placement estimated that it takes right after its load.
        nats_url: the node's own nats-server; ``user`` and ``password`` empty where it asks for none.
        weights: names the content of the weights file; empty: nothing is known of it.
        canary_dir: where the runner keeps what its engine recited (`skulk.engines.canary`); empty: nowhere.
        sampling: the card's, for requests that don't say.
        max_waiting: sequences that may wait for a slot; beyond it requests are refused with ``overloaded``.
        request_timeout_s: deadline of a request that names none.
        step_timeout_s: the longest step that is borne; a longer one is a hang and ends the runner.
        drain_timeout_s: how long running streams may go on after a polite stop.
    """

    runner_id: str
    instance_id: str
    epoch: int
    node_id: str
    model_id: str
    cluster: str
    restarts: int = 0
    reserved_bytes: int = 0
    expected_bytes: int = 0
    nats_url: str
    user: str = ""
    password: str = ""
    load: RunnerLoad
    weights: str = ""
    canary_dir: str = ""
    sampling: SamplingDefaults = SamplingDefaults()
    max_waiting: int = 64
    request_timeout_s: float = 600.0
    step_timeout_s: float = 120.0
    drain_timeout_s: float = 30.0
    log_format: Literal["text", "json"] = "text"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
