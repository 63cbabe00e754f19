"""Downloads whose processes are killed: nothing corrupt gets a name, nothing whole is fetched twice."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import signal
from pathlib import Path

import pytest

from skulk.errors import SkulkError
from skulk.models.fetching import Limits
from skulk.models.parts import PartFile, part_key
from skulk.node.downloads import Rules
from skulk.wire.model import ModelCard, ModelFile
from tests.support.downloading import DownloadingNode, downloading_node, hub_children, wait_for_children
from tests.support.hub import COMMIT, SmallHub

REPO = "org/m"
CHUNK = 64 * 1024
BODY = random.Random(11).randbytes(3_000_000)
LIMITS = Limits(chunk_bytes=CHUNK, attempts=5, wait_s=0.05, disk_margin_bytes=0)
CARD = ModelCard(
    model_id=REPO,
    name="m",
    family="x",
    format="mlx",
    backends=("mlx-metal",),
    files=(ModelFile(name="m.safetensors", size_bytes=len(BODY), sha256=hashlib.sha256(BODY).hexdigest()),),
    context_length=10,
    weights_bytes=1,
    kv_bytes_per_token=1,
    repo=REPO,
    revision=COMMIT,
)


def done_bytes(node: DownloadingNode) -> int:
    """Bytes of whole chunks on the disk, as the next process will find them."""
    with PartFile(node.shelf.parts, part_key(REPO, CARD.files[0]), len(BODY), chunk_bytes=CHUNK) as part:
        return part.done_bytes


def marked(node: DownloadingNode) -> int:
    """Chunks that are marked as whole, read while another process has the file."""
    marks = node.shelf.parts / f"{part_key(REPO, CARD.files[0])}.done"
    return marks.read_bytes()[: -(-len(BODY) // CHUNK)].count(1) if marks.exists() else 0


def target(node: DownloadingNode) -> Path:
    return node.folder / "org" / "m" / "m.safetensors"


async def kill_in_the_middle(node: DownloadingNode, small_hub: SmallHub, at_bytes: int) -> None:
    """Begins the download, kills its process with SIGKILL when so much was sent and some of it lies whole on the disk,
    and waits for the end.
    """
    before = marked(node)
    sent = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_block(total: int) -> None:
        if total >= at_bytes:
            # nothing more may come before the kill, or the download might end first
            small_hub.stalls = True
            loop.call_soon_threadsafe(sent.set)

    small_hub.on_block = on_block
    node.downloads.begin(CARD)
    async with asyncio.timeout(30.0):
        await sent.wait()
        # what was sent may still be on its way to the disk, and another process's file tells nothing by itself
        while marked(node) == before:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    (child,) = hub_children()
    os.kill(child.pid, signal.SIGKILL)
    small_hub.on_block = lambda _: None
    await node.wait_status(REPO, lambda status: status is not None and status.phase == "failed")
    small_hub.stalls = False


async def test_a_killed_download_is_told_and_taken_up_without_fetching_what_is_whole(tmp_path: Path) -> None:
    with SmallHub() as small_hub:
        small_hub.add(REPO, {"m.safetensors": BODY})
        async with downloading_node(tmp_path, small_hub.url, rules=Rules(limits=LIMITS)) as node:
            kept = 0
            for round_number in range(1, 4):
                await kill_in_the_middle(node, small_hub, small_hub.sent_bytes + 600_000)
                status = node.downloads.status(REPO)
                assert status is not None and status.error is not None and status.error.code == "download_failed"
                assert "SIGKILL" in status.error.detail
                assert not target(node).exists()
                whole = done_bytes(node)
                assert whole > kept, f"round {round_number} kept nothing"
                kept = whole
            before = small_hub.sent_bytes
            await node.downloads.fetch(CARD)
            assert target(node).read_bytes() == BODY
            assert small_hub.sent_bytes - before == len(BODY) - kept


async def test_parts_spoiled_on_the_disk_after_a_kill_never_become_the_file(tmp_path: Path) -> None:
    with SmallHub() as small_hub:
        small_hub.add(REPO, {"m.safetensors": BODY})
        async with downloading_node(tmp_path, small_hub.url, rules=Rules(limits=LIMITS)) as node:
            await kill_in_the_middle(node, small_hub, 800_000)
            (part,) = node.shelf.parts.glob("*.part")
            assert done_bytes(node) > 0
            with part.open("r+b") as file:
                # as a lost write before a power cut: chunks are marked, their bytes are not there
                file.write(bytes(len(BODY)))
            await node.downloads.fetch(CARD)
            assert target(node).read_bytes() == BODY


async def test_the_death_of_the_node_ends_its_downloads(tmp_path: Path) -> None:
    with SmallHub() as small_hub:
        small_hub.add(REPO, {"m.safetensors": BODY})
        async with downloading_node(tmp_path, small_hub.url, rules=Rules(limits=LIMITS)) as node:
            small_hub.stalls = True
            wait = asyncio.create_task(node.downloads.fetch(CARD))
            await wait_for_children()
        # leaving the block stops the node: its child must be gone, which the block's end asserts
        with pytest.raises(SkulkError):
            await wait
        assert not target(node).exists()
