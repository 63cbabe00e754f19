"""Chunks of ours into OpenAI's answers: stream events, whole completions, usage, statistics.

    first event of a choice      delta {"role": "assistant", "content": ""}
    each chunk with text         delta {"content": text}
    the end of a choice          delta {}, finish_reason
    after the last               usage with empty choices, where asked for

``logprobs`` and ``message.refusal`` stand there as null: strict checkers of the schema want them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal, Protocol

import msgspec
from msgspec import UNSET, UnsetType

from skulk.wire.base import encode
from skulk.wire.generation import Chunk, FinishReason, StreamEnd, Usage

ClientReason = Literal["stop", "length", "tool_calls"]

_REASONS: Final[dict[FinishReason, ClientReason]] = {
    "stop": "stop",
    "length": "length",
    "tool_calls": "tool_calls",
    # whoever cancels knows; OpenAI has no word for it, and clients check the ones it has
    "cancelled": "stop",
}


class UsageDetails(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of the prompt that were not computed again."""

    cached_tokens: int


class UsageOut(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of a completion."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: UsageDetails

    @classmethod
    def of(cls, usage: Usage) -> UsageOut:
        """From ours."""
        return cls(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            total_tokens=usage.prompt_tokens + usage.completion_tokens,
            prompt_tokens_details=UsageDetails(cached_tokens=usage.cached_tokens),
        )


class Delta(msgspec.Struct, frozen=True, kw_only=True):
    """What is new of a message."""

    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChunkChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One choice in a chat event."""

    index: int
    delta: Delta
    logprobs: None = None
    finish_reason: ClientReason | None = None


class ChatChunk(msgspec.Struct, frozen=True, kw_only=True):
    """``chat.completion.chunk``; ``usage`` is null until the last one where the client asked for it, else absent."""

    id: str
    object: str = "chat.completion.chunk"
    created: int
    model: str
    choices: tuple[ChunkChoice, ...]
    usage: UsageOut | UnsetType | None = UNSET


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """A whole answer."""

    role: str = "assistant"
    content: str
    refusal: None = None


class ChatChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One choice of a whole answer."""

    index: int
    message: Message
    logprobs: None = None
    finish_reason: ClientReason


class TextChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One choice of a text completion, whole or in an event."""

    index: int
    text: str
    logprobs: None = None
    finish_reason: ClientReason | None = None


class Bytes(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A size."""

    in_bytes: int


class Stats(msgspec.Struct, frozen=True, kw_only=True):
    """``generation_stats``: rates in tokens a second, of the runner's own clock.

    Attributes:
        peak_memory_usage: of the runner's process, as last heard.
        serving_batches: sequences that its engine computes side by side, this one included.
        in_flight_at_admission: requests that the runner had when it took this one.
    """

    prompt_tps: float
    generation_tps: float
    prompt_tokens: int
    generation_tokens: int
    peak_memory_usage: Bytes
    serving_batches: int
    in_flight_at_admission: int


class ChatCompletion(msgspec.Struct, frozen=True, kw_only=True):
    """``chat.completion``."""

    id: str
    object: str = "chat.completion"
    created: int
    model: str
    choices: tuple[ChatChoice, ...]
    usage: UsageOut | None
    generation_stats: Stats | UnsetType = UNSET


class TextCompletion(msgspec.Struct, frozen=True, kw_only=True):
    """``text_completion``, whole or an event."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    choices: tuple[TextChoice, ...]
    usage: UsageOut | UnsetType | None = UNSET
    generation_stats: Stats | UnsetType = UNSET


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """What every event of one answer repeats. ``created``: whole seconds since the epoch; ``n``: choices in all."""

    request_id: str
    created: int
    model: str
    n: int = 1
    include_usage: bool = False


class Part(msgspec.Struct, kw_only=True):
    """One choice as it grows, for whole answers."""

    text: list[str]
    finish_reason: ClientReason | None = None


class Answer(Protocol):
    """How one dialect's call tells an answer."""

    def event(self, chunk: Chunk) -> bytes:
        """The SSE bytes of one chunk; empty where it holds nothing for clients."""
        ...

    def tail(self, end: StreamEnd) -> bytes:
        """The SSE bytes after the last chunk, ``[DONE]`` aside."""
        ...

    def whole(self, parts: list[Part], end: StreamEnd, stats: Stats | UnsetType) -> bytes:
        """The body of an answer that isn't streamed."""
        ...


def sse(record: object) -> bytes:
    """A record as one SSE event."""
    return b"data: " + encode(record) + b"\n\n"


def reason_of(reason: FinishReason) -> ClientReason:
    """A finish reason as clients know it; errors have none."""
    assert reason != "error", "an error is told as an error"
    return _REASONS[reason]


class _Choices:
    """Which choices have begun and ended: the role comes once, so does ``finish_reason``."""

    def __init__(self, n: int) -> None:
        self._silent = set(range(n))
        self._open = set(range(n))

    def begins(self, choice: int) -> bool:
        if choice in self._silent:
            self._silent.remove(choice)
            return True
        return False

    def finish_of(self, chunk: Chunk) -> ClientReason | None:
        if chunk.finish_reason is None or chunk.finish_reason == "error" or chunk.choice not in self._open:
            return None
        self._open.remove(chunk.choice)
        return reason_of(chunk.finish_reason)

    def left(self) -> tuple[int, ...]:
        return tuple(sorted(self._open))


class ChatAnswer:
    """``/v1/chat/completions``."""

    def __init__(self, head: Head) -> None:
        self._head = head
        self._id = f"chatcmpl-{head.request_id}"
        self._usage: UnsetType | None = None if head.include_usage else UNSET
        self._choices = _Choices(head.n)

    def event(self, chunk: Chunk) -> bytes:
        finish = self._choices.finish_of(chunk)
        if not chunk.text and finish is None:
            return b""
        return self._events(chunk.choice, chunk.text, finish)

    def tail(self, end: StreamEnd) -> bytes:
        # a stream may end for all choices at once
        closed = b"".join(self._events(choice, "", reason_of(end.reason)) for choice in self._choices.left())
        if not self._head.include_usage:
            return closed
        usage = None if end.usage is None else UsageOut.of(end.usage)
        return closed + sse(self._chunk((), usage))

    def whole(self, parts: list[Part], end: StreamEnd, stats: Stats | UnsetType) -> bytes:
        choices = tuple(
            ChatChoice(
                index=index,
                message=Message(content="".join(part.text)),
                finish_reason=part.finish_reason or reason_of(end.reason),
            )
            for index, part in enumerate(parts)
        )
        return encode(
            ChatCompletion(
                id=self._id,
                created=self._head.created,
                model=self._head.model,
                choices=choices,
                usage=None if end.usage is None else UsageOut.of(end.usage),
                generation_stats=stats,
            )
        )

    def _events(self, choice: int, text: str, finish: ClientReason | None) -> bytes:
        events = b""
        if self._choices.begins(choice):
            events += self._event(choice, Delta(role="assistant", content=""), None)
        if text:
            events += self._event(choice, Delta(content=text), None)
        if finish is not None:
            events += self._event(choice, Delta(), finish)
        return events

    def _event(self, index: int, delta: Delta, finish: ClientReason | None) -> bytes:
        return sse(self._chunk((ChunkChoice(index=index, delta=delta, finish_reason=finish),), self._usage))

    def _chunk(self, choices: tuple[ChunkChoice, ...], usage: UsageOut | UnsetType | None) -> ChatChunk:
        return ChatChunk(id=self._id, created=self._head.created, model=self._head.model, choices=choices, usage=usage)


class TextAnswer:
    """``/v1/completions``. ``echoes``: what the choices of each prompt begin with; empty: with nothing."""

    def __init__(self, head: Head, echoes: Sequence[str] = ()) -> None:
        self._head = head
        each = head.n // len(echoes) if echoes else 0
        self._echoes = [echo for echo in echoes for _ in range(each)] or [""] * head.n
        self._id = f"cmpl-{head.request_id}"
        self._usage: UnsetType | None = None if head.include_usage else UNSET
        self._choices = _Choices(head.n)

    def event(self, chunk: Chunk) -> bytes:
        finish = self._choices.finish_of(chunk)
        if not chunk.text and finish is None:
            return b""
        return self._begun(chunk.choice) + self._event(chunk.choice, chunk.text, finish)

    def tail(self, end: StreamEnd) -> bytes:
        closed = b"".join(
            self._begun(choice) + self._event(choice, "", reason_of(end.reason)) for choice in self._choices.left()
        )
        if not self._head.include_usage:
            return closed
        usage = None if end.usage is None else UsageOut.of(end.usage)
        return closed + sse(self._completion((), usage))

    def whole(self, parts: list[Part], end: StreamEnd, stats: Stats | UnsetType) -> bytes:
        choices = tuple(
            TextChoice(
                index=index,
                text=self._echoes[index] + "".join(part.text),
                finish_reason=part.finish_reason or reason_of(end.reason),
            )
            for index, part in enumerate(parts)
        )
        usage = None if end.usage is None else UsageOut.of(end.usage)
        return encode(self._completion(choices, usage, stats))

    def _begun(self, choice: int) -> bytes:
        """The echo as an event of its own before a choice's first one."""
        echo = self._echoes[choice]
        return self._event(choice, echo, None) if self._choices.begins(choice) and echo else b""

    def _event(self, index: int, text: str, finish: ClientReason | None) -> bytes:
        return sse(self._completion((TextChoice(index=index, text=text, finish_reason=finish),), self._usage))

    def _completion(
        self,
        choices: tuple[TextChoice, ...],
        usage: UsageOut | UnsetType | None,
        stats: Stats | UnsetType = UNSET,
    ) -> TextCompletion:
        return TextCompletion(
            id=self._id,
            created=self._head.created,
            model=self._head.model,
            choices=choices,
            usage=usage,
            generation_stats=stats,
        )


def grow(parts: list[Part], chunk: Chunk) -> None:
    """Adds a chunk to the choice it belongs to."""
    part = parts[chunk.choice]
    if chunk.text:
        part.text.append(chunk.text)
    if part.finish_reason is None and chunk.finish_reason is not None and chunk.finish_reason != "error":
        part.finish_reason = reason_of(chunk.finish_reason)
