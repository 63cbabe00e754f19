"""Weights on the disks of nodes: finding, fetching, verifying, removing."""

from __future__ import annotations

from typing import Literal

from skulk.wire.base import ErrorBody, Wire
from skulk.wire.model import ModelCard, ModelFile

DownloadPhase = Literal["waiting", "fetching", "verifying", "done", "failed", "cancelled"]


class DownloadStatus(Wire, frozen=True, kw_only=True):
    """How far a node is with a model's files. Sizes are bytes.

    Attributes:
        speed: bytes a second, over the last seconds.
        eta_s: seconds left at that speed; None: not known.
        sources: who gave something: ``hub``, or addresses of neighbours.
        error: why it failed; it is tried again when somebody asks, without a restart.
        since: when this phase began, seconds since the epoch.
    """

    model_id: str
    phase: DownloadPhase
    done_bytes: int = 0
    total_bytes: int = 0
    speed: float = 0.0
    eta_s: float | None = None
    sources: tuple[str, ...] = ()
    error: ErrorBody | None = None
    since: float = 0.0


class ResolveModel(Wire, frozen=True, kw_only=True):
    """Make a card of a name of the hub, on a node that may reach it."""

    name: str


class SearchModels(Wire, frozen=True, kw_only=True):
    """Ask the hub for repositories."""

    query: str
    limit: int = 20


class FoundModel(Wire, frozen=True, kw_only=True):
    """A repository that the hub found."""

    repo: str
    downloads: int = 0
    likes: int = 0
    tags: tuple[str, ...] = ()


class FoundModels(Wire, frozen=True, kw_only=True):
    """Answer to `SearchModels`, the most downloaded first."""

    found: tuple[FoundModel, ...] = ()


class AddModel(Wire, frozen=True, kw_only=True):
    """Know a model from now on: keep its card in the node's models folder."""

    card: ModelCard


class PullModel(Wire, frozen=True, kw_only=True):
    """Have a model's files on a node; answered as soon as it has begun, or has them already.

    Attributes:
        pinned: keep it, whatever the disk budget says; None: as it is.
    """

    card: ModelCard
    pinned: bool | None = None


class CancelPull(Wire, frozen=True, kw_only=True):
    """End a download; what came so far is kept for the next one."""

    model_id: str


class RemoveModel(Wire, frozen=True, kw_only=True):
    """Delete a model's files from a node's models folder. Refused while the model is placed there."""

    model_id: str


class RemovedModel(Wire, frozen=True, kw_only=True):
    """Answer to `RemoveModel`: what was freed, bytes."""

    model_id: str
    freed_bytes: int = 0


class VerifyModel(Wire, frozen=True, kw_only=True):
    """Hash a model's files anew and compare them with its card."""

    model_id: str


class VerifiedModel(Wire, frozen=True, kw_only=True):
    """Answer to `VerifyModel`.

    Attributes:
        problem: what is wrong, in a sentence; empty: nothing.
        is_pinned: its card pins a hash for every file; else they could only be read.
        files: as they lie there, with their hashes.
    """

    model_id: str
    problem: str = ""
    is_pinned: bool = False
    files: tuple[ModelFile, ...] = ()
