"""What a child process does with the hub and with neighbours: one task in, lines of JSON out. Blocks.

    HubTask ──> run_task ──> progress lines (every 0.5 s of a fetch) ──> pieces of the result, done  |  failed

A result is cut into pieces, for a line of a child's output has a limit.
"""

from __future__ import annotations

import base64
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, TypeVar

import msgspec

from skulk.errors import ServiceError, SkulkError
from skulk.models.fetching import Fetch, Limits, Progress
from skulk.models.reference import parse_reference
from skulk.models.sources import HubSource, Neighbour, NeighbourSource
from skulk.wire.base import ErrorBody
from skulk.wire.model import ModelCard, ModelFile
from skulk.wire.store import FoundModels

PROGRESS_S: Final = 0.5
PIECE_BYTES: Final = 5_000
T = TypeVar("T")


class ResolveTask(msgspec.Struct, frozen=True, kw_only=True, tag="resolve"):
    """Make a card of a name of the hub; the result is a `ModelCard`.

    ``quantization`` and ``file``: what a card prefers where the name says nothing.
    """

    name: str
    quantization: str = ""
    file: str = ""


class SearchTask(msgspec.Struct, frozen=True, kw_only=True, tag="search"):
    """Ask the hub; the result is a `FoundModels`."""

    query: str
    limit: int = 20


class FetchTask(msgspec.Struct, frozen=True, kw_only=True, tag="fetch"):
    """Fetch a model's files; the result is the card with the sha256 of every file.

    Attributes:
        folder: where the files belong, under the names of the card.
        parts: where unfinished ones lie.
        no_hub: why the hub must not be asked; empty: it may be.
    """

    card: ModelCard
    folder: str
    parts: str
    neighbours: tuple[Neighbour, ...] = ()
    no_hub: str = ""
    limits: Limits = Limits()


Task: TypeAlias = ResolveTask | SearchTask | FetchTask


class HubTask(msgspec.Struct, frozen=True, kw_only=True):
    """A child's whole instruction: what to do, at which hub (empty: the usual one), with which token."""

    task: Task
    endpoint: str = ""
    token: str = ""
    log_format: Literal["text", "json"] = "text"
    log_level: Literal["debug", "info", "warning", "error"] = "info"


class ProgressLine(msgspec.Struct, frozen=True, kw_only=True, tag="progress"):
    """How far a fetch is."""

    progress: Progress


class PieceLine(msgspec.Struct, frozen=True, kw_only=True, tag="piece"):
    """A part of the encoded result, base64."""

    piece: str


class DoneLine(msgspec.Struct, frozen=True, kw_only=True, tag="done"):
    """The result is complete."""


class FailedLine(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """There is no result."""

    error: ErrorBody


Line: TypeAlias = ProgressLine | PieceLine | DoneLine | FailedLine
_LINE: Final[msgspec.json.Decoder[Line]] = msgspec.json.Decoder(Line)


def read_line(text: str) -> Line | None:
    """A line of a child's output; None: it is something else, a line of its log for one."""
    if not text.startswith("{"):
        return None
    try:
        return _LINE.decode(text)
    except msgspec.DecodeError:
        return None


def read_result(pieces: Iterable[str], kind: type[T]) -> T:
    """The result from its pieces.

    Raises:
        ServiceError: ``download_failed``: it is none.
    """
    try:
        return msgspec.json.decode(base64.b64decode("".join(pieces)), type=kind)
    except (msgspec.DecodeError, ValueError) as error:
        raise ServiceError("download_failed", f"the child's answer can't be read: {error}") from error


def run_task(told: HubTask, say: Callable[[Line], None]) -> bool:
    """Does the task and says everything about it; whether it was done. Never raises a `SkulkError`."""
    try:
        result = _do(told, say)
    except SkulkError as error:
        say(FailedLine(error=ErrorBody.of(error)))
        return False
    except OSError as error:
        text = f"{error}; mend that on this node, then try again"
        say(FailedLine(error=ErrorBody(code="download_failed", detail=text)))
        return False
    body = base64.b64encode(msgspec.json.encode(result)).decode()
    for start in range(0, len(body), PIECE_BYTES):
        say(PieceLine(piece=body[start : start + PIECE_BYTES]))
    say(DoneLine())
    return True


def _do(told: HubTask, say: Callable[[Line], None]) -> Any:
    task = told.task
    if isinstance(task, FetchTask):
        return _fetch(told, task, say)
    hub = _hub(told)
    if isinstance(task, SearchTask):
        return FoundModels(found=hub.search(task.query, task.limit))
    from skulk.models.resolving import resolve

    return resolve(hub, parse_reference(task.name), quantization=task.quantization, file=task.file)


def _hub(told: HubTask) -> Any:
    # the library is slow to import, and a fetch from neighbours alone has no use for it
    from skulk.models.hub import Hub

    return Hub(endpoint=told.endpoint, token=told.token)


def _fetch(told: HubTask, task: FetchTask, say: Callable[[Line], None]) -> ModelCard:
    card, hub, no_hub = task.card, None, task.no_hub
    if not no_hub and card.repo and card.revision:
        hub = HubSource(_hub(told), card.repo, card.revision)
    elif not no_hub:
        no_hub = "its card names no repository of the hub"
    neighbours = tuple(NeighbourSource(neighbour, card.model_id) for neighbour in task.neighbours)
    fetch = Fetch(
        card,
        Path(task.folder),
        Path(task.parts),
        neighbours=neighbours,
        hub=hub,
        no_hub=no_hub,
        limits=task.limits,
    )
    is_over = threading.Event()

    def report() -> None:
        while not is_over.wait(PROGRESS_S):
            say(ProgressLine(progress=fetch.progress()))

    reporter = threading.Thread(target=report, name="progress", daemon=True)
    reporter.start()
    try:
        files = fetch.run()
    finally:
        is_over.set()
        reporter.join()
    say(ProgressLine(progress=fetch.progress()))
    return with_files(card, files)


def with_files(card: ModelCard, files: tuple[ModelFile, ...]) -> ModelCard:
    """The card with what is now known of all its files, in the order of `ModelCard.all_files`."""
    count = len(card.files)
    has_projector = card.projector is not None
    return msgspec.structs.replace(
        card,
        files=files[:count],
        projector=files[count] if has_projector else None,
        companions=files[count + has_projector :],
    )
