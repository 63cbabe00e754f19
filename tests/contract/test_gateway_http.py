"""What isn't HTTP, or not quite: refused by the parser, before any route, and still told as every other error is."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from skulk.gateway import bodies
from tests.support.http import WAIT_S, Gateway, running_gateway

HOST = b"Host: localhost\r\nConnection: close\r\n"
POST = b"POST /v1/chat/completions HTTP/1.1\r\n"


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[Gateway]:
    async with running_gateway(tmp_path) as gateway:
        yield gateway


async def spoken(gateway: Gateway, words: bytes) -> tuple[int, dict[str, str]]:
    """What the server says: the status and the error."""
    reader, writer = await asyncio.open_connection(*gateway.address)
    try:
        writer.write(words)
        async with asyncio.timeout(WAIT_S):
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"Content-Length: (\d+)", head)
            assert length is not None, head
            body = await reader.readexactly(int(length[1]))
    finally:
        writer.close()
    assert b"application/json" in head, head
    return int(head.split()[1]), msgspec.json.decode(body)["error"]


@pytest.mark.parametrize(
    "words",
    [
        b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03" + b"\0" * 150,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"FOO /health HTTP/1.1\r\n" + HOST + b"\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: evil.org\r\n" + HOST + b"\r\n",
        b"GET http://localhost:99999999/health HTTP/1.1\r\n" + HOST + b"\r\n",
        b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\n" + HOST + b"\r\n",
        b"GET /health HTTP/1.1\r\nX-Long: " + b"a" * 20_000 + b"\r\n" + HOST + b"\r\n",
        POST + b"Content-Length: -5\r\n" + HOST + b"\r\n{}",
        POST + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n" + HOST + b"\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\n" + HOST + b"\r\nZZ\r\n",
        POST + b"Content-Encoding: br\r\nContent-Length: 2\r\n" + HOST + b"\r\nxx",
    ],
)
async def test_what_the_parser_refuses_is_an_envelope(
    gateway: Gateway, words: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    status, error = await spoken(gateway, words)
    assert (status, error["code"]) in ((400, "invalid_request"), (403, "forbidden_host"))
    assert error["message"]
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
    assert (await gateway.call("GET", "/health")).status == 200


async def test_a_body_announced_too_large_is_refused_before_it_comes(gateway: Gateway) -> None:
    status, error = await spoken(gateway, POST + b"Content-Length: 99999999999\r\n" + HOST + b"\r\n{")
    assert (status, error["code"]) == (413, "body_too_large")


async def test_a_body_that_never_comes_is_not_waited_for(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "BODY_WAIT_S", 0.2)
    status, error = await spoken(gateway, POST + b"Content-Length: 100\r\n" + HOST + b"\r\n{")
    assert (status, error["code"]) == (400, "invalid_request")
    assert "did not arrive" in error["message"]


async def test_an_unreadable_body_leaves_no_traceback(gateway: Gateway, caplog: pytest.LogCaptureFixture) -> None:
    words = POST + b"Content-Encoding: gzip\r\nContent-Length: 7\r\n" + HOST + b"\r\nno gzip"
    status, error = await spoken(gateway, words)
    assert (status, error["code"]) == (400, "invalid_request")
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
