"""What a node tells of its machine in each beat; what changes slowly is asked seldom, never in the beat's way."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Final

import msgspec

from skulk.clock import Clock
from skulk.models.catalogue import Catalogue
from skulk.node.node import Measured
from skulk.node.quarantine import Quarantine, without
from skulk.telemetry.backends import Advertised, probe_engine, tags_of
from skulk.telemetry.gpus import accelerators
from skulk.telemetry.host import disk_facts, load_average, system_facts
from skulk.telemetry.memory import memory_facts
from skulk.telemetry.processes import MemoryWatch
from skulk.units import MIB
from skulk.wire.beats import Accelerator, DiskFacts, EngineFacts, HealthReason, MemoryFacts, SystemFacts
from skulk.wire.model import HeldModel

PROBE: Final = (sys.executable, "-m", "skulk.runner.probe")
ENGINE_EVERY_S: Final = 60.0
GPUS_EVERY_S: Final = 5.0
UNMEASURED: Final = EngineFacts()
MODELS_EVERY_S: Final = 30.0
PROCESS_STEP: Final = 4 * MIB


def stepped(process_bytes: int) -> int:
    """A measured process, rounded up to 4 MiB: nodes of one build tell the same then, and are placed on alike."""
    return -(-process_bytes // PROCESS_STEP) * PROCESS_STEP


class MachineMeter:
    """Measures this machine. `start` once before the first beat; keep `run` going.

    Args:
        models_dir: where weights lie; its disk is the one that is told.
        declared: backends that the operator declared; empty: detect.
        limit_bytes: the most that models may take here; 0: no limit.
        engine: how this node's runners are set up; what one takes without a model is measured here.
        quarantine: backends that aren't offered though the engine has them.
    """

    def __init__(
        self,
        clock: Clock,
        catalogue: Catalogue,
        *,
        models_dir: Path,
        declared: tuple[str, ...],
        limit_bytes: int,
        quarantine: Quarantine,
        engine: EngineFacts = UNMEASURED,
    ) -> None:
        self._clock = clock
        self._catalogue = catalogue
        self._models_dir = models_dir
        self._declared = declared
        self._limit_bytes = limit_bytes
        self._probed = Advertised((), ())
        self._quarantine = quarantine
        self._engine = engine
        self._build = ""
        self._gpus: tuple[Accelerator, ...] = ()
        self._system: SystemFacts | None = None
        self._models: tuple[HeldModel, ...] = ()
        self._problems: tuple[HealthReason, ...] = ()
        self._watch = MemoryWatch()

    @property
    def tags(self) -> tuple[str, ...]:
        """The advertised backends."""
        return self._advertised.tags

    def quarantine(self, backend: str, reason: str) -> None:
        """Doesn't offer a backend from now on; see `skulk.node.quarantine` for the ways back."""
        self._quarantine.add(backend, self._build, reason, self._clock.wall())

    @property
    def _advertised(self) -> Advertised:
        return without(self._probed, self._quarantine.holding(self._build, self._clock.wall()))

    async def start(self) -> None:
        """Looks at everything once."""
        await asyncio.gather(self._look_at_engine(), self._look_at_gpus(), self._look_at_models())

    async def run(self) -> None:
        """Looks again at what changes slowly, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_every(ENGINE_EVERY_S, self._look_at_engine), name="look-at-engine")
            tasks.create_task(_every(MODELS_EVERY_S, self._look_at_models), name="look-at-models")
            if self._gpus:
                tasks.create_task(_every(GPUS_EVERY_S, self._look_at_gpus), name="look-at-gpus")

    async def measure(self, pids: Mapping[str, int]) -> Measured:
        """Facts as they are now; the file system and ``/proc`` are read in a thread."""
        advertised = self._advertised
        memory, runner_bytes, disk = await asyncio.to_thread(self._measure, dict(pids))
        if self._system is None:
            self._system = await asyncio.to_thread(system_facts, self._gpus)
        return Measured(
            tags=advertised.tags,
            system=self._system,
            memory=memory,
            disk=disk,
            load=load_average(),
            models=self._models,
            warnings=(*advertised.warnings, *self._problems),
            runner_bytes=runner_bytes,
            engine=self._engine,
        )

    def _measure(self, pids: dict[str, int]) -> tuple[MemoryFacts, dict[str, int], DiskFacts]:
        taken = self._watch.look(pids.values())
        own = {runner: taken[pid] for runner, pid in pids.items()}
        memory = memory_facts(self.tags, self._gpus, limit_bytes=self._limit_bytes, own=own.values())
        return memory, {runner: taken.total_bytes for runner, taken in own.items()}, disk_facts(self._models_dir)

    async def look_at_models(self) -> None:
        """Looks at the models now: something came or went."""
        await self._look_at_models()

    async def _look_at_engine(self) -> None:
        found = await probe_engine(PROBE)
        self._probed = tags_of(self._declared, found)
        if found.build and found.build != self._build:
            # once for a build: what the kernel counts of shared libraries hangs on who else has them
            self._build = found.build
            self._engine = msgspec.structs.replace(self._engine, process_bytes=stepped(found.process_bytes))

    async def _look_at_gpus(self) -> None:
        self._gpus = await accelerators()
        self._system = None

    async def _look_at_models(self) -> None:
        self._models, self._problems = await asyncio.to_thread(self._read_models)

    def _read_models(self) -> tuple[tuple[HeldModel, ...], tuple[HealthReason, ...]]:
        self._catalogue.rescan()
        problems = tuple(
            HealthReason(
                level="warn", code="model_problem", message=problem.reason, remediation="Mend or remove the file"
            )
            for problem in self._catalogue.problems()
        )
        return self._catalogue.held(), problems


async def _every(period_s: float, look: Callable[[], Awaitable[None]]) -> None:
    while True:
        await asyncio.sleep(period_s)
        await look()
