"""A node's downloads in real child processes: joined, cancelled, failed and begun again, within a budget."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from skulk.errors import RequestError, SkulkError, UnavailableError
from skulk.models.hub import Hub
from skulk.models.reference import parse_reference
from skulk.models.resolving import resolve
from skulk.models.tasks import ResolveTask, SearchTask
from skulk.node.children import HeaderChecks
from skulk.node.downloads import Rate, Rules
from skulk.wire.model import ModelCard
from skulk.wire.store import FoundModels
from tests.support.downloading import DownloadingNode, downloading_node, hub_children, serving_files, wait_for_children
from tests.support.gguf import TENSORS, Tensor, gguf_bytes, llama_metadata, write_model
from tests.support.hub import SmallHub

REPO = "org/tiny-GGUF"


def model_bytes(seed: int, size: int = 300_000) -> bytes:
    """A whole GGUF file whose weights are noise."""
    body = bytearray(gguf_bytes(llama_metadata(), (*TENSORS, Tensor("noise", (size // 4,), 0))))
    noise = random.Random(seed).randbytes(size // 4 * 4)
    body[-len(noise) :] = noise
    return bytes(body)


@pytest.fixture
def small_hub() -> Iterator[SmallHub]:
    with SmallHub() as hub:
        hub.add(REPO, {"tiny-Q4_0.gguf": model_bytes(1)})
        hub.add("org/two", {"two-Q4_0.gguf": model_bytes(2)})
        yield hub


async def resolved(small_hub: SmallHub, name: str) -> ModelCard:
    """The card, made in this process: a child for it takes a second."""
    return await asyncio.to_thread(resolve, Hub(endpoint=small_hub.url), parse_reference(name))


async def test_a_model_comes_and_is_known_and_verified(small_hub: SmallHub, tmp_path: Path) -> None:
    async with downloading_node(tmp_path, small_hub.url, in_threads=True) as node:
        card = await resolved(small_hub, REPO)
        assert not node.downloads.has(card)
        await node.downloads.fetch(card)
        assert node.downloads.has(card) and node.downloads.statuses() == () and node.changes == 1
        entry = node.catalogue.find(REPO)
        assert entry.is_held and node.catalogue.is_verified(entry)
        assert entry.card.revision == card.revision
        assert entry.path is not None and hashlib.sha256(entry.path.read_bytes()).hexdigest() == card.files[0].sha256
        # what lies there is not asked for again
        calls = len(small_hub.seen)
        await node.downloads.fetch(card)
        assert node.downloads.begin(card, pinned=True).phase == "done"
        assert len(small_hub.seen) == calls and node.shelf.all()[0].pinned


async def test_two_who_want_a_model_share_one_download(small_hub: SmallHub, tmp_path: Path) -> None:
    async with downloading_node(tmp_path, small_hub.url, in_threads=True) as node:
        card = await resolved(small_hub, REPO)
        before = small_hub.sent["tiny-Q4_0.gguf"]
        await asyncio.gather(node.downloads.fetch(card), node.downloads.fetch(card))
        assert small_hub.sent["tiny-Q4_0.gguf"] - before == card.size_bytes


async def test_a_runner_that_asks_before_everything_runs_waits(small_hub: SmallHub, tmp_path: Path) -> None:
    node = DownloadingNode(tmp_path, small_hub.url, Rules(no_hub="it is blocked"), ())
    card = await resolved(small_hub, REPO)
    early = asyncio.create_task(node.downloads.fetch(card))
    await asyncio.sleep(0)
    assert not early.done()
    task = asyncio.create_task(node.downloads.run())
    with pytest.raises(UnavailableError, match="it is blocked"):
        await early
    task.cancel()
    await asyncio.wait({task})


async def test_progress_is_told_while_it_comes(small_hub: SmallHub, tmp_path: Path) -> None:
    small_hub.block_bytes, small_hub.pace_s = 16_384, 0.05
    async with downloading_node(tmp_path, small_hub.url, in_threads=True) as node:
        card = await resolved(small_hub, REPO)
        assert node.downloads.begin(card).phase == "waiting"
        told = await node.wait_status(REPO, lambda status: status is not None and status.phase == "fetching")
        assert told is not None and told.total_bytes == card.size_bytes
        await node.downloads.fetch(card)


async def test_a_cancelled_download_ends_its_process_and_is_taken_up_later(small_hub: SmallHub, tmp_path: Path) -> None:
    async with downloading_node(tmp_path, small_hub.url) as node:
        card = await resolved(small_hub, REPO)
        small_hub.stalls = True
        node.downloads.begin(card)
        await node.wait_status(REPO, lambda status: status is not None and status.phase == "fetching")
        await wait_for_children()
        status = await node.downloads.cancel(REPO)
        assert (status.phase, status.error and status.error.code) == ("cancelled", "download_cancelled")
        assert hub_children() == []
        small_hub.stalls = False
        await node.downloads.fetch(card)
        assert node.downloads.has(card)
        with pytest.raises(RequestError) as caught:
            await node.downloads.cancel("org/nothing")
        assert caught.value.code == "download_not_found"


async def test_when_nobody_waits_any_more_the_download_ends_unless_a_person_asked(
    small_hub: SmallHub, tmp_path: Path
) -> None:
    async with downloading_node(tmp_path, small_hub.url) as node:
        card = await resolved(small_hub, REPO)
        small_hub.stalls = True
        wait = asyncio.create_task(node.downloads.fetch(card))
        await wait_for_children()
        wait.cancel()
        await node.wait_status(REPO, lambda status: status is not None and status.phase == "cancelled")
        node.downloads.begin(card)
        wait = asyncio.create_task(node.downloads.fetch(card))
        await wait_for_children()
        wait.cancel()
        await asyncio.wait({wait})
        small_hub.stalls = False
        await node.downloads.fetch(card)


async def test_what_a_person_asked_for_goes_on_when_the_node_starts_again(small_hub: SmallHub, tmp_path: Path) -> None:
    card = await resolved(small_hub, REPO)
    small_hub.stalls = True
    async with downloading_node(tmp_path, small_hub.url) as node:
        node.downloads.begin(card, pinned=True)
        await node.wait_status(REPO, lambda status: status is not None and status.phase == "fetching")
        await wait_for_children()
    small_hub.stalls = False
    async with downloading_node(tmp_path, small_hub.url) as node:
        await node.wait_status(REPO, lambda status: status is None and node.downloads.has(card))
        shelved = node.downloads.shelf.find(REPO)
        assert shelved is not None and (shelved.pinned, shelved.asked) == (True, False)


async def test_what_was_cancelled_stays_so_when_the_node_starts_again(small_hub: SmallHub, tmp_path: Path) -> None:
    card = await resolved(small_hub, REPO)
    small_hub.stalls = True
    async with downloading_node(tmp_path, small_hub.url, in_threads=True) as node:
        node.downloads.begin(card)
        shelved = node.downloads.shelf.find(REPO)
        assert shelved is not None and shelved.asked
        await node.downloads.cancel(REPO)
    small_hub.stalls = False
    async with downloading_node(tmp_path, small_hub.url, in_threads=True) as node:
        await asyncio.to_thread(node.downloads.shelf.all)
        shelved = node.downloads.shelf.find(REPO)
        assert shelved is not None and not shelved.asked
        assert node.downloads.statuses() == ()


async def test_a_failure_is_told_and_the_next_attempt_needs_no_restart(small_hub: SmallHub, tmp_path: Path) -> None:
    async with downloading_node(tmp_path, small_hub.url, in_threads=True) as node:
        card = await resolved(small_hub, REPO)
        small_hub.repositories[REPO].gated = True
        with pytest.raises(SkulkError) as caught:
            await node.downloads.fetch(card)
        assert caught.value.code == "model_gated"
        (status,) = node.downloads.statuses()
        assert status.phase == "failed" and status.error is not None and status.error.code == "model_gated"
        small_hub.repositories[REPO].gated = False
        await node.downloads.fetch(card)
        assert node.downloads.has(card)


async def test_offline_nothing_is_asked_and_the_reason_is_said(small_hub: SmallHub, tmp_path: Path) -> None:
    async with downloading_node(tmp_path, small_hub.url, in_threads=True) as node:
        card = await resolved(small_hub, REPO)
    calls = len(small_hub.seen)
    rules = Rules(no_hub="this node is offline (SKULK_OFFLINE)")
    async with downloading_node(tmp_path, small_hub.url, rules=rules, in_threads=True) as node:
        assert not node.downloads.can_fetch(card)
        with pytest.raises(UnavailableError, match="this node is offline"):
            await node.downloads.fetch(card)
    assert len(small_hub.seen) == calls


async def test_a_node_that_never_saw_the_internet_gets_the_model_from_one_that_did(
    small_hub: SmallHub, tmp_path: Path
) -> None:
    async with downloading_node(tmp_path / "a", small_hub.url) as first:
        card = await resolved(small_hub, REPO)
        await first.downloads.fetch(card)
    calls = len(small_hub.seen)
    blocked = Rules(no_hub="the hub is blocked here")
    async with serving_files(tmp_path / "a" / "models", token="s3cret") as neighbour:
        async with downloading_node(tmp_path / "b", "", rules=blocked, neighbours=(neighbour,)) as second:
            assert second.downloads.can_fetch(card)
            await second.downloads.fetch(card)
            entry = second.catalogue.find(REPO)
            assert second.catalogue.is_verified(entry) and entry.card.revision == card.revision
    assert len(small_hub.seen) == calls


async def test_the_least_recently_used_model_goes_when_the_budget_asks_for_it(
    small_hub: SmallHub, tmp_path: Path
) -> None:
    async with downloading_node(tmp_path, small_hub.url, rules=Rules(budget_bytes=400_000), in_threads=True) as node:
        first, second = await resolved(small_hub, REPO), await resolved(small_hub, "org/two")
        await node.downloads.fetch(first)
        node.in_use = frozenset({REPO})
        with pytest.raises(SkulkError, match="SKULK_MODELS_BUDGET") as caught:
            await node.downloads.fetch(second)
        assert caught.value.code == "disk_full" and node.downloads.has(first)
        node.in_use = frozenset()
        await node.downloads.fetch(second)
        assert node.downloads.has(second) and not node.downloads.has(first)
        assert [one.card.model_id for one in node.shelf.all()] == ["org/two"]


async def test_resolving_and_searching_in_a_child(small_hub: SmallHub, tmp_path: Path) -> None:
    async with downloading_node(tmp_path, small_hub.url) as node:
        found = await node.children.ask(SearchTask(query="tiny"), FoundModels)
        assert [one.repo for one in found.found] == [REPO]
        card = await node.children.ask(ResolveTask(name=REPO), ModelCard)
        assert card == await resolved(small_hub, REPO)
        with pytest.raises(SkulkError) as caught:
            await node.children.ask(ResolveTask(name="org/missing"), ModelCard)
        assert caught.value.code == "model_not_found"


async def test_headers_are_read_in_a_process_of_its_own(tmp_path: Path) -> None:
    checks = HeaderChecks(None)
    good = write_model(tmp_path / "good.gguf")
    await checks.check((good,))
    await checks.check((good,))
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(good.read_bytes()[:100])
    with pytest.raises(RequestError, match="cut short") as caught:
        await checks.check((good, bad))
    assert caught.value.code == "model_file_invalid"


def test_the_rate_is_of_the_last_seconds() -> None:
    rate = Rate()
    assert rate.add(0.0, 0) == 0.0
    assert rate.add(1.0, 100) == 100.0
    assert rate.add(10.0, 100) == 0.0
    assert rate.add(11.0, 400) == 300.0
