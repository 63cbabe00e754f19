"""A command for several replicas is as many commands for one: pure, their ids derived, their answers joined."""

from __future__ import annotations

from typing import Final

import msgspec

from skulk.errors import RequestError, SkulkError, error_of
from skulk.ids import commanded_instance_id
from skulk.wire.commands import PlacementReply, PlaceModel

MOST: Final = 64
"""Replicas of one command."""


def parts_of(command: PlaceModel) -> tuple[PlaceModel, ...]:
    """One command for each replica; the first keeps the id, so that a repeated command finds what it has made.

    Raises:
        RequestError: ``invalid_request``.
    """
    count = command.replicas
    if not 1 <= count <= MOST:
        raise RequestError("invalid_request", f"replicas is {count}; send 1 to {MOST}", param="replicas")
    if count > 1 and (command.ensure or command.instance_id is not None):
        raise RequestError("invalid_request", "one id names one instance; send replicas 1", param="replicas")
    ids = (command.command_id, *(f"{command.command_id}-{number}" for number in range(2, count + 1)))
    return tuple(msgspec.structs.replace(command, command_id=name, replicas=1) for name in ids)


def instances_of_parts(parts: tuple[PlaceModel, ...]) -> tuple[str, ...]:
    """The ids of the instances that commands without a name for them make."""
    return tuple(commanded_instance_id(part.command_id) for part in parts)


def joined(command: PlaceModel, replies: list[PlacementReply]) -> PlacementReply:
    """The answer to the whole command."""
    return msgspec.structs.replace(
        replies[0],
        command_id=command.command_id,
        position=replies[-1].position,
        instance_ids=tuple(reply.instance_id for reply in replies),
        warnings=tuple(warning for reply in replies for warning in reply.decision.warnings),
    )


def which_failed(error: SkulkError, number: int, count: int) -> SkulkError:
    """The failure of one replica as that of all."""
    detail = f"replica {number} of {count}: {error.detail} None of them stays."
    return error_of(error.code, detail, param=error.param, retry_after_s=error.retry_after_s)
