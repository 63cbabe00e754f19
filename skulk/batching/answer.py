"""Drawn tokens on their way to text: bytes, characters, stop strings, limits."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import msgspec

from skulk.batching.requests import BatchRequest, Sequence
from skulk.batching.stops import scan
from skulk.batching.text import decode_bytes, flush_bytes
from skulk.batching.tokens import TokenLog
from skulk.wire.generation import FinishReason


class Vocabulary(Protocol):
    """What the batch asks of an engine's tokenizer; both are pure and quick."""

    def piece(self, token: int) -> bytes: ...

    def is_end(self, token: int) -> bool: ...


class Drawn(NamedTuple):
    """The sequence with the tokens, its new text, and why it ended, if it did."""

    sequence: Sequence
    text: str
    finish_reason: FinishReason | None


def draw(sequence: Sequence, tokens: tuple[int, ...], vocabulary: Vocabulary, **changes: Any) -> Drawn:
    """Takes drawn tokens in, up to one that ends the answer, with other changes of the sequence at one go.

    An end token and a stop string end the answer with ``stop``, the last token that ``max_tokens`` allows with
    ``length``. The end token counts as drawn and has no text.
    """
    request = sequence.request
    count = sequence.drawn.count + len(tokens)
    pieces = b"".join([vocabulary.piece(token) for token in tokens])
    is_plain = pieces.isascii() and not (request.stop or sequence.held_bytes or sequence.skip)
    if is_plain and count < request.max_tokens and not _has_end(request, tokens, vocabulary):
        # most tokens: nothing was held back, and nothing has to be
        after = msgspec.structs.replace(sequence, drawn=sequence.drawn.extended(tokens), **changes)
        return Drawn(after, pieces.decode(), None)
    sequence = msgspec.structs.replace(sequence, **changes) if changes else sequence
    texts: list[str] = []
    for token in tokens:
        sequence, text, finish_reason = _draw(sequence, token, vocabulary)
        texts.append(text)
        if finish_reason is not None:
            return Drawn(sequence, "".join(texts), finish_reason)
    return Drawn(sequence, "".join(texts), None)


def _has_end(request: BatchRequest, tokens: tuple[int, ...], vocabulary: Vocabulary) -> bool:
    return not request.ignore_eos and any(map(vocabulary.is_end, tokens))


def _draw(sequence: Sequence, token: int, vocabulary: Vocabulary) -> Drawn:
    request = sequence.request
    drawn = sequence.drawn.extended((token,))
    if _has_end(request, (token,), vocabulary):
        text, _ = _rest(sequence, sequence.held_bytes, sequence.held_text)
        return _drawn(sequence, drawn, text, finish_reason="stop")
    complete, held_bytes = decode_bytes(sequence.held_bytes, vocabulary.piece(token))
    text, held_text, is_stopped = scan(request.stop, sequence.held_text, complete)
    if is_stopped:
        return _drawn(sequence, drawn, text, finish_reason="stop")
    if drawn.count >= request.max_tokens:
        rest, is_stopped = _rest(sequence, held_bytes, held_text)
        return _drawn(sequence, drawn, text + rest, finish_reason="stop" if is_stopped else "length")
    return _drawn(sequence, drawn, text, held_bytes=held_bytes, held_text=held_text)


def _drawn(
    sequence: Sequence,
    drawn: TokenLog,
    text: str,
    *,
    finish_reason: FinishReason | None = None,
    held_bytes: bytes = b"",
    held_text: str = "",
) -> Drawn:
    skip = max(0, sequence.skip - len(text))
    after = msgspec.structs.replace(sequence, drawn=drawn, held_bytes=held_bytes, held_text=held_text, skip=skip)
    return Drawn(after, text[sequence.skip :], finish_reason)


def _rest(sequence: Sequence, held_bytes: bytes, held_text: str) -> tuple[str, bool]:
    """What was held back and goes out at the end; whether the last of it completed a stop string."""
    text, held, is_stopped = scan(sequence.request.stop, held_text, flush_bytes(held_bytes))
    return (text, True) if is_stopped else (text + held, False)
