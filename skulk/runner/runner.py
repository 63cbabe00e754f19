"""The runner: its endpoints on the bus, its requests, and the engine thread behind them.

    phase      generate is answered                 leaves when
    loading    instance_not_ready                   the weights are read -> warming
    warming    instance_not_ready                   a chunk and a step are computed -> ready
    ready      accepted, or a refusal by code       asked to stop -> draining; the engine fails -> failed
    draining   draining                             nothing is open, the drain's time is over, or asked again -> stopped
    failed     instance_not_ready                   never; the process ends
    stopped    nobody answers                       never; the process ends

Everything here runs on the event loop; only the engine thread touches the engine's slots.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Any, Final, assert_never

from skulk.batching.admission import BatchShape, check_fields, check_room, with_defaults
from skulk.batching.requests import BatchRequest, Emitted, Ended, Output, Progressed, RequestKey
from skulk.bus.port import Bus, Call
from skulk.bus.streams import Outbox
from skulk.bus.subjects import (
    GATEWAY_BEAT,
    NODE_BEAT,
    RUNNER_CANCEL,
    RUNNER_GENERATE,
    RUNNER_RESEND,
    RUNNER_RETIRE,
)
from skulk.clock import Clock
from skulk.engines.protocol import Engine, EngineInfo
from skulk.errors import ServiceError, SkulkError, UnavailableError
from skulk.placement.prefixes import filter_of
from skulk.runner.embedding import EmbedDesk
from skulk.runner.engine_thread import EngineThread, Load
from skulk.runner.hang import StepWatch
from skulk.runner.preparing import Preparer
from skulk.runner.reports import (
    Add,
    EndRequest,
    Failed,
    Loaded,
    Loading,
    Refused,
    Report,
    SetThreads,
    Stepped,
    Stopped,
    Vectors,
)
from skulk.runner.shape import shape_of
from skulk.runner.speeds import speeds_after
from skulk.runner.status import StatusBoard
from skulk.runner.table import OpenRequest, RequestTable
from skulk.runner.texts import check_generates
from skulk.runner.threads import thread_share
from skulk.wire.base import ErrorBody
from skulk.wire.beats import NodeBeat
from skulk.wire.generation import Accepted, Cancel, Cancelled, Generate, Resend, Resent, Retire, Retired, StreamEnd
from skulk.wire.runner import EXIT_FAILED, EXIT_REFUSED, EXIT_STOPPED, RunnerSpec

UPKEEP_S: Final = 0.5
ENDING_S: Final = 2.0
SETTLE_S: Final = 1.0
FLUSH_S: Final = 0.5

log = logging.getLogger(__name__)


class Runner:
    """One runner, from its start to its exit status.

    Args:
        load: makes the engine, on the engine thread.
        on_ready: called once, when requests are taken.
        on_refused: called once instead, at the end, where the model can't be loaded.
    """

    def __init__(
        self,
        spec: RunnerSpec,
        bus: Bus,
        clock: Clock,
        load: Load,
        *,
        on_ready: Callable[[EngineInfo], None] = lambda _: None,
        on_refused: Callable[[SkulkError], None] = lambda _: None,
    ) -> None:
        self._spec = spec
        self._bus = bus
        self._clock = clock
        self._on_ready = on_ready
        self._on_refused = on_refused
        self.status = StatusBoard(bus, spec, clock)
        self._outbox = Outbox(bus, spec.runner_id, clock)
        self._watch = StepWatch(spec.step_timeout_s)
        self._table = RequestTable()
        self._preparer = Preparer(clock, spec.request_timeout_s)
        self._loop = asyncio.get_running_loop()
        self._thread = EngineThread(load, lambda info: shape_of(info, spec), self._post, clock)
        self._engine: Engine | None = None
        self._shape: BatchShape | None = None
        self._threads = 0
        self._over: asyncio.Future[int] = self._loop.create_future()
        self._stop_asked = asyncio.Event()
        self._is_hurried = False
        self._held_until = 0.0
        self._is_stuck = False
        self._refusal: SkulkError | None = None
        self._thread_ended = asyncio.Event()
        self._preparations: set[asyncio.Task[None]] = set()
        self._desk = EmbedDesk(
            self._ready, self._thread.submit, self._embeds_changed, default_timeout_s=spec.request_timeout_s
        )

    async def run(self) -> int:
        """Serves until it is asked to stop or can't go on.

        Returns:
            The exit status, one of `skulk.wire.runner`.
        """
        service = await self._bus.serve(
            "runner",
            {
                RUNNER_GENERATE: self._generate,
                RUNNER_CANCEL: self._cancel,
                RUNNER_RESEND: self._resend,
                RUNNER_RETIRE: self._retire,
                **self._desk.handlers,
            },
            metadata={"model": self._spec.model_id, "instance": self._spec.instance_id, "node": self._spec.node_id},
            runner=self._spec.runner_id,
        )
        beats = await self._bus.subscribe(GATEWAY_BEAT, lambda beat: self._outbox.gateway_heard(beat.message))
        own_node = await self._bus.subscribe(
            NODE_BEAT, lambda beat: self._share_threads(beat.message), node=self._spec.node_id
        )
        tasks = [
            asyncio.create_task(self._outbox.run(), name="outbox"),
            asyncio.create_task(self.status.run(), name="status"),
            asyncio.create_task(self._keep_up(), name="upkeep"),
        ]
        self.status.enter("loading")
        self._thread.start()
        life = asyncio.create_task(self._life(), name="life")
        try:
            # A background task never returns: one that is done has failed.
            await asyncio.wait([*tasks, life], return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task.done():
                    task.result()
            return await life
        finally:
            await _cancelled(*tasks, life, *self._preparations)
            self._thread.stop()
            await beats.close()
            await own_node.close()
            await service.close(drain_s=0.5)
            await self._preparer.close(0.0)

    def stop(self) -> None:
        """Asks to stop: first politely (running streams may finish), the second time at once."""
        self._is_hurried = self._stop_asked.is_set()
        self._stop_asked.set()
        self._table.changed.set()

    # Endpoints

    async def _generate(self, call: Call[Generate]) -> Accepted:
        """Up to the first ``await`` calls are handled in the order they came: a cancel finds its request here."""
        generate = with_defaults(call.message, self._spec.sampling)
        request = self._table.get(RequestKey(generate.request_id, generate.attempt))
        if request is None:
            request = self._enter(generate)
        request.wait_until(call.deadline)
        return await asyncio.shield(request.accepted)

    async def _cancel(self, call: Call[Cancel]) -> Cancelled:
        found = tuple(self._table.known_as(call.message.request_id))
        for request in found:
            self._end(request, StreamEnd(reason="cancelled"))
        was_running = bool(found) or self._desk.cancel(call.message.request_id)
        return Cancelled(request_id=call.message.request_id, was_running=was_running)

    async def _resend(self, call: Call[Resend]) -> Resent:
        resent = self._outbox.resend(call.message)
        self._table.changed.set()
        return resent

    async def _retire(self, call: Call[Retire]) -> Retired:
        """What is open stays. After the answer that it is idle nothing comes in: nothing is in flight at the stop."""
        is_idle = self.status.phase == "ready" and not (self._table.open_requests() or self._desk.open_calls)
        if is_idle:
            self._held_until = self._clock.now() + call.message.hold_s
        return Retired(runner_id=self._spec.runner_id, is_idle=is_idle)

    def _embeds_changed(self) -> None:
        self._note_load()
        self._table.changed.set()

    def _enter(self, generate: Generate) -> OpenRequest:
        """Takes a new request in and starts to prepare it; refuses what can be refused without its tokens."""
        engine, shape = self._ready()
        check_generates(engine.info, generate.model_id)
        check_fields(generate, shape)
        for older in self._table.attempts(generate.request_id):
            # Its gateway has given that attempt up: nobody reads its stream.
            self._end(older, StreamEnd(reason="cancelled"))
        check_room(
            shape,
            open_sequences=self._table.open_sequences,
            n=generate.n,
            request_s=self._table.request_s,
            is_resumed=generate.resume is not None,
        )
        request = self._table.open(generate, self._clock.now())
        task = asyncio.create_task(self._prepare(request, engine, shape), name=f"prepare {generate.request_id}")
        self._preparations.add(task)
        task.add_done_callback(self._preparations.discard)
        self._note_load()
        return request

    def _ready(self) -> tuple[Engine, BatchShape]:
        phase = self.status.phase
        if phase == "draining" or self._clock.now() < self._held_until:
            raise UnavailableError("draining", "this runner is about to stop and takes no new requests; ask another")
        if phase != "ready" or self._engine is None or self._shape is None:
            raise UnavailableError(
                "instance_not_ready",
                f"this runner is {phase} ({self.status.now.progress:.0%} loaded); try again in a moment",
                retry_after_s=1.0,
            )
        return self._engine, self._shape

    async def _prepare(self, request: OpenRequest, engine: Engine, shape: BatchShape) -> None:
        try:
            admitted = await self._preparer.admitted(request, engine, shape)
            if self._over.done():
                self._ready()
            request.accepted.set_result(self._take(request, admitted))
        except SkulkError as error:
            self._table.remove(request)
            self._note_load()
            request.accepted.set_exception(error)
        except (
            Exception
        ) as error:  # a named border: a defect ends this request, and nobody waits for its answer for ever
            log.exception("the request %s could not be taken", request.key.request_id)
            failure = ServiceError("internal", f"the runner failed ({type(error).__name__}); its log has the traceback")
            request.accepted.set_exception(failure)
            if request.writer is None:
                self._table.remove(request)
            else:
                self._finish(request, StreamEnd(reason="error", error=ErrorBody.of(failure)))

    def _take(self, request: OpenRequest, admitted: BatchRequest) -> Accepted:
        """Opens an admitted request's stream and hands it to the engine thread."""
        generate = request.generate
        ahead = self._table.waiting - self._table.preparing
        in_flight = sum(other.state == "computing" for other in self._table.open_requests())
        request.writer = self._outbox.open(generate)
        if request.wanted_end is None:
            if self._is_idle:
                # Before there was nothing to compute.
                self._age_begins()
            request.state = "computing"
            self._thread.submit(Add(admitted))
        else:
            self._finish(request, request.wanted_end)
        return Accepted(
            request_id=generate.request_id,
            runner_id=self._spec.runner_id,
            prompt_tokens=len(admitted.prompt),
            queued=ahead,
            in_flight=in_flight,
            # whoever brought them has them
            prompt_ids=admitted.prompt if generate.resume is None else (),
        )

    @property
    def _is_idle(self) -> bool:
        return all(request.state != "computing" for request in self._table.open_requests())

    # Ends

    def _end(self, request: OpenRequest, end: StreamEnd) -> None:
        """Ends a request from outside: through the engine thread where it is there, else as soon as it is admitted."""
        if request.state == "computing":
            if not request.end_asked:
                request.end_asked = True
                self._thread.submit(EndRequest(request.key, end.reason, end.error))
        elif request.wanted_end is None:
            request.wanted_end = end

    def _finish(self, request: OpenRequest, end: StreamEnd) -> None:
        """The one place where a request's stream ends."""
        assert request.writer is not None, f"{request.key} has no stream"
        request.writer.end(end)
        took_s = (
            end.timings.prefill_s + end.timings.decode_s if end.timings and end.reason in ("stop", "length") else None
        )
        self._table.ended(request, self._clock.now(), took_s)
        self.status.note(**speeds_after(self.status.now, end, request.generate.n))

    def _finish_all(self, error: SkulkError) -> None:
        """Ends what is open without the engine thread, which is gone or doesn't answer."""
        self._desk.fail_all(error)
        for request in self._table.open_requests():
            if request.state == "computing":
                self._finish(request, StreamEnd(reason="error", error=ErrorBody.of(error)))
            else:
                request.wanted_end = StreamEnd(reason="error", error=ErrorBody.of(error))

    # What the engine thread tells

    def _post(self, report: Report) -> None:
        """Called by the engine thread."""
        self._loop.call_soon_threadsafe(self._on_report, report)

    def _on_report(self, report: Report) -> None:
        self._thread.taken()
        match report:
            case Loading(progress):
                if not self._stop_asked.is_set():
                    self.status.enter("warming" if progress >= 1.0 else "loading", progress=progress)
            case Loaded(engine, shape):
                self._loaded(engine, shape)
            case Refused(error):
                self._refused(error)
            case Stepped(outputs, held):
                self._age_begins()
                for output in outputs:
                    self._tell(output)
                if held is not None:
                    self.status.note(prefixes=filter_of(held))
                self._note_load()
            case Vectors():
                self._age_begins()
                self._desk.took(report)
            case Failed(error, outputs):
                for output in outputs:
                    self._tell(output)
                self._failed(error, EXIT_FAILED)
            case Stopped():
                self._thread_ended.set()
            case _:
                assert_never(report)

    def _age_begins(self) -> None:
        """The age of the engine's step counts from now: for the gateways, and for telling a hang."""
        now = self._clock.now()
        self._outbox.step_finished(now)
        self._watch.finished(now)

    def _tell(self, output: Output) -> None:
        request = self._table.get(output.key)
        if request is None or request.writer is None or request.state != "computing":
            return  # ended without the engine thread
        match output:
            case Emitted():
                request.writer.send(output.choice, output.text, output.tokens, output.finish_reason)
            case Progressed():
                request.has_started = True
                request.writer.set_phase(output.phase, output.processed, output.total)
            case Ended():
                self._finish(request, output.end)
            case _:
                assert_never(output)

    def _note_load(self) -> None:
        self.status.note(active=self._table.active + self._desk.open_calls, waiting=self._table.waiting)

    def _loaded(self, engine: Engine, shape: BatchShape) -> None:
        self._engine, self._shape = engine, shape
        info = engine.info
        log.info(
            "%s %s on %s: %d sequences of %d tokens",
            info.engine,
            info.version,
            info.backend,
            info.n_parallel,
            info.n_ctx,
        )
        if not info.has_template:
            log.warning("the model brings no chat template: a plain one is used")
        if self._stop_asked.is_set():
            return
        self.status.device_bytes = info.device_bytes
        self.status.enter("ready", progress=1.0, n_ctx=info.n_ctx)
        self._on_ready(info)

    def _share_threads(self, beat: NodeBeat) -> None:
        """Follows the number of runners that share the node's cores, unless a person has set the threads."""
        if self._engine is None or self._spec.load.n_threads or not self._engine.info.n_threads:
            return
        threads = thread_share(self._engine.info.n_threads, self._spec.runner_id, beat)
        if threads != (self._threads or self._engine.info.n_threads):
            log.info("computing with %d of %d threads", threads, self._engine.info.n_threads)
            self._threads = threads
            self._thread.submit(SetThreads(threads))

    def _refused(self, error: SkulkError) -> None:
        self._refusal = error
        self._failed(error, EXIT_FAILED if error.retryable else EXIT_REFUSED)

    def _failed(self, error: SkulkError, exit_status: int) -> None:
        self._thread_ended.set()
        self.status.enter("failed", error=ErrorBody.of(error), active=0, waiting=0)
        self._finish_all(error if error.code == "runner_failed" else ServiceError("runner_failed", error.detail))
        if not self._over.done():
            self._over.set_result(exit_status)

    # Life

    async def _life(self) -> int:
        """Until the end, and the tidy part of the end itself."""
        stop = asyncio.create_task(self._stop_asked.wait(), name="stop asked")
        try:
            await asyncio.wait((self._over, stop), return_when=asyncio.FIRST_COMPLETED)
        finally:
            stop.cancel()
        if not self._over.done():
            await self._drain()
        exit_status = self._over.result() if self._over.done() else EXIT_STOPPED
        if not self._over.done():
            self._over.set_result(exit_status)
        await self._until(lambda: not self._table.preparing, ENDING_S)
        # The last chunks are resent to whoever missed them.
        await self._until(lambda: self._is_hurried or not self._table.unconfirmed(), SETTLE_S)
        await self._end_thread()
        if exit_status == EXIT_STOPPED:
            self.status.enter("stopped", active=0, waiting=0)
        await self.status.publish()
        if self._refusal is not None:
            # Last, for whoever hears it ends this process.
            with contextlib.suppress(SkulkError):
                await self._bus.flush(FLUSH_S)
            self._on_refused(self._refusal)
        return exit_status

    async def _drain(self) -> None:
        """Lets running streams finish; what is open after that, or when asked again, ends with ``draining``."""
        self.status.enter("draining")
        await self._until(
            lambda: self._is_hurried or self._over.done() or not self._has_work, self._spec.drain_timeout_s
        )
        if self._over.done() or not self._has_work:
            return
        error = UnavailableError("draining", "the runner was stopped before the answer was complete; ask again")
        for request in self._table.open_requests():
            self._end(request, StreamEnd(reason="error", error=ErrorBody.of(error)))
        await self._until(lambda: not self._table.open_requests(), ENDING_S)
        self._is_stuck = any(request.state == "computing" for request in self._table.open_requests())
        self._finish_all(error)

    @property
    def _has_work(self) -> bool:
        return bool(self._table.open_requests() or self._desk.open_calls)

    async def _end_thread(self) -> None:
        """Ends the engine thread, unless a native call keeps it; the process then ends with it inside."""
        if not await self._preparer.close(ENDING_S):
            log.warning("a prompt is still being rendered; the engine is left to the end of the process")
            return
        self._thread.stop()
        if self._is_stuck:
            log.warning("the engine is in a step that doesn't end; it is left to the end of the process")
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ENDING_S):
                await self._thread_ended.wait()

    async def _until(self, is_so: Callable[[], bool], timeout_s: float) -> None:
        """Waits for something about the requests, or for being asked to stop at once; for so long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not is_so():
                    self._table.changed.clear()
                    await self._table.changed.wait()

    async def _keep_up(self) -> None:
        """What only time can tell: gateways that are gone, answers that nobody asks for any more."""
        while True:
            await asyncio.sleep(UPKEEP_S)
            now = self._clock.now()
            for request_id in self._outbox.orphans(now):
                log.info("the gateway of %s is gone: cancelled", request_id)
                for request in self._table.attempts(request_id):
                    self._end(request, StreamEnd(reason="cancelled"))
            self._table.forget_old(now)
            age_s = self._watch.look(now, has_work=self._has_engine_work)
            if age_s is not None:
                self._hangs(age_s)

    @property
    def _has_engine_work(self) -> bool:
        return bool(self._desk.open_calls) or any(
            request.state == "computing" for request in self._table.open_requests()
        )

    def _hangs(self, age_s: float) -> None:
        """The engine won't come back: this process ends with it inside, and its supervisor starts another."""
        self._is_stuck = True
        detail = (
            f"a step of the engine has taken {age_s:.0f} s, more than {self._watch.limit_s:.0f} s: it hangs and the "
            "runner is started anew; where steps really take so long, raise SKULK_STEP_TIMEOUT_S"
        )
        self._failed(ServiceError("runner_failed", detail), EXIT_FAILED)


async def _cancelled(*tasks: asyncio.Task[Any]) -> None:
    """Cancels tasks and waits for their end."""
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
