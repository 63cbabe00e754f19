"""What a route's port answers, and what is told of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest

from skulk.discovery.probe import Caller, ask_route, judge, node_of_server, server_name

OURS = Caller(cluster="skulk-home")
GUARDED = Caller(cluster="skulk-home", user="route", password="p")
HELLO = {"server_name": "skulk-aaaa.0001", "cluster": "skulk-home"}


def info(**changes: object) -> bytes:
    return b"INFO " + json.dumps({**HELLO, **changes}).encode() + b" \r\n"


def test_a_server_s_name_tells_its_node() -> None:
    assert node_of_server(server_name("aaaa", "0001")) == "aaaa" == node_of_server("skulk-aaaa")
    assert node_of_server("skulk-\x1b[31m") == node_of_server("") == ""


@pytest.mark.parametrize(
    ("line", "caller", "problem"),
    [
        (info(), OURS, None),
        (info(auth_required=True), GUARDED, None),
        (info(auth_required=True), OURS, "wrong_token"),
        (info(), GUARDED, "wrong_token"),
        (info(cluster="skulk-garage"), OURS, "other_cluster"),
        (info(cluster=""), OURS, "other_cluster"),
        (info(client_id=7), OURS, "other_program"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", OURS, "other_program"),
        (b"INFO {}{}\r\n", OURS, "other_program"),
        (b'{"server_name":"skulk-a","cluster":"skulk-home"}', OURS, "other_program"),
        (b"", OURS, "no_answer"),
    ],
)
def test_what_a_greeting_tells(line: bytes, caller: Caller, problem: str | None) -> None:
    answer = judge("10.0.0.1:7", caller, line, 5.0)
    assert (answer.problem, answer.at) == (problem, 5.0)
    assert (answer.problem is None) == (answer.detail == "")
    assert answer.node_id == ("aaaa" if problem in (None, "wrong_token") else "")


def test_a_stranger_s_text_drives_no_terminal() -> None:
    answer = judge("10.0.0.1:7", OURS, info(cluster="skulk-\x1b[31mred" + "x" * 500), 0.0)
    assert answer.detail.isprintable() and len(answer.detail) < 300


@asynccontextmanager
async def listening(*words: bytes) -> AsyncGenerator[str]:
    """A route at which a visitor is told each of these words, one after each line of his."""

    talks: set[asyncio.Task[None] | None] = set()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        talks.add(asyncio.current_task())
        try:
            for word in words:
                writer.write(word)
                await reader.read(1000)
        except OSError:
            pass
        finally:
            writer.transport.abort()

    async with await asyncio.start_server(talk, "127.0.0.1", 0) as server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        await asyncio.wait([task for task in talks if task is not None])


@pytest.mark.parametrize(
    ("word", "problem"),
    [
        (b"-ERR 'attempted to connect to route port'\r\n", None),
        (b"-ERR 'Authorization Violation'\r\n", "wrong_token"),
        (b"PING\r\n-ERR 'Authorization Violation'\r\n", "wrong_token"),
    ],
)
async def test_the_password_is_tried_where_both_have_one(word: bytes, problem: str | None) -> None:
    async with listening(info(auth_required=True), word) as route:
        assert (await ask_route(route, GUARDED, 0.0)).problem == problem


@pytest.mark.parametrize(
    ("words", "problem"),
    [((b"x" * 100_000 + b"\r\n",), "other_program"), ((b"INFO {",), "no_answer"), ((), "no_answer")],
)
async def test_who_says_too_much_or_nothing(words: tuple[bytes, ...], problem: str) -> None:
    async with listening(*words) as route:
        assert (await ask_route(route, OURS, 0.0, timeout_s=0.2)).problem == problem


async def test_nobody_there_and_no_such_name() -> None:
    assert (await ask_route("127.0.0.1:1", OURS, 0.0)).problem == "port_closed"
    assert (await ask_route(f"{'a' * 70}.invalid:7", OURS, 0.0)).problem == "unknown_host"
