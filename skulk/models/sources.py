"""Where bytes come from: the hub, or a neighbour of the cluster. Each fetches one run of chunks into a part file.

| source    | one run                                  | checked while it comes                                    |
|-----------|------------------------------------------|-----------------------------------------------------------|
| hub       | one ranged request of up to 16 chunks    | status, ``Content-Range``; 200 begins at byte 0           |
| neighbour | one chunk                                | status, ``Content-Range``, the chunk's sha256             |

The hash of the whole file is taken by `skulk.models.fetching`, whatever the source.
"""

from __future__ import annotations

import hashlib
import http.client
import re
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any, Final, Protocol
from urllib.parse import quote, urlsplit

import msgspec

from skulk.errors import RequestError, ServiceError, UnavailableError
from skulk.models.parts import PartFile, Run
from skulk.wire.model import ModelFile

HUB_CONNECTIONS: Final = 4
HUB_RUN: Final = 16
NEIGHBOUR_CONNECTIONS: Final = 2
NEIGHBOUR_SILENCE_S: Final = 20.0
CHUNK_HASH: Final = "X-Skulk-Chunk-Sha256"
_BLOCK: Final = 1024 * 1024
_CONTENT_RANGE: Final = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


class Source(Protocol):
    """One place that has the file.

    Attributes:
        name: for people.
        connections: how many runs it gives side by side.
        run_chunks: chunks of one run.
    """

    name: str
    connections: int
    run_chunks: int

    def fetch(self, file: ModelFile, part: PartFile, run: Run) -> None:
        """Fetches the chunks of a run and marks each when it is whole; what is marked stays after a failure.

        Raises:
            SkulkError: a retryable one may pass; any other means that this source hasn't the file.
        """
        ...


class HubContent(Protocol):
    """What is needed of `skulk.models.hub.Hub`."""

    def content(self, repo: str, revision: str, name: str, start: int, end: int) -> Any: ...


class HubSource:
    """The hub. A server that ignores ranges is read once from its first byte, by one thread alone."""

    name = "hub"

    def __init__(self, hub: HubContent, repo: str, revision: str, errors: tuple[type[Exception], ...] = ()) -> None:
        self.connections = HUB_CONNECTIONS
        self.run_chunks = HUB_RUN
        self._hub = hub
        self._repo = repo
        self._revision = revision
        self._errors = errors
        self._sweeping = threading.Lock()

    def fetch(self, file: ModelFile, part: PartFile, run: Run) -> None:
        start, end = part.span(run)
        with self._hub.content(self._repo, self._revision, file.name, start, end) as response:
            if response.status_code == 206:
                check_range(response.headers.get("content-range", ""), start, end, file, self.name)
                _write_stream(response.iter_raw(), part, start, end, file)
                return
            length = response.headers.get("content-length")
            if length is not None and int(length) != file.size_bytes:
                raise _changed(file, f"has {int(length):,} bytes now")
            # bytes that begin at 0 must never be put where the range was to begin
            if not self._sweeping.acquire(blocking=False):
                raise UnavailableError(
                    "hub_unreachable", f"the hub gives no ranges of {file.name}; one thread reads it"
                )
            try:
                self.connections = 1
                _write_stream(response.iter_raw(), part, 0, file.size_bytes, file)
            finally:
                self._sweeping.release()


def check_range(told: str, start: int, end: int, file: ModelFile, name: str) -> None:
    """Whether a 206 answer is the range that was asked for.

    Raises:
        ServiceError: ``download_failed``: it is another one, or of another file.
    """
    found = _CONTENT_RANGE.fullmatch(told)
    if found is None or (int(found[1]), int(found[2])) != (start, end - 1):
        raise ServiceError("download_failed", f"{name} answered with the range {told[:80]!r}, not {start}-{end - 1}.")
    if int(found[3]) != file.size_bytes:
        raise _changed(file, f"has {int(found[3]):,} bytes now")


def _changed(file: ModelFile, what: str) -> RequestError:
    return RequestError(
        "model_file_invalid",
        f"{file.name} {what}, not the {file.size_bytes:,} that are pinned; resolve the model again.",
    )


def _write_stream(blocks: Iterator[bytes], part: PartFile, start: int, end: int, file: ModelFile) -> None:
    """Writes a stream that begins at a chunk's begin; chunks that are whole already are passed over."""
    position = start
    for block in blocks:
        if position + len(block) > end:
            raise ServiceError("download_failed", f"more bytes of {file.name} came than were asked for.")
        view = memoryview(block)
        while view:
            index = position // part.chunk_bytes
            chunk_end = min((index + 1) * part.chunk_bytes, part.size_bytes)
            piece = view[: chunk_end - position]
            if not part.is_done(index):
                part.write(position, piece)
                if position + len(piece) == chunk_end:
                    part.mark(index)
            position += len(piece)
            view = view[len(piece) :]
    if position != end:
        raise UnavailableError("hub_unreachable", f"{file.name} ended {end - position:,} bytes early", retry_after_s=1)


class Neighbour(msgspec.Struct, frozen=True, kw_only=True):
    """A node of the cluster that serves weights.

    Attributes:
        url: ``http://host:port`` of its files port.
        credential: what it asks for; empty: nothing.
    """

    url: str
    credential: str = ""


class NeighbourSource:
    """One neighbour; keeps its connections. Any thread; close it."""

    def __init__(self, neighbour: Neighbour, model_id: str) -> None:
        self.name = neighbour.url
        self.connections = NEIGHBOUR_CONNECTIONS
        self.run_chunks = 1
        self._model_id = model_id
        self._neighbour = neighbour
        self._local = threading.local()
        self._idle: list[http.client.HTTPConnection] = []

    def listing(self) -> dict[str, ModelFile]:
        """The files of the model that it has, by name, each with its sha256; it may have to hash them first.

        Raises:
            SkulkError: it hasn't the model, or doesn't answer.
        """
        path = f"/v1/weights?model={quote(self._model_id, safe='')}"
        with self._get(path, {}, silence_s=600.0) as response:
            body = response.read(16 * 1024 * 1024)
            self._check(response.status)
        try:
            return {file.name: file for file in msgspec.json.decode(body, type=list[ModelFile])}
        except msgspec.DecodeError as error:
            raise ServiceError("download_failed", f"{self.name} told no list of files: {error}") from error

    def fetch(self, file: ModelFile, part: PartFile, run: Run) -> None:
        assert file.sha256 is not None, "files are named by their hash among neighbours"
        for index in range(run.first, run.last):
            start, end = part.span(Run(index, index + 1))
            headers = {"Range": f"bytes={start}-{end - 1}"}
            with self._get(f"/v1/content/{file.sha256}", headers, silence_s=NEIGHBOUR_SILENCE_S) as response:
                if response.status != 206:
                    response.read(64 * 1024)
                    self._check(response.status)
                    raise ServiceError("download_failed", f"{self.name} answered {response.status} to a range.")
                check_range(response.headers.get("Content-Range", ""), start, end, file, self.name)
                self._take(response, part, start, end)
            part.mark(index)

    def _take(self, response: http.client.HTTPResponse, part: PartFile, start: int, end: int) -> None:
        """One chunk into memory, hashed, and only then onto the disk."""
        view = memoryview(self._buffer(part.chunk_bytes))[: end - start]
        filled = 0
        digest = hashlib.sha256()
        while filled < len(view):
            length = response.readinto(view[filled : filled + _BLOCK])
            if not length:
                raise UnavailableError("unreachable", f"{self.name} ended {len(view) - filled:,} bytes early")
            digest.update(view[filled : filled + length])
            filled += length
        told = response.headers.get(CHUNK_HASH, "")
        if told != digest.hexdigest():
            raise ServiceError(
                "download_failed", f"{self.name} sent a chunk with the sha256 {digest.hexdigest()}, not {told[:64]}"
            )
        part.write(start, view)

    def _buffer(self, size: int) -> bytearray:
        buffer: bytearray | None = getattr(self._local, "buffer", None)
        if buffer is None or len(buffer) < size:
            buffer = self._local.buffer = bytearray(size)
        return buffer

    def _check(self, status: int) -> None:
        if status == 404:
            raise RequestError("model_not_found", f"{self.name} doesn't have {self._model_id}.")
        if status == 401:
            raise RequestError("unauthorized", f"{self.name} asks for another cluster token.")
        if status >= 400:
            raise ServiceError("download_failed", f"{self.name} answered {status}.")

    @contextmanager
    def _get(self, path: str, headers: dict[str, str], *, silence_s: float) -> Generator[http.client.HTTPResponse]:
        """A GET on a kept connection; anything but a body read to its end closes it."""
        connection = self._connection(silence_s)
        if self._neighbour.credential:
            headers = {**headers, "Authorization": f"Bearer {self._neighbour.credential}"}
        is_whole = False
        try:
            connection.request("GET", path, headers=headers)
            response = connection.getresponse()
            yield response
            is_whole = response.isclosed()
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = str(error) or type(error).__name__
            raise UnavailableError("unreachable", f"{self.name} doesn't answer: {reason}") from error
        finally:
            if is_whole:
                self._idle.append(connection)
            else:
                connection.close()

    def _connection(self, silence_s: float) -> http.client.HTTPConnection:
        try:
            connection = self._idle.pop()
        except IndexError:
            parts = urlsplit(self._neighbour.url)
            return http.client.HTTPConnection(parts.hostname or "", parts.port or 80, timeout=silence_s)
        connection.timeout = silence_s
        if connection.sock is not None:
            connection.sock.settimeout(silence_s)
        return connection

    def close(self) -> None:
        """Closes the connections that are kept."""
        while self._idle:
            self._idle.pop().close()
