"""Idle models leave: the runner is asked first, for only it knows that nothing is in flight.

idle by the view ──> retire ──> the runner takes nothing for a moment ──> InstanceDeleted ──> gone
                       └──> it is at work after all: it stays
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from skulk.bus.port import Bus
from skulk.bus.replica import Replica
from skulk.bus.subjects import RUNNER_RETIRE
from skulk.clock import Clock
from skulk.cluster.view import ClusterView, phase_of, runner_of
from skulk.errors import SkulkError
from skulk.master.idle import Idle, idle_instances, room_for
from skulk.master.ledger import Ledger
from skulk.placement.decision import place
from skulk.wire.events import InstanceDeleted
from skulk.wire.generation import Retire
from skulk.wire.placement import PlacementRequest
from skulk.wire.state import Instance

log = logging.getLogger("skulk.master")

LOOK_S: Final = 1.0
HOLD_S: Final = 10.0
RETIRE_WAIT_S: Final = 2.0
GONE_WAIT_S: Final = 10.0
FREE_WAIT_S: Final = 5.0


class Retiring:
    """Lets models that were placed on demand leave during one term.

    Args:
        view: the authoritative state with what beats say.
        waited: the models that requests wait for.
        idle_ttl_s: how long a model may be idle.
        is_busy: whether a command is placing an instance.
    """

    def __init__(
        self,
        bus: Bus,
        replica: Replica,
        clock: Clock,
        ledger: Ledger,
        *,
        view: Callable[[], ClusterView],
        waited: Callable[[], frozenset[str]],
        idle_ttl_s: float,
        default_parallel: int,
        is_busy: Callable[[str], bool],
    ) -> None:
        self._bus = bus
        self._replica = replica
        self._clock = clock
        self._ledger = ledger
        self._view = view
        self._waited = waited
        self._idle_ttl_s = idle_ttl_s
        self._default_parallel = default_parallel
        self._is_busy = is_busy
        self._turn = asyncio.Lock()

    async def run(self) -> None:
        """Lets those leave whose time is over, until cancelled."""
        while True:
            await asyncio.sleep(LOOK_S)
            for one in self._idle():
                if one.idle_s >= self._idle_ttl_s:
                    async with self._turn:
                        await self._retire(one.instance, f"idle for {one.idle_s:.0f} s")

    async def make_room(self, request: PlacementRequest) -> bool:
        """Lets the least recently used leave so that a request fits; whether it fits now."""
        async with self._turn:
            if self._fits(request):
                return True
            view = self._view()
            leaving = room_for(view, request, self._idle(), self._clock.now(), self._default_parallel)
            for one in leaving:
                if not await self._retire(one.instance, f"{request.card.model_id} needs its room"):
                    return False
            # the node's next beat tells what is free
            return bool(leaving) and await self._replica.wait_until(lambda _: self._fits(request), FREE_WAIT_S)

    def _idle(self) -> tuple[Idle, ...]:
        found = idle_instances(self._view(), self._waited(), self._clock.wall())
        return tuple(one for one in found if not self._is_busy(one.instance.instance_id))

    def _fits(self, request: PlacementRequest) -> bool:
        decision = place(self._view(), request, self._clock.now(), default_parallel=self._default_parallel)
        return decision.outcome == "placed"

    async def _retire(self, instance: Instance, why: str) -> bool:
        """Deletes an instance if its runner is idle; whether it is gone."""
        view = self._view()
        status = runner_of(view, instance)
        if status is not None and phase_of(view, instance) == "ready" and not await self._is_released(status.runner_id):
            return False
        current = self._ledger.state.instances.get(instance.instance_id)
        if current is None or not current.on_demand:
            return current is None
        log.info("the instance %s of %s leaves: %s", instance.instance_id, instance.model_id, why)
        self._ledger.append(InstanceDeleted(instance_id=instance.instance_id, deleted_at=self._clock.wall()))
        if status is None:
            return True
        runner = status.runner_id

        def is_gone(view: ClusterView) -> bool:
            told = view.runners.get(runner)
            return told is None or told.phase == "stopped"

        return await self._replica.wait_until(is_gone, GONE_WAIT_S)

    async def _is_released(self, runner_id: str) -> bool:
        try:
            answer = await self._bus.request(
                RUNNER_RETIRE, Retire(hold_s=HOLD_S), timeout_s=RETIRE_WAIT_S, runner=runner_id
            )
        except SkulkError as error:
            log.info("runner %s can't be asked whether it is idle: %s", runner_id, error)
            return False
        return answer.is_idle
