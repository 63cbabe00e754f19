"""The cluster over HTTP, as every client sees it: which address, JSON calls, streams, and errors in one sentence.

--api URL  >  SKULK_API  >  the running node of <home>/node.json  >  http://127.0.0.1:52415 (or SKULK_API_PORT)
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, TypeAlias, TypeVar

import aiohttp
import msgspec
from yarl import URL

from skulk import __version__
from skulk.cli.node_file import read_node_file
from skulk.cli.sse import SseParser
from skulk.errors import ServiceError, SkulkError, StartError, error_of
from skulk.settings import Settings

T = TypeVar("T")
Method: TypeAlias = Literal["GET", "POST", "DELETE"]

DEFAULT_PORT: Final = 52415
CALL_TIMEOUT_S: Final = 30.0
PLACE_TIMEOUT_S: Final = 120.0
# Servers send a comment at least that often; more silence than this is a dead connection.
STREAM_SILENCE_S: Final = 120.0


class _ErrorObject(msgspec.Struct, frozen=True):
    message: str
    code: str | None = None
    param: str | None = None


class ErrorEnvelope(msgspec.Struct, frozen=True):
    """An error as the API tells it, in bodies and inside streams."""

    error: _ErrorObject

    def to_error(self) -> SkulkError:
        """The exception for it."""
        return error_of(self.error.code or "internal", self.error.message, param=self.error.param)


def target_url(settings: Settings) -> str:
    """The address of the cluster to talk to."""
    if settings.api_url:
        return settings.api_url
    node = read_node_file(Path(settings.home))
    if node is not None and node.api_url:
        return node.api_url
    return f"http://127.0.0.1:{settings.api_port or DEFAULT_PORT}"


def client_key(settings: Settings) -> str:
    """The key to show: of the first of ``SKULK_API_KEYS`` (``name:key``, ``key``, or a file of these as ``@path``).

    Raises:
        StartError: ``config_invalid``: the file can't be read.
    """
    for entry in settings.api_keys:
        if not entry.startswith("@"):
            return entry.partition(":")[2] or entry
        try:
            lines = Path(entry[1:]).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise StartError("config_invalid", f"The file of SKULK_API_KEYS can't be read: {error}") from error
        for line in lines:
            if line.strip() and not line.startswith("#"):
                return line.strip().partition(":")[2] or line.strip()
    return ""


def connect(settings: Settings, *, url: str | None = None) -> ApiClient:
    """A client of the cluster that the settings name, or of ``url``; use it as an async context manager."""
    return ApiClient(url or target_url(settings), client_key(settings))


class ApiClient:
    """Calls to one gateway. Every failure is a `SkulkError` whose text is a sentence for the terminal.

    Args:
        url: ``http://host:port``.
        key: sent as a bearer token; empty: none.
    """

    def __init__(self, url: str, key: str = "") -> None:
        self.url: Final = url
        self._key = key
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> ApiClient:
        headers = {"User-Agent": f"skulk/{__version__}"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        self._session = aiohttp.ClientSession(headers=headers)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._session is not None
        await self._session.close()

    async def get(self, path: str, kind: type[T], *, query: Mapping[str, str | list[str]] | None = None) -> T:
        """GET ``path`` as a ``kind``.

        Raises:
            SkulkError: what the API answered; ``cluster_not_reached``.
        """
        return await self._json("GET", self._address(path, query), kind)

    async def post(self, path: str, body: Any, kind: type[T], *, timeout_s: float = CALL_TIMEOUT_S) -> T:
        """POST a JSON body; raises as `get`."""
        return await self._json("POST", self._address(path), kind, body=body, timeout_s=timeout_s)

    async def delete(self, path: str, kind: type[T], *, query: Mapping[str, str | list[str]] | None = None) -> T:
        """DELETE ``path``; raises as `get`."""
        return await self._json("DELETE", self._address(path, query), kind)

    async def stream(self, path: str, body: Any) -> AsyncGenerator[str]:
        """POST a JSON body and yield the ``data`` of each server-sent event; ends with ``[DONE]`` or the connection.

        Raises:
            SkulkError: what the API answered before or in the stream; ``stream_lost``; ``cluster_not_reached``.
        """
        limits = aiohttp.ClientTimeout(total=None, sock_connect=CALL_TIMEOUT_S, sock_read=STREAM_SILENCE_S)
        parser = SseParser()
        async with self._request("POST", self._address(path), body, limits) as response:
            async for part in response.content.iter_any():
                try:
                    events = parser.feed(part)
                except ValueError as error:
                    raise self._not_skulk() from error
                for event in events:
                    if event == "[DONE]":
                        return
                    _raise_if_error(event)
                    yield event
        raise ServiceError("stream_lost", f"{self.url} closed the connection before the answer was complete.")

    def _address(self, path: str, query: Mapping[str, str | list[str]] | None = None) -> URL:
        pairs = [
            (name, item)
            for name, value in (query or {}).items()
            for item in ([value] if isinstance(value, str) else value)
        ]
        return URL(self.url).joinpath(path.lstrip("/")).with_query(pairs)

    async def _json(
        self, method: Method, url: URL, kind: type[T], *, body: Any = None, timeout_s: float = CALL_TIMEOUT_S
    ) -> T:
        async with self._request(method, url, body, aiohttp.ClientTimeout(total=timeout_s)) as response:
            answer = await response.read()
        try:
            return msgspec.json.decode(answer, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise self._not_skulk() from error

    @asynccontextmanager
    async def _request(
        self, method: Method, url: URL, body: Any, limits: aiohttp.ClientTimeout
    ) -> AsyncGenerator[aiohttp.ClientResponse]:
        assert self._session is not None, "use it as a context manager"
        data = None if body is None else msgspec.json.encode(body)
        headers = {} if data is None else {"Content-Type": "application/json"}
        try:
            async with self._session.request(method, url, data=data, headers=headers, timeout=limits) as response:
                if response.status >= 400:
                    raise self._told(response.status, await response.read())
                yield response
        except TimeoutError as error:
            raise StartError(
                "cluster_not_reached", f"{self.url} didn't answer in time; `skulk doctor` on that machine may tell why."
            ) from error
        except aiohttp.ClientConnectorError as error:
            raise StartError(
                "cluster_not_reached",
                f"No cluster answers at {self.url}: start one with `skulk up`, or name another with --api.",
            ) from error
        except (aiohttp.ClientError, aiohttp.InvalidURL) as error:
            raise ServiceError(
                "stream_lost", f"The connection to {self.url} broke ({type(error).__name__}); try again."
            ) from error

    def _told(self, status: int, body: bytes) -> SkulkError:
        try:
            return msgspec.json.decode(body, type=ErrorEnvelope).to_error()
        except (msgspec.DecodeError, UnicodeDecodeError):
            return self._not_skulk(f" (status {status})")

    def _not_skulk(self, detail: str = "") -> SkulkError:
        return StartError(
            "cluster_not_reached",
            f"What answers at {self.url} doesn't speak Skulk's API{detail}; name the cluster with --api.",
        )


def _raise_if_error(event: str) -> None:
    """An error inside a stream is an object of the same form as an error of a body."""
    if '"error"' not in event:
        return
    try:
        envelope = msgspec.json.decode(event.encode(), type=ErrorEnvelope)
    except msgspec.DecodeError:
        return
    raise envelope.to_error()
