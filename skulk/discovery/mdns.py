"""Nodes on the same network find each other: announce, browse, follow a changed address. The home of zeroconf.

    local addresses ──every 5 s──> changed? ──> leave, and begin anew on the interfaces there are now
                                                 ├── announce  <node>._skulk._tcp.local.   TXT of `adverts`
                                                 └── browse ──names──> resolve ──Advert──> on_advert

A machine without a network has nothing to announce; it is looked at again every 5 s.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Final, TypeAlias

from zeroconf import Error as ZeroconfError
from zeroconf import IPVersion, ServiceStateChange, Zeroconf
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from skulk.discovery.addresses import local_addresses
from skulk.discovery.adverts import Advert, read_advert, txt_of

SERVICE_TYPE: Final = "_skulk._tcp.local."
LOOK_S: Final = 5.0
RESOLVE_S: Final = 3.0
MAX_NAMES: Final = 1_000

_logger = logging.getLogger(__name__)
_Names: TypeAlias = "asyncio.Queue[tuple[str, ServiceStateChange]]"


class Mdns:
    """Announces one node and hears the others. Keep `run` going.

    Args:
        describe: the own advert for the addresses that there are now.
        on_advert: another node's word, first or changed; also the own one.
        on_goodbye: a node has left, or its word has grown too old.
        addresses: where the own addresses come from.
        look_s: how often.
    """

    def __init__(
        self,
        describe: Callable[[tuple[str, ...]], Advert],
        on_advert: Callable[[Advert], None],
        on_goodbye: Callable[[str], None],
        *,
        addresses: Callable[[], tuple[str, ...]] = local_addresses,
        look_s: float = LOOK_S,
    ) -> None:
        self._describe = describe
        self._on_advert = on_advert
        self._on_goodbye = on_goodbye
        self._addresses = addresses
        self._look_s = look_s
        self._failure = ""

    async def run(self) -> None:
        """Announces and browses until cancelled; what fails is told once and tried again."""
        while True:
            addresses = self._addresses()
            if addresses:
                try:
                    await self._on_network(addresses)
                except (OSError, ZeroconfError) as error:
                    self._failed(error)
                except Exception:  # the border: what strangers send, and a library that reads it, end no node
                    _logger.exception("mDNS failed and is begun anew")
            await asyncio.sleep(self._look_s)

    async def _on_network(self, addresses: tuple[str, ...]) -> None:
        """One life on the interfaces of these addresses; returns when the node is reached otherwise."""
        told = self._describe(addresses)
        async with _zeroconf(addresses) as zeroconf, _browsing(zeroconf.zeroconf) as names:
            await (await zeroconf.async_register_service(_info(told), allow_name_change=True))
            self._failure = ""
            _logger.info("announced by mDNS at %s", ", ".join(addresses))
            async with asyncio.TaskGroup() as tasks:
                resolving = tasks.create_task(self._resolve(zeroconf.zeroconf, names), name="mdns-resolve")
                while self._describe(self._addresses()) == told:  # noqa: ASYNC110 - the system can only be asked
                    await asyncio.sleep(self._look_s)
                resolving.cancel()
            _logger.info("this node is reached otherwise now")

    async def _resolve(self, zeroconf: Zeroconf, names: _Names) -> None:
        known: dict[str, str] = {}
        while True:
            name, change = await names.get()
            if change is ServiceStateChange.Removed:
                if name in known:
                    self._on_goodbye(known.pop(name))
                continue
            advert = await _advert_of(zeroconf, name)
            if advert is not None:
                known[name] = advert.node_id
                self._on_advert(advert)

    def _failed(self, error: Exception) -> None:
        text = f"nodes of this network aren't found by mDNS now: {error or type(error).__name__}"
        if text != self._failure:
            self._failure = text
            _logger.warning("%s; SKULK_BOOTSTRAP_PEERS names them without it", text)


async def browse_once(wait_s: float) -> tuple[Advert, ...]:
    """The nodes that answer within ``wait_s`` seconds; none where there is no network.

    Raises:
        OSError: mDNS can't be used here.
    """
    addresses = local_addresses()
    found: dict[str, Advert] = {}
    if not addresses:
        return ()
    try:
        async with _zeroconf(addresses) as zeroconf, _browsing(zeroconf.zeroconf) as names, asyncio.timeout(wait_s):
            while True:
                name, _ = await names.get()
                advert = await _advert_of(zeroconf.zeroconf, name)
                if advert is not None:
                    found[advert.node_id] = advert
    except TimeoutError:
        return tuple(found[node_id] for node_id in sorted(found))
    except ZeroconfError as error:
        raise OSError(str(error)) from error


@asynccontextmanager
async def _zeroconf(addresses: tuple[str, ...]) -> AsyncGenerator[AsyncZeroconf]:
    v4 = [address for address in addresses if ":" not in address]
    version = IPVersion.V4Only if v4 else IPVersion.V6Only
    zeroconf = AsyncZeroconf(interfaces=v4 or list(addresses), ip_version=version)
    try:
        yield zeroconf
    finally:
        # says goodbye for what was announced
        await zeroconf.async_close()


@asynccontextmanager
async def _browsing(zeroconf: Zeroconf) -> AsyncGenerator[_Names]:
    names: _Names = asyncio.Queue(MAX_NAMES)

    def changed(zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange) -> None:
        del zeroconf, service_type
        if not names.full():  # a word that is lost here comes again
            names.put_nowait((name, state_change))

    browser = AsyncServiceBrowser(zeroconf, SERVICE_TYPE, handlers=[changed])
    try:
        yield names
    finally:
        await browser.async_cancel()


async def _advert_of(zeroconf: Zeroconf, name: str) -> Advert | None:
    info = AsyncServiceInfo(SERVICE_TYPE, name)
    try:
        if not await info.async_request(zeroconf, RESOLVE_S * 1000):
            return None
    except (OSError, ZeroconfError) as error:
        _logger.debug("%s isn't resolved: %s", name, error)
        return None
    return read_advert({key: value or "" for key, value in info.decoded_properties.items()})


def _info(advert: Advert) -> AsyncServiceInfo:
    return AsyncServiceInfo(
        SERVICE_TYPE,
        f"{advert.node_id}.{SERVICE_TYPE}",
        port=advert.port,
        properties=txt_of(advert),
        server=f"skulk-{advert.node_id}.local.",
        addresses=[
            socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)
            for address in advert.addresses
        ],
    )
