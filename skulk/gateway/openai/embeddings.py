"""Requests for embeddings, scores and tokens as records, with the fields of each call."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec

from skulk.errors import RequestError
from skulk.gateway.openai.fields import Field, honoured, inert, refused
from skulk.gateway.openai.requests import ModelId, TokenId
from skulk.wire.embedding import EmbedInput
from skulk.wire.generation import TextPrompt, TokenPrompt

MAX_INPUTS: Final = 2048

EMBEDDING_FIELDS: Final[dict[str, Field]] = {
    **honoured("model", "input", "encoding_format"),
    **inert("user"),
    **refused("dimensions", "shortened embeddings (cut and norm them yourself where the model allows it)"),
}
RERANK_FIELDS: Final[dict[str, Field]] = {
    **honoured("model", "query", "documents", "top_n", "return_documents"),
    **inert("user"),
}
TOKENIZE_FIELDS: Final[dict[str, Field]] = honoured("model", "content", "add_special", "parse_special", "with_pieces")
DETOKENIZE_FIELDS: Final[dict[str, Field]] = honoured("model", "tokens")


class DocumentText(msgspec.Struct, frozen=True, kw_only=True):
    """A document as some clients write it."""

    text: str


class EmbeddingRequest(msgspec.Struct, frozen=True, kw_only=True):
    """``POST /v1/embeddings``. ``input``: a text, token ids, or an array of either."""

    model: ModelId
    input: str | list[Any]
    encoding_format: Literal["float", "base64"] = "float"


class RerankRequest(msgspec.Struct, frozen=True, kw_only=True):
    """``POST /v1/rerank``. ``top_n`` None: all documents."""

    model: ModelId
    query: str
    documents: Annotated[list[str | DocumentText], msgspec.Meta(min_length=1, max_length=MAX_INPUTS)]
    top_n: Annotated[int, msgspec.Meta(ge=1)] | None = None
    return_documents: bool = False


class TokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """``POST /tokenize``. ``model`` None: the only one that is ready."""

    content: str
    model: ModelId | None = None
    add_special: bool = False
    parse_special: bool = True
    with_pieces: bool = False


class DetokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """``POST /detokenize``. ``model`` as in `TokenizeRequest`."""

    tokens: Annotated[list[TokenId], msgspec.Meta(max_length=1_000_000)]
    model: ModelId | None = None


def inputs_of(sent: str | list[Any]) -> tuple[EmbedInput, ...]:
    """What is to be embedded.

    Raises:
        RequestError: ``invalid_request``.
    """
    match sent:
        case str():
            return (TextPrompt(text=sent),)
        case []:
            raise RequestError("invalid_request", "input is empty; send at least one text", param="input")
        case [int(), *_]:
            return (TokenPrompt(tokens=_ids(sent)),)
        case _ if len(sent) > MAX_INPUTS:
            raise RequestError("invalid_request", f"{len(sent)} inputs; at most {MAX_INPUTS} a call", param="input")
        case _:
            return tuple(_input_of(one) for one in sent)


def _input_of(one: Any) -> EmbedInput:
    if isinstance(one, str):
        return TextPrompt(text=one)
    return TokenPrompt(tokens=_ids(one))


def _ids(tokens: Any) -> tuple[int, ...]:
    try:
        return msgspec.convert(tokens, tuple[TokenId, ...])
    except msgspec.ValidationError as error:
        raise RequestError(
            "invalid_request",
            "input must be a text, token ids, or an array of texts or of arrays of token ids",
            param="input",
        ) from error
