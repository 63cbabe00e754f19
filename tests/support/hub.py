"""A small hub on real sockets in a thread of its own: the API that huggingface_hub's client speaks, and its failures.

    GET  /api/models/{org}/{repo}[/revision/{rev}]      model info: id, sha, tags
    GET  /api/models/{org}/{repo}/tree/{rev}?recursive  the list, in pages (Link: rel="next")
    GET  /api/models?search=                            search
    HEAD, GET /{org}/{repo}/resolve/{rev}/{name}        small files at once; large ones by a redirect to the store
    GET  <store>/{sha256}                               the content, on another origin (another port), with ranges

The real hub serves many of these files through Xet too; our client asks for plain ranges, so Xet plays no part here.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import threading
from collections.abc import Callable
from functools import lru_cache
from types import TracebackType
from typing import Any, Final

from aiohttp import web

START_S: Final = 10.0
LARGE: Final = 4096
COMMIT: Final = "c0ffee" + "0" * 34
_RANGE: Final = re.compile(r"bytes=(\d+)-(\d*)")


class HubRepository:
    """One repository. ``gated``: its list is public, its content isn't; ``moved_to``: its new name."""

    def __init__(self, files: dict[str, bytes], *, tags: tuple[str, ...] = (), commit: str = COMMIT) -> None:
        self.files = files
        self.tags = tags
        self.commit = commit
        self.gated = False
        self.private = False
        self.moved_to = ""


class Seen:
    """One call that came in."""

    def __init__(self, request: web.Request) -> None:
        self.method = request.method
        self.path = request.path
        self.range = request.headers.get("Range", "")
        self.authorization = request.headers.get("Authorization", "")


class SmallHub:
    """Set what it has and how it fails, look at what it was asked.

    Attributes:
        page_size: entries of one page of a list.
        busy: how many of the next calls get 429.
        broken: how many of the next calls for content get 500.
        ignores_ranges: content is always sent whole, with 200.
        lies_about_ranges: 206 with a range that wasn't asked for.
        cuts_after: content ends after so many bytes of an answer, the connection is cut; None: never.
        cuts: how many answers are cut; each counts one down.
        spoiled: names whose content has a wrong byte.
        stalls: content stops after 64 KiB, the connection stays open, while this is set.
        block_bytes: content is sent in blocks of so many bytes.
        on_block: called with the bytes of content sent so far, after each block; may block the sender by raising.
        sent: bytes of content sent, by name.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, HubRepository] = {}
        self.page_size = 1000
        self.busy = 0
        self.retry_after = "7"
        self.broken = 0
        self.ignores_ranges = False
        self.lies_about_ranges = False
        self.cuts_after: int | None = None
        self.cuts = 0
        self.spoiled: set[str] = set()
        self.stalls = False
        self.block_bytes = 65_536
        self.on_block: Callable[[int], None] = lambda _: None
        self.pace_s = 0.0
        self.sent: dict[str, int] = {}
        self.seen: list[Seen] = []
        self.url = ""
        self.store_url = ""
        self._total = 0
        self._thread = threading.Thread(target=self._run, name="small-hub")
        self._started = threading.Event()

    def __enter__(self) -> SmallHub:
        self._thread.start()
        assert self._started.wait(START_S)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(START_S)
        assert not self._thread.is_alive()

    def add(self, repo: str, files: dict[str, bytes], **rest: Any) -> HubRepository:
        """A repository with these files."""
        self.repositories[repo] = repository = HubRepository(files, **rest)
        return repository

    @property
    def content_calls(self) -> list[Seen]:
        """The calls to the store."""
        return [seen for seen in self.seen if seen.path.startswith("/store/") or "/resolve/" in seen.path]

    @property
    def sent_bytes(self) -> int:
        """Bytes of content sent so far."""
        return self._total

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        hub = web.Application(middlewares=[self._note])
        hub.router.add_get("/api/models", self._search)
        hub.router.add_get("/api/models/{org}/{repo}", self._info)
        hub.router.add_get("/api/models/{org}/{repo}/revision/{revision}", self._info)
        hub.router.add_get("/api/models/{org}/{repo}/tree/{revision}", self._tree)
        hub.router.add_route("*", "/{org}/{repo}/resolve/{revision}/{name:.+}", self._resolve)
        store = web.Application(middlewares=[self._note])
        store.router.add_get("/store/{digest}", self._store)
        runners = [web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1) for app in (hub, store)]
        for runner in runners:
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.url, self.store_url = (f"http://127.0.0.1:{runner.addresses[0][1]}" for runner in runners)
        self._started.set()
        await self._stop.wait()
        for runner in runners:
            await runner.cleanup()

    @web.middleware
    async def _note(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self.seen.append(Seen(request))
        if self.busy:
            self.busy -= 1
            return web.Response(status=429, headers={"Retry-After": self.retry_after}, text="slow down")
        return await handler(request)

    def _find(self, request: web.Request) -> tuple[str, HubRepository]:
        name = f"{request.match_info['org']}/{request.match_info['repo']}"
        found = self.repositories.get(name)
        if found is None or (found.private and not request.headers.get("Authorization")):
            raise web.HTTPNotFound(headers={"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        if found.moved_to:
            raise web.HTTPTemporaryRedirect(request.path_qs.replace(name, found.moved_to, 1))
        revision = request.match_info.get("revision", "main")
        if revision not in ("main", found.commit):
            raise web.HTTPNotFound(headers={"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
        return name, found

    async def _info(self, request: web.Request) -> web.Response:
        name, found = self._find(request)
        siblings = [{"rfilename": file} for file in found.files]
        return web.json_response(
            {
                "id": name,
                "modelId": name,
                "sha": found.commit,
                "tags": list(found.tags),
                "siblings": siblings,
                "gated": "manual" if found.gated else False,
                "private": found.private,
                "downloads": 3,
                "likes": 1,
            }
        )

    async def _search(self, request: web.Request) -> web.Response:
        words = request.query.get("search", "").lower()
        found = [name for name in self.repositories if words in name.lower()]
        return web.json_response(
            [{"id": name, "modelId": name, "tags": ["gguf"], "downloads": 5, "likes": 2} for name in found]
        )

    async def _tree(self, request: web.Request) -> web.Response:
        _, found = self._find(request)
        entries = [_entry(name, body) for name, body in sorted(found.files.items())]
        start = int(request.query.get("cursor", "0"))
        headers = {}
        if start + self.page_size < len(entries):
            following = request.url.update_query(cursor=str(start + self.page_size))
            headers["Link"] = f'<{following}>; rel="next"'
        return web.json_response(entries[start : start + self.page_size], headers=headers)

    async def _resolve(self, request: web.Request) -> web.StreamResponse:
        _, found = self._find(request)
        if found.gated and not request.headers.get("Authorization"):
            raise web.HTTPUnauthorized(headers={"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        name = request.match_info["name"]
        body = found.files.get(name)
        if body is None:
            raise web.HTTPNotFound(headers={"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})
        digest = _sha256(body)
        headers = {"X-Repo-Commit": found.commit, "ETag": f'"{_git_oid(body)}"'}
        if len(body) < LARGE:
            return await self._send(request, name, body, headers)
        headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(body))}
        raise web.HTTPFound(f"{self.store_url}/store/{digest}?name={name}", headers=headers)

    async def _store(self, request: web.Request) -> web.StreamResponse:
        digest, name = request.match_info["digest"], request.query["name"]
        found = (body for repository in self.repositories.values() for body in repository.files.values())
        body = next(body for body in found if _sha256(body) == digest)
        if name in self.spoiled:
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        return await self._send(request, name, body, {"ETag": f'"{digest}"'})

    async def _send(self, request: web.Request, name: str, body: bytes, headers: dict[str, str]) -> web.StreamResponse:
        if self.broken:
            self.broken -= 1
            return web.Response(status=500, text="broken")
        asked = _RANGE.fullmatch(request.headers.get("Range", ""))
        status, start, end = 200, 0, len(body)
        if asked is not None and not self.ignores_ranges:
            status, start = 206, int(asked[1])
            end = min(len(body), int(asked[2]) + 1) if asked[2] else len(body)
            if self.lies_about_ranges:
                start += 1
            headers = {**headers, "Content-Range": f"bytes {start}-{end - 1}/{len(body)}"}
        response = web.StreamResponse(status=status, headers=headers)
        response.content_length = end - start
        await response.prepare(request)
        if request.method == "HEAD":
            return response
        await self._send_blocks(request, response, name, body[start:end])
        return response

    async def _send_blocks(self, request: web.Request, response: web.StreamResponse, name: str, body: bytes) -> None:
        for position in range(0, len(body), self.block_bytes):
            block = body[position : position + self.block_bytes]
            if self.cuts_after is not None and position + len(block) > self.cuts_after and self.cuts > 0:
                self.cuts -= 1
                self._count(name, max(0, self.cuts_after - position))
                await response.write(block[: max(0, self.cuts_after - position)])
                assert request.transport is not None
                request.transport.abort()
                return
            # before it is sent: whoever has all of it finds all of it counted
            self._count(name, len(block))
            await response.write(block)
            self.on_block(self._total)
            while True:
                if not self.stalls:
                    break
                await asyncio.sleep(0.02)
            if self.pace_s:
                await asyncio.sleep(self.pace_s)

    def _count(self, name: str, length: int) -> None:
        self.sent[name] = self.sent.get(name, 0) + length
        self._total += length


@lru_cache(maxsize=64)
def _sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


@lru_cache(maxsize=64)
def _git_oid(body: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


def _entry(name: str, body: bytes) -> dict[str, Any]:
    """A file as the tree lists it: large ones are LFS objects, with their sha256."""
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(body), "oid": _git_oid(body)}
    if len(body) >= LARGE:
        entry["lfs"] = {"oid": _sha256(body), "size": len(body), "pointerSize": 134}
    return entry
