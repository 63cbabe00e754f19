"""Runners are asked here: for a generation, and to cancel one.

generate    accepted, or a refusal by code; asked again with the same id for up to 1 s while unreachable
cancel      told in the background: whoever leaves doesn't wait for it
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from skulk.bus.port import Bus
from skulk.bus.replica import Replica
from skulk.bus.subjects import RUNNER_CANCEL, RUNNER_GENERATE
from skulk.clock import Clock
from skulk.errors import ServiceError, SkulkError, UnavailableError
from skulk.gateway.run import Attempt, Run
from skulk.gateway.waiting import death_of
from skulk.wire.gateway import GatewaySpec
from skulk.wire.generation import Accepted, Cancel, Generate

log = logging.getLogger("skulk.gateway")

ACCEPT_WAIT_S: Final = 30.0
UNREACHABLE_RETRY_S: Final = 1.0
RETRY_PAUSE_S: Final = 0.05
CANCEL_WAIT_S: Final = 2.0
_UNREACHABLE: Final = ("unreachable", "bus_disconnected")


class Asking:
    """Calls to runners. Owns the cancels that are under way."""

    def __init__(self, bus: Bus, replica: Replica, clock: Clock, spec: GatewaySpec) -> None:
        self._bus = bus
        self._replica = replica
        self._clock = clock
        self._spec = spec
        self._cancels: set[asyncio.Task[bool]] = set()

    async def generate(self, run: Run, attempt: Attempt) -> Accepted:
        """One runner's yes.

        Raises:
            SkulkError: its no; ``unreachable``; ``runner_failed``: it died meanwhile; ``deadline_exceeded``.
        """
        give_up_at = self._clock.now() + UNREACHABLE_RETRY_S
        while True:
            attempt.raise_if_stopped()
            left_s = min(ACCEPT_WAIT_S, run.deadline - self._clock.now())
            try:
                asking = self._bus.request(
                    RUNNER_GENERATE, self._message(run, attempt), timeout_s=left_s, runner=attempt.runner_id
                )
                return await attempt.within(asking, left_s)
            except TimeoutError:
                raise ServiceError(
                    "deadline_exceeded", f"the runner {attempt.runner_id} did not answer for {left_s:.0f} s"
                ) from None
            except UnavailableError as error:
                if error.code not in _UNREACHABLE or self._clock.now() >= give_up_at:
                    raise
                if await self._replica.wait_until(
                    lambda view: death_of(view, attempt.status) is not None, RETRY_PAUSE_S
                ):
                    raise

    def _message(self, run: Run, attempt: Attempt) -> Generate:
        generation = run.generation
        return Generate(
            request_id=run.request_id,
            attempt=attempt.number,
            gateway_id=self._spec.gateway_id,
            gateway_incarnation=self._spec.incarnation,
            model_id=generation.model_id,
            prompt=generation.prompt,
            sampling=generation.sampling,
            limits=generation.limits,
            n=generation.n,
            resume=run.progress.resume(run.prompt_ids) if run.prompt_ids else None,
            timeout_s=max(0.0, run.deadline - self._clock.now()),
            priority=generation.priority,
            part_of=run.part_of,
        )

    def cancel_soon(self, runner_id: str, request_id: str) -> None:
        """Tells a runner in the background."""
        task = asyncio.create_task(self.cancel(runner_id, request_id), name=f"cancel-{request_id}")
        self._cancels.add(task)
        task.add_done_callback(self._cancels.discard)

    async def cancel(self, runner_id: str, request_id: str) -> bool:
        """Tells a runner to end a request; whether it was running there."""
        try:
            answer = await self._bus.request(
                RUNNER_CANCEL, Cancel(request_id=request_id), timeout_s=CANCEL_WAIT_S, runner=runner_id
            )
        except SkulkError as error:
            # a runner that can't be told either is dead or hears of it by the gateway's beats
            log.info("cancel of %s not told to runner %s: %s", request_id, runner_id, error)
            return False
        return answer.was_running

    async def close(self) -> None:
        """Returns when the runners were told, or after `CANCEL_WAIT_S`."""
        if self._cancels:
            await asyncio.wait(self._cancels, timeout=CANCEL_WAIT_S)
        for task in self._cancels:
            task.cancel()
