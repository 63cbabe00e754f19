"""Child processes that do one thing and end: hub tasks with their lines, and the check of a file's header."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol, TypeVar

import msgspec

from skulk.errors import ServiceError, SkulkError, StartError
from skulk.models.fetching import Progress
from skulk.models.tasks import (
    DoneLine,
    FailedLine,
    FetchTask,
    HubTask,
    Line,
    PieceLine,
    ProgressLine,
    Task,
    read_line,
    read_result,
)
from skulk.settings import Settings
from skulk.supervision.child import Child, ChildSpec, Ledger
from skulk.wire.base import encode
from skulk.wire.model import ModelCard

log = logging.getLogger("skulk.node")

START_S: Final = 60.0
HEADER_S: Final = 60.0
ASK_S: Final = 60.0
_QUIET: Final = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    # files are fetched by ranges, see `skulk.models.sources`
    "HF_HUB_DISABLE_XET": "1",
}
T = TypeVar("T")


class Tasks(Protocol):
    """Runs tasks that may take long; cancelling the wait ends the task."""

    async def ask(self, task: Task, kind: type[T]) -> T: ...

    async def fetch(self, task: FetchTask, on_progress: Callable[[Progress], None]) -> ModelCard: ...


class HubChildren:
    """Each task in a process of its own; cancelling kills it.

    Args:
        settings: the hub's address, its token and home.
        ledger: where running children are written down.
    """

    def __init__(self, settings: Settings, ledger: Ledger | None) -> None:
        self._settings = settings
        self._ledger = ledger

    async def ask(self, task: Task, kind: type[T]) -> T:
        """The result of a short task.

        Raises:
            SkulkError: what the task failed with; ``deadline_exceeded``: after a minute.
        """
        try:
            async with asyncio.timeout(ASK_S):
                return await self._run(task, kind, lambda _: None)
        except TimeoutError as error:
            raise ServiceError(
                "deadline_exceeded", f"the hub didn't answer within {ASK_S:.0f} s; try again."
            ) from error

    async def fetch(self, task: FetchTask, on_progress: Callable[[Progress], None]) -> ModelCard:
        """Fetches a model, however long that takes; the card with all hashes.

        Raises:
            SkulkError: what the fetch failed with; ``download_failed``: its process ended.
        """
        return await self._run(task, ModelCard, on_progress)

    async def _run(self, task: Task, kind: type[T], on_progress: Callable[[Progress], None]) -> T:
        heard = _Heard(on_progress)
        child = Child(self._spec(task), ledger=self._ledger, on_line=heard.line)
        try:
            await child.start()
            report = await child.exited
        except StartError as error:
            raise ServiceError("download_failed", f"the child process for it failed: {error.detail}") from error
        finally:
            # when this wait is cancelled the process must not live on
            if child.pid is not None:
                await child.end()
        if heard.error is not None:
            raise heard.error
        if not heard.is_done:
            raise ServiceError("download_failed", f"{report.last_words} What came is kept for the next attempt.")
        return read_result(heard.pieces, kind)

    def _spec(self, task: Task) -> ChildSpec:
        settings = self._settings
        env = {**_QUIET, "HF_ENDPOINT": settings.hf_endpoint, "HF_HOME": settings.hf_home}
        told = HubTask(
            task=task,
            endpoint=settings.hf_endpoint,
            token=settings.hf_token,
            log_format=settings.log_format,
            log_level="warning",
        )
        return ChildSpec(
            name="hub",
            argv=(sys.executable, "-m", "skulk", "_hub"),
            env={name: value for name, value in env.items() if value},
            nice=5,
            stdin=encode(told),
            ready_timeout_s=START_S,
            drain_s=0.0,
            term_s=1.0,
        )


class _Heard:
    """What a child has said."""

    def __init__(self, on_progress: Callable[[Progress], None]) -> None:
        self.pieces: list[str] = []
        self.error: SkulkError | None = None
        self.is_done = False
        self._on_progress = on_progress

    def line(self, text: str) -> None:
        line: Line | None = read_line(text)
        match line:
            case ProgressLine():
                self._on_progress(line.progress)
            case PieceLine():
                self.pieces.append(line.piece)
            case DoneLine():
                self.is_done = True
            case FailedLine():
                self.error = line.error.to_error()
            case None:
                log.info("hub: %s", text)


class HeaderSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What the process that checks headers is told: files of one model, the first part first."""

    paths: tuple[str, ...]


class HeaderChecks:
    """Reads headers in a process of its own before anything native touches the file; each content once."""

    def __init__(self, ledger: Ledger | None) -> None:
        self._ledger = ledger
        self._passed: dict[Path, tuple[int, int, int]] = {}

    async def check(self, paths: tuple[Path, ...]) -> None:
        """Returns when all headers are sound.

        Raises:
            SkulkError: ``model_file_invalid``: what is wrong; also where the process died of the file.
        """
        fresh = {path: _look(path) for path in paths}
        if all(self._passed.get(path) == look for path, look in fresh.items()):
            return
        spec = ChildSpec(
            name="header",
            argv=(sys.executable, "-m", "skulk", "_header"),
            stdin=encode(HeaderSpec(paths=tuple(map(str, paths)))),
            ready_timeout_s=HEADER_S,
            drain_s=0.0,
            term_s=1.0,
        )
        child = Child(spec, ledger=self._ledger)
        try:
            await child.start()
        except StartError as error:
            raise ServiceError(
                "runner_failed", f"the process that reads the header of {paths[0]} failed: {error.detail}"
            ) from error
        finally:
            if child.pid is not None:
                await child.end()
        self._passed.update(fresh)


def _look(path: Path) -> tuple[int, int, int]:
    facts = path.stat()
    return facts.st_size, facts.st_mtime_ns, facts.st_ino
