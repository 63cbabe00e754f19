"""Requests made from the OpenAPI document, by schemathesis: what it says holds, and nothing breaks a handler."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from skulk.gateway.openapi import BODIES, QUERIES, document
from skulk.gateway.routes import ROUTES
from tests.support.http import MODEL, NODE, Gateway, running_gateway
from tests.support.stores import FakeStore

EXAMPLES = int(os.environ.get("OPENAPI_EXAMPLES", "8"))
CALL_S = 20.0
SHARD = {"PipelineShardMetadata": {"modelCard": {"modelId": MODEL}}}
SAID: dict[str, Any] = {
    "model": MODEL,
    "model_id": MODEL,
    "instance_id": "i1",
    "node": NODE,
    "node_id": NODE,
    "targetNodeId": NODE,
    "messages": [{"role": "user", "content": "Hi"}],
    "prompt": "Once",
    "shardMetadata": SHARD,
}
BOUND = {"stream", "stream_options", "max_tokens", "max_completion_tokens", "logit_bias", "stop", "suffix"}
"""Fields that must fit to others in ways that a schema doesn't say."""
UNSERVED = {
    "POST /instance",  # wants a preview's instance
    "POST /nodes/{node}/drain",  # this cluster's master can't
    "DELETE /nodes/{node}/drain",
    "POST /v1/cancel/{command_id}",  # nothing runs
    "POST /v1/embeddings",  # the one model generates text
    "POST /v1/rerank",
}
"""What is refused here whatever is sent."""


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[Gateway]:
    async with running_gateway(tmp_path) as running:
        store = FakeStore()
        await store.start(running.cluster.bus)
        running.cluster.more_of_beat["hub"] = True
        yield running
        await store.service.close(drain_s=0.0)


def operations() -> Iterator[Any]:
    schema = schemathesis.openapi.from_dict(document(ROUTES))
    for found in schema.get_all_operations():
        assert isinstance(found, Ok), found
        yield found.ok()


OPERATIONS = {f"{found.method.upper()} {found.path}": found for found in operations()}


def aim(case: Any) -> None:
    """Names what is there, so that more than the refusal of an unknown name is seen."""
    if isinstance(case.body, dict):
        sent = cast("dict[str, Any]", case.body)
        case.body = {name: value for name, value in sent.items() if name not in BOUND and not isinstance(value, float)}
    for part in (case.body, case.query, case.path_parameters):
        if isinstance(part, dict):
            found = cast("dict[str, Any]", part)
            found.update({name: value for name, value in SAID.items() if name in found})


def ask(url: str, name: str, mode: GenerationMode) -> list[int]:
    """Calls an operation with what the document allows, or forbids; returns the statuses."""
    statuses: list[int] = []

    @given(case=OPERATIONS[name].as_strategy(generation_mode=mode))
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        phases=(Phase.generate,),
        suppress_health_check=(HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large),
    )
    def check(case: Any) -> None:
        if mode is GenerationMode.POSITIVE and len(statuses) % 3:
            aim(case)
        if mode is GenerationMode.POSITIVE and isinstance(case.query, dict):
            cast("dict[str, Any]", case.query).pop("wait", None)  # nothing that is placed here is ever ready
        with requests.Session() as session:
            response = case.call(base_url=url, session=session, timeout=CALL_S)
        statuses.append(response.status_code)
        assert response.status_code != 500, response.text
        checks = [status_code_conformance, content_type_conformance, response_schema_conformance]
        if mode is GenerationMode.NEGATIVE:
            checks.append(negative_data_rejection)
        case.validate_response(response, checks=checks)

    check()
    return statuses


@pytest.mark.parametrize("name", OPERATIONS)
async def test_what_the_document_allows_is_answered_as_it_says(gateway: Gateway, name: str) -> None:
    await gateway.serve_model()
    statuses = await asyncio.to_thread(ask, gateway.url, name, GenerationMode.POSITIVE)
    assert statuses
    assert name in UNSERVED or min(statuses) < 300, f"only refusals, {statuses}: nothing of an answer was checked"


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name in BODIES or name in QUERIES])
async def test_what_the_document_forbids_is_refused(gateway: Gateway, name: str) -> None:
    await gateway.serve_model()
    assert await asyncio.to_thread(ask, gateway.url, name, GenerationMode.NEGATIVE)
