"""One question to a model, its answer as it comes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import aclosing
from typing import Any, Final

import msgspec

from skulk.cli.client import ApiClient
from skulk.errors import ServiceError

# The API's own default is 1.0, at which small models ramble; so the same question has the same answer, too.
TEMPERATURE: Final = 0.0
# Some small models never end. Not sent as max_tokens: an instance with a smaller window would refuse that.
LIMIT: Final = 1024


class _Delta(msgspec.Struct, frozen=True):
    content: str | None = None


class _Choice(msgspec.Struct, frozen=True):
    delta: _Delta = _Delta()
    finish_reason: str | None = None


class _Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Chunk(msgspec.Struct, frozen=True):
    choices: tuple[_Choice, ...] = ()
    usage: _Usage | None = None


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """A whole answer. ``finish_reason``: ``stop``, ``length``, …"""

    model: str
    content: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int


async def ask(
    client: ApiClient,
    model_id: str,
    prompt: str,
    write: Callable[[str], object],
    *,
    limit: int = LIMIT,
) -> Answer:
    """Asks, greedily; ``write`` is given each piece of text as it comes.

    After ``limit`` pieces (about one a token) it hangs up, which cancels the rest; its reason is ``length``.

    Raises:
        SkulkError: what the API answered, before or in the stream; ``stream_lost``: it broke off.
    """
    body: dict[str, Any] = {
        "model": model_id,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": TEMPERATURE,
        "messages": [{"role": "user", "content": prompt}],
    }
    pieces: list[str] = []
    reason, usage = "", _Usage()
    async with aclosing(client.stream("/v1/chat/completions", body)) as events:
        async for event in events:
            chunk = _chunk(client, event)
            usage = chunk.usage or usage
            for choice in chunk.choices:
                reason = choice.finish_reason or reason
                if choice.delta.content:
                    pieces.append(choice.delta.content)
                    write(choice.delta.content)
            if len(pieces) >= limit and not reason:
                reason = "length"
                break
    if not reason:
        raise ServiceError("stream_lost", f"{client.url} ended the answer without saying why it ended.")
    return Answer(
        model=model_id,
        content="".join(pieces),
        finish_reason=reason,
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens or len(pieces),
    )


def _chunk(client: ApiClient, event: str) -> _Chunk:
    try:
        return msgspec.json.decode(event.encode(), type=_Chunk)
    except msgspec.DecodeError as error:
        raise ServiceError("stream_lost", f"{client.url} sent an event that is no chat chunk: {error}") from error
