"""What a prompt begins with, as marks that a gateway and a runner compute alike without a tokenizer. Pure.

    prompt ──stream of bytes──> a digest at 256, 512, … bytes ──> marks
                                                                     │ runner: of all prompts whose cells are there
                                                                     v
                                              a Bloom filter in its status, 683 characters at most

Marks stand at 1 to 8 blocks, from there on four to each doubling: a megabyte has 50, and the longest one that two
prompts have in common is at least four fifths of all that they have in common, but for the last block. A filter says
yes to what it holds and, at its fullest, to one in a hundred others; marks are asked for in ascending order and the
first no ends the search, so such an error adds one mark. It costs a runner the prefill that it would have had anyway.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

import msgspec

from skulk.wire.base import encode
from skulk.wire.generation import ChatPrompt, InfillPrompt, Prompt, TextPrompt, TokenPrompt

BLOCK_BYTES: Final = 256
"""About 64 tokens: less isn't worth a runner's copying."""
TOKEN_BYTES: Final = 4
"""Of text for each token, roughly; token ids take as many here by chance."""
MOST_DIGESTS: Final = 400
"""In one filter; the newest prompts' come first."""
_EVEN: Final = 8
_DIGEST_BYTES: Final = 8
_HASHES: Final = 4
_BITS_EACH: Final = 10
_LEAST_BITS: Final = 256
_MOST_BITS: Final = 4096


class Mark(NamedTuple):
    """The first ``size_bytes`` bytes of a prompt, in 64 bits."""

    size_bytes: int
    digest: int


class Prefix(NamedTuple):
    """A prompt's length, roughly, in tokens, and its marks, the shortest first."""

    tokens: int
    marks: tuple[Mark, ...]


NO_PREFIX: Final = Prefix(0, ())


def prefix_of(prompt: Prompt) -> Prefix:
    """Length and marks of a prompt. O(bytes of the prompt)."""
    running = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    marks: list[Mark] = []
    size = 0
    places = _places()
    due = next(places)
    for piece in _stream(prompt):
        rest = memoryview(piece)
        while size + len(rest) >= due:
            running.update(rest[: due - size])
            rest = rest[due - size :]
            marks.append(Mark(due, int.from_bytes(running.digest(), "little")))
            size, due = due, next(places)
        running.update(rest)
        size += len(rest)
    return Prefix(-(-size // TOKEN_BYTES), tuple(marks))


def _places() -> Iterator[int]:
    """Where marks stand, in bytes, ascending without end."""
    blocks = 1
    while True:
        yield blocks * BLOCK_BYTES
        blocks += max(1, 1 << (blocks.bit_length() - 1) >> 2) if blocks >= _EVEN else 1


def _stream(prompt: Prompt) -> Iterator[bytes]:
    """A prompt's bytes, in an order in which prompts that render alike at first are alike at first."""
    match prompt:
        case ChatPrompt():
            # tools and switches mostly stand in a template's first lines
            yield encode(prompt.variables)
            for message in prompt.messages:
                yield encode(message)
        case TextPrompt():
            yield prompt.text.encode("utf-8", "surrogatepass")
        case TokenPrompt():
            yield b"".join(token.to_bytes(TOKEN_BYTES, "little", signed=True) for token in prompt.tokens)
        case InfillPrompt():
            # templates differ in what they put first
            yield encode((prompt.prefix, prompt.suffix))


def filter_of(digests: Iterable[int]) -> str:
    """A Bloom filter of the first `MOST_DIGESTS` digests, as text; empty for none."""
    taken = tuple(dict.fromkeys(digests))[:MOST_DIGESTS]
    if not taken:
        return ""
    bits = _LEAST_BITS
    while bits < min(_BITS_EACH * len(taken), _MOST_BITS):
        bits *= 2
    cells = bytearray(bits // 8)
    for digest in taken:
        for place in _bits_of(digest, bits):
            cells[place >> 3] |= 1 << (place & 7)
    return base64.b64encode(cells).decode().rstrip("=")


class Held(msgspec.Struct, frozen=True):
    """A filter that was told, opened."""

    cells: bytes = b""

    def __contains__(self, digest: int) -> bool:
        bits = len(self.cells) * 8
        return bits > 0 and all(self.cells[place >> 3] >> (place & 7) & 1 for place in _bits_of(digest, bits))

    def share_of(self, prefix: Prefix) -> float:
        """How much of a prompt is there, from its beginning on: 0.0 to 1.0."""
        found = 0
        for mark in prefix.marks:
            if mark.digest not in self:
                break
            found = mark.size_bytes
        return min(1.0, found / (prefix.tokens * TOKEN_BYTES)) if prefix.tokens else 0.0


NOTHING_HELD: Final = Held()


def held_by(told: str) -> Held:
    """A filter out of a status; one that can't be read holds nothing."""
    try:
        cells = base64.b64decode(told + "=" * (-len(told) % 4), validate=True)
    except (binascii.Error, ValueError):
        return NOTHING_HELD
    bits = len(cells) * 8
    return Held(cells) if _LEAST_BITS <= bits <= _MOST_BITS and bits & (bits - 1) == 0 else NOTHING_HELD


def _bits_of(digest: int, bits: int) -> Iterator[int]:
    for number in range(_HASHES):
        yield digest >> (16 * number) & (bits - 1)
