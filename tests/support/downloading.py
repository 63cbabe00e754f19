"""A node's downloads with real child processes, on a folder of a test, against the small hub."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import psutil

from skulk.clock import SystemClock
from skulk.models.catalogue import Catalogue
from skulk.models.fetching import Progress
from skulk.models.file_server import files_credential
from skulk.models.shelf import Shelf
from skulk.models.sources import Neighbour
from skulk.models.tasks import (
    FailedLine,
    FetchTask,
    HubTask,
    Line,
    PieceLine,
    ProgressLine,
    Task,
    read_result,
    run_task,
)
from skulk.node.children import HubChildren
from skulk.node.downloads import Downloads, Rules
from skulk.node.files_process import FilesSpec
from skulk.settings import Settings
from skulk.supervision.child import Child, ChildSpec
from skulk.wire.base import encode
from skulk.wire.model import ModelCard
from skulk.wire.store import DownloadStatus

T = TypeVar("T")


class ThreadTasks:
    """The same tasks in threads of this process, which start at once. They can't be ended: for tests that end none."""

    def __init__(self, hub_url: str) -> None:
        self._hub_url = hub_url

    async def ask(self, task: Task, kind: type[T]) -> T:
        return await self._run(task, kind, lambda _: None)

    async def fetch(self, task: FetchTask, on_progress: Callable[[Progress], None]) -> ModelCard:
        return await self._run(task, ModelCard, on_progress)

    async def _run(self, task: Task, kind: type[T], on_progress: Callable[[Progress], None]) -> T:
        lines: list[Line] = []
        loop = asyncio.get_running_loop()

        def say(line: Line) -> None:
            if isinstance(line, ProgressLine):
                loop.call_soon_threadsafe(on_progress, line.progress)
            else:
                lines.append(line)

        await asyncio.to_thread(run_task, HubTask(task=task, endpoint=self._hub_url), say)
        if isinstance(lines[-1], FailedLine):
            raise lines[-1].error.to_error()
        return read_result([line.piece for line in lines if isinstance(line, PieceLine)], kind)


class DownloadingNode:
    """Downloads that run, and what is around them. ``in_threads``: without child processes."""

    def __init__(
        self,
        home: Path,
        hub_url: str,
        rules: Rules,
        neighbours: tuple[Neighbour, ...],
        *,
        in_threads: bool = False,
    ) -> None:
        settings = Settings(
            home=str(home), models_dir=str(home / "models"), hf_endpoint=hub_url, hf_home=str(home / "hf")
        )
        self.changes = 0
        self.in_use: frozenset[str] = frozenset()
        self.folder = home / "models"
        self.shelf = Shelf(self.folder)
        self.catalogue = Catalogue(self.folder, verified_file=home / "verified.json")
        self.catalogue.rescan()
        self.children = HubChildren(settings, None)
        self.downloads = Downloads(
            self.shelf,
            self.catalogue,
            ThreadTasks(hub_url) if in_threads else self.children,
            SystemClock(),
            rules=rules,
            neighbours=lambda _: neighbours,
            in_use=lambda: self.in_use,
            on_change=self._changed,
        )

    async def _changed(self) -> None:
        self.changes += 1

    async def wait_status(
        self, model_id: str, is_so: Callable[[DownloadStatus | None], bool], timeout_s: float = 30.0
    ) -> DownloadStatus | None:
        """Waits until a download's status satisfies a predicate."""
        async with asyncio.timeout(timeout_s):
            while True:
                status = self.downloads.status(model_id)
                if is_so(status):
                    return status
                await asyncio.sleep(0.02)


def hub_children() -> list[psutil.Process]:
    """The hub processes that this test's process has started."""
    return [
        child
        for child in psutil.Process().children(recursive=True)
        if child.status() != psutil.STATUS_ZOMBIE and "_hub" in child.cmdline()
    ]


async def wait_for_children(timeout_s: float = 30.0) -> list[psutil.Process]:
    """Waits until there is a hub process."""
    async with asyncio.timeout(timeout_s):
        while True:
            if found := hub_children():
                return found
            await asyncio.sleep(0.02)


@asynccontextmanager
async def serving_files(models_dir: Path, *, token: str = "") -> AsyncGenerator[Neighbour]:
    """The process by which a node serves its weights, on a free port."""
    credential = files_credential(token)
    spec = FilesSpec(
        host="127.0.0.1",
        port=0,
        models_dir=str(models_dir),
        verified_file=str(models_dir.parent / "verified-files.json"),
        credential=credential,
    )
    argv = (sys.executable, "-m", "skulk", "_files")
    child = Child(ChildSpec(name="files", argv=argv, stdin=encode(spec), drain_s=2.0))
    ready = await child.start()
    try:
        yield Neighbour(url=f"http://127.0.0.1:{ready.fields['port']}", credential=credential)
    finally:
        report = await child.stop()
        assert report.returncode == 0, report.last_words


@asynccontextmanager
async def downloading_node(
    home: Path,
    hub_url: str,
    *,
    rules: Rules | None = None,
    neighbours: tuple[Neighbour, ...] = (),
    in_threads: bool = False,
) -> AsyncGenerator[DownloadingNode]:
    """Running downloads; at the end no child is left."""
    node = DownloadingNode(home, hub_url, rules or Rules(), neighbours, in_threads=in_threads)
    task = asyncio.create_task(node.downloads.run(), name="downloads")
    await asyncio.sleep(0)
    try:
        yield node
    finally:
        task.cancel()
        await asyncio.wait({task})
        assert hub_children() == []
