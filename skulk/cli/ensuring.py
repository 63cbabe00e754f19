"""``--place M``: the cluster has at least one instance of M, as soon as there is a master to see to it.

| at the start                             | then                                                                   |
|------------------------------------------|------------------------------------------------------------------------|
| the master answers                       | its decision is told; an instance that fits nowhere yet is `pending`   |
| none leads, or others hear it and we not | the node serves without, and asks again every 5 s until one answers    |
| the request is refused                   | the node doesn't start; later, when it serves, the log tells           |
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, TypeAlias

from skulk.errors import SkulkError
from skulk.wire.commands import PlacementReply
from skulk.wire.placement import PlacementRequest

log = logging.getLogger("skulk.launcher")

ASK_AGAIN_S: Final = 5.0
_LATER: Final = ("no_master", "master_unreachable")
Ensure: TypeAlias = Callable[[PlacementRequest], Awaitable[PlacementReply]]


async def ensure_now(
    ensure: Ensure, requests: Sequence[PlacementRequest]
) -> tuple[tuple[PlacementReply, ...], tuple[PlacementRequest, ...]]:
    """Asks for each model in turn; the answers, and the requests that no master could be asked.

    Raises:
        SkulkError: the master refused one.
    """
    replies: list[PlacementReply] = []
    for at, request in enumerate(requests):
        try:
            replies.append(await ensure(request))
        except SkulkError as error:
            if error.code not in _LATER:
                raise
            left = tuple(requests[at:])
            names = ", ".join(one.card.model_id for one in left)
            log.warning("%s will be placed when a master can be asked: %s", names, error.detail)
            return tuple(replies), left
    return tuple(replies), ()


async def keep_ensuring(ensure: Ensure, requests: Sequence[PlacementRequest]) -> None:
    """Asks every 5 s until each model was answered."""
    left = list(requests)
    while left:
        await asyncio.sleep(ASK_AGAIN_S)
        model_id = left[0].card.model_id
        try:
            reply = await ensure(left[0])
        except SkulkError as error:
            if error.code in _LATER:
                continue
            log.error("%s is not placed: %s", model_id, error.detail)
        else:
            log.info("%s: %s", model_id, reply.decision.reason or reply.decision.outcome)
        del left[0]
