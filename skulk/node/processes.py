"""Runners as processes: what they are started with, and what their supervisor says when they end."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import msgspec

from skulk.cluster.reconcile import Wanted
from skulk.errors import UnavailableError
from skulk.models.catalogue import Catalogue, CatalogueEntry
from skulk.node.children import HeaderChecks
from skulk.node.downloads import Downloads
from skulk.node.hosting import Prepared, ProcessReport, lost_process
from skulk.node.measuring import MachineMeter
from skulk.node.node import Measured
from skulk.node.quarantine import CANARY_DIR
from skulk.settings import Settings
from skulk.supervision.child import ChildSpec, Ledger
from skulk.supervision.restarts import GiveUp, RestartPolicy
from skulk.supervision.supervisor import Crash, Supervised
from skulk.wire.base import ErrorBody, encode
from skulk.wire.model import ModelCard
from skulk.wire.runner import RunnerLoad, RunnerSpec

DRAIN_S: Final = 30.0
LOAD_TIMEOUT_S: Final = 1_800.0
"""A runner is ready when its model is loaded; the largest ones come from slow disks."""
SPINS_ALONE: Final = 300_000
SPINS_SHARED: Final = 1_000
"""How often a thread of libgomp looks before it sleeps, at each barrier. Alone, its usual number: waking takes longer
than most waits, and answers one at a time came 1.1 times as fast. Beside another runner, or with more threads than
cores, threads that look keep the core from the one that everybody waits for: steps of 1.96 s were seen."""
TUNABLES: Final = "GLIBC_TUNABLES"
HUGE_PAGES: Final = "glibc.malloc.hugetlb=1"
"""Weights, caches and buffers in pages of 2 MiB, where the kernel grants them on request (``madvise``, the usual
setting) and the C library asks for them (glibc since 2.35; others pass over this). A step reads all weights, and with
pages of 4 KiB the processor spends up to a third of it on finding them (ADR 20)."""
POLICY: Final = RestartPolicy(advice="See its log for the reason; then delete the instance and place it again.")


class BusAddress(msgspec.Struct, frozen=True, kw_only=True):
    """How a child reaches the bus; user and password are empty where it asks for none."""

    url: str
    user: str = ""
    password: str = ""


class LocalMachine:
    """The machine beneath a node: weights on its disk, its memory, runner processes.

    Args:
        ledger: where running children are written down, so that the next start can end leftovers.
        downloads: brings weights that aren't here; None: nothing is fetched.
    """

    def __init__(
        self,
        settings: Settings,
        node_id: str,
        address: BusAddress,
        catalogue: Catalogue,
        meter: MachineMeter,
        ledger: Ledger | None,
        downloads: Downloads | None = None,
    ) -> None:
        self._settings = settings
        self._node_id = node_id
        self._address = address
        self._catalogue = catalogue
        self._meter = meter
        self._ledger = ledger
        self._downloads = downloads
        self._headers = HeaderChecks(ledger)
        self._hashing = asyncio.Lock()
        self._runners: weakref.WeakSet[SupervisedRunner] = weakref.WeakSet()

    def has_weights(self, wanted: Wanted) -> bool:
        """Whether the model lies here with the pins of its card; a node that runs none refuses in `prepare`."""
        card, downloads = wanted.instance.request.card, self._downloads
        if downloads is None or self._settings.participation == "management" or downloads.has(card):
            return True
        # no source is known: `prepare` says what is missing or broken, better than a download that can't be
        return not downloads.can_fetch(card)

    async def fetch(self, wanted: Wanted) -> None:
        """Has the weights come.

        Raises:
            SkulkError: why they don't.
        """
        assert self._downloads is not None, "`has_weights` says when there is nothing to fetch"
        await self._downloads.fetch(wanted.instance.request.card)

    async def prepare(self, wanted: Wanted) -> Prepared:
        """Finds the model's files and verifies them against its card, in a thread that ends when this is cancelled;
        then their headers are read in a process of its own.

        Raises:
            SkulkError: ``refused_by_node``: this node runs no models; what the catalogue has against the model.
        """
        if self._settings.participation == "management":
            # the state may be older than the role
            raise UnavailableError("refused_by_node", "this node runs no models (--no-worker)")
        is_cancelled = threading.Event()
        # one at a time: two would only share the disk, and a few would leave no thread for the beats
        async with self._hashing:
            try:
                entry = await asyncio.to_thread(self._find, wanted.instance.request.card, is_cancelled)
            finally:
                is_cancelled.set()
        if entry.card.format == "gguf" and wanted.assignment.backend.startswith("llama_cpp"):
            await self._headers.check(entry.paths)
        weights = self._catalogue.known_digest(entry.paths[0]) or entry.card.files[0].sha256 or ""
        return Prepared(path=str(entry.paths[0]), weights=weights)

    def _find(self, card: ModelCard, is_cancelled: threading.Event) -> CatalogueEntry:
        model_id = card.model_id

        def on_block(_: int) -> None:
            if is_cancelled.is_set():
                raise InterruptedError(f"the check of {model_id} is not needed any more")

        entry = self._catalogue.find(model_id)
        digests = self._catalogue.verify(entry, on_block)
        _check_pins(card, {file.name: digest for file, digest in zip(entry.card.all_files, digests, strict=True)})
        if self._downloads is not None:
            self._downloads.shelf.touch(model_id, time.time())
        return entry

    def quarantine(self, backend: str, reason: str) -> None:
        """This node doesn't offer the backend from now on."""
        self._meter.quarantine(backend, reason)

    async def facts(self, pids: dict[str, int]) -> Measured:
        """Tags and memory, measured now."""
        return await self._meter.measure(pids)

    def supervise(
        self, wanted: Wanted, prepared: Prepared, on_exit: Callable[[ProcessReport], None]
    ) -> SupervisedRunner:
        """A runner process that isn't running yet."""

        def spec_of(restarts: int) -> RunnerSpec:
            return self._spec(wanted, prepared, restarts)

        log_path = Path(self._settings.home) / "logs" / f"runner-{wanted.assignment.runner_id}.log"
        runner = SupervisedRunner(wanted, spec_of, self._environment, log_path, on_exit, self._ledger)
        self._runners.add(runner)
        return runner

    def _environment(self) -> dict[str, str]:
        """Of a runner that starts now."""
        return environment_of(self._settings.threads, sum(runner.pid is not None for runner in self._runners))

    def _spec(self, wanted: Wanted, prepared: Prepared, restarts: int) -> RunnerSpec:
        settings, assignment = self._settings, wanted.assignment
        return RunnerSpec(
            runner_id=assignment.runner_id,
            instance_id=wanted.instance.instance_id,
            epoch=assignment.epoch,
            node_id=self._node_id,
            model_id=wanted.instance.model_id,
            cluster=settings.cluster,
            restarts=restarts,
            reserved_bytes=assignment.memory.need_bytes,
            expected_bytes=assignment.memory.expected_bytes,
            weights=prepared.weights,
            sampling=wanted.instance.request.card.sampling,
            canary_dir=str(Path(settings.home) / CANARY_DIR),
            nats_url=self._address.url,
            user=self._address.user,
            password=self._address.password,
            load=RunnerLoad(
                path=prepared.path,
                backend=assignment.backend,
                context_length=assignment.context_length,
                n_parallel=assignment.n_parallel,
                kv_cells=assignment.kv_cells,
                n_batch=settings.batch,
                n_ubatch=settings.ubatch,
                n_threads=settings.threads,
                gpu_layers=settings.gpu_layers,
                flash_attention=settings.flash_attention,
                kv_type=settings.kv_type,
                park_bytes=assignment.memory.park_bytes,
                embeds=wanted.instance.request.card.embeds,
            ),
            request_timeout_s=settings.request_timeout_s,
            step_timeout_s=settings.step_timeout_s,
            drain_timeout_s=DRAIN_S,
            log_format=settings.log_format,
            log_level=settings.log_level,
        )


def environment_of(n_threads: int, runners: int) -> dict[str, str]:
    """What a runner is told by its environment.

    Args:
        n_threads: fixed by a setting; 0: the runners share the cores.
        runners: how many there are on this node already.
    """
    spins = SPINS_ALONE if n_threads == 0 and runners == 0 else SPINS_SHARED
    return {"GOMP_SPINCOUNT": str(spins), "GGML_NO_BACKTRACE": "1", TUNABLES: tunables_of(os.environ.get(TUNABLES, ""))}


def tunables_of(own: str) -> str:
    """What the C library is told; a person's own word on huge pages counts."""
    return own if "glibc.malloc.hugetlb" in own else ":".join(filter(None, (own, HUGE_PAGES)))


def _check_pins(card: ModelCard, here: Mapping[str, str]) -> None:
    """Whether the files here are those that the placement means: another revision has the same names.

    Raises:
        UnavailableError: ``refused_by_node``.
    """
    for file in card.files:
        own = here.get(file.name)
        if own is not None and file.sha256 is not None and own != file.sha256:
            raise UnavailableError(
                "refused_by_node",
                f"{file.name} of {card.model_id} lies here with the sha256 {own}, the placement pins {file.sha256}; "
                "'skulk remove' it here, or place the model anew",
            )


class SupervisedRunner:
    """One assignment's process, started again after crashes until its budget is used up."""

    def __init__(
        self,
        wanted: Wanted,
        spec_of: Callable[[int], RunnerSpec],
        environment: Callable[[], dict[str, str]],
        log_path: Path,
        on_exit: Callable[[ProcessReport], None],
        ledger: Ledger | None,
    ) -> None:
        self._name = f"runner {wanted.assignment.runner_id}"
        self._spec_of = spec_of
        self._environment = environment
        self._log_path = log_path
        self._report = on_exit
        self._supervised = Supervised(self._name, self._child_spec, policy=POLICY, on_exit=self._exited, ledger=ledger)

    @property
    def pid(self) -> int | None:
        """Of the process that serves now."""
        return self._supervised.pid

    async def run(self) -> None:
        """Keeps it running; returns when it was stopped, or when it is not started any more."""
        await self._supervised.run()

    async def stop(self) -> None:
        """Drains and ends it."""
        await self._supervised.stop()

    def kill(self, reason: str) -> None:
        """Ends the process that serves now, at once; it is started again as after a crash."""
        if (child := self._supervised.child) is not None:
            child.kill(reason)

    def _child_spec(self) -> ChildSpec:
        return ChildSpec(
            name=self._name,
            argv=(sys.executable, "-m", "skulk", "_runner"),
            env=self._environment(),
            stdin=encode(self._spec_of(self._supervised.restarts)),
            log_path=self._log_path,
            ready_timeout_s=LOAD_TIMEOUT_S,
            drain_s=DRAIN_S,
        )

    def _exited(self, crash: Crash) -> None:
        final = crash.decision if isinstance(crash.decision, GiveUp) else None
        detail = crash.detail if final is None else final.detail
        error = lost_process(detail) if crash.code == "child_failed" else ErrorBody(code=crash.code, detail=detail)
        # the supervisor counts a restart when it begins; everybody else counts the life that follows this one
        restarts = self._supervised.restarts + (final is None)
        self._report(ProcessReport(error=error, restarts=restarts, is_final=final is not None))
