"""Every generation over HTTP: a dialect's request in, its stream or its whole answer out.

    read ──> dispatcher.begin ──> accepted ──┬── stream: headers, command id, events, statistics, [DONE]
              │  (`prompts` of several)      └── whole: one body
              └── refused: a true status, nothing was sent

After the headers an error is one event, ``data: {"error": …}``, and the stream ends without ``[DONE]``: that word
says that the answer is whole. A client that goes away cancels the handler, and leaving `Dispatcher.begin` cancels the
generation.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Final, TypeAlias

import msgspec
from aiohttp import web
from msgspec import UNSET, UnsetType

from skulk.errors import RequestError, ServiceError, SkulkError
from skulk.gateway import sse
from skulk.gateway.doors import KEY_NAME
from skulk.gateway.errors import envelope_of, internal_error
from skulk.gateway.keys import CLOCK, DISPATCHER, METRICS, REPLICA, REQUEST_ID, SPEC
from skulk.gateway.openai.answers import Answer, Bytes, Head, Part, Stats, grow
from skulk.gateway.openai.requests import Asked
from skulk.gateway.prompts import Prompts, begin_all
from skulk.gateway.run import Generation, Run
from skulk.wire.base import encode
from skulk.wire.generation import Chunk, Priority, StreamEnd, Timings

log = logging.getLogger("skulk.gateway")

Answers = Callable[[Head], Answer]
Reading: TypeAlias = Run | Prompts
STALLED_S: Final = 60.0
LAST_WORD_S: Final = 1.0


async def generate(
    request: web.Request, asked: Asked, answers: Answers, *, with_stats: bool = False
) -> web.StreamResponse:
    """Runs one generation and answers with it.

    Raises:
        SkulkError: it was refused or failed before anything was sent.
    """
    timeout_s = timeout_of(request, request.app[SPEC].request_timeout_s)
    priority, key = priority_of(request), request.get(KEY_NAME) or ""
    generations = [msgspec.structs.replace(one, priority=priority, key=key) for one in asked.generations]
    async with _begun(request, generations, timeout_s) as run:
        head = Head(
            request_id=run.request_id,
            created=int(request.app[CLOCK].wall()),
            model=generations[0].model_id,
            n=sum(one.n for one in generations),
            include_usage=asked.include_usage,
        )
        headers = {"X-Skulk-Inert": ", ".join(asked.inert)} if asked.inert else {}
        answer = answers(head)
        if asked.stream:
            return await _stream(request, run, answer, headers)
        parts, end = await _collect(request, run, head.n)
        stats: Stats | UnsetType = stats_of(request, run, end) if with_stats else UNSET
        return web.Response(body=answer.whole(parts, end, stats), headers=headers, content_type="application/json")


def _begun(
    request: web.Request, generations: list[Generation], timeout_s: float
) -> AbstractAsyncContextManager[Reading]:
    dispatcher = request.app[DISPATCHER]
    if len(generations) > 1:
        return begin_all(dispatcher, generations, request.app[CLOCK], timeout_s)
    return dispatcher.begin(generations[0], timeout_s)


def timeout_of(request: web.Request, most_s: float) -> float:
    """The request's time: ``X-Request-Timeout`` in seconds, at most and by default the node's.

    Raises:
        RequestError: ``invalid_request``.
    """
    sent = request.headers.get("X-Request-Timeout")
    if sent is None:
        return most_s
    try:
        timeout_s = float(sent)
    except ValueError:
        timeout_s = 0.0
    # a NaN is not above zero either
    if not timeout_s > 0:
        raise RequestError(
            "invalid_request", "X-Request-Timeout must be a number of seconds above 0", param="X-Request-Timeout"
        )
    return min(timeout_s, most_s)


def priority_of(request: web.Request) -> Priority:
    """How urgent a request is: ``X-Skulk-Priority``.

    Raises:
        RequestError: ``invalid_request``.
    """
    match request.headers.get("X-Skulk-Priority", "interactive").lower():
        case "interactive":
            return "interactive"
        case "batch":
            return "batch"
        case _:
            raise RequestError(
                "invalid_request", "X-Skulk-Priority must be interactive or batch", param="X-Skulk-Priority"
            )


async def _collect(request: web.Request, run: Reading, n: int) -> tuple[list[Part], StreamEnd]:
    parts = [Part(text=[]) for _ in range(n)]
    while run.end is None:
        for chunk in await run.take(request.app[SPEC].request_timeout_s):
            grow(parts, chunk)
    _count_end(request, run.end)
    _raise_failure(run.end)
    return parts, run.end


async def _stream(request: web.Request, run: Reading, answer: Answer, headers: dict[str, str]) -> web.StreamResponse:
    response = await sse.open_stream(request, headers)
    run.is_answered = True
    metrics = request.app[METRICS]
    metrics.streams += 1
    try:
        await _send_events(request, response, run, answer)
    except ConnectionError:
        log.info("the client of %s went away", run.request_id)
        raise
    except SkulkError as error:
        await _send_error(request, response, error)
    except asyncio.CancelledError:
        metrics.cancelled += 1
        raise
    except Exception:  # the border: the status was sent, so the stream itself must tell that it failed
        log.exception("the stream of request %s failed", request[REQUEST_ID])
        await _send_error(request, response, internal_error(request[REQUEST_ID]))
    return response


async def _send_events(request: web.Request, response: web.StreamResponse, run: Reading, answer: Answer) -> None:
    keep_alive_s = request.app[SPEC].keep_alive_s
    await _write(request, response, run, sse.comment(f"command_id {run.request_id}"))
    while run.end is None:
        chunks = await run.take(keep_alive_s)
        request.app[METRICS].chunks += len(chunks)
        events = _joined(chunks, answer) if chunks else sse.KEEP_ALIVE
        if events:
            # what is on its way to the client counts as read
            run.has_sent = run.has_sent or bool(chunks)
            await _write(request, response, run, events)
    _count_end(request, run.end)
    _raise_failure(run.end)
    stats = encode(stats_of(request, run, run.end)).decode()
    await _write(request, response, run, answer.tail(run.end) + sse.comment(f"generation_stats {stats}") + sse.DONE)
    await response.write_eof()


def _joined(chunks: list[Chunk], answer: Answer) -> bytes:
    return b"".join(answer.event(chunk) for chunk in chunks)


async def _write(request: web.Request, response: web.StreamResponse, run: Reading, body: bytes) -> None:
    """Writes; a client that takes nothing for `STALLED_S` is given up."""
    transport = request.transport
    if transport is not None and transport.get_write_buffer_size() == 0:
        # it takes what it is given: nothing to wait for, and no timer for each token
        await response.write(body)
        return
    run.is_behind = True
    try:
        await run.within(response.write(body), STALLED_S)
    except TimeoutError:
        raise ServiceError("stream_lost", f"the client has taken nothing for {STALLED_S:.0f} s: read faster") from None
    finally:
        run.is_behind = False


async def _send_error(request: web.Request, response: web.StreamResponse, error: SkulkError) -> None:
    request.app[METRICS].stream_errors[error.code] += 1
    log.warning("request %s: the stream ends with %s: %s", request[REQUEST_ID], error.code, error)
    try:
        async with asyncio.timeout(LAST_WORD_S):
            await response.write(b"data: " + encode(envelope_of(error)) + b"\n\n")
            await response.write_eof()
    except (TimeoutError, ConnectionError):
        # else the server would wait for this client's buffer to empty
        if request.transport is not None:
            request.transport.abort()


def _raise_failure(end: StreamEnd) -> None:
    if end.reason != "error":
        return
    if end.error is None:
        raise ServiceError("runner_failed", "the runner ended the answer without saying why; send the request again")
    raise end.error.to_error()


def _count_end(request: web.Request, end: StreamEnd) -> None:
    if end.usage is not None:
        metrics = request.app[METRICS]
        metrics.tokens += end.usage.completion_tokens
        metrics.prompt_tokens += end.usage.prompt_tokens


def stats_of(request: web.Request, run: Reading, end: StreamEnd) -> Stats:
    """The statistics of an ended run."""
    status = request.app[REPLICA].view.runners.get(run.status.runner_id, run.status)
    usage, timings = end.usage, end.timings
    accepted = run.accepted
    prompt = 0 if accepted is None else accepted.prompt_tokens
    in_flight = 0 if accepted is None else accepted.in_flight
    computed = prompt if usage is None else usage.prompt_tokens - usage.cached_tokens
    generated = 0 if usage is None else usage.completion_tokens
    return Stats(
        prompt_tps=_rate(computed, 0.0 if timings is None else timings.prefill_s),
        generation_tps=_generation_tps(run, generated, timings),
        prompt_tokens=prompt if usage is None else usage.prompt_tokens,
        generation_tokens=generated,
        peak_memory_usage=Bytes(in_bytes=status.memory_bytes),
        serving_batches=in_flight + 1,
        in_flight_at_admission=in_flight,
    )


def _generation_tps(run: Reading, generated: int, timings: Timings | None) -> float:
    """As the end tells it, where several runners had a part in it: each has a clock of its own."""
    if timings is None:
        return 0.0
    return _rate(generated, timings.decode_s) if run.has_one_clock else round(timings.decode_tps, 2)


def _rate(tokens: int, seconds: float) -> float:
    return round(tokens / seconds, 2) if seconds > 0 else 0.0


class CancelReply(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of ``POST /v1/cancel/{command_id}``."""

    message: str
    command_id: str


async def cancel(request: web.Request) -> web.Response:
    """``POST /v1/cancel/{command_id}``: ends a generation of this or of any other gateway."""
    command_id = request.match_info["command_id"]
    if not await request.app[DISPATCHER].cancel(command_id):
        raise RequestError("command_not_found", f"no generation {command_id[:100]!r} is running; it may have ended")
    request.app[METRICS].cancelled += 1
    reply = CancelReply(message="Cancelled.", command_id=command_id)
    return web.Response(body=encode(reply), content_type="application/json")
