"""Embeddings and scores: inputs of all calls in one queue, as many at a time as one native call takes.

    Embed ──tokens, window──> inputs ──queue──> EmbedBatch ──engine thread──> Vectors ──> Embedded

One batch is on its way at a time, so a call that is cancelled, or late, leaves the queue within one batch. The engine's
word on a batch that nobody waits for any more is dropped.
"""

from __future__ import annotations

import array
import asyncio
import itertools
import sys
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

from skulk.batching.admission import BatchShape
from skulk.bus.port import Call
from skulk.bus.subjects import RUNNER_DETOKENIZE, RUNNER_EMBED, RUNNER_TOKENIZE, Endpoint
from skulk.engines.protocol import Engine, EngineInfo
from skulk.errors import RequestError, ServiceError, SkulkError, UnavailableError
from skulk.runner.reports import EmbedBatch, Vectors
from skulk.runner.texts import detokenized, tokenized
from skulk.wire.embedding import Detokenize, Detokenized, Embed, Embedded, EmbedInput, Tokenize, Tokenized

MAX_INPUTS: Final = 2048
"""Of one call, as OpenAI's."""
MAX_OPEN_INPUTS: Final = 8192
"""Of all calls; beyond it a call is refused at once."""
RETRY_S: Final = 1.0


class _Input:
    """One input on its way to its vector."""

    def __init__(self, tokens: tuple[int, ...]) -> None:
        self.tokens = tokens
        self.vector: asyncio.Future[tuple[float, ...]] = asyncio.get_running_loop().create_future()


class EmbedDesk:
    """See the module. Event loop only.

    Args:
        ready: the loaded engine and its shape, or the reason why calls aren't answered now.
        submit: hands a batch to the engine thread.
        on_change: told whenever `open_calls` has changed.
        default_timeout_s: of a call that names none.
    """

    def __init__(
        self,
        ready: Callable[[], tuple[Engine, BatchShape]],
        submit: Callable[[EmbedBatch], None],
        on_change: Callable[[], None],
        *,
        default_timeout_s: float,
    ) -> None:
        self._ready = ready
        self._submit = submit
        self._on_change = on_change
        self._default_timeout_s = default_timeout_s
        self._ids = itertools.count(1)
        self._waiting: deque[_Input] = deque()
        self._batch: tuple[int, tuple[_Input, ...]] | None = None
        self._open_inputs = 0
        self._calls: dict[str, asyncio.Task[Embedded]] = {}
        self._failure: SkulkError | None = None
        self._info: EngineInfo | None = None

    @property
    def open_calls(self) -> int:
        return len(self._calls)

    @property
    def waiting(self) -> int:
        """Inputs that are read and in no batch yet."""
        return len(self._waiting)

    @property
    def handlers(self) -> dict[Endpoint[Any, Any], Callable[[Call[Any]], Awaitable[Any]]]:
        """The runner's endpoints that are answered here."""
        return {RUNNER_EMBED: self.embed, RUNNER_TOKENIZE: self._tokenize, RUNNER_DETOKENIZE: self._detokenize}

    async def _tokenize(self, call: Call[Tokenize]) -> Tokenized:
        engine, _ = self._ready()
        return await asyncio.to_thread(tokenized, engine, call.message)

    async def _detokenize(self, call: Call[Detokenize]) -> Detokenized:
        engine, shape = self._ready()
        return await asyncio.to_thread(detokenized, engine, call.message, shape.vocabulary_size)

    async def embed(self, call: Call[Embed]) -> Embedded:
        """Answers one call.

        Raises:
            RequestError: ``invalid_request``, ``context_length_exceeded``, ``request_cancelled``.
            UnavailableError: ``overloaded``.
            ServiceError: ``deadline_exceeded``, ``runner_failed``.
        """
        engine, _ = self._ready()
        message = call.message
        self._info = engine.info
        self._check(message, engine.info)
        self._open_inputs += len(message.inputs)
        asking = asyncio.create_task(self._vectors(message, engine), name=f"embed {message.request_id}")
        self._calls[message.request_id] = asking
        self._on_change()
        timeout_s = self._default_timeout_s if message.timeout_s is None else message.timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                return await asking
        except TimeoutError:
            raise ServiceError(
                "deadline_exceeded",
                f"the {len(message.inputs)} inputs were not computed within {timeout_s:g} s; send fewer, or allow more",
            ) from None
        except asyncio.CancelledError:
            if self._failure is not None:
                raise self._failure from None
            if not asking.cancelled():
                raise
            raise RequestError("request_cancelled", "the call was cancelled before its vectors were there") from None
        finally:
            asking.cancel()
            self._open_inputs -= len(message.inputs)
            self._calls.pop(message.request_id, None)
            self._on_change()

    def cancel(self, request_id: str) -> bool:
        """Ends a call; False: there is none."""
        asking = self._calls.get(request_id)
        return asking is not None and asking.cancel()

    def fail_all(self, error: SkulkError) -> None:
        """Ends every call with ``error``, and takes none any more."""
        self._failure = error
        for asking in tuple(self._calls.values()):
            asking.cancel()

    def took(self, report: Vectors) -> None:
        """The engine thread's answer to the batch that was on its way."""
        assert self._batch is not None and self._batch[0] == report.id, f"nobody asked for the batch {report.id}"
        _, inputs = self._batch
        self._batch = None
        for one, vector in zip(inputs, report.vectors, strict=True):
            if not one.vector.done():
                one.vector.set_result(vector)
        self._go_on()

    def _check(self, message: Embed, info: EngineInfo) -> None:
        if self._failure is not None:
            raise self._failure
        if not info.pooling:
            raise RequestError(
                "invalid_request",
                f"{message.model_id} generates text and gives no embeddings; ask an embedding model",
                param="model",
            )
        if not 1 <= len(message.inputs) <= MAX_INPUTS:
            raise RequestError(
                "invalid_request", f"{len(message.inputs)} inputs; send 1 to {MAX_INPUTS} in one call", param="input"
            )
        if message.request_id in self._calls:
            raise RequestError("invalid_request", f"the call {message.request_id} is being answered already")
        if self._open_inputs + len(message.inputs) > MAX_OPEN_INPUTS:
            raise UnavailableError(
                "overloaded",
                f"{self._open_inputs} inputs wait here already, {MAX_OPEN_INPUTS} at most; try again later",
                retry_after_s=RETRY_S,
            )

    async def _vectors(self, message: Embed, engine: Engine) -> Embedded:
        tokens = await asyncio.to_thread(_tokens_of, engine, message.inputs)
        inputs = [_Input(one) for one in tokens]
        self._waiting.extend(inputs)
        self._go_on()
        try:
            vectors = [await one.vector for one in inputs]
        finally:
            for one in inputs:
                one.vector.cancel()
        return Embedded(
            vectors=tuple(_packed(vector) for vector in vectors), prompt_tokens=sum(len(one) for one in tokens)
        )

    def _go_on(self) -> None:
        """Sends the next batch, if none is on its way."""
        if self._batch is not None:
            return
        info = self._info
        assert info is not None, "inputs came before an engine"
        inputs: list[_Input] = []
        room = info.n_batch
        while self._waiting and len(inputs) < info.n_parallel:
            one = self._waiting[0]
            if not one.vector.done():
                if len(one.tokens) > room:
                    break
                room -= len(one.tokens)
                inputs.append(one)
            self._waiting.popleft()
        if inputs:
            self._batch = (next(self._ids), tuple(inputs))
            self._submit(EmbedBatch(self._batch[0], tuple(one.tokens for one in inputs)))


def _tokens_of(engine: Engine, inputs: Sequence[EmbedInput]) -> list[tuple[int, ...]]:
    """The ids of every input, checked against the window."""
    found: list[tuple[int, ...]] = []
    most = engine.info.n_ctx
    for number, one in enumerate(inputs):
        tokens = tuple(engine.input_tokens(one))
        where = f"input {number + 1} of {len(inputs)}"
        if not tokens:
            raise RequestError("invalid_request", f"{where} is empty; send at least one token of text", param="input")
        if len(tokens) > most:
            raise RequestError(
                "context_length_exceeded",
                f"{where} has {len(tokens)} tokens, this instance's context length is {most}; send shorter texts, or "
                "place the model with a longer context",
                param="input",
            )
        found.append(tokens)
    return found


def _packed(vector: Sequence[float]) -> bytes:
    packed = array.array("f", vector)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()
