"""One drawn token on its way to text: bytes, characters, stop strings, limits."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import msgspec

from skulk.batching.requests import Sequence
from skulk.batching.stops import scan
from skulk.batching.text import decode_bytes, flush_bytes
from skulk.wire.generation import FinishReason


class Vocabulary(Protocol):
    """What the batch asks of an engine's tokenizer; both are pure and quick."""

    def piece(self, token: int) -> bytes: ...

    def is_end(self, token: int) -> bool: ...


class Drawn(NamedTuple):
    """The sequence with the token, its new text, and why it ended, if it did."""

    sequence: Sequence
    text: str
    finish_reason: FinishReason | None


def draw(sequence: Sequence, token: int, vocabulary: Vocabulary, **changes: Any) -> Drawn:
    """Takes a drawn token in, with other changes of the sequence at one go.

    An end token and a stop string end the answer with ``stop``, the last token that ``max_tokens`` allows with
    ``length``. The end token counts as drawn and has no text.
    """
    request = sequence.request
    changes["drawn"] = drawn = sequence.drawn.append(token)
    if vocabulary.is_end(token) and not request.ignore_eos:
        text, _ = _rest(sequence, sequence.held_bytes, sequence.held_text)
        return _drawn(sequence, text, finish_reason="stop", **changes)
    piece = vocabulary.piece(token)
    is_plain = piece.isascii() and not (request.stop or sequence.held_bytes or sequence.skip)
    if is_plain and drawn.count < request.max_tokens:
        # most tokens: nothing was held back, and nothing has to be
        return Drawn(msgspec.structs.replace(sequence, **changes), piece.decode(), None)
    complete, held_bytes = decode_bytes(sequence.held_bytes, piece)
    text, held_text, is_stopped = scan(request.stop, sequence.held_text, complete)
    if is_stopped:
        return _drawn(sequence, text, finish_reason="stop", **changes)
    if drawn.count >= request.max_tokens:
        rest, is_stopped = _rest(sequence, held_bytes, held_text)
        return _drawn(sequence, text + rest, finish_reason="stop" if is_stopped else "length", **changes)
    return _drawn(sequence, text, held_bytes=held_bytes, held_text=held_text, **changes)


def _drawn(
    sequence: Sequence,
    text: str,
    *,
    finish_reason: FinishReason | None = None,
    held_bytes: bytes = b"",
    held_text: str = "",
    **changes: Any,
) -> Drawn:
    if sequence.skip:
        changes["skip"] = max(0, sequence.skip - len(text))
        text = text[sequence.skip :]
    after = msgspec.structs.replace(sequence, held_bytes=held_bytes, held_text=held_text, **changes)
    return Drawn(after, text, finish_reason)


def _rest(sequence: Sequence, held_bytes: bytes, held_text: str) -> tuple[str, bool]:
    """What was held back and goes out at the end; whether the last of it completed a stop string."""
    text, held, is_stopped = scan(sequence.request.stop, held_text, flush_bytes(held_bytes))
    return (text, True) if is_stopped else (text + held, False)
