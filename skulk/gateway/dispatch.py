"""One generation, from "somebody asked" to the chunks of its stream: the one path of all dialects.

`Dispatcher.begin` decides, again and again until a runner has accepted or the answer is a refusal:

    1. draining, or past the deadline     -> 503 draining, 504 deadline_exceeded
    2. a ready instance, not yet tried    -> ask the least loaded
         2a. accepted                        -> the stream
         2b. unreachable                     -> ask again with the same id for up to 1 s, then as 2c
         2c. a refusal that may pass         -> the next instance
         2d. any other refusal               -> the caller's: it would be the same everywhere
    3. every ready instance refused       -> the last refusal
    4. no instance of the model           -> 404 model_not_placed, with the call to make
    5. one is being placed or loaded      -> wait for it, at most ``load_wait_s``, then 503 instance_not_ready
    6. all are pending or failed          -> wait `SETTLE_S`, for a supervisor may start it again; then the true reason

A runner that dies ends the asking and its streams at once: the view has its supervisor's word. Where no word comes,
the inbox's own rule of silence ends the stream.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Final

from skulk.bus.port import Bus
from skulk.bus.replica import Replica
from skulk.bus.streams import Inbox
from skulk.bus.subjects import RUNNER_CANCEL, RUNNER_GENERATE
from skulk.clock import Clock
from skulk.cluster.view import ClusterView, instances_of, phase_of, ready_instances, runner_of
from skulk.errors import ServiceError, SkulkError, UnavailableError
from skulk.gateway.run import Generation, Run, seeded
from skulk.gateway.waiting import death_of, not_placed, why_not_ready
from skulk.ids import new_id
from skulk.wire.base import ErrorBody
from skulk.wire.beats import RunnerStatus
from skulk.wire.gateway import GatewaySpec
from skulk.wire.generation import Accepted, Cancel, Generate
from skulk.wire.state import Instance

log = logging.getLogger("skulk.gateway")

ACCEPT_WAIT_S: Final = 30.0
UNREACHABLE_RETRY_S: Final = 1.0
RETRY_PAUSE_S: Final = 0.05
SETTLE_S: Final = 3.0
CANCEL_WAIT_S: Final = 2.0
MAX_WAITING: Final = 256
MAX_ATTEMPTS: Final = 16
# A runner that says so has not begun; after any other passing failure it may have.
_REFUSALS: Final = ("overloaded", "draining", "instance_not_ready")


class _Request:
    """What stays the same over the attempts of one generation, and what was tried."""

    def __init__(self, generation: Generation, deadline: float) -> None:
        self.request_id = new_id()
        self.generation = seeded(generation)
        self.deadline = deadline
        self.attempt = 0
        self.tried: dict[str, tuple[int, float]] = {}
        self.refusal: SkulkError | None = None

    def may_try(self, status: RunnerStatus | None) -> bool:
        """Whether a runner wasn't asked yet in its present life."""
        return status is not None and self.tried.get(status.runner_id) != _life(status)


def _life(status: RunnerStatus) -> tuple[int, float]:
    return status.restarts, status.since


class Dispatcher:
    """Brings generations to runners. Owns every open run and every cancel that is under way.

    Args:
        inbox: started; where the chunks arrive.
    """

    def __init__(self, bus: Bus, replica: Replica, inbox: Inbox, clock: Clock, spec: GatewaySpec) -> None:
        self._bus = bus
        self._replica = replica
        self._inbox = inbox
        self._clock = clock
        self._spec = spec
        self._runs: dict[str, Run] = {}
        self._cancels: set[asyncio.Task[None]] = set()
        self._waiting = 0
        self._waited: Counter[str] = Counter()
        self._idle = asyncio.Event()
        self._idle.set()
        self._is_draining = False
        self._stop_listening = replica.on_change(self._view_changed)

    @property
    def open_runs(self) -> int:
        """Generations that a runner was asked for and that have not ended."""
        return len(self._runs)

    @property
    def waiting(self) -> int:
        """Requests that wait for an instance to be ready."""
        return self._waiting

    @property
    def waited_models(self) -> tuple[str, ...]:
        """The models that they wait for."""
        return tuple(sorted(self._waited))

    @asynccontextmanager
    async def begin(self, generation: Generation, timeout_s: float) -> AsyncGenerator[Run]:
        """A run that a runner has accepted. Leaving before its end cancels it at the runner.

        Raises:
            SkulkError: see the module's table.
        """
        request = _Request(generation, self._clock.now() + timeout_s)
        run = await self._start(request)
        try:
            yield run
        finally:
            await self._leave(run)

    async def cancel(self, request_id: str) -> bool:
        """Cancels a generation of this or of another gateway; False where nobody knows it or it has ended."""
        own = self._runs.get(request_id)
        if own is not None:
            await self._cancel_at(own.runner_id, request_id)
            return True
        runners = [name for name, status in self._replica.view.runners.items() if status.phase in ("ready", "draining")]
        answers = await asyncio.gather(*(self._cancel_at(runner, request_id) for runner in runners))
        return any(answers)

    def drain(self) -> None:
        """Takes no new generations from now on."""
        self._is_draining = True

    async def wait_idle(self) -> None:
        """Returns when no generation is open."""
        await self._idle.wait()

    def stop_all(self, error: SkulkError) -> None:
        """Ends every open run with ``error``."""
        for run in tuple(self._runs.values()):
            run.stop(error)

    async def close(self) -> None:
        """Ends what is open and waits until the runners were told."""
        self._stop_listening()
        self.drain()
        self.stop_all(_draining())
        if self._cancels:
            await asyncio.wait(self._cancels, timeout=CANCEL_WAIT_S)
        for task in self._cancels:
            task.cancel()

    async def _start(self, request: _Request) -> Run:
        while True:
            if self._is_draining:  # 1
                raise _draining()
            if self._clock.now() >= request.deadline:
                raise ServiceError("deadline_exceeded", "the request's time was up before a runner took it")
            view = self._replica.view
            ready = ready_instances(view, request.generation.model_id)
            fresh = [instance for instance in ready if request.may_try(runner_of(view, instance))]
            if fresh and request.attempt < MAX_ATTEMPTS:  # 2
                run = await self._try(request, fresh[0], view)
                if run is not None:
                    return run
            elif ready:  # 3
                assert request.refusal is not None
                raise request.refusal
            else:  # 4, 5, 6
                await self._wait_for_ready(request)

    async def _try(self, request: _Request, instance: Instance, view: ClusterView) -> Run | None:
        """Asks one runner; None: it refused, but another one may not."""
        status = runner_of(view, instance)
        assert status is not None
        request.attempt += 1
        request.tried[status.runner_id] = _life(status)
        reader = self._inbox.open(request.request_id, request.attempt, status.runner_id)
        run = Run(
            request_id=request.request_id,
            attempt=request.attempt,
            instance=instance,
            status=status,
            reader=reader,
            deadline=request.deadline,
            clock=self._clock,
        )
        self._runs[request.request_id] = run
        self._idle.clear()
        try:
            run.accepted = await self._ask(request, run)
        except SkulkError as error:
            await self._leave(run, may_run=error.retryable and error.code not in _REFUSALS)
            if not error.retryable:  # 2d
                raise
            log.info("runner %s refused %s: %s", run.runner_id, run.request_id, error)
            request.refusal = error
            return None
        except BaseException:
            await self._leave(run)
            raise
        return run

    async def _ask(self, request: _Request, run: Run) -> Accepted:
        """One runner's yes; asks again while it is unreachable, for up to 1 s."""
        give_up_at = self._clock.now() + UNREACHABLE_RETRY_S
        while True:
            run.raise_if_stopped()
            left_s = min(ACCEPT_WAIT_S, request.deadline - self._clock.now())
            try:
                asking = self._bus.request(
                    RUNNER_GENERATE, self._message(request, run), timeout_s=left_s, runner=run.runner_id
                )
                return await run.within(asking, left_s)
            except TimeoutError:
                raise ServiceError(
                    "deadline_exceeded", f"the runner {run.runner_id} did not answer for {left_s:.0f} s"
                ) from None
            except UnavailableError as error:
                if error.code not in ("unreachable", "bus_disconnected") or self._clock.now() >= give_up_at:
                    raise
                if await self._replica.wait_until(lambda view: death_of(view, run.status) is not None, RETRY_PAUSE_S):
                    raise

    def _message(self, request: _Request, run: Run) -> Generate:
        generation = request.generation
        return Generate(
            request_id=request.request_id,
            attempt=run.attempt,
            gateway_id=self._spec.gateway_id,
            gateway_incarnation=self._spec.incarnation,
            model_id=generation.model_id,
            prompt=generation.prompt,
            sampling=generation.sampling,
            limits=generation.limits,
            n=generation.n,
            timeout_s=max(0.0, request.deadline - self._clock.now()),
        )

    async def _wait_for_ready(self, request: _Request) -> None:
        """Returns when an instance of the model is ready; see 4 to 6 of the module."""
        if self._waiting >= MAX_WAITING:
            raise UnavailableError(
                "overloaded", f"{MAX_WAITING} requests wait for models to load; ask again later", retry_after_s=5
            )
        model_id = request.generation.model_id
        self._waiting += 1
        self._waited[model_id] += 1
        try:
            await self._wait(request, min(request.deadline, self._clock.now() + self._spec.load_wait_s))
        finally:
            self._waiting -= 1
            self._waited[model_id] -= 1
            if not self._waited[model_id]:
                del self._waited[model_id]

    async def _wait(self, request: _Request, give_up_at: float) -> None:
        model_id = request.generation.model_id
        settled_at: float | None = None
        while not self._is_draining:
            view, now = self._replica.view, self._clock.now()
            phases = _phases(view, model_id)
            if not phases:
                raise not_placed(model_id)
            if "ready" in phases.values():
                return
            if set(phases.values()) & {"placing", "loading"}:
                settled_at, limit = None, give_up_at
            else:
                settled_at = now if settled_at is None else settled_at
                limit = min(give_up_at, settled_at + SETTLE_S)
            if now >= limit:
                raise why_not_ready(view, instances_of(view, model_id))
            await self._replica.wait_until(
                lambda view, seen=phases: self._is_draining or _phases(view, model_id) != seen, limit - now
            )

    async def _leave(self, run: Run, *, may_run: bool = True) -> None:
        """Forgets a run; tells its runner where it may still be at work."""
        self._runs.pop(run.request_id, None)
        if not self._runs:
            self._idle.set()
        if run.end is None and may_run:
            task = asyncio.create_task(self._tell_cancel(run), name=f"cancel-{run.request_id}")
            self._cancels.add(task)
            task.add_done_callback(self._cancels.discard)
        await run.reader.close()

    async def _tell_cancel(self, run: Run) -> None:
        await self._cancel_at(run.runner_id, run.request_id)

    async def _cancel_at(self, runner_id: str, request_id: str) -> bool:
        try:
            answer = await self._bus.request(
                RUNNER_CANCEL, Cancel(request_id=request_id), timeout_s=CANCEL_WAIT_S, runner=runner_id
            )
        except SkulkError as error:
            # a runner that can't be told either is dead or hears of it by the gateway's beats
            log.info("cancel of %s not told to runner %s: %s", request_id, runner_id, error)
            return False
        return answer.was_running

    def _view_changed(self, view: ClusterView) -> None:
        for run in tuple(self._runs.values()):
            error = death_of(view, run.status)
            if error is None:
                continue
            if run.accepted is None:
                run.stop(error)
            else:
                # the inbox first hands out what had arrived
                self._inbox.runner_died(run.runner_id, ErrorBody.of(error))


def _phases(view: ClusterView, model_id: str) -> dict[str, str]:
    return {instance.instance_id: phase_of(view, instance) for instance in instances_of(view, model_id)}


def _draining() -> UnavailableError:
    return UnavailableError("draining", "this gateway is stopping; ask another node", retry_after_s=5)
