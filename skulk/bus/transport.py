"""What lies under the typed bus: subjects as text, bodies as bytes, headers as text. Two implementations, few words.

Everything above (ids, JSON, answers, services, parcels, streams) is written once, over this.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final, Protocol

import msgspec

from skulk.bus.port import BusState, Subscription
from skulk.errors import RequestError, UnavailableError
from skulk.units import format_bytes

REMAINING_MS: Final = "Skulk-Remaining-Ms"
PARCEL: Final = "Skulk-Parcel"
MESSAGE_ID: Final = "Nats-Msg-Id"
SERVICE_ERROR: Final = "Nats-Service-Error"
SERVICE_ERROR_CODE: Final = "Nats-Service-Error-Code"
STATUS: Final = "Status"
NO_RESPONDERS: Final = "503"

NO_HEADERS: Final[Mapping[str, str]] = MappingProxyType({})

_FRAME: Final = len("NATS/1.0\r\n") + len("\r\n")
_LINE: Final = len(": \r\n")


class Raw(msgspec.Struct, frozen=True, gc=False):
    """A message as it crosses the wire. ``reply``: where an answer goes; ``""`` where none is expected."""

    subject: str
    body: bytes
    reply: str = ""
    headers: Mapping[str, str] = NO_HEADERS


Receive = Callable[[Raw], None]

_logger = logging.getLogger(__name__)


class ConnectionState:
    """The state of a connection and who is told of its changes."""

    def __init__(self, state: BusState) -> None:
        self._state: BusState = state
        self._callbacks: dict[object, Callable[[BusState], None]] = {}

    @property
    def now(self) -> BusState:
        return self._state

    def tell(self, callback: Callable[[BusState], None]) -> Callable[[], None]:
        """Calls ``callback`` at each change until what is returned is called."""
        key = object()
        self._callbacks[key] = callback

        def end() -> None:
            self._callbacks.pop(key, None)

        return end

    def change(self, state: BusState) -> None:
        if state == self._state:
            return
        self._state = state
        for callback in tuple(self._callbacks.values()):
            try:
                callback(state)
            except Exception:  # the border: one listener's defect doesn't keep the others from hearing
                _logger.exception("a listener to the bus's state failed")


class Transport(Protocol):
    """A connection that moves raw messages and survives its breaks.

    Subscriptions are kept over breaks. Nothing is buffered while disconnected.
    """

    @property
    def state(self) -> BusState: ...

    @property
    def heard_at(self) -> float: ...

    @property
    def max_payload(self) -> int: ...

    def on_state(self, callback: Callable[[BusState], None]) -> Callable[[], None]: ...

    async def publish(self, message: Raw) -> None:
        """Hands one message to the server.

        Raises:
            UnavailableError: ``bus_disconnected``.
        """
        ...

    async def subscribe(self, subject: str, receive: Receive, *, queue: str = "") -> Subscription: ...

    async def close(self) -> None: ...


def one_line(text: str, limit: int = 400) -> str:
    """``text`` as a header value: one line, at most ``limit`` characters."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def encoded_headers_size(headers: Mapping[str, str]) -> int:
    """Bytes that headers take on the wire; none take none."""
    if not headers:
        return 0
    return _FRAME + sum(len(name.encode()) + len(value.encode()) + _LINE for name, value in headers.items())


def check_size(message: Raw, max_payload: int) -> None:
    """Refuses what the server would answer by closing the connection.

    Raises:
        RequestError: ``message_too_large``, with both numbers.
    """
    headers_size = encoded_headers_size(message.headers)
    size = headers_size + len(message.body)
    if size > max_payload:
        raise RequestError(
            "message_too_large",
            f"a message of {size} bytes ({headers_size} of them headers) for {message.subject} is over the bus's limit "
            f"of {max_payload} bytes ({format_bytes(max_payload)}): send less at once",
        )


def disconnected(why: str) -> UnavailableError:
    """The error of everything that needs a connection that isn't there."""
    return UnavailableError("bus_disconnected", f"there is no connection to the bus now ({why}): try again")
