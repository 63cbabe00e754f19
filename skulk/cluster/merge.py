"""Two lineages made one: pure, commutative, associative, idempotent (DESIGN 3). A stale state erases nothing.

instance    the version with the higher (birth, epoch, position) wins; a promise to somebody is a birth, and of versions
            whose id comes from one command a promised one wins
tombstone   united; it beats every version of its instance that was born up to its position, and every version of one
            whose id comes from its command: such an id is never used again, but two masters that don't hear each other
            may both have carried the command out, so that one's deletion is below the other's birth. A promise
            outlives a tombstone below it that nobody asked for
drain       the version with the higher position wins
position    the higher; ``seq`` the higher of both, so that it never falls

What a tombstone covers is decided by the id, which all versions share, and by promise and birth, which are also the
first ranks of a version: so if any version outlives a tombstone, the one that wins does, in any order of merging. A
deletion beats a move it didn't know of.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar

import msgspec

from skulk.ids import is_commanded
from skulk.wire.state import ClusterState, Drain, Instance, Position, Tombstone

T = TypeVar("T")

DAY_S: Final = 24 * 3600.0
TOMBSTONE_S: Final = 30 * DAY_S
"""How long a deletion is remembered."""


def merge(a: ClusterState, b: ClusterState) -> ClusterState:
    """The union of what two states know. Both must be of one cluster."""
    assert a.cluster == b.cluster, f"{a.cluster!r} and {b.cluster!r} are different clusters"
    tombstones = _united_tombstones(a.tombstones, b.tombstones)
    instances = _united(a.instances, b.instances, _instance_rank)
    merged = ClusterState(
        cluster=a.cluster,
        position=Position(
            term=max(a.position.term, b.position.term),
            seq=max(a.position.seq, b.position.seq),
        ),
        instances={name: found for name, found in instances.items() if not _is_covered(found, tombstones)},
        tombstones=tombstones,
        drains=_united(a.drains, b.drains, _drain_rank),
    )
    unknown = _united_unknown(merged, *sorted((a, b), key=lambda state: (state.position, repr(state.unknown))))
    return msgspec.structs.replace(merged, unknown=unknown, partial=bool(unknown))


_RECORDS: Final = ("instances", "tombstones", "drains")


def _united_unknown(merged: ClusterState, lower: ClusterState, higher: ClusterState) -> dict[str, Any]:
    """What neither side knows: of a record, what came with the version that won; of the rest, the higher side's."""
    if not lower.unknown and not higher.unknown:
        return {}
    united = {name: value for name, value in (lower.unknown | higher.unknown).items() if name not in _RECORDS}
    for kind in _RECORDS:
        kept = {
            name: rest
            for side in (lower, higher)
            for name, rest in side.unknown.get(kind, {}).items()
            if getattr(side, kind).get(name) == getattr(merged, kind).get(name, ...)
        }
        if kept:
            united[kind] = kept
    return united


def lacks(known: ClusterState, other: ClusterState, wall: float) -> bool:
    """Whether ``other`` holds what ``known`` lacks: an instance, a newer version of one, a deletion, a drain.

    Tombstones that are nearly as old as they get don't count: ``known`` may have forgotten them by now. ``wall``:
    seconds since the epoch. Cost: O(size of ``other``).
    """
    for name, found in other.instances.items():
        if _is_covered(found, known.tombstones):
            continue
        own = known.instances.get(name)
        if own is None or _instance_rank(own) < _instance_rank(found):
            return True
    for name, tombstone in other.tombstones.items():
        own_stone = known.tombstones.get(name)
        is_old = wall - tombstone.deleted_at > TOMBSTONE_S - DAY_S
        if not is_old and (own_stone is None or own_stone.position < tombstone.position):
            return True
        if not is_old and own_stone is not None and own_stone.unasked and not tombstone.unasked:
            return True
    for name, drain in other.drains.items():
        own_drain = known.drains.get(name)
        if own_drain is None or own_drain.position < drain.position:
            return True
    return False


def _united(a: dict[str, T], b: dict[str, T], rank: Callable[[T], tuple[object, ...]]) -> dict[str, T]:
    if a is b:
        return a
    united = dict(a)
    for name, found in b.items():
        own = united.get(name)
        united[name] = found if own is None else _higher(own, found, rank)
    return united


def _united_tombstones(a: dict[str, Tombstone], b: dict[str, Tombstone]) -> dict[str, Tombstone]:
    """The higher of each two; asked for where either was."""
    united = _united(a, b, _tombstone_rank)
    if a is b:
        return united
    for name in [name for name, found in united.items() if found.unasked]:
        if not all(side[name].unasked for side in (a, b) if name in side):
            united[name] = msgspec.structs.replace(united[name], unasked=False)
    return united


def _higher(one: T, other: T, rank: Callable[[T], tuple[object, ...]]) -> T:
    if one is other or one == other:
        # what both sides know already; compared first, for it is nearly everything
        return one
    ranks = rank(one), rank(other)
    if ranks[0] == ranks[1]:
        # a tie that only a defect can make; the text breaks it, so that merge stays commutative even then
        return max(one, other, key=repr)
    return one if ranks[0] > ranks[1] else other


def _is_covered(instance: Instance, tombstones: dict[str, Tombstone]) -> bool:
    tombstone = tombstones.get(instance.instance_id)
    if tombstone is None:
        return False
    if tombstone.position >= instance.born:
        return True
    return _is_of_command(instance) and not (tombstone.unasked and instance.kept)


def _is_of_command(instance: Instance) -> bool:
    return is_commanded(instance.instance_id, instance.command_id)


def _instance_rank(instance: Instance) -> tuple[object, ...]:
    # only among versions of one command a promise comes first; all versions of an id are of one command or none is
    is_promised = instance.kept and _is_of_command(instance)
    return is_promised, instance.born, instance.last_epoch, instance.position


def _tombstone_rank(tombstone: Tombstone) -> tuple[object, ...]:
    return (tombstone.position,)


def _drain_rank(drain: Drain) -> tuple[object, ...]:
    return (drain.position,)
