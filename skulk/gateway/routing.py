"""Which ready instance is asked first: what the view tells of the runners, put to `skulk.placement.routing`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from skulk.cluster.view import ClusterView, runner_of
from skulk.placement.prefixes import Held, Prefix, held_by
from skulk.placement.routing import Replica, route
from skulk.wire.state import Instance

MOST_KEPT: Final = 4096
_SEED_DIGITS: Final = 8


class Router:
    """Keeps opened filters, so that one that was told is opened once."""

    def __init__(self) -> None:
        self._held: dict[str, tuple[str, Held]] = {}

    def ordered(
        self, view: ClusterView, ready: tuple[Instance, ...], prefix: Prefix, request_id: str, sent: Mapping[str, int]
    ) -> tuple[Instance, ...]:
        """Ready instances in the order in which to ask them.

        Args:
            prefix: of the request's prompt.
            request_id: the seed.
            sent: open requests of this gateway by runner id.
        """
        by_runner: dict[str, Instance] = {}
        replicas: list[Replica] = []
        for instance in ready:
            status, assigned = runner_of(view, instance), instance.assignment
            if status is None or assigned is None:
                continue
            by_runner[status.runner_id] = instance
            replicas.append(
                Replica(
                    name=status.runner_id,
                    slots=assigned.n_parallel,
                    active=status.active,
                    waiting=status.waiting,
                    sent=sent.get(status.runner_id, 0),
                    prefill_tps=status.prefill_tps,
                    request_s=status.request_s,
                    held=self._opened(status.runner_id, status.prefixes),
                )
            )
        return tuple(by_runner[one.name] for one in route(tuple(replicas), prefix, seed_of(request_id)))

    def _opened(self, runner_id: str, told: str) -> Held:
        known = self._held.get(runner_id)
        if known is not None and known[0] == told:
            return known[1]
        held = held_by(told)
        if runner_id not in self._held and len(self._held) >= MOST_KEPT:
            del self._held[next(iter(self._held))]
        self._held[runner_id] = (told, held)
        return held


def seed_of(request_id: str) -> int:
    """A request's own seed: the last digits of a random id."""
    return int.from_bytes(request_id.encode()[-_SEED_DIGITS:], "little")
