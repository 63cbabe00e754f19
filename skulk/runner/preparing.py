"""From a request's words to its tokens, off the event loop: templates and long prompts take their time."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Final, NamedTuple

import msgspec

from skulk.batching.admission import BatchShape, Reuse, admit
from skulk.batching.requests import BatchRequest
from skulk.clock import Clock
from skulk.engines.protocol import Engine
from skulk.errors import ServiceError, SkulkError
from skulk.placement.prefixes import prefix_of
from skulk.runner.table import OpenRequest
from skulk.wire.generation import Generate, TokenPrompt

THREADS: Final = 2
"""One more than one, so that a template that burns its whole time doesn't stop the others."""

log = logging.getLogger(__name__)


class Read(NamedTuple):
    """A prompt's ids, how many of them come before its last turn where that matters, else 0, and its digests."""

    tokens: tuple[int, ...]
    border: int
    digests: tuple[int, ...]


class Preparer:
    """Tokenises and admits requests. Its queue is bounded by what `check_room` lets in.

    Args:
        default_timeout_s: deadline of a request that names none.
    """

    def __init__(self, clock: Clock, default_timeout_s: float) -> None:
        self._clock = clock
        self._default_timeout_s = default_timeout_s
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="prepare")
        self._running: set[asyncio.Future[Read]] = set()

    async def admitted(self, request: OpenRequest, engine: Engine, shape: BatchShape) -> BatchRequest:
        """The request with its tokens, when it fits and somebody still waits for the answer.

        Raises:
            RequestError: ``invalid_request``, ``unsupported_field``, ``template_failed``, ``context_length_exceeded``.
            ServiceError: ``deadline_exceeded``; ``internal``: a defect of the engine's tokenizer.
        """
        generate = request.generate
        timeout_s = self._default_timeout_s if generate.timeout_s is None else generate.timeout_s
        work = asyncio.get_running_loop().run_in_executor(self._pool, _read, engine, generate, shape.reuse)
        self._running.add(work)
        work.add_done_callback(self._running.discard)
        try:
            async with asyncio.timeout(max(0.0, request.arrived_at + timeout_s - self._clock.now())):
                tokens, border, digests = await asyncio.shield(work)
        except TimeoutError as error:
            work.add_done_callback(_retrieve)
            raise ServiceError(
                "deadline_exceeded",
                f"the prompt was not ready within the request's {timeout_s:g} s; allow more time or shorten it",
            ) from error
        if self._clock.now() >= request.wanted_until:
            raise ServiceError("deadline_exceeded", "the caller stopped waiting before its prompt was ready; ask again")
        admitted = admit(
            generate,
            tokens,
            shape,
            arrived_at=request.arrived_at,
            default_timeout_s=self._default_timeout_s,
            border=border,
        )
        return msgspec.structs.replace(admitted, digests=digests)

    async def close(self, timeout_s: float) -> bool:
        """Ends the threads.

        Returns:
            False: one is still busy with the engine's tokenizer after ``timeout_s``.
        """
        self._pool.shutdown(wait=False, cancel_futures=True)
        running = [work for work in self._running if not work.done()]
        if running:
            await asyncio.wait(running, timeout=timeout_s)
        return all(work.done() for work in running)


def _read(engine: Engine, generate: Generate, reuse: Reuse) -> Read:
    prompt = TokenPrompt(tokens=generate.resume.prompt_tokens) if generate.resume is not None else generate.prompt
    try:
        engine.check(generate.sampling)
        tokens = tuple(engine.tokens_of(prompt))
        # of the words, also where the ids came with them: gateways know the words
        digests = tuple(mark.digest for mark in prefix_of(generate.prompt).marks)
        return Read(tokens, engine.border_of(prompt, tokens) if reuse == "whole" else 0, digests)
    except SkulkError:
        raise
    except Exception as error:  # a named border: what one prompt does to the tokenizer ends this request alone
        log.exception("the prompt of %s could not be tokenised", generate.request_id)
        raise ServiceError(
            "internal",
            f"the prompt could not be tokenised ({type(error).__name__}); the runner's log has the traceback",
        ) from error


def _retrieve(work: asyncio.Future[Read]) -> None:
    if not work.cancelled():
        work.exception()
