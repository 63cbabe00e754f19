"""The store service over the bus: what is removed and what isn't, what verifying finds, who may ask the hub."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from skulk.bus.memory_bus import MemoryBus, MemoryHub
from skulk.bus.subjects import (
    STORE_ADD,
    STORE_PULL,
    STORE_REMOVE,
    STORE_RESOLVE,
    STORE_SEARCH,
    STORE_STOP,
    STORE_VERIFY,
)
from skulk.errors import SkulkError
from skulk.models.catalogue import Catalogue
from skulk.models.fetching import Progress
from skulk.models.parts import file_digest
from skulk.models.shelf import Shelf
from skulk.models.tasks import FetchTask, ResolveTask, SearchTask, with_files
from skulk.node.downloads import Downloads, Rules
from skulk.node.store import Store
from skulk.wire.model import ModelCard, ModelFile
from skulk.wire.store import (
    AddModel,
    CancelPull,
    FoundModel,
    FoundModels,
    PullModel,
    RemoveModel,
    ResolveModel,
    SearchModels,
    VerifyModel,
)
from tests.support.gguf import TENSORS, gguf_bytes, llama_metadata, write_model
from tests.support.states import card

BODY = gguf_bytes(llama_metadata(), TENSORS)
FAR = msgspec.structs.replace(
    card("org/far"), files=(ModelFile(name="m.gguf", size_bytes=len(BODY)),), repo="org/far", revision="c0ffee"
)


class FakeTasks:
    """Tasks done at once in this process; ``held_back`` holds fetches until it is set."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.held_back = asyncio.Event()
        self.held_back.set()

    async def ask(self, task: Any, kind: Any) -> Any:
        self.asked.append(task)
        del kind
        return FAR if isinstance(task, ResolveTask) else FoundModels(found=(FoundModel(repo="org/far"),))

    async def fetch(self, task: FetchTask, on_progress: Callable[[Progress], None]) -> ModelCard:
        on_progress(Progress(done_bytes=1, total_bytes=task.card.size_bytes))
        await self.held_back.wait()
        target = Path(task.folder) / task.card.files[0].name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(BODY)
        files = tuple(msgspec.structs.replace(file, sha256=file_digest(target, "sha256")) for file in task.card.files)
        return with_files(task.card, files)


class Node:
    """A store that runs, and calls to it."""

    def __init__(self, home: Path, bus: MemoryBus, no_hub: str = "") -> None:
        self.bus = bus
        self.folder = home / "models"
        self.elsewhere = home / "elsewhere"
        self.shelf = Shelf(self.folder)
        self.cards = home / "cards"
        self.catalogue = Catalogue(
            self.folder, (self.elsewhere,), verified_file=home / "verified.json", card_dirs=(self.cards,)
        )
        self.tasks = FakeTasks()
        self.placed: frozenset[str] = frozenset()
        self.changes = 0
        shared: dict[str, Any] = {
            "in_use": lambda: self.placed,
            "on_change": self._changed,
        }
        downloads = Downloads(
            self.shelf,
            self.catalogue,
            self.tasks,
            bus.clock,
            rules=Rules(no_hub=no_hub),
            neighbours=lambda _: (),
            **shared,
        )
        self.store = Store(
            bus, "aaaa", bus.clock, shelf=self.shelf, catalogue=self.catalogue, tasks=self.tasks, downloads=downloads,
            **shared,
        )  # fmt: skip
        self.downloads = downloads

    def add_card(self, text: str) -> None:
        self.cards.mkdir(exist_ok=True)
        (self.cards / "own.toml").write_text(text)
        self.catalogue.rescan()

    async def _changed(self) -> None:
        self.changes += 1

    async def call(self, endpoint: Any, message: Any) -> Any:
        return await self.bus.request(endpoint, message, timeout_s=10.0, node="aaaa")

    async def code_of(self, endpoint: Any, message: Any) -> str:
        with pytest.raises(SkulkError) as caught:
            await self.call(endpoint, message)
        return caught.value.code

    async def pulled(self) -> None:
        await self.call(STORE_PULL, PullModel(card=FAR))
        await self.downloads.fetch(FAR)


async def running(home: Path, no_hub: str = "") -> AsyncIterator[Node]:
    bus = MemoryBus(MemoryHub(), cluster="test", name="aaaa")
    node = Node(home, bus, no_hub)
    task = asyncio.create_task(node.store.run())
    await node.downloads.started.wait()
    await asyncio.sleep(0)
    try:
        yield node
    finally:
        task.cancel()
        await asyncio.wait({task})
        await bus.close()


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    async for found in running(tmp_path):
        yield found


@pytest.fixture
async def offline(tmp_path: Path) -> AsyncIterator[Node]:
    async for found in running(tmp_path, "this node is offline"):
        yield found


async def test_a_name_is_resolved_once_a_minute(node: Node) -> None:
    assert await node.call(STORE_RESOLVE, ResolveModel(name="org/far")) == FAR
    await node.call(STORE_RESOLVE, ResolveModel(name="org/far"))
    assert node.tasks.asked == [ResolveTask(name="org/far")]
    assert await node.code_of(STORE_RESOLVE, ResolveModel(name="no name")) == "model_not_found"


async def test_a_card_without_files_says_which_to_take_and_what_holds_over_them(node: Node) -> None:
    node.add_card(
        'model_id = "org/far"\nquantization = "Q8_0"\nfile = "a.gguf"\nmax_context_tokens = 99\nsources = ["https://x"]\n'
    )
    found = await node.call(STORE_RESOLVE, ResolveModel(name="org/far"))
    assert node.tasks.asked == [ResolveTask(name="org/far", quantization="Q8_0", file="a.gguf")]
    assert found == msgspec.structs.replace(FAR, max_context_tokens=99)


async def test_what_lies_here_is_told_without_asking_anybody(offline: Node) -> None:
    write_model(offline.folder / "bare.gguf")
    offline.catalogue.rescan()
    assert (await offline.call(STORE_RESOLVE, ResolveModel(name="bare"))).model_id == "bare"
    assert offline.tasks.asked == []


async def test_an_offline_node_asks_nobody(offline: Node) -> None:
    assert await offline.code_of(STORE_RESOLVE, ResolveModel(name="org/far")) == "model_not_found"
    assert await offline.code_of(STORE_SEARCH, SearchModels(query="x")) == "model_not_found"
    assert offline.tasks.asked == []


async def test_search_has_a_limit(node: Node) -> None:
    found = await node.call(STORE_SEARCH, SearchModels(query="far", limit=3))
    assert [one.repo for one in found.found] == ["org/far"]
    assert node.tasks.asked == [SearchTask(query="far", limit=3)]
    assert await node.code_of(STORE_SEARCH, SearchModels(query="far", limit=0)) == "invalid_request"


async def test_an_added_model_is_known_and_can_be_removed_without_files(node: Node) -> None:
    await node.call(STORE_ADD, AddModel(card=FAR))
    assert node.catalogue.find("org/far").card == FAR and not node.catalogue.find("org/far").is_held
    assert (await node.call(STORE_REMOVE, RemoveModel(model_id="org/far"))).freed_bytes == 0
    assert await node.code_of(STORE_REMOVE, RemoveModel(model_id="org/far")) == "model_not_found"


async def test_a_placed_model_is_not_removed(node: Node) -> None:
    await node.pulled()
    node.placed = frozenset({"org/far"})
    assert await node.code_of(STORE_REMOVE, RemoveModel(model_id="org/far")) == "model_in_use"
    assert node.catalogue.find("org/far").is_held
    node.placed = frozenset()
    removed = await node.call(STORE_REMOVE, RemoveModel(model_id="org/far"))
    assert removed.freed_bytes > 0 and not (node.folder / "org").exists()


async def test_removing_ends_a_download(node: Node) -> None:
    node.tasks.held_back.clear()
    assert (await node.call(STORE_PULL, PullModel(card=FAR))).phase == "waiting"
    await node.call(STORE_REMOVE, RemoveModel(model_id="org/far"))
    assert node.downloads.statuses() == () and node.shelf.all() == ()


async def test_a_download_is_stopped(node: Node) -> None:
    node.tasks.held_back.clear()
    await node.call(STORE_PULL, PullModel(card=FAR))
    assert (await node.call(STORE_STOP, CancelPull(model_id="org/far"))).phase == "cancelled"
    assert await node.code_of(STORE_STOP, CancelPull(model_id="org/none")) == "download_not_found"


async def test_files_that_a_person_put_there_are_removed_from_the_own_folder_only(node: Node) -> None:
    own = write_model(node.folder / "o" / "own" / "m.gguf")
    read_only = write_model(node.elsewhere / "o" / "other" / "m.gguf")
    node.catalogue.rescan()
    assert (await node.call(STORE_REMOVE, RemoveModel(model_id="o/own"))).freed_bytes > 0
    assert not own.exists()
    assert await node.code_of(STORE_REMOVE, RemoveModel(model_id="o/other")) == "invalid_request"
    assert read_only.exists()


async def test_verifying_finds_a_damaged_file_that_was_whole_before(node: Node) -> None:
    await node.pulled()
    verified = await node.call(STORE_VERIFY, VerifyModel(model_id="org/far"))
    assert (verified.problem, verified.is_pinned) == ("", True)
    path = node.folder / "org" / "far" / "m.gguf"
    facts = path.stat()
    spoiled = bytearray(BODY)
    spoiled[-1] ^= 1
    path.write_bytes(spoiled)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    verified = await node.call(STORE_VERIFY, VerifyModel(model_id="org/far"))
    assert "damaged or another file" in verified.problem
    node.catalogue.rescan()
    assert not node.catalogue.find("org/far").is_held
    # and pulling it again replaces it
    await node.pulled()
    assert path.read_bytes() == BODY and node.catalogue.find("org/far").is_held
