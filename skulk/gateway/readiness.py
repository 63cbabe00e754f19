"""``?wait=ready`` of a placement: returns when its instances serve, or raises the true reason why they don't.

all are ready                            -> returns
one was deleted meanwhile                -> 404 instance_not_found
one failed, or lost its node, and        -> 502 runner_failed, 503 instance_not_ready: what its runner or its
  stays so for `SETTLE_S`                   node said; a supervisor may start it again before
the time is up                           -> 504 deadline_exceeded: how far it is
"""

from __future__ import annotations

from typing import Final

from aiohttp import web

from skulk.bus.replica import Replica
from skulk.clock import Clock
from skulk.cluster.view import ClusterView, InstancePhase, phase_of
from skulk.errors import RequestError, ServiceError
from skulk.gateway.waiting import loading_of, why_not_ready

READY_WAIT_S: Final = 3600.0
"""A load of hundreds of gigabytes from a slow disk, or a long download before it."""
SETTLE_S: Final = 3.0


def waits_for_ready(request: web.Request) -> bool:
    """Whether the caller asks to wait.

    Raises:
        RequestError: ``invalid_request``: for something else.
    """
    asked = request.query.get("wait")
    if asked not in (None, "ready"):
        raise RequestError("invalid_request", "wait must be ready, or be left out", param="wait")
    return asked == "ready"


async def wait_ready(replica: Replica, clock: Clock, instance_ids: tuple[str, ...], timeout_s: float) -> None:
    """Returns when all are ready.

    Raises:
        SkulkError: see the module.
    """
    give_up_at = clock.now() + timeout_s
    settled_at: float | None = None
    while True:
        view, now = replica.view, clock.now()
        phases = _phases(view, instance_ids)
        if all(phase == "ready" for phase in phases.values()):
            return
        stuck = [name for name, phase in phases.items() if phase in ("failed", "pending")]
        settled_at = None if not stuck else now if settled_at is None else settled_at
        limit = give_up_at if settled_at is None else min(give_up_at, settled_at + SETTLE_S)
        if now >= limit and stuck:
            raise why_not_ready(view, tuple(view.state.instances[name] for name in stuck))
        if now >= limit:
            raise _too_late(view, phases, timeout_s)
        await replica.wait_until(lambda view, seen=phases: _changed(view, seen), limit - now)


def _phases(view: ClusterView, instance_ids: tuple[str, ...]) -> dict[str, InstancePhase]:
    instances = view.state.instances
    for name in instance_ids:
        if name not in instances:
            raise RequestError("instance_not_found", f"the instance {name} was deleted while it was waited for")
    return {name: phase_of(view, instances[name]) for name in instance_ids}


def _changed(view: ClusterView, seen: dict[str, InstancePhase]) -> bool:
    instances = view.state.instances
    return any(name not in instances or phase_of(view, instances[name]) != phase for name, phase in seen.items())


def _too_late(view: ClusterView, phases: dict[str, InstancePhase], timeout_s: float) -> ServiceError:
    name = next(name for name, phase in phases.items() if phase != "ready")
    loading = loading_of(view, view.state.instances[name])
    return ServiceError(
        "deadline_exceeded",
        f"the instance {name} is not ready after {timeout_s:g} s: {loading.phase}, {loading.done:,} of "
        f"{loading.total:,} bytes; it goes on, see GET /instance/{name}, or allow more with X-Request-Timeout",
    )
