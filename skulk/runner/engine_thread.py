"""The thread that owns the engine: load, then step after step until it is told to stop.

    commands ──deque, condition──> [ take | expire | start waiting | plan | run | apply ] ──call_soon──> reports

    1. no engine yet                    load; a stop meanwhile cancels it
    2. commands                         fold them into the batch
    3. deadlines that have passed       end those requests
    4. free slots                       give them to waiting sequences
    5. nothing runs                     wait for a command
    6. else                             plan a step, run it, fold its result, report

Batch state and engine belong to this thread alone. Both ways between the threads are bounded: the event loop adds only
what `check_room` allowed and ends each request at most once; the thread is at most `REPORTS_AHEAD` reports ahead.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Final, assert_never

from skulk.batching.admission import BatchShape
from skulk.batching.apply import apply
from skulk.batching.plan import budget_for, plan_step
from skulk.batching.rate import Rate, measured
from skulk.batching.requests import Output
from skulk.batching.slots import BatchState, Changed, add, end_all, end_request, expire, start_waiting
from skulk.clock import Clock
from skulk.engines.protocol import Engine, EngineInfo, LoadCancelled, Progress
from skulk.errors import RequestError, ServiceError, SkulkError
from skulk.runner.reports import Add, Command, End, Failed, Loaded, Loading, Refused, Report, Stepped, Stopped
from skulk.wire.base import ErrorBody

REPORTS_AHEAD: Final = 64
REPORT_TIMEOUT_S: Final = 600.0
PROGRESS_STEP: Final = 0.01

log = logging.getLogger(__name__)

Load = Callable[[Progress], Engine]


class LoopGone(Exception):
    """The event loop takes no more reports: nobody is left to serve."""


class EngineThread:
    """See the module. Every method but the thread's own is called by the event loop's thread.

    Args:
        load: makes the engine; blocks.
        shape_of: what the loaded engine can hold.
        post: hands a report to the event loop, from this thread; raises RuntimeError once the loop is closed.
    """

    def __init__(
        self,
        load: Load,
        shape_of: Callable[[EngineInfo], BatchShape],
        post: Callable[[Report], None],
        clock: Clock,
    ) -> None:
        self._load = load
        self._shape_of = shape_of
        self._post = post
        self._clock = clock
        self._wake = threading.Condition()
        self._commands: deque[Command] = deque()
        self._stopping = False
        self._ahead = threading.Semaphore(REPORTS_AHEAD)
        self._told_progress = -1.0
        self._begun: set[int] = set()
        # A daemon: a native call that never returns must not keep the process.
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, command: Command) -> None:
        """Hands over a command; it takes effect before the next step."""
        with self._wake:
            self._commands.append(command)
            self._wake.notify()

    def stop(self) -> None:
        """Ends the thread after the step it is in; what is open ends without a word (the loop has spoken it)."""
        with self._wake:
            self._stopping = True
            self._wake.notify()

    def taken(self) -> None:
        """The event loop has handled one report."""
        self._ahead.release()

    # The thread

    def _main(self) -> None:
        try:
            engine = self._loaded()
            if engine is not None:
                self._serve(engine)
        except LoopGone:
            log.debug("the event loop is gone; the engine thread ends")

    def _report(self, report: Report) -> None:
        if not self._ahead.acquire(timeout=REPORT_TIMEOUT_S):
            raise LoopGone
        try:
            self._post(report)
        except RuntimeError as error:
            raise LoopGone from error

    def _progress(self, done: float) -> bool:
        if done - self._told_progress >= PROGRESS_STEP or (done >= 1.0 > self._told_progress):
            self._told_progress = done
            self._report(Loading(done))
        return not self._stopping

    def _loaded(self) -> Engine | None:
        """The engine, or None after a report of why there is none."""
        engine: Engine | None = None
        try:
            engine = self._load(self._progress)
            shape = self._shape_of(engine.info)
        except LoadCancelled:
            self._report(Stopped())
            return None
        except SkulkError as error:
            self._report(Refused(error))
            return None
        except LoopGone:
            raise
        except Exception as error:  # a named border: an engine's defect ends its runner with a reason
            log.exception("the model could not be loaded")
            self._report(Refused(_failure(error, "loading the model failed")))
            return None
        self._state = BatchState(shape=shape)
        self._report(Loaded(engine, shape))
        return engine

    def _serve(self, engine: Engine) -> None:
        try:
            self._turns(engine)
        except LoopGone:
            raise
        except Exception as error:  # a named border: whatever an engine raises, its streams end and the process too
            log.exception("the engine failed")
            failure = error if isinstance(error, ServiceError) else _failure(error, "the engine failed")
            ended = end_all(self._state, self._clock.now(), ErrorBody.of(failure))
            self._report(Stepped(ended.outputs))
            # Not closed: freeing what is in an unknown state may crash before the reason is told.
            self._report(Failed(failure))
            return
        engine.close()
        self._report(Stopped())

    def _turns(self, engine: Engine) -> None:
        rate = Rate()
        while True:
            commands = self._take_commands()
            if commands is None:
                return
            outputs: list[Output] = []
            for command in commands:
                self._fold(engine, self._commanded(engine, command), outputs)
            self._fold(engine, expire(self._state, self._clock.now()), outputs)
            self._begin_waiting(engine, outputs)
            plan = plan_step(self._state, budget_for(self._state, rate))
            if plan is not None:
                if outputs:
                    # A long step must not hold back what is known before it.
                    self._report(Stepped(tuple(outputs)))
                    outputs = []
                result = engine.run(plan)
                rate = measured(rate, plan, result.elapsed_s)
                self._fold(engine, apply(self._state, plan, result, engine, self._clock.now()), outputs)
            self._report(Stepped(tuple(outputs)))

    def _take_commands(self) -> list[Command] | None:
        """All commands so far, after waiting for one where nothing is open; None: stop."""
        with self._wake:
            while self._state.is_idle and not self._commands and not self._stopping:
                self._wake.wait()
            if self._stopping:
                return None
            commands = list(self._commands)
            self._commands.clear()
            return commands

    def _commanded(self, engine: Engine, command: Command) -> Changed:
        now = self._clock.now()
        match command:
            case Add(request):
                return add(self._state, request, engine, now)
            case End(key, reason, error):
                return end_request(self._state, key, now, reason=reason, error=error)
            case _:
                assert_never(command)

    def _fold(self, engine: Engine, changed: Changed, outputs: list[Output]) -> None:
        self._state = changed.state
        outputs.extend(changed.outputs)
        for slot in changed.freed:
            if slot in self._begun:
                self._begun.discard(slot)
                engine.end(slot)

    def _begin_waiting(self, engine: Engine, outputs: list[Output]) -> None:
        started = start_waiting(self._state, self._clock.now())
        self._state = started.state
        outputs.extend(started.outputs)
        for sequence in started.sequences:
            request = sequence.request
            if all(other.request.key != request.key for other in self._state.running):
                continue  # its first choice was refused
            try:
                engine.begin(
                    sequence.slot, request.sampling, sequence.known_tokens(0, sequence.known), choice=sequence.choice
                )
            except RequestError as error:
                now = self._clock.now()
                refusal = end_request(self._state, request.key, now, reason="error", error=ErrorBody.of(error))
                self._fold(engine, refusal, outputs)
            else:
                self._begun.add(sequence.slot)


def _failure(error: Exception, what: str) -> ServiceError:
    return ServiceError(
        "runner_failed", f"{what} ({type(error).__name__}: {error}); the runner's log has the traceback, try again"
    )
