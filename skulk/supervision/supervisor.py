"""Keep one named child running, by the policy of `skulk.supervision.restarts`.

    run():  start ──ready──> on_ready ──its end──> on_exit ──RestartAfter──> wait ──> start …
              │                                        └───GiveUp──────────────────> returns it
              └──refused: any code but child_failed, and not retryable ───────────────> returns it

A start that fails with ``child_failed``, or with a retryable code, counts as a crash. Any other refusal (the model file
is invalid, the port is taken) would be the same next time, so it isn't tried again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final, assert_never

import msgspec

from skulk.clock import Clock, SystemClock
from skulk.errors import SkulkError, StartError, error_of
from skulk.supervision.child import Child, ChildSpec, ExitReport, Ledger, Ready
from skulk.supervision.restarts import (
    Decision,
    GiveUp,
    RestartAfter,
    RestartPolicy,
    RestartState,
    on_crash,
    on_ready,
)

_LOG: Final = logging.getLogger(__name__)


class Crash(msgspec.Struct, frozen=True, kw_only=True):
    """A life that ended unasked.

    Attributes:
        code: ``child_failed`` for a crash, else the child's own refusal.
        detail: what happened, for people.
        report: how the process ended; None when there was none.
        was_ready: it had served.
        decision: what follows.
    """

    code: str
    detail: str
    report: ExitReport | None
    was_ready: bool
    decision: Decision


def _nothing(*_: object) -> None:
    """The default of the callbacks."""


def _as_it_is(error: SkulkError, _: ExitReport | None) -> SkulkError:
    return error


class Supervised:
    """One child that is to be running.

    Whoever makes it awaits `run` in a task of its own; the callbacks run in that task and only note and enqueue.

    Args:
        name: for people.
        spec_factory: what to run; asked anew before each start. May raise a `SkulkError`: the child is given up.
        policy: when it starts again after a crash.
        on_ready: a life began to serve.
        on_exit: a life ended unasked, before or after it was ready, with what follows.
        explain: turns the error of a failed start into a more telling one (the report: how that process ended).
        on_line: gets each line of output.
        ledger: where running children are written down.
        clock: for the policy.
    """

    def __init__(
        self,
        name: str,
        spec_factory: Callable[[], ChildSpec],
        *,
        policy: RestartPolicy | None = None,
        on_ready: Callable[[Child, Ready], None] = _nothing,
        on_exit: Callable[[Crash], None] = _nothing,
        explain: Callable[[SkulkError, ExitReport | None], SkulkError] = _as_it_is,
        on_line: Callable[[str], None] | None = None,
        ledger: Ledger | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.name: Final = name
        self.restarts = 0
        self._spec_factory = spec_factory
        self._policy = policy or RestartPolicy()
        self._on_ready = on_ready
        self._on_exit = on_exit
        self._explain = explain
        self._on_line = on_line
        self._ledger = ledger
        self._clock: Clock = clock or SystemClock()
        self._state = RestartState()
        self._child: Child | None = None
        self._serving: asyncio.Event = asyncio.Event()
        self._ended: asyncio.Event = asyncio.Event()
        self._stop_asked: asyncio.Event = asyncio.Event()
        self._give_up: GiveUp | None = None

    @property
    def child(self) -> Child | None:
        """The life that serves; None between lives and before readiness."""
        return self._child if self._serving.is_set() else None

    @property
    def pid(self) -> int | None:
        """The process that serves; None where `child` is."""
        child = self.child
        return None if child is None else child.pid

    async def run(self) -> GiveUp | None:
        """Start the child, start it again when it crashes; call once.

        Returns:
            None after `stop`; else why the child isn't started any more. When cancelled the child is killed.
        """
        assert not self._ended.is_set() and self._child is None, "run() is called once"
        try:
            while not self._stop_asked.is_set():
                decision = await self._one_life()
                match decision:
                    case None:
                        break
                    case GiveUp():
                        _LOG.error("%s: %s", self.name, decision.detail)
                        self._give_up = decision
                        break
                    case RestartAfter():
                        self.restarts += 1
                        await self._pause(decision.delay_s)
                    case _:
                        assert_never(decision)
            return self._give_up
        finally:
            self._serving.clear()
            self._ended.set()

    async def wait_ready(self) -> Child:
        """Wait for a life that serves. Bounded by the policy and the spec's times, as `run` gives up after them.

        Raises:
            SkulkError: the child is given up; the code is the child's own or ``child_failed``.
            StartError: ``child_failed`` when it was stopped.
        """
        serving = asyncio.ensure_future(self._serving.wait())
        ended = asyncio.ensure_future(self._ended.wait())
        try:
            await asyncio.wait((serving, ended), return_when=asyncio.FIRST_COMPLETED)
        finally:
            serving.cancel()
            ended.cancel()
        if self._give_up is not None:
            raise error_of(self._give_up.code, self._give_up.detail)
        child = self.child
        if child is None:
            raise StartError("child_failed", f"{self.name} was stopped before it was ready.")
        return child

    async def stop(self, drain: Callable[[], Awaitable[object]] | None = None) -> None:
        """End the child by its ladder (`Child.stop`) and have `run` return. May come at any time and twice."""
        self._stop_asked.set()
        child = self._child
        if child is not None and child.pid is not None:
            await child.stop(drain if self._serving.is_set() else None)

    async def _one_life(self) -> Decision | None:
        """One child from its start to its end; None when it was to end."""
        try:
            spec = self._spec_factory()
        except SkulkError as error:
            return self._refused(error)
        child = self._child = Child(spec, ledger=self._ledger, on_line=self._on_line, clock=self._clock)
        try:
            ready = await child.start()
        except SkulkError as error:
            return self._refused(error, child.exit_report)
        except OSError as error:
            # No process, no pipe, no folder: it passes or it doesn't, which the budget finds out.
            return self._refused(StartError("child_failed", f"{self.name} can't start: {error}."))
        try:
            self._state = on_ready(self._state, self._clock.now())
            self._serving.set()
            self._on_ready(child, ready)
            report = await child.exited
        finally:
            self._serving.clear()
            await child.end()
        if report.was_stopped or self._stop_asked.is_set():
            return None
        return self._crashed("child_failed", report.last_words, report, was_ready=True)

    def _refused(self, error: SkulkError, report: ExitReport | None = None) -> Decision | None:
        """A life that never served."""
        if self._stop_asked.is_set():
            return None
        told = self._explain(error, report)
        if told.code == "child_failed" or told.retryable:
            return self._crashed(told.code, told.detail, report, was_ready=False)
        return self._tell(told.code, told.detail, report, GiveUp(code=told.code, detail=told.detail))

    def _crashed(self, code: str, what: str, report: ExitReport | None, *, was_ready: bool) -> Decision:
        self._state, decision = on_crash(self._policy, self._state, self._clock.now(), what)
        return self._tell(code, what, report, decision, was_ready=was_ready)

    def _tell(
        self, code: str, detail: str, report: ExitReport | None, decision: Decision, *, was_ready: bool = False
    ) -> Decision:
        _LOG.warning("%s", detail)
        self._on_exit(Crash(code=code, detail=detail, report=report, was_ready=was_ready, decision=decision))
        return decision

    async def _pause(self, delay_s: float) -> None:
        try:
            async with asyncio.timeout(delay_s):
                await self._stop_asked.wait()
        except TimeoutError:
            return
