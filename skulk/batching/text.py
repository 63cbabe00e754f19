"""Text from tokens: their bytes may cut a character, so what is incomplete waits for the rest."""

from __future__ import annotations

import codecs


def decode_bytes(held: bytes, new: bytes) -> tuple[str, bytes]:
    """The text that is complete, and the bytes (at most three) of a character that may still become one.

    Bytes that can become none are U+FFFD, as ``bytes.decode("utf-8", "replace")`` of the whole would give.
    """
    data = held + new
    text, consumed = codecs.utf_8_decode(data, "replace", False)
    return text, data[consumed:]


def flush_bytes(held: bytes) -> str:
    """The text of bytes that wait at the end of an answer."""
    return held.decode("utf-8", "replace")
