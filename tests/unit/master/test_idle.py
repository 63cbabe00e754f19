"""Which models leave by themselves: idle ones, the least recently used first, no more than the room that is needed."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from skulk.cluster.view import ClusterView, NodeView
from skulk.master.idle import idle_instances, room_for
from skulk.placement.decision import place
from skulk.wire.beats import RunnerStatus
from skulk.wire.placement import PlacementRequest
from skulk.wire.state import Instance
from tests.support.states import GIB, assignment, beat, card, estimate, instance, state_of, status

WALL = 10_000.0


def served(
    name: str, *, idle_s: float, size: int = GIB, on_demand: bool = True, active: int = 0
) -> tuple[Instance, RunnerStatus]:
    """A ready instance of its own model, and its runner."""
    assigned = msgspec.structs.replace(assignment(name), memory=estimate(size))
    made = msgspec.structs.replace(instance(name, model_id=f"org/{name}", assigned=assigned), on_demand=on_demand)
    told = status(assigned, "ready", instance_id=name, model_id=f"org/{name}", active=active)
    return made, msgspec.structs.replace(told, idle_s=idle_s, memory_bytes=size, reserved_bytes=size)


def view_of(*those: tuple[Instance, RunnerStatus], free: int = GIB) -> ClusterView:
    """One node on which these run and which has ``free`` bytes left."""
    statuses = tuple(told for _, told in those)
    spoken = beat(models=("org/new",), runners=statuses, memory_bytes=64 * GIB)
    memory = msgspec.structs.replace(spoken.memory, usable_bytes=free, available_bytes=free)
    return ClusterView(
        state=state_of(*(made for made, _ in those)),
        nodes={"aaaa": NodeView(beat=msgspec.structs.replace(spoken, memory=memory), heard_at=0.0)},
        runners={told.runner_id: told for told in statuses},
    )


def names(view: ClusterView, waited: frozenset[str] = frozenset()) -> list[str]:
    return [one.instance.instance_id for one in idle_instances(view, waited, WALL)]


def test_only_what_a_request_placed_and_nobody_uses_may_leave() -> None:
    view = view_of(
        served("old", idle_s=50.0),
        served("older", idle_s=90.0),
        served("busy", idle_s=0.0, active=1),
        served("wanted", idle_s=900.0, on_demand=False),
        served("awaited", idle_s=900.0),
    )
    assert names(view, frozenset({"org/awaited"})) == ["older", "old"]


def test_one_that_can_not_run_leaves_too_and_one_that_loads_does_not() -> None:
    made, told = served("failed", idle_s=0.0)
    failed = msgspec.structs.replace(told, phase="failed", since=WALL - 700.0)
    pending = msgspec.structs.replace(made, instance_id="pending", assignment=None, created_at=WALL - 650.0)
    loading, told_loading = served("loading", idle_s=0.0)
    view = view_of((made, failed), (loading, msgspec.structs.replace(told_loading, phase="loading")))
    instances = {**view.state.instances, "pending": pending}
    view = msgspec.structs.replace(view, state=msgspec.structs.replace(view.state, instances=instances))
    found = idle_instances(view, frozenset(), WALL)
    assert [(one.instance.instance_id, one.idle_s) for one in found] == [("failed", 700.0), ("pending", 650.0)]


SIZES = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 1000), st.booleans()), max_size=6)


@given(SIZES, st.integers(1, 20))
def test_room_is_made_by_as_few_as_needed_and_only_where_that_helps(
    those: list[tuple[int, int, bool]], need: int
) -> None:
    view = view_of(
        *(
            served(f"i{number}", idle_s=float(idle_s), size=size * GIB, active=int(is_busy))
            for number, (size, idle_s, is_busy) in enumerate(those)
        )
    )
    request = PlacementRequest(card=card("org/new", weights_bytes=need * GIB), context_length=256, n_parallel=1)
    idle = idle_instances(view, frozenset(), WALL)
    leaving = room_for(view, request, idle, 0.0, 1)
    assert {one.instance.instance_id for one in leaving} <= {one.instance.instance_id for one in idle}
    if not leaving:
        return

    def fits_without(gone: tuple[str, ...]) -> bool:
        left = tuple(
            (made, view.runners[made.assignment.runner_id])
            for name, made in view.state.instances.items()
            if name not in gone and made.assignment is not None
        )
        freed = sum(
            view.runners[made.assignment.runner_id].memory_bytes
            for name, made in view.state.instances.items()
            if name in gone and made.assignment is not None
        )
        return place(view_of(*left, free=GIB + freed), request, 0.0, default_parallel=1).outcome == "placed"

    chosen = tuple(one.instance.instance_id for one in leaving)
    assert fits_without(chosen)
    for one in chosen[:-1]:
        assert not fits_without(tuple(name for name in chosen if name != one)), f"{one} had not to leave"


def test_beside_a_discrete_gpu_one_leaves_only_for_room_in_its_own_pool() -> None:
    """The idle one computes on the processor: its leave gives the GPU's memory nothing."""
    made, told = served("idle", idle_s=900.0, size=8 * GIB)
    view = view_of((made, msgspec.structs.replace(told, backend="llama_cpp-cpu")), free=GIB)
    node = view.nodes["aaaa"]
    memory = msgspec.structs.replace(node.beat.memory, cpu_usable_bytes=GIB)
    both = msgspec.structs.replace(node.beat, memory=memory, tags=("llama_cpp", "llama_cpp-cuda", "llama_cpp-cpu"))
    view = msgspec.structs.replace(view, nodes={"aaaa": NodeView(beat=both, heard_at=0.0)})
    idle = idle_instances(view, frozenset(), WALL)
    wide = card("org/new", weights_bytes=5 * GIB)
    anywhere = PlacementRequest(card=wide, context_length=2048, n_parallel=1)
    assert [one.instance.instance_id for one in room_for(view, anywhere, idle, 0.0, 1)] == ["idle"]
    on_gpu = msgspec.structs.replace(anywhere, card=msgspec.structs.replace(wide, backends=("llama_cpp-cuda",)))
    assert room_for(view, on_gpu, idle, 0.0, 1) == ()
