"""What keeps mDNS going: networks that come, change and fail. The real one is in tests/mesh."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

import pytest

from skulk.discovery import mdns
from skulk.discovery.adverts import Advert
from skulk.discovery.mdns import Mdns, browse_once

LOOK_S = 0.001


def advert(addresses: tuple[str, ...]) -> Advert:
    return Advert(cluster="home", node_id="me", version="0", protocol=1, port=7, addresses=addresses)


def nothing(_: object) -> None:
    """No word is expected."""


async def lives_of(
    networks: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch, fails: Callable[[int], Exception | None]
) -> list[tuple[str, ...]]:
    """With which addresses it began anew, while the machine had one after another of these."""
    began: list[tuple[str, ...]] = []
    enough = asyncio.Event()

    def addresses() -> tuple[str, ...]:
        if len(networks) == 1:
            enough.set()
            return networks[0]
        return networks.pop(0)

    @asynccontextmanager
    async def zeroconf(found: tuple[str, ...]) -> AsyncGenerator[None]:
        began.append(found)
        error = fails(len(began))
        if error is not None:
            raise error
        yield

    class Told:
        async def async_register_service(self, *_: object, **__: object) -> object:
            return asyncio.sleep(0)

    @asynccontextmanager
    async def whole(found: tuple[str, ...]) -> AsyncGenerator[Told]:
        async with zeroconf(found):
            told = Told()
            told.zeroconf = None  # pyright: ignore[reportAttributeAccessIssue]
            yield told

    @asynccontextmanager
    async def browsing(_: object) -> AsyncGenerator[asyncio.Queue[object]]:
        yield asyncio.Queue()

    monkeypatch.setattr(mdns, "_zeroconf", whole)
    monkeypatch.setattr(mdns, "_browsing", browsing)
    running = asyncio.create_task(Mdns(advert, nothing, nothing, addresses=addresses, look_s=LOOK_S).run())
    async with asyncio.timeout(10.0):
        await enough.wait()
        await asyncio.sleep(10 * LOOK_S)
    running.cancel()
    await asyncio.wait({running})
    return began


async def test_it_waits_for_a_network_and_begins_anew_on_another(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = ("10.0.0.1",), ("10.0.0.9",)
    assert await lives_of([(), (), one, one, one, two, two], monkeypatch, lambda _: None) == [one, two]


@pytest.mark.parametrize("error", [OSError("no multicast"), ValueError("a stranger's word")])
async def test_what_fails_is_told_once_and_tried_again(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    one = ("10.0.0.1",)
    began = await lives_of([one] * 9, monkeypatch, lambda number: error if number < 4 else None)
    assert began[:4] == [one] * 4
    if isinstance(error, OSError):
        assert len([line for line in caplog.messages if "no multicast" in line]) == 1
        assert "SKULK_BOOTSTRAP_PEERS" in caplog.text


async def test_without_a_network_nobody_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mdns, "local_addresses", tuple)
    assert await browse_once(5.0) == ()
