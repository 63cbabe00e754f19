"""Calls about text and tokens that the engine's vocabulary answers; any thread."""

from __future__ import annotations

from skulk.engines.protocol import Engine, EngineInfo
from skulk.errors import RequestError
from skulk.wire.embedding import Detokenize, Detokenized, Tokenize, Tokenized


def check_generates(info: EngineInfo, model_id: str) -> None:
    """Whether a model generates text.

    Raises:
        RequestError: ``invalid_request``, with the call to make instead.
    """
    if info.pooling:
        call = "/v1/rerank" if info.pooling == "rank" else "/v1/embeddings"
        raise RequestError("invalid_request", f"{model_id} generates no text; POST {call} instead", param="model")


def tokenized(engine: Engine, message: Tokenize) -> Tokenized:
    """The tokens of a text, with the bytes of each."""
    tokens = tuple(engine.tokenize(message.text, add_special=message.add_special, parse_special=message.parse_special))
    return Tokenized(tokens=tokens, pieces=tuple(engine.piece(token) for token in tokens))


def detokenized(engine: Engine, message: Detokenize, vocabulary_size: int) -> Detokenized:
    """The text of tokens.

    Raises:
        RequestError: ``invalid_request``: one of them isn't the model's.
    """
    wrong = next((token for token in message.tokens if not 0 <= token < vocabulary_size), None)
    if wrong is not None:
        raise RequestError(
            "invalid_request",
            f"tokens holds {wrong}; this model has the tokens 0 to {vocabulary_size - 1}",
            param="tokens",
        )
    return Detokenized(text=engine.detokenize(message.tokens))
