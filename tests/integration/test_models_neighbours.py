"""Weights from neighbours: before the hub, by hash, in chunks that are checked one by one, never by a path."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from skulk.errors import SkulkError, UnavailableError
from skulk.models.catalogue import Catalogue
from skulk.models.fetching import Fetch, Limits
from skulk.models.file_server import FileServer, files_credential
from skulk.models.hub import Hub
from skulk.models.listening import listening
from skulk.models.shelf import Shelf
from skulk.models.sources import CHUNK_HASH, HubSource, Neighbour, NeighbourSource
from skulk.wire.model import ModelCard, ModelFile
from tests.support.gguf import TENSORS, Tensor, gguf_bytes, llama_metadata
from tests.support.hub import COMMIT, SmallHub

REPO = "org/m"
CHUNK = 64 * 1024
LIMITS = Limits(chunk_bytes=CHUNK, attempts=3, wait_s=0.01, disk_margin_bytes=0)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def noise_model(seed: int = 1, size: int = 1_000_000) -> bytes:
    body = bytearray(gguf_bytes(llama_metadata(), (*TENSORS, Tensor("noise", (size // 4,), 0))))
    noise = random.Random(seed).randbytes(size // 4 * 4)
    body[-len(noise) :] = noise
    return bytes(body)


BODY = noise_model()
SHA = hashlib.sha256(BODY).hexdigest()


def card_of(sha256: str | None = SHA, model_id: str = REPO) -> ModelCard:
    return ModelCard(
        model_id=model_id,
        name="m",
        family="llama",
        backends=("fake-cpu",),
        files=(ModelFile(name="m.gguf", size_bytes=len(BODY), sha256=sha256),),
        context_length=10,
        weights_bytes=1,
        kv_bytes_per_token=1,
        repo=REPO,
        revision=COMMIT,
    )


class Served:
    """A neighbour's files port. ``spoil``: replaces what it answers."""

    def __init__(self, folder: Path, credential: str) -> None:
        self.catalogue = Catalogue(folder, verified_file=folder / "verified.json")
        self.catalogue.rescan()
        self.server = FileServer(self.catalogue, credential)
        self.url = ""
        self.spoil: Callable[[web.StreamResponse], None] = lambda _: None
        self.paths: list[str] = []

    @web.middleware
    async def _spoiling(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        self.paths.append(request.path)
        response = await handler(request)
        self.spoil(response)
        return response


def put_model(folder: Path, body: bytes, *, pinned: bool) -> None:
    """Lays the model into a models folder."""
    if pinned:
        Shelf(folder).keep(card_of(), 1.0)
    path = folder / "org" / "m" / "m.gguf"
    path.parent.mkdir(parents=True)
    path.write_bytes(body)


@asynccontextmanager
async def serving(folder: Path, *, body: bytes = BODY, pinned: bool = True, token: str = "") -> AsyncGenerator[Served]:
    """A node that has the model and serves it."""
    put_model(folder, body, pinned=pinned)
    served = Served(folder, files_credential(token))
    app = served.server.app()
    app.middlewares.insert(0, served._spoiling)
    async with listening(app, "127.0.0.1", 0) as (host, port):
        served.url = f"http://{host}:{port}"
        yield served


def fetch_to(
    folder: Path, *served: Served, hub: SmallHub | None = None, token: str = "", card: ModelCard | None = None
) -> Fetch:
    wanted = card or card_of()
    neighbours = [NeighbourSource(Neighbour(url=one.url, credential=files_credential(token)), REPO) for one in served]
    source = None if hub is None else HubSource(Hub(endpoint=hub.url), REPO, COMMIT)
    return Fetch(
        wanted,
        folder / "org" / "m",
        folder / ".parts",
        neighbours=neighbours,
        hub=source,
        no_hub="hub off",
        limits=LIMITS,
    )


def got(folder: Path) -> bytes:
    return (folder / "org" / "m" / "m.gguf").read_bytes()


async def run(fetch: Fetch) -> tuple[ModelFile, ...]:
    return await asyncio.to_thread(fetch.run)


async def test_a_neighbour_is_asked_before_the_hub(tmp_path: Path) -> None:
    with SmallHub() as hub:
        hub.add(REPO, {"m.gguf": BODY})
        async with serving(tmp_path / "a") as neighbour:
            fetch = fetch_to(tmp_path / "b", neighbour, hub=hub)
            await run(fetch)
        assert got(tmp_path / "b") == BODY
        assert hub.seen == []
        assert fetch.progress().sources == (neighbour.url,)


async def test_several_neighbours_give_together(tmp_path: Path) -> None:
    async with serving(tmp_path / "a") as first, serving(tmp_path / "c") as second:
        fetch = fetch_to(tmp_path / "b", first, second)
        await run(fetch)
        assert got(tmp_path / "b") == BODY
        assert fetch.progress().sources == tuple(sorted((first.url, second.url)))
        chunks = [path for path in (*first.paths, *second.paths) if path.startswith("/v1/content/")]
        assert len(chunks) == -(-len(BODY) // CHUNK)


async def test_a_chunk_that_is_not_what_its_hash_says_is_taken_from_another(tmp_path: Path) -> None:
    async with serving(tmp_path / "a") as bad, serving(tmp_path / "c") as good:

        def lie(response: web.StreamResponse) -> None:
            if CHUNK_HASH in response.headers:
                response.headers[CHUNK_HASH] = "0" * 64

        bad.spoil = lie
        fetch = fetch_to(tmp_path / "b", bad, good)
        await run(fetch)
        assert got(tmp_path / "b") == BODY
        assert fetch.progress().sources == (good.url,)


async def test_a_neighbour_with_other_bytes_loses_to_the_hub(tmp_path: Path) -> None:
    other = bytearray(BODY)
    other[len(BODY) // 2] ^= 1
    with SmallHub() as hub:
        hub.add(REPO, {"m.gguf": BODY})
        async with serving(tmp_path / "a", body=bytes(other)) as neighbour:
            await run(fetch_to(tmp_path / "b", neighbour, hub=hub))
            assert got(tmp_path / "b") == BODY
        async with serving(tmp_path / "c", body=bytes(other)) as neighbour:
            with pytest.raises(SkulkError, match="came with the sha256"):
                await run(fetch_to(tmp_path / "d", neighbour))
            assert not (tmp_path / "d" / "org").exists()


async def test_a_neighbour_that_goes_away_leaves_the_rest_to_the_hub(tmp_path: Path) -> None:
    with SmallHub() as hub:
        hub.add(REPO, {"m.gguf": BODY})
        async with serving(tmp_path / "a") as neighbour:
            count = 0

            def go(response: web.StreamResponse) -> None:
                nonlocal count
                count += CHUNK_HASH in response.headers
                if count > 4:
                    raise web.HTTPInternalServerError

            neighbour.spoil = go
            fetch = fetch_to(tmp_path / "b", neighbour, hub=hub)
            await run(fetch)
        assert got(tmp_path / "b") == BODY
        assert fetch.progress().sources == (neighbour.url, "hub") or fetch.progress().sources == ("hub", neighbour.url)
        # what the neighbour gave was not fetched again
        assert hub.sent_bytes <= len(BODY) - 3 * CHUNK


async def test_a_file_without_a_pin_is_hashed_by_who_has_it(tmp_path: Path) -> None:
    async with serving(tmp_path / "a", pinned=False) as neighbour:
        files = await run(fetch_to(tmp_path / "b", neighbour, card=card_of(None)))
    assert got(tmp_path / "b") == BODY
    assert files[0].sha256 == SHA


async def test_the_cluster_s_token_is_asked_for_and_never_sent(tmp_path: Path) -> None:
    async with serving(tmp_path / "a", token="s3cret") as neighbour:
        with pytest.raises(UnavailableError, match="no node of the cluster gives org/m, and hub off"):
            await run(fetch_to(tmp_path / "b", neighbour))
        with pytest.raises(UnavailableError):
            await run(fetch_to(tmp_path / "b", neighbour, token="other"))
        await run(fetch_to(tmp_path / "b", neighbour, token="s3cret"))
        assert got(tmp_path / "b") == BODY
        assert "s3cret" not in files_credential("s3cret")


@pytest.mark.parametrize(
    "path",
    ["/v1/content/../../etc/passwd", "/v1/content/%2e%2e%2fetc%2fpasswd", f"/v1/content/{'0' * 64}", "/org/m/m.gguf",
     "/v1/weights?model=../../etc", "/v1/weights?model=/etc/passwd", "/v1/weights?model=", "/v1/weights", "/",
     "/v1/content/" + "A" * 64, "/.cards/x.json", "/v1/weights?model=org/m/m.gguf"],
)  # fmt: skip
async def test_nothing_but_known_models_is_served(tmp_path: Path, path: str) -> None:
    async with serving(tmp_path / "a") as neighbour, aiohttp.ClientSession() as session:
        async with session.get(neighbour.url + path) as response:
            assert response.status == 404
            assert BODY[:16] not in await response.read()


async def test_it_is_read_only_and_ranges_are_kept_within_the_file(tmp_path: Path) -> None:
    async with serving(tmp_path / "a") as neighbour, aiohttp.ClientSession() as session:
        url = f"{neighbour.url}/v1/content/{SHA}"
        for method in ("PUT", "POST", "DELETE"):
            async with session.request(method, url) as response:
                assert response.status == 405
        async with session.get(url, headers={"Range": f"bytes={len(BODY)}-"}) as response:
            assert response.status == 416
        async with session.get(url, headers={"Range": "bytes=9-3"}) as response:
            assert response.status == 416
        async with session.get(url, headers={"Range": "bytes=10-19"}) as response:
            assert (response.status, await response.read()) == (206, BODY[10:20])
            assert response.headers[CHUNK_HASH] == hashlib.sha256(BODY[10:20]).hexdigest()
        async with session.get(url) as response:
            assert (response.status, await response.read()) == (200, BODY)


async def test_a_model_that_came_since_the_start_is_served(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    served = Served(folder, "")
    async with listening(served.server.app(), "127.0.0.1", 0) as (host, port):
        put_model(folder, BODY, pinned=False)
        found = NeighbourSource(Neighbour(url=f"http://{host}:{port}"), REPO)
        listing = await asyncio.to_thread(found.listing)
        found.close()
    assert listing == {"m.gguf": ModelFile(name="m.gguf", size_bytes=len(BODY), sha256=SHA)}
