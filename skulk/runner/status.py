"""What the runner says of itself: a change of phase at once, else at most four times and at least once a second.

`StatusBoard.device_bytes`: what the engine saw its load take of a device whose driver tells nothing of processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from typing import Any, Final

import msgspec

from skulk.bus.port import Bus
from skulk.bus.subjects import RUNNER_STATUS
from skulk.clock import Clock
from skulk.cluster.liveness import RUNNER_STATUS_S
from skulk.errors import SkulkError, UnavailableError
from skulk.telemetry import MemoryWatch, process_memory
from skulk.units import format_bytes
from skulk.wire.base import ErrorBody
from skulk.wire.beats import RunnerPhase, RunnerStatus
from skulk.wire.runner import RunnerSpec

STATUS_PAUSE_S: Final = 0.25
# The kernel walks all pages of the process to tell it.
MEMORY_EVERY_S: Final = 5.0

log = logging.getLogger(__name__)


class StatusBoard:
    """The runner's status; `run` must be running for it to be heard."""

    def __init__(self, bus: Bus, spec: RunnerSpec, clock: Clock) -> None:
        self._bus = bus
        self._clock = clock
        self._measure_at = clock.now()
        self._watch = MemoryWatch()
        self._changed = asyncio.Event()
        self._phase_changed = asyncio.Event()
        self._idle_since = clock.now()
        self.now = RunnerStatus(
            runner_id=spec.runner_id,
            instance_id=spec.instance_id,
            epoch=spec.epoch,
            node_id=spec.node_id,
            model_id=spec.model_id,
            phase="starting",
            restarts=spec.restarts,
            reserved_bytes=spec.reserved_bytes,
            since=clock.wall(),
            backend=spec.load.backend,
            expected_bytes=spec.expected_bytes,
        )
        self.device_bytes = 0

    @property
    def phase(self) -> RunnerPhase:
        return self.now.phase

    def enter(self, phase: RunnerPhase, *, error: ErrorBody | None = None, **facts: Any) -> None:
        """Goes on to a phase."""
        if phase == self.now.phase:
            self.note(**facts)
            return
        log.info("%s -> %s%s", self.now.phase, phase, f": {error.detail}" if error else "")
        self._idle_since = self._clock.now()
        self.now = msgspec.structs.replace(self.now, phase=phase, error=error, since=self._clock.wall(), **facts)
        self._phase_changed.set()
        self._changed.set()

    def note(self, **facts: Any) -> None:
        """Notes figures (progress, active, waiting); nothing happens where they are the same.

        Becoming idle or busy is told at once, other figures in time.
        """
        after = msgspec.structs.replace(self.now, **facts)
        # also where it stays idle: a request may have come and gone since
        self._idle_since = self._clock.now()
        if (after.active == 0) != (self.now.active == 0):
            self._phase_changed.set()
        if after != self.now:
            self.now = after
            self._changed.set()

    async def run(self) -> None:
        """Publishes until it is cancelled."""
        while True:
            self._changed.clear()
            self._phase_changed.clear()
            await self._measure()
            await self.publish()
            await self._weigh()
            await _within(self._changed, RUNNER_STATUS_S)
            await _within(self._phase_changed, STATUS_PAUSE_S)

    async def _measure(self) -> None:
        if self._clock.now() >= self._measure_at:
            self._measure_at = self._clock.now() + MEMORY_EVERY_S
            own = os.getpid()
            taken = await asyncio.to_thread(self._watch.look, (own,))
            self.now = msgspec.structs.replace(self.now, memory_bytes=taken[own].total_bytes)

    async def _weigh(self) -> None:
        """Once, right after the load: what it really takes, to be held against what was expected."""
        if self.now.phase != "ready" or self.now.loaded_bytes:
            return
        taken = await asyncio.to_thread(process_memory, os.getpid())
        loaded = taken.resident_bytes + max(taken.device_bytes, self.device_bytes)
        expected = self.now.expected_bytes
        if expected:
            log.info("%s after the load, %.2f of what was expected", format_bytes(loaded), loaded / expected)
        self.note(loaded_bytes=loaded)

    async def publish(self) -> None:
        """Says it now, if the bus takes it; the next time comes soon."""
        is_idle = self.now.phase == "ready" and not self.now.active and not self.now.waiting
        idle_s = self._clock.now() - self._idle_since if is_idle else 0.0
        self.now = msgspec.structs.replace(self.now, idle_s=idle_s)
        try:
            await self._bus.publish(RUNNER_STATUS, self.now, runner=self.now.runner_id)
        except UnavailableError:
            log.debug("the status waits for the bus")
        except SkulkError as error:
            log.warning("the status can't be published: %s", error.detail)


async def _within(event: asyncio.Event, timeout_s: float) -> None:
    """Waits for an event, at most so long."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await event.wait()
