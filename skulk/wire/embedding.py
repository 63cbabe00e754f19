"""Texts to vectors, scores and tokens: calls that a runner answers at once, without a stream."""

from __future__ import annotations

from typing import TypeAlias

from skulk.wire.base import Wire
from skulk.wire.generation import TextPrompt, TokenPrompt


class RankPair(Wire, frozen=True, kw_only=True, tag="pair"):
    """A document to be scored for a query, by a model that ranks."""

    query: str
    document: str


EmbedInput: TypeAlias = TextPrompt | TokenPrompt | RankPair


class Embed(Wire, frozen=True, kw_only=True):
    """Compute a vector for each input; for pairs a vector of one number, the score.

    Attributes:
        request_id: for `Cancel`.
        timeout_s: seconds from its arrival at the runner until it is given up; None: the runner's own limit.
    """

    request_id: str
    model_id: str
    inputs: tuple[EmbedInput, ...]
    timeout_s: float | None = None


class Embedded(Wire, frozen=True, kw_only=True):
    """Answer to `Embed`.

    Attributes:
        vectors: of each input in its order: float32, little-endian; base64 in JSON. Vectors have the length 1, scores
            are as the model gives them.
        prompt_tokens: of all inputs together.
    """

    vectors: tuple[bytes, ...]
    prompt_tokens: int


class Tokenize(Wire, frozen=True, kw_only=True):
    """Turn text into the model's tokens.

    Attributes:
        add_special: with the tokens that the model wants around a text.
        parse_special: texts of special tokens become those tokens.
    """

    text: str
    add_special: bool = False
    parse_special: bool = True


class Tokenized(Wire, frozen=True, kw_only=True):
    """Answer to `Tokenize`; ``pieces``: the bytes of each token's text, base64 in JSON."""

    tokens: tuple[int, ...]
    pieces: tuple[bytes, ...] = ()


class Detokenize(Wire, frozen=True, kw_only=True):
    """Turn tokens into text; special ones into their names."""

    tokens: tuple[int, ...]


class Detokenized(Wire, frozen=True, kw_only=True):
    """Answer to `Detokenize`; bytes that are no characters are U+FFFD."""

    text: str
