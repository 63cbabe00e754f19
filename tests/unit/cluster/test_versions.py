"""Versions that know more than ours: what they wrote is kept, and who doesn't understand it all holds back."""

from __future__ import annotations

from pathlib import Path

import msgspec

from skulk.cluster.fold import fold, state_hash
from skulk.cluster.follow import follow_event
from skulk.cluster.merge import merge
from skulk.node.storage import load_state
from skulk.wire.base import decode, encode
from skulk.wire.commands import Snapshot
from skulk.wire.events import InstanceAssigned, InstanceCreated, InstanceDeleted
from skulk.wire.state import Assignment, ClusterState, Instance, Position
from skulk.wire.unknown import opened
from tests.support.states import TERM, assignment, instance, record, state_of


class NewerAssignment(Assignment, frozen=True, kw_only=True):
    """With a field of tomorrow."""

    speed: int = 0


class NewerInstance(Instance, frozen=True, kw_only=True):
    """With two fields of tomorrow."""

    owner: str = ""
    assignment: NewerAssignment | None = None


class NewerState(ClusterState, frozen=True, kw_only=True):
    """With a table of tomorrow."""

    instances: dict[str, NewerInstance] = {}  # pyright: ignore[reportIncompatibleVariableOverride]
    pins: dict[str, str] = {}


def newer_state() -> NewerState:
    assigned = msgspec.convert({**msgspec.to_builtins(assignment("i1")), "speed": 7}, NewerAssignment)
    plain = msgspec.to_builtins(instance("i1", assigned=assignment("i1")))
    first = msgspec.convert({**plain, "owner": "anna", "assignment": msgspec.to_builtins(assigned)}, NewerInstance)
    second = msgspec.convert({**msgspec.to_builtins(instance("i2")), "owner": "bert"}, NewerInstance)
    position = Position(term=TERM, seq=5)
    instances = {"i1": first, "i2": second}
    return NewerState(cluster="test", position=position, instances=instances, pins={"m": "r"})


def older_view() -> ClusterState:
    body = encode({"node_id": "bbbb", "state": newer_state()})
    return decode(body, Snapshot).state


def as_newer_reads(state: ClusterState) -> NewerState:
    return msgspec.structs.replace(opened(msgspec.json.decode(encode(state)), NewerState), partial=False)


def test_what_this_version_doesnt_know_survives_a_round_trip() -> None:
    state = older_view()
    assert state.partial
    assert state.instances["i1"].model_id == "org/model"
    assert as_newer_reads(state) == newer_state()


def test_it_survives_the_disk(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_bytes(encode(older_view()))
    assert load_state(tmp_path, "test") == older_view()
    (tmp_path / "state.json").write_bytes(encode(newer_state()))
    assert load_state(tmp_path, "test") == older_view()


def test_it_goes_with_the_record_that_it_belongs_to() -> None:
    moved = assignment("i1", epoch=2)
    state = fold(older_view(), record(InstanceAssigned(instance_id="i1", assignment=moved), 6))
    read = as_newer_reads(state).instances["i1"]
    assert read.owner == "anna"
    assert read.assignment is not None
    assert (read.assignment.epoch, read.assignment.speed) == (2, 0)
    gone = fold(state, record(InstanceDeleted(instance_id="i1", deleted_at=0.0), 7))
    assert gone.unknown["instances"].keys() == {"i2"}


def test_a_state_is_whole_again_when_nothing_unknown_is_left_in_it() -> None:
    state = msgspec.structs.replace(older_view(), unknown={"instances": older_view().unknown["instances"]})
    for number, name in enumerate(("i1", "i2"), 6):
        assert state.partial
        state = fold(state, record(InstanceDeleted(instance_id=name, deleted_at=0.0), number))
    assert (state.unknown, state.partial) == ({}, False)
    # nor does it come back over the bus as partial
    told = decode(encode({"node_id": "bbbb", "state": state}), Snapshot).state
    assert follow_event(told, record(InstanceCreated(instance=instance("i3")), 8)).state.instances.keys() == {"i3"}


def test_a_partial_state_is_never_folded_by_a_follower() -> None:
    assert follow_event(older_view(), record(InstanceDeleted(instance_id="i1", deleted_at=0.0), 6)).wants_snapshot


def test_a_merge_keeps_it_with_the_version_that_wins() -> None:
    newer = instance("i1", assigned=assignment("i1", epoch=2), position=Position(term=TERM, seq=9))
    other = state_of(newer, seq=9)
    for merged in (merge(older_view(), other), merge(other, older_view())):
        assert merged.partial
        assert merged.unknown["pins"] == {"m": "r"}
        assert merged.unknown["instances"].keys() == {"i2"}
        assert merge(merged, older_view()) == merged


def test_the_digest_tells_it() -> None:
    state = older_view()
    other = msgspec.structs.replace(state, unknown={**state.unknown, "pins": {"m": "other"}})
    assert state_hash(state) != state_hash(other)
    assert not state_of().partial
