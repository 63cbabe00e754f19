"""A call to a runner that is answered whole: embeddings, scores, tokens. The streams' way is `dispatch`.

    1. a ready instance, not yet tried in its present life    -> ask the soonest
         a refusal that may pass, or its death                   -> the next one
         any other refusal                                       -> the caller's: it would be the same everywhere
    2. every ready instance refused                           -> the last refusal
    3. no instance of the model                               -> placed on demand where that is allowed, else 404
    4. one is being placed or loaded                          -> wait for it, at most ``load_wait_s``, then 503

A caller that goes away cancels its call at the runner.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

import msgspec

from skulk.bus.port import Bus
from skulk.bus.replica import Replica
from skulk.bus.subjects import RUNNER_CANCEL, RUNNER_DETOKENIZE, Endpoint
from skulk.clock import Clock
from skulk.cluster.view import ClusterView, instances_of, phase_of, ready_instances, runner_of
from skulk.errors import ServiceError, SkulkError, UnavailableError
from skulk.gateway.routing import Router
from skulk.gateway.waiting import death_of, not_placed, why_not_ready
from skulk.ids import new_id
from skulk.placement.prefixes import NO_PREFIX
from skulk.wire.beats import RunnerStatus
from skulk.wire.embedding import Detokenize, Detokenized
from skulk.wire.generation import Cancel
from skulk.wire.state import Instance

log = logging.getLogger("skulk.gateway")

CANCEL_WAIT_S: Final = 2.0
QUICK_S: Final = 30.0
MAX_WAITING: Final = 256

Q = TypeVar("Q")
R = TypeVar("R")


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked. ``request_id``: by which a runner can cancel it; empty: it is quick."""

    endpoint: Endpoint[Any, Any]
    message: Any
    model_id: str
    request_id: str = ""


class Asker:
    """See the module.

    Args:
        place: sees to it that a model that isn't placed is, or raises why not.
        load_wait_s: longest wait for a loading instance.
    """

    def __init__(
        self, bus: Bus, replica: Replica, clock: Clock, *, load_wait_s: float, place: Callable[[str], Awaitable[None]]
    ) -> None:
        self._bus = bus
        self._replica = replica
        self._clock = clock
        self._load_wait_s = load_wait_s
        self._place = place
        self._router = Router()
        self._waiting = 0
        self._cancels: set[asyncio.Task[None]] = set()

    async def ask(self, question: Question, timeout_s: float) -> Any:
        """The answer of one runner.

        Raises:
            SkulkError: see the module's table; ``deadline_exceeded``.
        """
        deadline = self._clock.now() + timeout_s
        tried: set[tuple[str, int, float]] = set()
        refusal: SkulkError | None = None
        while True:
            left_s = deadline - self._clock.now()
            if left_s <= 0:
                raise ServiceError("deadline_exceeded", f"no answer came within {timeout_s:g} s; allow more time")
            view = self._replica.view
            found = ready_instances(view, question.model_id)
            ready = [runner_of(view, instance) for instance in self._ordered(view, found, question)]
            fresh = [one for one in ready if one is not None and _life(one) not in tried]
            if not fresh and ready:
                assert refusal is not None
                raise refusal
            if not fresh:
                await self._wait_for_ready(question.model_id, min(left_s, self._load_wait_s))
                continue
            tried.add(_life(fresh[0]))
            try:
                return await self._ask_one(question, fresh[0], left_s)
            except SkulkError as error:
                if not error.retryable or error.code == "deadline_exceeded":
                    raise
                log.info("runner %s refused: %s", fresh[0].runner_id, error)
                refusal = error

    def _ordered(self, view: ClusterView, ready: tuple[Instance, ...], question: Question) -> tuple[Instance, ...]:
        if len(ready) < 2:
            return ready
        return self._router.ordered(view, ready, NO_PREFIX, question.request_id or new_id(), {})

    async def text_of(self, model_id: str, tokens: tuple[int, ...]) -> str:
        """What a model's tokens stand for.

        Raises:
            SkulkError: as `ask`; ``invalid_request``: a token that the model doesn't have.
        """
        question = Question(endpoint=RUNNER_DETOKENIZE, message=Detokenize(tokens=tokens), model_id=model_id)
        told: Detokenized = await self.ask(question, QUICK_S)
        return told.text

    async def close(self) -> None:
        """Waits until the runners were told what was cancelled."""
        if self._cancels:
            await asyncio.wait(self._cancels, timeout=CANCEL_WAIT_S)

    async def _ask_one(self, question: Question, status: RunnerStatus, left_s: float) -> Any:
        """One runner's answer, or why it can't come any more."""
        asking = asyncio.ensure_future(
            self._bus.request(question.endpoint, question.message, timeout_s=left_s, runner=status.runner_id)
        )
        dying = asyncio.ensure_future(
            self._replica.wait_until(lambda view: death_of(view, status) is not None, left_s + 1.0)
        )
        try:
            await asyncio.wait((asking, dying), return_when=asyncio.FIRST_COMPLETED)
            if asking.done():
                return asking.result()
            raise death_of(self._replica.view, status) or UnavailableError("unreachable", "the runner is silent")
        finally:
            if not asking.done() and question.request_id:
                self._cancel(status.runner_id, question.request_id)
            asking.cancel()
            dying.cancel()

    def _cancel(self, runner_id: str, request_id: str) -> None:
        task = asyncio.create_task(self._tell_cancel(runner_id, request_id), name=f"cancel-{request_id}")
        self._cancels.add(task)
        task.add_done_callback(self._cancels.discard)

    async def _tell_cancel(self, runner_id: str, request_id: str) -> None:
        try:
            await self._bus.request(
                RUNNER_CANCEL, Cancel(request_id=request_id), timeout_s=CANCEL_WAIT_S, runner=runner_id
            )
        except SkulkError as error:
            log.info("cancel of %s not told to runner %s: %s", request_id, runner_id, error)

    async def _wait_for_ready(self, model_id: str, timeout_s: float) -> None:
        """Returns when an instance of the model is ready."""
        if self._waiting >= MAX_WAITING:
            raise UnavailableError(
                "overloaded", f"{MAX_WAITING} calls wait for models to load; ask again later", retry_after_s=5
            )
        self._waiting += 1
        try:
            if not instances_of(self._replica.view, model_id):
                await self._place(model_id)
            if not await self._replica.wait_until(lambda view: _is_decided(view, model_id), timeout_s):
                raise why_not_ready(self._replica.view, instances_of(self._replica.view, model_id))
        finally:
            self._waiting -= 1
        view = self._replica.view
        if not ready_instances(view, model_id):
            instances = instances_of(view, model_id)
            raise why_not_ready(view, instances) if instances else not_placed(model_id)


def _is_decided(view: ClusterView, model_id: str) -> bool:
    """Whether waiting is over: one is ready, or none can become so."""
    phases = {phase_of(view, instance) for instance in instances_of(view, model_id)}
    return "ready" in phases or not phases & {"placing", "loading"}


def _life(status: RunnerStatus) -> tuple[str, int, float]:
    return status.runner_id, status.restarts, status.since
