"""The hub, read through huggingface_hub's own client: what a repository holds, and parts of its files. Blocks.

Only the child process of `skulk.node.hub_process` uses this: the library sleeps and retries inside its calls, and
what blocks can only be cancelled by ending its process.

| the hub says                                     | we say                                                         |
|--------------------------------------------------|----------------------------------------------------------------|
| 404, or 401 without a token                      | `model_not_found`                                              |
| 401 or 403 with ``X-Error-Code: GatedRepo``      | `model_gated`                                                  |
| another id than was asked for, after a redirect  | `model_renamed`                                                |
| 404 with ``X-Error-Code: RevisionNotFound``      | `revision_not_found`                                           |
| 429                                              | `hub_rate_limited`, with the seconds of ``Retry-After``        |
| nothing: no connection, no answer in time        | `hub_unreachable`                                              |
| anything else                                    | `hub_failed`                                                   |
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any, Final

import msgspec
from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage] - httpx's, which every failed connection is
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers as _headers  # pyright: ignore[reportUnknownVariableType]
from huggingface_hub.utils import get_session, hf_raise_for_status

from skulk.errors import RequestError, ServiceError, SkulkError, UnavailableError
from skulk.models.gguf import MAX_HEADER_BYTES
from skulk.models.reference import ModelReference
from skulk.models.selection import MAX_FILES
from skulk.wire.model import ModelFile
from skulk.wire.store import FoundModel

ANSWER_S: Final = 10.0
MAX_SMALL_FILE: Final = 32 * 1024 * 1024
MAX_RETRY_AFTER_S: Final = 3600.0
# The reader looks at the magic, then asks for 1 MiB behind it: the first part fetched has both.
_LEAST_READ: Final = 1024 * 1024 + 4096
_MOST_READ: Final = 8 * 1024 * 1024


class Repository(msgspec.Struct, frozen=True, kw_only=True):
    """A repository at one commit.

    Attributes:
        revision: the commit.
        tags: what its owner says of it.
    """

    repo: str
    revision: str
    files: tuple[ModelFile, ...]
    tags: tuple[str, ...] = ()
    license: str = ""


class Hub:
    """One hub.

    Args:
        endpoint: its address; empty: the library's (``HF_ENDPOINT``, else the public one).
        token: for gated and private repositories; empty: the one that the user logged in with, if any.
    """

    def __init__(self, *, endpoint: str = "", token: str = "") -> None:
        self._api = HfApi(endpoint=endpoint or None, token=token or None, library_name="skulk")
        self._endpoint = endpoint or None
        self._token = token or None

    def repository(self, reference: ModelReference) -> Repository:
        """What a repository holds now: the commit first, then every page of its list at that commit.

        Raises:
            SkulkError: see the module.
        """
        with _told(reference.repo, reference.revision):
            info = self._api.model_info(reference.repo, revision=reference.revision or None, timeout=ANSWER_S)
            if info.id.casefold() != reference.repo.casefold():
                raise RequestError(
                    "model_renamed", f"{reference.repo} is called {info.id} now; ask for that.", param="model_id"
                )
            if not info.sha:
                raise ServiceError("hub_failed", f"the hub names no commit for {reference.repo}; try again.")
            files = tuple(self._files(info.id, info.sha))
        tags = tuple(info.tags or ())
        license_name = next((tag.removeprefix("license:") for tag in tags if tag.startswith("license:")), "")
        return Repository(repo=info.id, revision=info.sha, files=files, tags=tags, license=license_name)

    def _files(self, repo: str, revision: str) -> Iterator[ModelFile]:
        listed = self._api.list_repo_tree(repo, recursive=True, revision=revision)
        for count, entry in enumerate(listed):
            if count >= MAX_FILES:
                raise RequestError("model_file_invalid", f"{repo} lists more than {MAX_FILES:,} files; choose another.")
            size = getattr(entry, "size", None)
            if size is None:
                continue
            lfs: Any = getattr(entry, "lfs", None)
            yield ModelFile(
                name=entry.path,
                size_bytes=size if lfs is None else lfs.size,
                sha256=None if lfs is None else lfs.sha256,
                git_oid=getattr(entry, "blob_id", None) if lfs is None else None,
            )

    def search(self, query: str, limit: int) -> tuple[FoundModel, ...]:
        """GGUF repositories that the hub finds, the most downloaded first.

        Raises:
            SkulkError: see the module.
        """
        with _told(query, ""):
            found = self._api.list_models(search=query, filter="gguf", sort="downloads", limit=limit)
            return tuple(
                FoundModel(
                    repo=model.id,
                    downloads=model.downloads or 0,
                    likes=model.likes or 0,
                    tags=tuple(model.tags or ())[:50],
                )
                for model in found
            )

    def url_of(self, repo: str, revision: str, name: str) -> str:
        """Where a file's content is; the hub redirects from there to where it is stored."""
        return hf_hub_url(repo, name, revision=revision, endpoint=self._endpoint)

    def headers(self) -> dict[str, str]:
        """The headers of a call: who we are, and the token."""
        return {**_headers(token=self._token, library_name="skulk"), "accept-encoding": "identity"}

    @contextmanager
    def content(self, repo: str, revision: str, name: str, start: int, end: int) -> Generator[Any]:
        """A response (httpx) that streams a file from ``start`` to before ``end``; status 206, or 200: from its begin.

        There is a limit on each silence, none on the whole. Its body is to be read with ``iter_raw``.

        Raises:
            SkulkError: see the module.
        """
        headers = {**self.headers(), "range": f"bytes={start}-{end - 1}"}
        with (
            _told(repo, revision),
            get_session().stream(
                "GET", self.url_of(repo, revision, name), headers=headers, timeout=ANSWER_S, follow_redirects=True
            ) as response,
        ):
            if response.status_code >= 400:
                response.read()
            hf_raise_for_status(response)
            yield response

    def part(self, repo: str, revision: str, name: str, start: int, length: int) -> bytes:
        """A part of a file, shorter only at its end; a server that ignores ranges is read up to there.

        Raises:
            SkulkError: see the module; ``model_file_invalid``: without ranges, and too far into the file.
        """
        with self.content(repo, revision, name, start, start + length) as response:
            skip = 0
            if response.status_code != 206:
                skip = start
                if start + length > MAX_HEADER_BYTES:
                    raise ServiceError("hub_failed", f"the hub gives no part of {name}, only all of it.")
            body = bytearray()
            for block in response.iter_raw():
                dropped = min(skip, len(block))
                skip -= dropped
                body += block[dropped:]
                if len(body) >= length:
                    break
        return bytes(body[:length])

    def small_file(self, repo: str, revision: str, file: ModelFile) -> bytes:
        """All of a small file.

        Raises:
            SkulkError: see the module; ``model_file_invalid``: it is large.
        """
        if file.size_bytes > MAX_SMALL_FILE:
            raise RequestError(
                "model_file_invalid", f"{file.name} of {repo} has {file.size_bytes:,} bytes; it can't be."
            )
        return self.part(repo, revision, file.name, 0, file.size_bytes) if file.size_bytes else b""


class RemoteFile:
    """Parts of one file of the hub, fetched in growing blocks, for a reader that goes forward."""

    def __init__(self, hub: Hub, repository: Repository, file: ModelFile) -> None:
        self._hub = hub
        self._repository = repository
        self._file = file
        self._start = 0
        self._block = b""
        self._next_length = _LEAST_READ

    def read_at(self, offset: int, length: int) -> bytes:
        """As `skulk.models.gguf.ReadAt`."""
        length = min(length, self._file.size_bytes - offset)
        inside = offset - self._start
        if inside < 0 or inside + length > len(self._block):
            wanted = min(max(length, self._next_length), self._file.size_bytes - offset)
            if length <= 0:
                return b""
            repo, revision = self._repository.repo, self._repository.revision
            self._block = self._hub.part(repo, revision, self._file.name, offset, wanted)
            self._start, inside = offset, 0
            self._next_length = min(self._next_length * 2, _MOST_READ)
        return self._block[inside : inside + length]


@contextmanager
def _told(what: str, revision: str) -> Generator[None]:
    """Everything that the library raises, in our words."""
    try:
        yield
    except SkulkError:
        raise
    except (HTTPError, OSError, ValueError, KeyError, TypeError) as error:
        raise told(error, what, revision) from error


def told(error: Exception, what: str, revision: str = "") -> SkulkError:
    """The error of a call to the hub in our words; ``what`` was asked for."""
    if isinstance(error, GatedRepoError):
        return RequestError(
            "model_gated",
            f"{what} is gated: ask for access on its page, then start the node with HF_TOKEN of that account.",
            param="model_id",
        )
    if isinstance(error, RepositoryNotFoundError):
        return RequestError(
            "model_not_found",
            f"the hub has no {what}, or hides it from this node; check the name, or give HF_TOKEN for a private one.",
            param="model_id",
        )
    if isinstance(error, RevisionNotFoundError):
        return RequestError(
            "revision_not_found", f"{what} has no revision {revision!r}; see its page.", param="model_id"
        )
    if isinstance(error, RemoteEntryNotFoundError):
        return RequestError("model_not_found", f"a file of {what} is not on the hub any more.", param="model_id")
    if isinstance(error, HfHubHTTPError):
        return _told_status(error, what)
    if isinstance(error, (HTTPError, OSError)):
        reason = str(error) or type(error).__name__
        return UnavailableError(
            "hub_unreachable",
            f"the hub doesn't answer ({reason[:200]}); check the network, or HF_ENDPOINT.",
            retry_after_s=10,
        )
    return ServiceError("hub_failed", f"the hub's answer about {what} can't be read ({type(error).__name__}).")


def _told_status(error: HfHubHTTPError, what: str) -> SkulkError:
    status = error.response.status_code
    if status == 429:
        wait_s = retry_after_s(error.response.headers)
        return UnavailableError(
            "hub_rate_limited",
            f"the hub takes no more calls from here for {wait_s:.0f} s; HF_TOKEN gives a higher limit.",
            retry_after_s=wait_s,
        )
    if status in (401, 403):
        return RequestError(
            "model_gated", f"the hub refuses {what} (status {status}); check HF_TOKEN and its rights.", param="model_id"
        )
    return ServiceError("hub_failed", f"the hub answered {status} about {what}; try again later.")


def retry_after_s(headers: Any) -> float:
    """Seconds to wait that a refusal names, 30 where it names none."""
    text = str(headers.get("retry-after") or "")
    return min(float(text), MAX_RETRY_AFTER_S) if text.isascii() and text.isdigit() else 30.0
