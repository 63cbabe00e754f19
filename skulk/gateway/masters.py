"""Calls to the master, whoever it is by then."""

from __future__ import annotations

from typing import Any, Final, TypeVar

from skulk.bus.port import Bus
from skulk.bus.replica import Replica
from skulk.bus.subjects import Endpoint
from skulk.clock import Clock
from skulk.errors import ServiceError, UnavailableError
from skulk.wire.state import Position

R = TypeVar("R")

MASTER_WAIT_S: Final = 5.0
COMMAND_WAIT_S: Final = 40.0
POSITION_WAIT_S: Final = 10.0
_RETRY_PAUSE_S: Final = 0.2
_NOT_THE_MASTER: Final = ("not_master", "no_master", "unreachable", "bus_disconnected")


class Masters:
    """Asks the master of the moment; a change of masters in between is waited out, for the same command id is safe.

    Args:
        node_id: the own node, whose beat tells whether it is cut off from a master that others hear.
    """

    def __init__(self, bus: Bus, replica: Replica, clock: Clock, node_id: str = "") -> None:
        self._node_id = node_id
        self._bus = bus
        self._replica = replica
        self._clock = clock

    async def ask(self, endpoint: Endpoint[Any, R], message: Any, *, timeout_s: float = COMMAND_WAIT_S) -> R:
        """The master's answer.

        Raises:
            UnavailableError: ``no_master``: none was heard, or none answered, for 5 s; ``master_unreachable``: others
                hear one, this node doesn't.
            SkulkError: what the master answered.
        """
        give_up_at = self._clock.now() + MASTER_WAIT_S
        while True:
            left_s = max(0.0, give_up_at - self._clock.now())
            if not await self._replica.wait_until(lambda view: view.master is not None, left_s):
                raise self._unreachable() or _no_master("none has been heard")
            master = self._replica.view.master
            if master is None:
                continue
            try:
                return await self._bus.request(endpoint, message, timeout_s=timeout_s, node=master.node_id)
            except UnavailableError as error:
                if error.code not in _NOT_THE_MASTER:
                    raise
                if self._clock.now() >= give_up_at:
                    raise _no_master(error.detail) from error
            asked = master.term
            await self._replica.wait_until(
                lambda view, asked=asked: view.master is not None and view.master.term != asked, _RETRY_PAUSE_S
            )

    def _unreachable(self) -> UnavailableError | None:
        node = self._replica.view.nodes.get(self._node_id)
        reasons = () if node is None else node.beat.warnings
        found = next((reason for reason in reasons if reason.code == "master_unreachable"), None)
        return None if found is None else UnavailableError(found.code, found.message, retry_after_s=2)

    async def seen(self, position: Position, what: str) -> None:
        """Returns when the own state has reached ``position``: what a client is told, its next read shows.

        Raises:
            ServiceError: ``deadline_exceeded``.
        """
        if not await self._replica.wait_for(position, POSITION_WAIT_S):
            raise ServiceError(
                "deadline_exceeded",
                f"{what}, but this gateway has not heard of it within {POSITION_WAIT_S:.0f} s; see GET /state",
            )


def _no_master(why: str) -> UnavailableError:
    return UnavailableError(
        "no_master",
        f"there is no master that could decide this ({why}); one is elected within seconds, ask again",
        retry_after_s=2,
    )
