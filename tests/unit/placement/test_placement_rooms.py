"""The ledger: what is promised counts from assignment to release, and only once."""

from __future__ import annotations

import msgspec
import pytest

from skulk.placement import admit, reserved_bytes, room
from skulk.units import GIB
from skulk.wire.beats import RunnerPhase
from skulk.wire.placement import MemoryEstimate
from skulk.wire.state import Assignment
from tests.support.machines import CPU_TAGS, TINY, cluster, machine, runner, with_beat, with_instance


def assignment(instance_id: str = "i1", *, need_gib: float = 4, node_id: str = "d1", epoch: int = 1) -> Assignment:
    need = int(need_gib * GIB)
    return Assignment(
        epoch=epoch,
        node_id=node_id,
        runner_id=f"{instance_id}-{epoch}",
        backend="llama_cpp-cpu",
        context_length=4096,
        n_parallel=4,
        kv_cells=4096,
        memory=MemoryEstimate(weights_bytes=need, kv_bytes=0, compute_bytes=0, headroom_bytes=0, need_bytes=need),
    )


def test_an_empty_node_has_all_it_can_use_and_an_unknown_one_nothing() -> None:
    view = cluster(machine("d1", CPU_TAGS, 10))
    assert room(view, "d1") == 10 * GIB
    assert room(view, "zz") == 0


def test_an_assignment_counts_whole_before_its_runner_is_reported() -> None:
    view = with_instance(cluster(machine("d1", CPU_TAGS, 10), machine("d2", CPU_TAGS, 10)), TINY, assignment())
    assert room(view, "d1") == 6 * GIB
    assert room(view, "d2") == 10 * GIB


@pytest.mark.parametrize(
    ("phase", "memory_gib", "wanted", "expected_gib"),
    [
        ("accepted", 0, True, 6),
        ("starting", 0, True, 6),
        ("loading", 1, True, 7),
        ("ready", 3, True, 9),
        ("ready", 5, True, 10),  # it took more than promised: usable has shrunk by that already
        ("failed", 0, True, 6),  # it will be started again
        ("stopped", 0, True, 6),
        ("refused", 0, True, 10),
        ("ready", 3, False, 9),  # deleted, but the process is still there
        ("draining", 0, False, 6),
        ("stopped", 0, False, 10),
        ("failed", 0, False, 10),
    ],
)
def test_a_runner_counts_for_what_is_not_measured_yet(
    phase: RunnerPhase, memory_gib: int, wanted: bool, expected_gib: int
) -> None:
    given = assignment()
    node = machine("d1", CPU_TAGS, 10)
    status = runner(given, phase, memory_bytes=memory_gib * GIB)
    view = cluster(with_beat(node, runners=(status,)))
    view = with_instance(view, TINY, given) if wanted else view
    assert room(view, "d1") == expected_gib * GIB


def test_memory_that_only_a_newer_status_tells_of_is_not_counted_twice_as_free() -> None:
    """The beat's ``usable`` was measured before the load; the runner's own word is newer."""
    given = assignment()
    node = with_beat(machine("d1", CPU_TAGS, 10), runners=(runner(given, "loading"),))
    newer = runner(given, "ready", memory_bytes=4 * GIB)
    view = msgspec.structs.replace(with_instance(cluster(node), TINY, given), runners={given.runner_id: newer})
    assert room(view, "d1") == 6 * GIB


def test_old_and_new_epoch_on_one_node_both_count() -> None:
    old, new = assignment(epoch=1), assignment(epoch=2)
    node = with_beat(machine("d1", CPU_TAGS, 10), runners=(runner(old, "draining"),))
    view = with_instance(cluster(node), TINY, new)
    assert room(view, "d1") == 2 * GIB


def test_room_is_never_negative() -> None:
    view = with_instance(cluster(machine("d1", CPU_TAGS, 2)), TINY, assignment())
    assert room(view, "d1") == 0


def test_the_larger_of_wanted_and_reported_counts() -> None:
    status = runner(assignment(), "ready", reserved_bytes=5 * GIB)
    assert reserved_bytes([status], {"i1-1": 4 * GIB}, {"i1-1": GIB}) == 4 * GIB


def test_a_node_takes_what_fits_within_ten_percent() -> None:
    facts = machine("d1", CPU_TAGS, 10).beat
    assert admit(facts, assignment(need_gib=10), 0) is None
    assert admit(facts, assignment(need_gib=10.99), 0) is None
    refusal = admit(facts, assignment(need_gib=11.01), 0)
    assert refusal is not None
    assert refusal.code == "refused_by_node"


def test_a_refusal_names_the_figures() -> None:
    refusal = admit(machine("d1", CPU_TAGS, 10).beat, assignment(need_gib=8), 6 * GIB)
    assert refusal is not None
    assert (
        refusal.detail == "memory need 8.0 GiB have 4.0 GiB: 10.0 GiB usable, 6.0 GiB of it promised to other instances"
    )


def test_a_node_refuses_a_backend_that_it_lost() -> None:
    refusal = admit(machine("d1", ("llama_cpp", "llama_cpp-vulkan"), 10).beat, assignment(need_gib=1), 0)
    assert refusal is not None
    assert "llama_cpp-cpu isn't there any more" in refusal.detail
