"""The thread that owns the engine: load, then step after step until it is told to stop.

    commands ──deque, condition──> [ take | expire | start waiting | plan | run | apply ] ──call_soon──> reports

    1. no engine yet                    load; a stop meanwhile cancels it
    2. commands                         fold them into the batch
    3. deadlines that have passed       end those requests
    4. slots, cells, parked states      schedule, and have the engine do what that takes
    5. nothing runs                     wait for a command
    6. else                             plan a step, run it, fold its result, report; where all decode, several steps

Batch state and engine belong to this thread alone. Both ways between the threads are bounded: the event loop adds only
what `check_room` allowed and ends each request at most once; the thread is at most `REPORTS_AHEAD` reports ahead.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Final, assert_never

from skulk.batching.admission import BatchShape
from skulk.batching.apply import apply
from skulk.batching.operations import Begin, End, Forget, Keep, Move, Park, Restore, Share
from skulk.batching.plan import budget_for, plan_step
from skulk.batching.rate import RUN_S, Rate, idle_limit, measured
from skulk.batching.requests import Output, RequestKey
from skulk.batching.schedule import schedule
from skulk.batching.slots import add, end_all, end_request, expire
from skulk.batching.state import BatchState, Changed, held_digests
from skulk.clock import Clock
from skulk.engines.protocol import Engine, EngineInfo, LoadCancelled, Progress
from skulk.errors import RequestError, ServiceError, SkulkError
from skulk.runner.reports import (
    Add,
    Command,
    EmbedBatch,
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
from skulk.wire.base import ErrorBody
from skulk.wire.generation import Sampling

REPORTS_AHEAD: Final = 64
REPORT_TIMEOUT_S: Final = 600.0
PROGRESS_STEP: Final = 0.01

GREEDY: Final = Sampling(temperature=0.0)

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
        # Each is counted by one thread alone, so that a report costs no lock but where the loop is far behind.
        self._posted = 0
        self._handled = 0
        self._waits_for_room = False
        self._has_room = threading.Event()
        self._told_progress = -1.0
        self._told_held: tuple[int, ...] = ()
        self._is_held_old = False
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
        self._handled += 1
        if self._waits_for_room:
            self._has_room.set()

    # The thread

    def _main(self) -> None:
        try:
            engine = self._loaded()
            if engine is not None:
                self._serve(engine)
        except LoopGone:
            log.debug("the event loop is gone; the engine thread ends")

    def _report(self, report: Report) -> None:
        if self._posted - self._handled >= REPORTS_AHEAD:
            self._wait_for_room()
        self._posted += 1
        try:
            self._post(report)
        except RuntimeError as error:
            raise LoopGone from error

    def _wait_for_room(self) -> None:
        self._waits_for_room = True
        while self._posted - self._handled >= REPORTS_AHEAD:
            self._has_room.clear()
            if self._posted - self._handled >= REPORTS_AHEAD and not self._has_room.wait(REPORT_TIMEOUT_S):
                raise LoopGone
        self._waits_for_room = False

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
            # Not closed: freeing what is in an unknown state may crash before the reason is told.
            self._report(Failed(failure, ended.outputs))
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
            self._schedule(engine, rate, outputs)
            plan = plan_step(self._state, budget_for(self._state, rate))
            if plan is not None:
                if outputs:
                    # A long step must not hold back what is known before it.
                    self._report(Stepped(tuple(outputs), self._held_news()))
                    outputs = []
                result = engine.run(plan, partial(self._may_go_on, self._clock.now() + RUN_S))
                rate = measured(rate, plan, result.step_s)
                self._fold(engine, apply(self._state, plan, result, engine, self._clock.now()), outputs)
            self._report(Stepped(tuple(outputs), self._held_news()))

    def _may_go_on(self, until: float) -> bool:
        """Whether another step of a run may follow: nobody waits for this thread, and the drawn tokens aren't old."""
        return not (self._commands or self._stopping) and self._clock.now() < until

    def _held_news(self) -> tuple[int, ...] | None:
        """The digests of what can be taken over, where they aren't those that were told last."""
        if not self._is_held_old:
            return None
        self._is_held_old = False
        before, self._told_held = self._told_held, held_digests(self._state)
        return None if self._told_held == before else self._told_held

    def _schedule(self, engine: Engine, rate: Rate, outputs: list[Output]) -> None:
        decoding = sum(sequence.is_decoding for sequence in self._state.running)
        limit = idle_limit(rate, cell_s=engine.info.cell_s, rows=decoding)
        self._fold(engine, schedule(self._state, self._clock.now(), idle_limit=limit), outputs)

    def _take_commands(self) -> list[Command] | None:
        """All commands so far, after waiting for one where nothing is open; None: stop."""
        if not (self._commands or self._stopping or self._state.is_idle):
            # Between most steps; what comes in this moment is taken before the next one.
            return []
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
            case EndRequest(key, reason, error):
                return end_request(self._state, key, now, reason=reason, error=error)
            case SetThreads(count):
                engine.set_threads(count)
                return Changed(self._state)
            case EmbedBatch(id=number, inputs=inputs):
                self._report(Vectors(number, tuple(map(tuple, engine.embed(inputs)))))
                return Changed(self._state)
            case _:
                assert_never(command)

    def _fold(self, engine: Engine, changed: Changed, outputs: list[Output]) -> None:
        """Takes a change over and has the engine follow it; a sequence that can't begin ends its request."""
        self._state = changed.state
        self._is_held_old = self._is_held_old or bool(changed.operations)
        outputs.extend(changed.outputs)
        refused: dict[RequestKey, RequestError] = {}
        for operation in changed.operations:
            if isinstance(operation, Begin):
                self._begin(engine, operation, refused)
            else:
                perform(engine, operation)
        for key, error in refused.items():
            ended = end_request(self._state, key, self._clock.now(), reason="error", error=ErrorBody.of(error))
            self._fold(engine, ended, outputs)

    def _begin(self, engine: Engine, operation: Begin, refused: dict[RequestKey, RequestError]) -> None:
        sequence = operation.sequence
        request = sequence.request
        history = sequence.known_tokens(0, sequence.known)
        try:
            engine.begin(
                sequence.slot,
                request.sampling,
                history,
                drawn=sequence.drawn.count,
                choice=sequence.choice,
                parked=operation.parked,
            )
        except RequestError as error:
            refused[request.key] = error
            # A sampler that draws nothing: the slot is left like any other.
            engine.begin(sequence.slot, GREEDY, ())


def perform(engine: Engine, operation: End | Keep | Share | Move | Park | Restore | Forget) -> None:
    """Has the engine do what a batch asks for between two steps."""
    match operation:
        case End(slot=slot, parked=parked):
            engine.end(slot, parked=parked)
        case Keep(slot=slot, count=count):
            engine.keep(slot, count)
        case Share(source=source, slot=slot, count=count):
            engine.share(source, slot, count)
        case Move(source=source, slot=slot):
            engine.move(source, slot)
        case Park(slot=slot, parked=parked):
            engine.park(slot, parked)
        case Restore(parked=parked, slot=slot, count=count):
            engine.restore(parked, slot, count)
        case Forget(parked=parked):
            engine.forget(parked)
        case _:
            assert_never(operation)


def _failure(error: Exception, what: str) -> ServiceError:
    return ServiceError(
        "runner_failed", f"{what} ({type(error).__name__}: {error}); the runner's log has the traceback, try again"
    )
