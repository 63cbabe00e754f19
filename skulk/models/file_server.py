"""Serves this node's weights to its neighbours over HTTP: reads only, by hash, never by path.

    GET /v1/weights?model=<id>      the files of a model that lies here whole: [{name, size_bytes, sha256}]
    GET /v1/content/<sha256>        a file's bytes; ranges; `X-Skulk-Chunk-Sha256` for a range of up to 64 MiB

| who asks                      | gets                                                                                |
|-------------------------------|-------------------------------------------------------------------------------------|
| without the cluster's token   | 401, where the cluster has one                                                      |
| for an id that nobody knows   | 404                                                                                 |
| for a hash of no known file   | 404: what is served is looked up in the catalogue, a path is never made of a request |

A chunk is read and hashed in a thread and then sent by the kernel (`sendfile`), so it comes out of the page cache.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import os
from collections import OrderedDict
from pathlib import Path
from typing import Final

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler

from skulk.errors import RequestError
from skulk.models.catalogue import Catalogue, CatalogueEntry
from skulk.models.sources import CHUNK_HASH
from skulk.wire.model import ModelFile

log = logging.getLogger("skulk.files")

MAX_HASHED_RANGE: Final = 64 * 1024 * 1024
MAX_HASHES: Final = 100_000
RESCAN_S: Final = 5.0
_BLOCK: Final = 1024 * 1024


def files_credential(token: str) -> str:
    """What a neighbour shows in place of the cluster's token, which never crosses the wire; empty without one."""
    return hmac.new(token.encode(), b"skulk files v1", hashlib.sha256).hexdigest() if token else ""


class FileServer:
    """The handlers. Single event loop; hashing and scanning in threads.

    Args:
        credential: what callers must show; empty: nothing.
    """

    def __init__(self, catalogue: Catalogue, credential: str = "") -> None:
        self._catalogue = catalogue
        self._credential = credential
        self._by_digest: dict[str, Path] = {}
        self._chunks: OrderedDict[tuple[str, int, int, int], str] = OrderedDict()
        self._scanned_at = 0.0
        self._scanning = asyncio.Lock()
        self._hashing = asyncio.Lock()

    def app(self) -> web.Application:
        """The application; it has no other routes."""
        app = web.Application(middlewares=[self._guard])
        app.router.add_get("/v1/weights", self._weights)
        app.router.add_get("/v1/content/{digest:[0-9a-f]{64}}", self._content)
        return app

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if self._credential:
            shown = request.headers.get("Authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(shown.encode(), self._credential.encode()):
                return web.json_response({"error": "this cluster has a token"}, status=401)
        return await handler(request)

    async def _weights(self, request: web.Request) -> web.Response:
        model_id = request.query.get("model", "")
        entry = await self._find(model_id)
        if entry is None or not entry.is_held:
            return web.json_response({"error": "no such model lies here"}, status=404)
        # one after the other: two would only share the disk
        async with self._hashing:
            try:
                files = await asyncio.to_thread(self._with_digests, entry)
            except RequestError as error:
                log.warning("%s is not served: %s", model_id, error)
                return web.json_response({"error": error.detail}, status=404)
        for file, path in zip(files, entry.all_paths, strict=True):
            assert file.sha256 is not None
            self._by_digest[file.sha256] = path
        return web.Response(body=msgspec.json.encode(files), content_type="application/json")

    async def _find(self, model_id: str) -> CatalogueEntry | None:
        """The entry of a known id; one that isn't known is looked for once more, every 5 s at most."""
        for _ in range(2):
            try:
                return self._catalogue.find(model_id)
            except RequestError:
                if not await self._rescan():
                    return None
        return None

    async def _rescan(self) -> bool:
        """Whether the folders were looked at anew."""
        async with self._scanning:
            now = asyncio.get_running_loop().time()
            if self._scanned_at and now - self._scanned_at < RESCAN_S:
                return False
            await asyncio.to_thread(self._catalogue.rescan)
            self._scanned_at = now
            return True

    def _with_digests(self, entry: CatalogueEntry) -> tuple[ModelFile, ...]:
        """The files with the hash of each: the pinned one, else the one that was taken, else taken now."""
        if all(file.sha256 is not None for file in entry.card.all_files):
            return entry.card.all_files
        digests = self._catalogue.verify(entry)
        return tuple(
            msgspec.structs.replace(file, sha256=digest)
            for file, digest in zip(entry.card.all_files, digests, strict=True)
        )

    async def _content(self, request: web.Request) -> web.StreamResponse:
        digest = request.match_info["digest"]
        path = self._by_digest.get(digest) or await self._path_of(digest)
        if path is None:
            return web.json_response({"error": "no such file lies here"}, status=404)
        headers: dict[str, str] = {}
        try:
            asked = request.http_range
        except ValueError:
            return web.json_response({"error": "the range can't be read"}, status=416)
        start, stop = asked.start, asked.stop
        if start is not None and stop is not None and 0 <= start < stop and stop - start <= MAX_HASHED_RANGE:
            try:
                headers[CHUNK_HASH] = await self._chunk_hash(path, start, stop)
            except OSError:
                self._by_digest.pop(digest, None)
                return web.json_response({"error": "no such file lies here"}, status=404)
        return web.FileResponse(path, headers=headers, chunk_size=_BLOCK)

    async def _path_of(self, digest: str) -> Path | None:
        """A file of the catalogue by its pinned or known hash."""
        for _ in range(2):
            for entry in self._catalogue.entries():
                if not entry.is_held:
                    continue
                for file, path in zip(entry.card.all_files, entry.all_paths, strict=True):
                    if digest in (file.sha256, self._catalogue.known_digest(path)):
                        self._by_digest[digest] = path
                        return path
            if not await self._rescan():
                return None
        return None

    async def _chunk_hash(self, path: Path, start: int, stop: int) -> str:
        """The sha256 of a part of a file as it is now; taken once."""
        modified_ns = os.stat(path).st_mtime_ns
        key = (str(path), modified_ns, start, stop)
        known = self._chunks.get(key)
        if known is None:
            known = await asyncio.to_thread(_hash_part, path, start, stop)
            self._chunks[key] = known
            while len(self._chunks) > MAX_HASHES:
                self._chunks.popitem(last=False)
        return known


def _hash_part(path: Path, start: int, stop: int) -> str:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_BLOCK))
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        position = start
        while position < stop:
            length = os.preadv(file, [buffer[: min(_BLOCK, stop - position)]], position)
            if not length:
                break
            digest.update(buffer[:length])
            position += length
    finally:
        os.close(file)
    return digest.hexdigest()
