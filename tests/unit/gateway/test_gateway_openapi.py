"""The OpenAPI document: every route with a summary, every reader with its schema, the tables of fields whole."""

from __future__ import annotations

from typing import Any

import jsonschema
import msgspec
import pytest

from skulk.gateway.openai.fields import CHAT_FIELDS, COMPLETION_FIELDS
from skulk.gateway.openapi import ANSWERS, BODIES, EVENTS, OPEN, QUERIES, STATUSES, document, path_of
from skulk.gateway.routes import ROUTES

DOCUMENT = document(ROUTES)
NAMES = {f"{method} {path_of(path)}": handler for method, path, handler in ROUTES}


def operation(name: str) -> Any:
    method, path = name.split(" ")
    return DOCUMENT["paths"][path][method.lower()]


def schema_of(name: str) -> Any:
    """A component with everything that it refers to."""
    components = DOCUMENT["components"]["schemas"]
    return {**components[name], "components": {"schemas": components}}


def test_the_tables_name_routes_that_exist() -> None:
    for table in (BODIES, QUERIES, ANSWERS, EVENTS, STATUSES, OPEN):
        assert set(table) <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_route_stands_in_it_with_what_it_does(name: str) -> None:
    told = operation(name)
    assert told["summary"][0].isupper() and " " in told["summary"], "a handler's docstring says what the call does"
    assert {"400", "401", "403", "404", "500", "503"} < set(told["responses"])
    named = {part["name"] for part in told.get("parameters", ()) if part["in"] == "path"}
    assert named == {part[1:-1] for part in name.split("/") if part.startswith("{")}


def test_operations_have_names_of_their_own() -> None:
    ids = [operation(name)["operationId"] for name in NAMES]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize(("kind", "table"), [("ChatRequest", CHAT_FIELDS), ("CompletionRequest", COMPLETION_FIELDS)])
def test_a_table_s_fields_are_the_schema_s(kind: str, table: Any) -> None:
    schema = DOCUMENT["components"]["schemas"][kind]
    assert set(schema["properties"]) == set(table)
    assert schema["additionalProperties"] is False


@pytest.mark.parametrize(
    ("fields", "is_valid"),
    [
        ({}, True),
        ({"n": 9}, False),
        ({"temperature": 3}, False),
        ({"surprise": 1}, False),
        ({"user": "me", "store": True}, True),
        ({"tools": []}, True),
        ({"tools": [{"type": "function"}]}, False),
        ({"response_format": {"type": "text"}}, True),
        ({"response_format": {"type": "json_object"}}, False),
    ],
)
def test_the_schema_takes_what_the_reader_takes(fields: dict[str, Any], is_valid: bool) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], **fields}
    assert jsonschema.Draft202012Validator(schema_of("ChatRequest")).is_valid(body) == is_valid


def test_it_is_plain_json_and_every_reference_leads_somewhere() -> None:
    text = msgspec.json.encode(DOCUMENT).decode()
    names = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert names <= set(DOCUMENT["components"]["schemas"])
