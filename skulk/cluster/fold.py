"""The fold: one event applied to the state, and the digest that tells two states apart.

event                 effect
TermBegan             the position moves to the new term
InstanceCreated       the instance is there, pending; made again, its epochs go on from its tombstone's
InstanceAssigned      it belongs to a node; its epoch never falls
InstanceUnassigned    it is pending again
InstanceKept          somebody was promised it: it no longer leaves by itself
InstanceDeleted       it is gone; its tombstone stays
NodeDrainStarted      the node takes no new work
NodeDrainEnded        it does again
TombstonesExpired     those tombstones are gone
"""

from __future__ import annotations

from functools import reduce
from typing import Any, TypeAlias, TypeVar, assert_never

import msgspec

from skulk.ids import digest64, is_commanded
from skulk.wire.events import (
    Event,
    EventRecord,
    InstanceAssigned,
    InstanceCreated,
    InstanceDeleted,
    InstanceKept,
    InstanceUnassigned,
    NodeDrainEnded,
    NodeDrainStarted,
    TermBegan,
    TombstonesExpired,
)
from skulk.wire.state import ClusterState, Drain, Instance, Position, Tombstone
from skulk.wire.unknown import pruned

T = TypeVar("T")
_Digests: TypeAlias = dict[str, tuple[object, int]]


def state_hash(state: ClusterState) -> str:
    """A 64-bit digest of a state; equal states have equal digests whatever the order of their dicts. O(size)."""
    return StateHash().of(state)


class StateHash:
    """`state_hash` for one who sees a state change little by little: a record that stayed isn't encoded again.

    The digest is the sum, modulo 2^64, of the digests of the records and of the rest. Records are frozen, so one that
    is the same object is the same record.
    """

    def __init__(self) -> None:
        self._known: tuple[_Digests, ...] = ({}, {}, {})

    def of(self, state: ClusterState) -> str:
        """The digest. Cost: a look at each record, and the encoding of those that changed since the last call."""
        rest = (state.cluster, state.position, state.unknown)
        total = _digest(rest)
        fresh: list[_Digests] = []
        for known, records in zip(self._known, (state.instances, state.tombstones, state.drains), strict=True):
            digests: _Digests = {}
            for name, record in records.items():
                found = known.get(name)
                if found is None or found[0] is not record:
                    found = (record, _digest(record))
                digests[name] = found
                total += found[1]
            fresh.append(digests)
        self._known = tuple(fresh)
        return f"{total % 2**64:016x}"


def _digest(record: object) -> int:
    kind = type(record).__name__
    return int(digest64(kind.encode() + msgspec.json.encode(record, order="sorted")), 16)


def fold(state: ClusterState, record: EventRecord) -> ClusterState:
    """The state after one event. Total: an event about an instance that isn't there only moves the position.

    The caller sees to the order: `record` directly follows ``state.position``.
    """
    position = record.position
    assert position.seq == state.position.seq + 1, f"seq {position.seq} does not follow {state.position.seq}"
    event = record.event
    match event:
        case TermBegan():
            changed = state
        case InstanceCreated():
            changed = _created(state, event, position)
        case InstanceAssigned():
            changed = _assigned(state, event, position)
        case InstanceUnassigned():
            changed = _unassigned(state, event, position)
        case InstanceKept():
            changed = _kept(state, event, position)
        case InstanceDeleted():
            changed = _deleted(state, event, position)
        case NodeDrainStarted():
            drain = msgspec.structs.replace(event.drain, position=position)
            changed = msgspec.structs.replace(state, drains={**state.drains, drain.node_id: drain})
        case NodeDrainEnded():
            changed = _drain_ended(state, event.node_id, position)
        case TombstonesExpired():
            tombstones = _without(state.tombstones, event.instance_ids)
            changed = msgspec.structs.replace(state, tombstones=tombstones)
        case _:
            assert_never(event)
    unknown = _known_again(changed.unknown, event)
    return msgspec.structs.replace(changed, position=position, unknown=unknown, partial=bool(unknown))


def _known_again(unknown: dict[str, Any], event: Event) -> dict[str, Any]:
    """What is still unknown after an event: what it replaced was written anew by this version."""
    if not unknown:
        return unknown
    match event:
        case InstanceCreated():
            return pruned(unknown, "instances", event.instance.instance_id)
        case InstanceDeleted():
            return pruned(unknown, "instances", event.instance_id)
        case InstanceAssigned() | InstanceUnassigned():
            return pruned(unknown, "instances", event.instance_id, "assignment")
        case NodeDrainStarted():
            return pruned(unknown, "drains", event.drain.node_id)
        case TombstonesExpired():
            return reduce(lambda rest, name: pruned(rest, "tombstones", name), event.instance_ids, unknown)
        case TermBegan() | NodeDrainEnded() | InstanceKept():
            return unknown


def _created(state: ClusterState, event: InstanceCreated, position: Position) -> ClusterState:
    instance = msgspec.structs.replace(event.instance, command_id=event.command_id or event.instance.command_id)
    tombstone = state.tombstones.get(instance.instance_id)
    if tombstone is None:
        return _with_instance(state, msgspec.structs.replace(instance, born=position, position=position))
    assert position > tombstone.position, "the log moves on: an event comes after every tombstone of its past"
    if is_commanded(instance.instance_id, instance.command_id):
        # nobody uses such an id again, and a merge would take it away
        return state
    last_epoch = max(instance.last_epoch, tombstone.last_epoch)
    again = msgspec.structs.replace(instance, born=position, position=position, last_epoch=last_epoch)
    return _with_instance(state, again)


def _assigned(state: ClusterState, event: InstanceAssigned, position: Position) -> ClusterState:
    instance = state.instances.get(event.instance_id)
    if instance is None or event.assignment.epoch <= instance.last_epoch:
        return state
    changed = msgspec.structs.replace(
        instance,
        assignment=event.assignment,
        last_epoch=event.assignment.epoch,
        reason=event.reason,
        position=position,
    )
    return _with_instance(state, changed)


def _unassigned(state: ClusterState, event: InstanceUnassigned, position: Position) -> ClusterState:
    instance = state.instances.get(event.instance_id)
    if instance is None:
        return state
    changed = msgspec.structs.replace(instance, assignment=None, reason=event.reason, position=position)
    return _with_instance(state, changed)


def _kept(state: ClusterState, event: InstanceKept, position: Position) -> ClusterState:
    instance = state.instances.get(event.instance_id)
    if instance is None:
        return state
    # a birth: what another master took back before it doesn't touch a promise
    kept = msgspec.structs.replace(instance, on_demand=False, kept=True, born=position, position=position)
    return _with_instance(state, kept)


def _deleted(state: ClusterState, event: InstanceDeleted, position: Position) -> ClusterState:
    instance = state.instances.get(event.instance_id)
    earlier = state.tombstones.get(event.instance_id)
    tombstone = Tombstone(
        instance_id=event.instance_id,
        position=position,
        deleted_at=event.deleted_at,
        last_epoch=max(0 if known is None else known.last_epoch for known in (instance, earlier)),
        command_id=event.command_id,
        unasked=not event.command_id and (earlier is None or earlier.unasked),
    )
    return msgspec.structs.replace(
        state,
        instances=_without(state.instances, (event.instance_id,)),
        tombstones={**state.tombstones, event.instance_id: tombstone},
    )


def _drain_ended(state: ClusterState, node_id: str, position: Position) -> ClusterState:
    drain = state.drains.get(node_id)
    if drain is None:
        return state
    ended: Drain = msgspec.structs.replace(drain, active=False, position=position)
    return msgspec.structs.replace(state, drains={**state.drains, node_id: ended})


def _with_instance(state: ClusterState, instance: Instance) -> ClusterState:
    return msgspec.structs.replace(state, instances={**state.instances, instance.instance_id: instance})


def _without(items: dict[str, T], names: tuple[str, ...]) -> dict[str, T]:
    return {name: item for name, item in items.items() if name not in names}
