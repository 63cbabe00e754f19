"""Sizes and addresses: what is refused before anything is sent."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nats.aio.client import Client

from skulk.bus.nats_bus import parse_addresses
from skulk.bus.transport import ConnectionState, Raw, check_size, encoded_headers_size, one_line
from skulk.errors import RequestError, StartError

NAMES = st.text(alphabet="abcXYZ-0", min_size=1, max_size=12)


@given(st.dictionaries(NAMES, st.text(max_size=60).map(one_line), max_size=5))
async def test_the_size_of_headers_is_what_the_client_sends(headers: dict[str, str]) -> None:
    """Counted against nats-py's own encoder: the sum must be the server's, to the byte."""
    sent: list[bytes] = []

    class Recorder(Client):
        async def _send_command(self, cmd: bytes, priority: bool = False) -> None:
            sent.append(bytes(cmd))

    client = Recorder()
    await client._send_publish("a", "", b"body", 4, headers or None)
    line, _, rest = sent[0].partition(b"\r\n")
    assert len(rest) == encoded_headers_size(headers) + len(b"body\r\n")
    assert int(line.split()[-1]) == encoded_headers_size(headers) + len(b"body")


def test_the_limit_itself_is_no_error() -> None:
    check_size(Raw("a", b"x" * 100), 100)
    with pytest.raises(RequestError) as refused:
        check_size(Raw("a", b"x" * 101), 100)
    assert "101 bytes" in refused.value.detail
    with pytest.raises(RequestError) as refused:
        check_size(Raw("a", b"x" * 80, "", {"A": "b"}), 95)
    assert "98 bytes (18 of them headers)" in refused.value.detail


def test_a_header_is_one_line_of_bounded_length() -> None:
    assert one_line("a\r\nX-Evil: 1\n\n\tb ") == "a X-Evil: 1 b"
    assert one_line("x" * 500).endswith("…")
    assert len(one_line("x" * 500)) == 400


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nats://127.0.0.1:52414", [("127.0.0.1", 52414)]),
        ("example.org", [("example.org", 4222)]),
        ("tls://a:1, nats://me:secret@b:2 ,", [("a", 1), ("b", 2)]),
        ("nats://[::1]:4222", [("::1", 4222)]),
    ],
)
def test_addresses(text: str, expected: list[tuple[str, int]]) -> None:
    addresses = parse_addresses(text)
    assert [(one.host, one.port) for one in addresses] == expected
    assert "secret" not in "".join(one.shown for one in addresses)


@pytest.mark.parametrize("text", ["", " , ", "http://a:1", "nats://", "nats://a:port", "me:secret@nats://x:99999999"])
def test_what_is_no_address_is_refused_without_its_credentials(text: str) -> None:
    with pytest.raises(StartError) as refused:
        parse_addresses(text)
    assert refused.value.code == "config_invalid"
    assert "secret" not in refused.value.detail


def test_listeners_hear_changes_only_and_a_defect_in_one_does_not_deafen_the_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    state = ConnectionState("disconnected")
    heard: list[str] = []

    def broken(now: str) -> None:
        raise ValueError(now)

    state.tell(broken)
    end = state.tell(heard.append)
    state.change("disconnected")
    state.change("connected")
    state.change("connected")
    end()
    end()
    state.change("closed")
    assert heard == ["connected"]
    assert "ValueError" in caplog.text
