"""Whether a request may come in, decided before anything of it is computed.

1. its fields               check_fields        before the prompt is rendered
2. the queue's room         check_room          likewise, so that a refusal costs nothing
3. its length               admit               on the tokenised prompt
"""

from __future__ import annotations

import math
from typing import Final, Literal

import msgspec

from skulk.batching.ranges import check_sampling
from skulk.batching.requests import BatchRequest, Lane, RequestKey
from skulk.errors import RequestError, UnavailableError
from skulk.wire.generation import ChatPrompt, Generate, InfillPrompt, TextPrompt, TokenPrompt
from skulk.wire.model import SamplingDefaults

MAX_CHOICES: Final = 128
MAX_STOPS: Final = 16
MAX_STOP_CHARACTERS: Final = 4096
_RETRY_MIN_S: Final = 1.0
_RETRY_MAX_S: Final = 60.0


Reuse = Literal["none", "whole", "cut"]
"""Of a sequence's state: nothing can be taken over; all of it or nothing; any beginning."""


class BatchShape(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine can hold. Tokens, but for ``n_parallel`` and ``max_waiting``: sequences.

    Attributes:
        n_ctx: window of one request.
        kv_cells: of all sequences together, at least ``n_ctx``.
        n_batch: the most of one step; more than ``n_parallel``, so that every sequence can decode beside a chunk.
        n_ubatch: the most prefill of one step.
        vocabulary_size: ids are below it.
        is_unified: one cache that all sequences share; else a stream of ``n_ctx`` cells each.
        reuse: what can be taken over of a sequence's computed tokens.
        shares_cells: what is taken of a unified cache are the same cells; else copies in cells of their own.
        park_bytes: host memory for states that are set aside; one takes `parked_size`.
    """

    n_ctx: int
    kv_cells: int
    n_parallel: int
    n_batch: int
    n_ubatch: int
    max_waiting: int
    vocabulary_size: int
    is_unified: bool = False
    reuse: Reuse = "none"
    shares_cells: bool = True
    park_bytes: int = 0
    state_bytes: int = 0
    token_bytes: int = 0

    def __post_init__(self) -> None:
        assert 0 < self.n_ctx <= self.kv_cells, self
        assert 0 < self.n_parallel < self.n_batch, self
        assert 0 < self.n_ubatch <= self.n_batch, self

    @property
    def max_open(self) -> int:
        """Sequences that may be open at once, running and waiting."""
        return self.n_parallel + self.max_waiting

    @property
    def max_resumed(self) -> int:
        """Sequences that may be open when a resumed answer comes: it has a client who has read half of it."""
        return self.max_open + self.n_parallel

    def parked_size(self, count: int) -> int:
        """Bytes of host memory that the state of ``count`` tokens takes."""
        return self.state_bytes + count * self.token_bytes


def with_defaults(generate: Generate, defaults: SamplingDefaults) -> Generate:
    """A request with the card's sampling where it says nothing; what the model's own file says comes after that."""
    asked = generate.sampling
    filled = {
        name: value
        for name in defaults.__struct_fields__
        if (value := getattr(defaults, name)) is not None and getattr(asked, name) is None
    }
    if not filled:
        return generate
    return msgspec.structs.replace(generate, sampling=msgspec.structs.replace(asked, **filled))


def check_fields(generate: Generate, shape: BatchShape) -> None:
    """Refuses what is wrong whatever the prompt's length.

    Raises:
        RequestError: ``invalid_request``, naming the field.
    """
    most = min(MAX_CHOICES, shape.max_open)
    _require(1 <= generate.n <= most, "n", f"n is {generate.n}; ask for 1 to {most} choices")
    _require(generate.attempt >= 1, "attempt", f"attempt is {generate.attempt}; attempts count from 1")
    limits = generate.limits
    if limits.max_tokens is not None:
        _require(
            limits.max_tokens >= 1,
            "max_tokens",
            f"max_tokens is {limits.max_tokens}; ask for at least 1, or leave it out",
        )
    _require(len(limits.stop) <= MAX_STOPS, "stop", f"{len(limits.stop)} stop strings; send at most {MAX_STOPS}")
    for stop in limits.stop:
        _require(bool(stop), "stop", "a stop string is empty; leave it out")
        _require(
            len(stop) <= MAX_STOP_CHARACTERS,
            "stop",
            f"a stop string has {len(stop)} characters; send at most {MAX_STOP_CHARACTERS}",
        )
    if generate.timeout_s is not None:
        is_duration = math.isfinite(generate.timeout_s) and generate.timeout_s > 0
        _require(is_duration, "timeout_s", f"timeout_s is {generate.timeout_s}; send seconds above 0, or leave it out")
    check_sampling(generate.sampling, shape.vocabulary_size)
    _check_prompt(generate, shape)


def check_room(shape: BatchShape, *, open_sequences: int, n: int, request_s: float, is_resumed: bool = False) -> None:
    """Refuses what the waiting queue has no room for.

    ``open_sequences``: running and waiting ones; ``request_s``: seconds that one took lately from its slot to its
    end, 0 while unknown; ``is_resumed``: another runner lost it, so it may go beyond the bound, up to a second one.

    Raises:
        UnavailableError: ``overloaded``, with a time after which room is likely.
    """
    most = shape.max_resumed if is_resumed else shape.max_open
    if open_sequences + n <= most:
        return
    waiting = max(0, open_sequences - shape.n_parallel)
    turns = (waiting + n) / shape.n_parallel
    retry_after_s = min(max(math.ceil(turns * request_s / 2), _RETRY_MIN_S), _RETRY_MAX_S)
    raise UnavailableError(
        "overloaded",
        f"{open_sequences} sequences run or wait here and {most} are the most; "
        f"try again in {retry_after_s:.0f} s, or place another replica of the model",
        retry_after_s=retry_after_s,
    )


def admit(
    generate: Generate,
    prompt: tuple[int, ...],
    shape: BatchShape,
    *,
    arrived_at: float,
    default_timeout_s: float,
    border: int = 0,
) -> BatchRequest:
    """The request as the batch holds it, once its prompt is known to fit.

    ``prompt``: its ids; of a resumed request the ids it brought. ``border``: where its last turn begins.

    Raises:
        RequestError: ``invalid_request`` (empty prompt), ``context_length_exceeded`` (with both numbers).
    """
    _require(bool(prompt), "prompt", "the prompt is empty; send at least one token of text")
    count = len(prompt)
    wanted = generate.limits.max_tokens
    resume = generate.resume
    emitted = resume.emitted_tokens if resume is not None else ()
    least = max(1, *(len(choice.emitted_tokens) for choice in resume.choices)) if resume is not None else 1
    if count + least > shape.n_ctx:
        raise RequestError(
            "context_length_exceeded",
            f"the prompt has {count} tokens and this model's window here is {shape.n_ctx} tokens, the answer included; "
            "shorten the prompt or place the model with a longer context",
            param="messages" if isinstance(generate.prompt, ChatPrompt) else "prompt",
        )
    if wanted is not None and count + wanted > shape.n_ctx:
        raise RequestError(
            "context_length_exceeded",
            f"the prompt's {count} tokens and max_tokens {wanted} are {count + wanted} together, more than the "
            f"window of {shape.n_ctx} tokens; ask for at most {shape.n_ctx - count} tokens or shorten the prompt",
            param="max_tokens",
        )
    timeout_s = generate.timeout_s if generate.timeout_s is not None else default_timeout_s
    return BatchRequest(
        key=RequestKey(generate.request_id, generate.attempt),
        prompt=prompt,
        sampling=generate.sampling,
        max_tokens=shape.n_ctx - count if wanted is None else wanted,
        stop=generate.limits.stop,
        ignore_eos=generate.limits.ignore_eos,
        n=generate.n,
        emitted=emitted,
        sent_characters=resume.sent_characters if resume is not None else 0,
        others=resume.others if resume is not None else (),
        lane=_lane(generate),
        border=border,
        arrived_at=arrived_at,
        deadline=arrived_at + timeout_s,
    )


def _lane(generate: Generate) -> Lane:
    if generate.resume is not None:
        return -1
    return 0 if generate.priority == "interactive" else 1


def _check_ids(tokens: tuple[int, ...], param: str, shape: BatchShape) -> None:
    if tokens and not (min(tokens) >= 0 and max(tokens) < shape.vocabulary_size):
        wrong = next(token for token in tokens if not 0 <= token < shape.vocabulary_size)
        raise RequestError(
            "invalid_request",
            f"{param} names the token {wrong}; this model has tokens 0 to {shape.vocabulary_size - 1}",
            param=param,
        )


def _check_prompt(generate: Generate, shape: BatchShape) -> None:
    match generate.prompt:
        case ChatPrompt(messages=messages):
            _require(bool(messages), "messages", "messages is empty; send at least one message")
        case TextPrompt(text=text):
            _require(bool(text), "prompt", "the prompt is empty; send at least one token of text")
        case TokenPrompt(tokens=tokens):
            _require(bool(tokens), "prompt", "the prompt is empty; send at least one token of text")
            _check_ids(tokens, "prompt", shape)
        case InfillPrompt():
            pass
    if generate.resume is not None:
        _check_ids(generate.resume.prompt_tokens, "resume", shape)
        choices = generate.resume.choices
        _require(
            len(choices) == generate.n,
            "resume",
            f"it tells of {len(choices)} choices and n is {generate.n}; tell of all",
        )
        for choice in choices:
            _check_ids(choice.emitted_tokens, "resume", shape)
            sent = choice.sent_characters
            _require(sent >= 0, "resume", f"sent_characters is {sent}; send 0 or more")


def _require(condition: bool, param: str, detail: str) -> None:  # noqa: FBT001 - reads as an assertion does
    if not condition:
        raise RequestError("invalid_request", detail, param=param)
