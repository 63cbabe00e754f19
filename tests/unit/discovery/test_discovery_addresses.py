"""Which addresses are told to others, and how routes are read."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skulk.discovery import addresses
from skulk.discovery.addresses import (
    MAX_ROUTES,
    is_loopback_route,
    local_addresses,
    route_text,
    split_route,
    usable_of,
    usable_routes,
)

NEVER = (
    "127.0.0.1",
    "127.8.8.8",
    "::1",
    "169.254.3.4",
    "fe80::1",
    "fe80::1%eth0",
    "0.0.0.0",
    "::",
    "224.0.0.251",
    "ff02::fb",
)


def test_loopback_and_link_local_are_never_told_to_others() -> None:
    assert usable_of(NEVER) == ()
    assert usable_of(("::ffff:10.0.0.1", "240.0.0.1", "no address")) == ()


def test_the_likeliest_come_first() -> None:
    found = ("2001:4860::1", "fd00::2", "8.8.8.8", "192.168.1.9", "10.0.0.2", "100.64.0.7", "10.0.0.2")
    assert usable_of(found) == (
        *("10.0.0.2", "192.168.1.9", "8.8.8.8", "100.64.0.7"),
        *("fd00::2", "2001:4860::1"),
    )


def test_on_a_local_cluster_loopback_is_what_others_dial() -> None:
    assert usable_of(("127.0.0.1", "169.254.1.1"), local=True) == ("127.0.0.1",)
    assert usable_routes(("127.0.0.1:7",), local=True) == ("127.0.0.1:7",)
    assert usable_routes(("127.0.0.1:7", "[::1]:7"), local=False) == ()


@given(st.lists(st.ip_addresses()))
def test_what_is_told_is_dialled(found: list[ipaddress.IPv4Address | ipaddress.IPv6Address]) -> None:
    told = tuple(route_text(address, 52416) for address in usable_of(map(str, found)))
    assert usable_routes(told, local=False) == told
    assert len(told) <= MAX_ROUTES
    assert not any(is_loopback_route(route) for route in told)


@pytest.mark.parametrize(
    "route", ["", ":1", "a:", "a:0", "a:65536", "[a]:1", "::1:1", "a b:1", "a:1:2", 'a"x:1', "[::1]"]
)
def test_what_is_no_route(route: str) -> None:
    assert split_route(route) is None
    assert usable_routes((route,), local=True) == ()


def test_routes_by_name_are_taken_and_broken_numbers_are_not() -> None:
    assert usable_routes(("attic.local:7", "300.1.2.3:7", "10.0.0.1:7"), local=False) == ("attic.local:7", "10.0.0.1:7")
    assert split_route("[fd00::2]:52416") == ("fd00::2", 52416)
    assert is_loopback_route("localhost:1") and not is_loopback_route("attic:1")


def test_interfaces_that_are_down_are_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def one(address: str) -> object:
        return type("Found", (), {"address": address})()

    def stats(*, is_up: bool) -> object:
        return type("Stats", (), {"isup": is_up})()

    found = {"lo": [one("127.0.0.1")], "eth0": [one("10.0.0.5"), one("fe80::1%eth0")], "eth1": [one("10.1.0.5")]}
    states = {"lo": stats(is_up=True), "eth0": stats(is_up=True), "eth1": stats(is_up=False)}
    monkeypatch.setattr(addresses.psutil, "net_if_addrs", lambda: found)
    monkeypatch.setattr(addresses.psutil, "net_if_stats", lambda: states)
    assert local_addresses() == ("10.0.0.5",)
