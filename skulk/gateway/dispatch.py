"""One generation, from "somebody asked" to the end of its stream: the one path of all dialects.

`Dispatcher.begin` decides, again and again until a runner has accepted or the answer is a refusal:

    1. draining, or past the deadline     -> 503 draining, 504 deadline_exceeded
    2. a ready instance, not yet tried    -> wait for a turn (`queues`), then ask the soonest (`placement.routing`)
         2a. accepted                        -> the stream
         2b. unreachable                     -> ask again with the same id for up to 1 s, then as 2c
         2c. a refusal that may pass         -> the next instance
         2d. any other refusal               -> the caller's: it would be the same everywhere
    3. the client has read half of it     -> the error that ended the last attempt
    4. every ready instance refused       -> the last refusal
    5. no instance of the model           -> place it, where `SKULK_AUTO_PLACE` lets (`loading`), else 404
    6. one is being placed or loaded      -> wait for it, at most ``load_wait_s``, then 503 instance_not_ready
    7. all are pending or failed          -> wait `SETTLE_S`, for a supervisor may start it again; then the true reason

A stream whose runner is lost goes through the same decision once more, with what it has so far (ADR 10): only runners
with the same weights count in 2, they are asked to go on from the tokens that came, and while nothing was sent it may
wait as a new request does. Dead is what the supervisor says, or the inbox after 2.5 s of silence.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import Final

from skulk.bus.port import Bus
from skulk.bus.replica import Replica
from skulk.bus.streams import Inbox
from skulk.clock import Clock
from skulk.cluster.view import ClusterView, instances_of, phase_of, ready_instances, runner_of
from skulk.errors import ServiceError, SkulkError, UnavailableError
from skulk.gateway.asking import Asking
from skulk.gateway.crashes import Crashes, crashed
from skulk.gateway.loading import Loads
from skulk.gateway.queues import Queues, slots_of
from skulk.gateway.routing import Router
from skulk.gateway.run import Attempt, Generation, Run, life_of
from skulk.gateway.waiting import death_of, has_crashed, not_placed, why_not_ready
from skulk.ids import new_id
from skulk.placement.weights import weights_of
from skulk.wire.base import ErrorBody
from skulk.wire.gateway import GatewaySpec
from skulk.wire.state import Instance

log = logging.getLogger("skulk.gateway")

SETTLE_S: Final = 3.0
MAX_RUNS: Final = 8192
MAX_WAITING: Final = 256
MAX_ATTEMPTS: Final = 16
MAX_RESUMPTIONS: Final = 2
# A runner that says so has not begun; after any other passing failure it may have.
_REFUSALS: Final = ("overloaded", "draining", "instance_not_ready")
_LEAVING: Final = ("draining", "instance_not_ready")


class Dispatcher:
    """Brings generations to runners. Owns every open run.

    Args:
        inbox: started; where the chunks arrive.
        loads: places models on demand.
    """

    def __init__(self, bus: Bus, replica: Replica, inbox: Inbox, clock: Clock, spec: GatewaySpec, loads: Loads) -> None:
        self._replica = replica
        self._inbox = inbox
        self._clock = clock
        self._spec = spec
        self._loads = loads
        self._asking = Asking(bus, replica, clock, spec)
        self._queues = Queues(clock)
        self._crashes = Crashes(clock)
        self._router = Router()
        self._runs: dict[str, Run] = {}
        self._wholes: dict[str, Callable[[], None]] = {}
        self._waiting = 0
        self._waited: Counter[str] = Counter()
        self._idle = asyncio.Event()
        self._idle.set()
        self._is_draining = False
        self.failovers: Counter[str] = Counter()
        self._stop_listening = replica.on_change(self._view_changed)

    @property
    def open_runs(self) -> int:
        """Generations that a runner was asked for and that have not ended."""
        return sum(run.attempt is not None for run in self._runs.values())

    @property
    def waiting(self) -> int:
        """Requests that wait for an instance to be ready."""
        return self._waiting

    @property
    def queued(self) -> int:
        """Requests that wait for their turn."""
        return self._queues.waiting

    @property
    def waited_models(self) -> tuple[str, ...]:
        """The models that requests wait for because no instance is ready."""
        return tuple(sorted(self._waited))

    @asynccontextmanager
    async def begin(
        self, generation: Generation, timeout_s: float, *, part_of: str = "", is_let_in: bool = False
    ) -> AsyncGenerator[Run]:
        """A run that a runner has accepted. Leaving before its end cancels it at the runner.

        Args:
            generation: what is asked.
            timeout_s: seconds until it ends with ``deadline_exceeded``, wherever it is.
            part_of: the request that it is one prompt of; its id cancels it too.
            is_let_in: see `Run`.

        Raises:
            SkulkError: see the module's table.
        """
        if len(self._runs) >= MAX_RUNS:
            raise UnavailableError(
                "overloaded", f"{MAX_RUNS} requests are open at this node; ask another one, or later", retry_after_s=2
            )
        self._crashes.check(generation)
        deadline = self._clock.now() + timeout_s
        run = Run(new_id(), generation, deadline, self._clock, self._find_next, part_of, is_let_in=is_let_in)
        self._runs[run.request_id] = run
        self._idle.clear()
        try:
            async with AsyncExitStack() as turn:
                await self._find(run, turn)
                yield run
        finally:
            await self._leave(run)

    async def cancel(self, request_id: str) -> bool:
        """Cancels a generation of this or of another gateway; False where nobody knows it or it has ended."""
        whole = self._wholes.get(request_id)
        if whole is not None:
            whole()
            return True
        own = self._runs.get(request_id)
        if own is not None and own.is_finding:
            own.cancel_search()
            return True
        if own is not None and own.attempt is not None:
            await self._asking.cancel(own.runner_id, request_id)
            return True
        runners = [name for name, status in self._replica.view.runners.items() if status.phase in ("ready", "draining")]
        answers = await asyncio.gather(*(self._asking.cancel(runner, request_id) for runner in runners))
        return any(answers)

    @contextmanager
    def whole(self, request_id: str, cancel: Callable[[], None]) -> Generator[None]:
        """While the block lasts ``cancel`` ends a request whose prompts are runs of their own."""
        self._wholes[request_id] = cancel
        try:
            yield
        finally:
            del self._wholes[request_id]

    def slots_of(self, model_id: str) -> int:
        """Requests for a model that are computed side by side now."""
        return slots_of(ready_instances(self._replica.view, model_id))

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
            if run.attempt is not None:
                run.attempt.stop(error)

    async def close(self) -> None:
        """Ends what is open and waits until the runners were told."""
        self._stop_listening()
        self.drain()
        self.stop_all(_draining())
        await self._asking.close()
        await self._loads.close()

    async def _find(self, run: Run, turn: AsyncExitStack | None = None) -> None:
        """Finds a runner that accepts; ``turn`` holds the request's place among others, a resumed one keeps its own."""
        while True:
            run.raise_if_stopped()
            if self._is_draining and run.lost is None and not run.is_let_in:  # 1
                raise _draining()
            left_s = run.deadline - self._clock.now()
            if left_s <= 0:
                raise ServiceError("deadline_exceeded", "the request's time was up before a runner took it")
            view = self._replica.view
            ready = self._ready(view, run)
            fresh = [found for found in ready if run.may_try(runner_of(view, found))]
            if fresh and run.attempts < MAX_ATTEMPTS:  # 2
                if turn is not None and not run.has_turn:
                    wait_s = left_s if run.is_let_in else min(left_s, self._spec.load_wait_s)
                    waiting = self._queues.turn(run.generation, ready, wait_s, is_let_in=run.is_let_in)
                    await turn.enter_async_context(waiting)
                    run.has_turn = True
                elif await self._try(run, self._soonest(view, run, fresh), view):
                    return
            elif run.lost is not None and run.has_sent:  # 3
                raise run.lost
            elif run.refusal is not None and ready:  # 4
                raise run.refusal
            elif run.attempts >= MAX_ATTEMPTS:
                raise run.refusal or run.lost or why_not_ready(view, instances_of(view, run.model_id))
            elif not instances_of(view, run.model_id):  # 5
                await run.within(self._loads.place(run.model_id), left_s)
            else:  # 6, 7
                await self._wait_for_ready(run)

    def _ready(self, view: ClusterView, run: Run) -> tuple[Instance, ...]:
        """Where a run may go: ready, not lost to it, and with the weights that its tokens came from."""
        ready = ready_instances(view, run.model_id)
        return tuple(found for found in ready if _why_not(view, run, found) is None)

    def _soonest(self, view: ClusterView, run: Run, fresh: list[Instance]) -> Instance:
        """The one that should give the first token soonest."""
        if len(fresh) == 1:
            return fresh[0]
        attempts = (other.attempt for other in self._runs.values() if other.attempt is not None)
        sent = Counter(one.runner_id for one in attempts if not one.reader.is_closed)
        return self._router.ordered(view, tuple(fresh), run.prefix, run.request_id, sent)[0]

    async def _try(self, run: Run, instance: Instance, view: ClusterView) -> bool:
        """Asks one runner; False: it refused, but another one may not."""
        status = runner_of(view, instance)
        assert status is not None
        run.attempts += 1
        run.tried[status.runner_id] = life_of(status)
        reader = self._inbox.open(run.request_id, run.attempts, status.runner_id)
        run.attempt = attempt = Attempt(run.attempts, instance, status, reader)
        try:
            attempt.accepted = await self._asking.generate(run, attempt)
        except SkulkError as error:
            await self._release(run, attempt, may_run=error.retryable and error.code not in _REFUSALS)
            if not error.retryable:  # 2d
                raise
            log.info("runner %s refused %s: %s", attempt.runner_id, run.request_id, error)
            if error.code in _LEAVING:
                run.away.add((status.runner_id, life_of(status)))
            run.refusal = error
            if has_crashed(self._replica.view, status):
                self._count_crash(run, attempt)
            return False
        except BaseException:
            await self._release(run, attempt)
            raise
        if attempt.accepted.prompt_ids:
            run.prompt_ids = attempt.accepted.prompt_ids
        run.weights = weights_of(self._replica.view, instance)
        return True

    # A runner is lost

    async def _find_next(self, run: Run, error: SkulkError) -> None:
        """Finds who goes on with a run whose runner was lost; raises why nobody does."""
        attempt = run.current
        run.away.add((attempt.runner_id, life_of(attempt.status)))
        # a runner that ended the stream itself, or is dead by its supervisor's word, has nothing left to cancel
        is_over = attempt.reader.sequence.has_ended or death_of(self._replica.view, attempt.status) is not None
        is_crash = attempt.reader.sequence.has_ended and error.code == "runner_failed"
        await self._release(run, attempt, may_run=not is_over)
        if is_crash or has_crashed(self._replica.view, attempt.status):
            self._count_crash(run, attempt)
        is_known = run.progress.is_empty or bool(run.prompt_ids)
        if not self._spec.failover or run.resumptions >= MAX_RESUMPTIONS or not is_known:
            self.failovers["given_up"] += 1
            raise error
        run.lost, run.refusal, run.tried = error, None, {}
        try:
            await self._find(run)
        except SkulkError:
            self.failovers["no_replica"] += 1
            raise
        run.resumptions += 1
        self.failovers["resumed"] += 1
        log.warning("request %s goes on at runner %s: %s", run.request_id, run.runner_id, error)

    def _count_crash(self, run: Run, attempt: Attempt) -> None:
        if self._crashes.note(run.asked, (attempt.runner_id, attempt.status.restarts)):
            self.failovers["crashed_twice"] += 1
            raise crashed()

    # Waiting

    async def _wait_for_ready(self, run: Run) -> None:
        """Returns when an instance of the model is ready or none is left; see 6 and 7 of the module."""
        if self._waiting >= MAX_WAITING:
            raise UnavailableError(
                "overloaded", f"{MAX_WAITING} requests wait for models to load; ask again later", retry_after_s=5
            )
        model_id = run.model_id
        self._waiting += 1
        self._waited[model_id] += 1
        # headers that were sent can't become a 503: such a stream waits as long as it may
        patience_s = run.deadline if run.is_answered else self._clock.now() + self._spec.load_wait_s
        try:
            await run.within(self._wait(run, min(run.deadline, patience_s)), run.deadline - self._clock.now())
        except TimeoutError:
            raise ServiceError("deadline_exceeded", "the request's time was up before a runner took it") from None
        finally:
            self._waiting -= 1
            self._waited[model_id] -= 1
            if not self._waited[model_id]:
                del self._waited[model_id]

    async def _wait(self, run: Run, give_up_at: float) -> None:
        settled_at: float | None = None
        was_on_demand = False
        while not self._is_draining:
            view, now = self._replica.view, self._clock.now()
            phases = _phases(view, run)
            if "ready" in phases.values():
                return
            if not phases:
                if run.away or was_on_demand:
                    return  # it has left because it was idle; what is asked for now is placed anew
                raise not_placed(run.model_id)
            was_on_demand = all(found.on_demand for found in instances_of(view, run.model_id))
            if set(phases.values()) & {"placing", "loading"}:
                settled_at, limit = None, give_up_at
            else:
                settled_at = now if settled_at is None else settled_at
                limit = min(give_up_at, settled_at + SETTLE_S)
            if now >= limit:
                raise run.lost or why_not_ready(view, instances_of(view, run.model_id))
            await self._replica.wait_until(
                lambda view, seen=phases: self._is_draining or _phases(view, run) != seen, limit - now
            )

    # Ends

    async def _leave(self, run: Run) -> None:
        """Forgets a run; tells its runner where it may still be at work."""
        await run.close()
        self._runs.pop(run.request_id, None)
        if not self._runs:
            self._idle.set()
        if run.end is not None and run.end.error is None:
            self._crashes.forget(run.asked)
        if run.attempt is not None:
            await self._release(run, run.attempt, may_run=run.end is None)

    async def _release(self, run: Run, attempt: Attempt, *, may_run: bool = True) -> None:
        if may_run and not attempt.reader.is_closed:
            self._asking.cancel_soon(attempt.runner_id, run.request_id)
        await attempt.reader.close()

    def _view_changed(self, view: ClusterView) -> None:
        for run in tuple(self._runs.values()):
            attempt = run.attempt
            if attempt is None or attempt.reader.is_closed:
                continue
            error = death_of(view, attempt.status)
            if error is None:
                continue
            if attempt.accepted is None:
                attempt.stop(error)
            else:
                # the inbox first hands out what had arrived
                self._inbox.runner_died(attempt.runner_id, ErrorBody.of(error))
        for model_id in self._queues.models():
            self._queues.resize(model_id, ready_instances(view, model_id))


def _phases(view: ClusterView, run: Run) -> dict[str, str]:
    """Each instance's phase, as far as it matters to a run: one that is away for it is as good as being placed."""
    phases: dict[str, str] = {}
    for instance in instances_of(view, run.model_id):
        phase = phase_of(view, instance)
        phases[instance.instance_id] = phase if phase != "ready" else _why_not(view, run, instance) or phase
    return phases


def _why_not(view: ClusterView, run: Run, instance: Instance) -> str | None:
    """Why a ready instance is none for a run, as a phase: it was lost to it, or has other weights."""
    status = runner_of(view, instance)
    assert status is not None
    if (status.runner_id, life_of(status)) in run.away:
        return "placing"
    return None if run.progress.is_empty or weights_of(view, instance) == run.weights else "failed"


def _draining() -> UnavailableError:
    return UnavailableError("draining", "this gateway is stopping; ask another node", retry_after_s=5)
