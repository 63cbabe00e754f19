"""Placing a model and waiting for it, for every command that needs it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from typing import Any, Final

import msgspec

from skulk.cli.client import PLACE_TIMEOUT_S, ApiClient
from skulk.cli.models import list_models
from skulk.cli.state_view import SERVING, InstanceRow, StateView, instance_rows
from skulk.errors import RequestError, ServiceError
from skulk.wire.placement import PlacementDecision

# The public API has no call that waits; half a second is what a person doesn't notice.
POLL_S: Final = 0.5
# A load of hundreds of gigabytes from a slow disk.
READY_TIMEOUT_S: Final = 3600.0
# A runner that failed is started again: only a failure that stays ends the wait.
FAILURE_S: Final = 3.0


class Wish(msgspec.Struct, frozen=True, kw_only=True):
    """How a model is to be placed.

    Attributes:
        excluded: nodes not to use, by id or name.
        context_length: window of one request, tokens; None: what fits.
        replicas: instances to add, all of them or none.
        force: also where its memory doesn't suffice by the estimate.
    """

    excluded: tuple[str, ...] = ()
    context_length: int | None = None
    replicas: int = 1
    force: bool = False


AS_IT_FITS: Final = Wish()


class Placed(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of ``POST /place_instance``; a gateway of an older version names one instance."""

    instance_id: str
    command_id: str = ""
    instance_ids: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


class Previews(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of ``GET /instance/previews``, without the part that older clients read."""

    decision: PlacementDecision


async def preview(client: ApiClient, model_id: str, wish: Wish = AS_IT_FITS) -> PlacementDecision:
    """What placing the model would decide now.

    Raises:
        SkulkError: as `ApiClient.get`.
    """
    query: dict[str, str | list[str]] = {"model_id": model_id, "excluded_node_ids": list(wish.excluded)}
    if wish.context_length is not None:
        query["context_length"] = str(wish.context_length)
    if wish.force:
        query["force"] = "1"
    return (await client.get("/instance/previews", Previews, query=query)).decision


async def place(client: ApiClient, model_id: str, wish: Wish = AS_IT_FITS) -> Placed:
    """Adds instances.

    Raises:
        SkulkError: as `ApiClient.post`; ``unplaceable``.
    """
    body: dict[str, Any] = {"model_id": model_id, "excluded_nodes": list(wish.excluded)}
    if wish.context_length is not None:
        body["context_length"] = wish.context_length
    # said only where they are meant: an older gateway refuses fields that it doesn't know
    if wish.replicas > 1:
        body["replicas"] = wish.replicas
    if wish.force:
        body["force"] = True
    placed = await client.post("/place_instance", body, Placed, timeout_s=PLACE_TIMEOUT_S)
    return placed if placed.instance_ids else msgspec.structs.replace(placed, instance_ids=(placed.instance_id,))


async def ensure_ready(client: ApiClient, model_id: str, say: Callable[[str], object]) -> None:
    """Sees to it that an instance of the model is ready: waits for one that is on its way, else places one.

    Raises:
        SkulkError: ``model_not_found``, ``unplaceable``, ``runner_failed``, ``deadline_exceeded``.
    """
    known = next((model for model in await list_models(client) if model.id == model_id), None)
    if known is not None and known.state == "ready":
        return
    instances = [row for row in await _instances(client) if row.model_id == model_id and row.state != "failed"]
    if not instances:
        say(f"placing {model_id}")
        await wait_ready(client, (await place(client, model_id)).instance_ids, say)
        return
    await wait_ready(client, {row.instance_id for row in instances}, say)


async def wait_ready(
    client: ApiClient,
    instance_ids: Collection[str],
    say: Callable[[str], object],
    *,
    all_of_them: bool = False,
    timeout_s: float = READY_TIMEOUT_S,
) -> None:
    """Waits until one (or all) of the instances can answer; says each change of their state once.

    Raises:
        RequestError: ``instance_not_found``: all were deleted meanwhile.
        ServiceError: ``runner_failed`` with the reason; ``deadline_exceeded``.
    """
    wait = _Wait(all_of_them=all_of_them, say=say)
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    while True:
        rows = [row for row in await _instances(client) if row.instance_id in instance_ids]
        if wait.is_over(rows, loop.time()):
            return
        if loop.time() >= deadline:
            raise ServiceError(
                "deadline_exceeded", f"Not ready after {timeout_s:.0f} s; `skulk ps` shows how far it is."
            )
        await asyncio.sleep(POLL_S)


async def wait_for_instance(client: ApiClient, model_id: str, *, timeout_s: float) -> set[str]:
    """The ids of the model's instances, as soon as there is one: a node that starts places what it was told to.

    Raises:
        ServiceError: ``deadline_exceeded``.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    while True:
        found = {row.instance_id for row in await _instances(client) if row.model_id == model_id}
        if found:
            return found
        if loop.time() >= deadline:
            raise ServiceError(
                "deadline_exceeded",
                f"{model_id} is not placed after {timeout_s:.0f} s; `skulk preview {model_id}` tells why.",
            )
        await asyncio.sleep(POLL_S)


async def _instances(client: ApiClient) -> tuple[InstanceRow, ...]:
    return instance_rows(await client.get("/state", StateView))


class _Wait:
    """What `wait_ready` remembers between two looks."""

    def __init__(self, *, all_of_them: bool, say: Callable[[str], object]) -> None:
        self._all = all_of_them
        self._say = say
        self._told: dict[str, str] = {}
        self._failed_since: float | None = None

    def is_over(self, rows: list[InstanceRow], now: float) -> bool:
        """Whether the wait has its answer; raises where that is a failure."""
        if not rows:
            raise RequestError("instance_not_found", "It was deleted while this command waited for it.")
        for row in rows:
            self._tell(row)
        ready = [row for row in rows if row.state in SERVING]
        if ready and (len(ready) == len(rows) or not self._all):
            return True
        failed = [row for row in rows if row.state == "failed"]
        if not failed or (len(failed) < len(rows) and not self._all):
            self._failed_since = None
            return False
        if self._failed_since is None:
            self._failed_since = now
        if now - self._failed_since >= FAILURE_S:
            raise ServiceError("runner_failed", f"{failed[0].model_id} failed to load: {failed[0].detail}")
        return False

    def _tell(self, row: InstanceRow) -> None:
        if self._told.get(row.instance_id) != row.state:
            self._told[row.instance_id] = row.state
            where = f" on {', '.join(row.nodes)}" if row.nodes else ""
            self._say(f"{row.model_id} {row.state}{where}{f': {row.detail}' if row.detail else ''}")
