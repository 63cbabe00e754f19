"""What the commands read of ``GET /state``, and its rows for tables. Fields that aren't there have their defaults."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from skulk.errors import RequestError

# A runner's tag in /state as a word for people.
PHASES: Final = {
    "RunnerIdle": "starting",
    "RunnerLoading": "loading",
    "RunnerLoaded": "loading",
    "RunnerWarmingUp": "warming",
    "RunnerReady": "ready",
    "RunnerRunning": "running",
    "RunnerShutdown": "stopping",
    "RunnerFailed": "failed",
}
SERVING: Final = ("ready", "running")


class _Camel(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    pass


class _Shard(_Camel, frozen=True, kw_only=True):
    resolved_backend: str | None = None


class _Assignments(_Camel, frozen=True, kw_only=True):
    model_id: str
    node_to_runner: dict[str, str] = {}
    runner_to_shard: dict[str, dict[str, _Shard]] = {}


class _Instance(_Camel, frozen=True, kw_only=True):
    shard_assignments: _Assignments
    context_token_limit: int | None = None
    reason: str = ""


class _Loaded(_Camel, frozen=True, kw_only=True):
    loaded_bytes: int = 0
    ratio: float | None = None


class _Runner(_Camel, frozen=True, kw_only=True):
    error_message: str | None = None
    memory: _Loaded = _Loaded()


class _Bytes(_Camel, frozen=True, kw_only=True):
    in_bytes: int = 0


class _Memory(_Camel, frozen=True, kw_only=True):
    ram_total: _Bytes = _Bytes()
    ram_available: _Bytes = _Bytes()


class _Identity(_Camel, frozen=True, kw_only=True):
    friendly_name: str = ""
    skulk_version: str = ""


class _Reason(_Camel, frozen=True, kw_only=True):
    code: str = ""
    message: str = ""
    remediation: str = ""


class _Health(_Camel, frozen=True, kw_only=True):
    level: str = "ok"
    reasons: tuple[_Reason, ...] = ()


class StateView(_Camel, frozen=True, kw_only=True):
    """``GET /state``, as far as it is shown."""

    instances: dict[str, dict[str, _Instance]] = {}
    runners: dict[str, dict[str, _Runner]] = {}
    node_identities: dict[str, _Identity] = {}
    node_memory: dict[str, _Memory] = {}
    node_health: dict[str, _Health] = {}
    node_backends: dict[str, tuple[str, ...]] = {}
    last_seen: dict[str, str] = {}
    master: Any = None


class InstanceRow(msgspec.Struct, frozen=True, kw_only=True):
    """One line of ``skulk ps``.

    Attributes:
        state: one of `PHASES`' words, ``pending`` without a node.
        nodes: names of the nodes that run it.
        context_length: window of one request, tokens; 0 where it isn't known.
        detail: why it failed, or what it waits for.
        loaded_bytes: what its runner was measured to take after the load; 0: not yet.
        memory_ratio: that, divided by what was estimated; None: not known.
    """

    instance_id: str
    model_id: str
    state: str
    nodes: tuple[str, ...]
    backend: str
    context_length: int
    detail: str
    loaded_bytes: int = 0
    memory_ratio: float | None = None


class NodeRow(msgspec.Struct, frozen=True, kw_only=True):
    """One line of ``skulk nodes``. ``health``: ``ok``, ``warn`` or ``error``, with its ``reasons`` as sentences."""

    node_id: str
    name: str
    is_master: bool
    health: str
    reasons: tuple[str, ...]
    backends: tuple[str, ...]
    memory_total_bytes: int
    memory_available_bytes: int
    version: str
    last_seen: str


def instance_rows(state: StateView) -> tuple[InstanceRow, ...]:
    """The instances by model, then id."""
    rows = (_instance_row(state, name, body) for name, tagged in state.instances.items() for body in tagged.values())
    return tuple(sorted(rows, key=lambda row: (row.model_id, row.instance_id)))


def _instance_row(state: StateView, instance_id: str, body: _Instance) -> InstanceRow:
    assignments = body.shard_assignments
    phases: list[str] = []
    errors: list[str] = []
    loaded: list[_Loaded] = []
    for runner_id in assignments.node_to_runner.values():
        # A runner that nobody has heard of yet is on its way.
        tag, runner = next(iter(state.runners.get(runner_id, {}).items()), ("RunnerIdle", _Runner()))
        phases.append(PHASES.get(tag, tag))
        loaded += [runner.memory] if runner.memory.loaded_bytes else []
        errors += [runner.error_message] if runner.error_message else []
    shards = (shard for tagged in assignments.runner_to_shard.values() for shard in tagged.values())
    return InstanceRow(
        instance_id=instance_id,
        model_id=assignments.model_id,
        state=_least(phases),
        nodes=tuple(node_name(state, node) for node in assignments.node_to_runner),
        backend=next((shard.resolved_backend for shard in shards if shard.resolved_backend), ""),
        context_length=body.context_token_limit or 0,
        detail="; ".join(errors) if phases else body.reason,
        loaded_bytes=sum(one.loaded_bytes for one in loaded),
        memory_ratio=loaded[0].ratio if len(loaded) == 1 else None,
    )


def _least(phases: list[str]) -> str:
    """An instance over several nodes is as far as its last runner; one failure fails it."""
    order = ["failed", "stopping", *dict.fromkeys(PHASES.values())]
    return min(phases, key=lambda phase: order.index(phase) if phase in order else -1, default="pending")


def node_name(state: StateView, node_id: str) -> str:
    """A node's name for people; its id where it has none."""
    identity = state.node_identities.get(node_id)
    return identity.friendly_name if identity is not None and identity.friendly_name else node_id


def node_rows(state: StateView) -> tuple[NodeRow, ...]:
    """The live nodes by name, then id."""
    known = state.last_seen or state.node_identities
    return tuple(sorted((_node_row(state, node) for node in known), key=lambda row: (row.name, row.node_id)))


def _node_row(state: StateView, node_id: str) -> NodeRow:
    memory = state.node_memory.get(node_id, _Memory())
    health = state.node_health.get(node_id, _Health())
    return NodeRow(
        node_id=node_id,
        name=node_name(state, node_id),
        is_master=state.master == node_id,
        health=health.level,
        reasons=tuple(f"{reason.message} {reason.remediation}".strip() for reason in health.reasons),
        backends=state.node_backends.get(node_id, ()),
        memory_total_bytes=memory.ram_total.in_bytes,
        memory_available_bytes=memory.ram_available.in_bytes,
        version=state.node_identities.get(node_id, _Identity()).skulk_version,
        last_seen=state.last_seen.get(node_id, ""),
    )


def find_instance(rows: tuple[InstanceRow, ...], prefix: str) -> InstanceRow:
    """The one instance whose id begins with ``prefix``; a whole id always names itself.

    Raises:
        RequestError: ``instance_not_found``: none does, or several do.
    """
    found = [row for row in rows if row.instance_id.startswith(prefix)] if prefix else []
    whole = [row for row in found if row.instance_id == prefix]
    if len(whole or found) == 1:
        return (whole or found)[0]
    if found:
        ids = ", ".join(row.instance_id for row in found[:5]) + (", …" if len(found) > 5 else "")
        raise RequestError(
            "instance_not_found", f"{prefix!r} begins the ids of {len(found)} instances ({ids}); give more of it."
        )
    raise RequestError("instance_not_found", f"No instance's id begins with {prefix!r}; `skulk ps` lists them.")
