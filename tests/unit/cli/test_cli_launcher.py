"""What the launcher tells of the bus, and which tokens it takes."""

from __future__ import annotations

import pytest

from skulk.cli.launcher import nats_options, shown_url
from skulk.cli.nats_settings import client_password
from skulk.errors import StartError
from skulk.node.processes import BusAddress


@pytest.mark.parametrize("token", ["", "geheim", "mit Leerzeichen", "$HOME", "$2 for a coffee", 'a"b\\c', "ü"])
def test_a_token_is_taken_as_it_is(token: str) -> None:
    assert client_password(token) == token


@pytest.mark.parametrize("token", ["a\tb", "a\nb", "\x7f", "$2a$10$abcdefghijklmnopqrstuv", "$2b$x", "$2y$", "$2$"])
def test_a_token_that_the_server_would_misread_is_refused(token: str) -> None:
    with pytest.raises(StartError) as refused:
        client_password(token)
    assert refused.value.code == "config_invalid"
    assert token not in refused.value.detail or len(token) <= 4


@pytest.mark.parametrize(
    ("address", "options"),
    [
        (BusAddress(url="nats://127.0.0.1:4222"), "-s nats://127.0.0.1:4222"),
        (
            BusAddress(url="nats://127.0.0.1:4222", user="skulk", password="geheim"),
            '-s nats://127.0.0.1:4222 --user skulk --password "$SKULK_CLUSTER_TOKEN"',
        ),
        (BusAddress(url="nats://ann:geheim@box:4222"), '-s "$SKULK_NATS_URL"'),
        (BusAddress(url="nats://one:4222,ann:geheim@two"), '-s "$SKULK_NATS_URL"'),
        (BusAddress(url="box:4222"), "-s nats://box:4222"),
    ],
)
def test_how_to_watch_the_bus_is_told_without_secrets(address: BusAddress, options: str) -> None:
    assert nats_options(address) == options
    assert "geheim" not in options


def test_addresses_are_shown_without_credentials() -> None:
    assert shown_url("nats://ann:a%40b@one:4222, tls://two:4223") == "nats://one:4222,tls://two:4223"
