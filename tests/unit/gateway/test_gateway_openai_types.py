"""The tables of fields against the types of OpenAI's own client: a field of a newer one must be sorted, too."""

from __future__ import annotations

from typing import Any

import pytest
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import chat_completion_stream_options_param
from openai.types.chat import completion_create_params as chat_create_params

from skulk.gateway.openai.embeddings import EMBEDDING_FIELDS
from skulk.gateway.openai.fields import CHAT_FIELDS, COMPLETION_FIELDS, Field
from skulk.gateway.openai.requests import StreamOptions


def documented(*kinds: Any) -> set[str]:
    """Every key of the client's typed dictionaries, inherited ones included."""
    return {name for kind in kinds for name in (*kind.__required_keys__, *kind.__optional_keys__)}


@pytest.mark.parametrize(
    ("table", "kinds"),
    [
        (
            CHAT_FIELDS,
            (
                chat_create_params.CompletionCreateParamsStreaming,
                chat_create_params.CompletionCreateParamsNonStreaming,
            ),
        ),
        (
            COMPLETION_FIELDS,
            (
                completion_create_params.CompletionCreateParamsStreaming,
                completion_create_params.CompletionCreateParamsNonStreaming,
            ),
        ),
        (EMBEDDING_FIELDS, (embedding_create_params.EmbeddingCreateParams,)),
    ],
    ids=["chat", "completions", "embeddings"],
)
def test_every_field_of_the_client_stands_in_the_table(table: dict[str, Field], kinds: tuple[Any, ...]) -> None:
    fields = documented(*kinds)
    assert {"model"} < fields, "these are not the client's types"
    assert fields - set(table) == set()


def test_the_stream_options_are_those_of_the_client() -> None:
    known = documented(chat_completion_stream_options_param.ChatCompletionStreamOptionsParam)
    assert known <= set(StreamOptions.__struct_fields__)
