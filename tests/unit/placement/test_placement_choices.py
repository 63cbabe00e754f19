"""What decides between nodes that could serve: replicas apart, measured speed, pools of memory; and what force does."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skulk.cluster.view import ClusterView, NodeView
from skulk.placement import admit, assign, place, room
from skulk.placement.rooms import rooms
from skulk.placement.speeds import MOST_TPS, USUAL_GIB_S, doublings, expected_tps
from skulk.units import GIB, MIB
from skulk.wire.beats import MeasuredSpeed
from skulk.wire.model import ModelCard
from skulk.wire.placement import NodeReport, PlacementDecision, PlacementRequest
from tests.support.machines import (
    CPU_TAGS,
    EXPERTS,
    GEFORCE,
    GPU_ONLY,
    HOME,
    LARGE,
    NOW,
    PLAIN,
    SMALL,
    TINY,
    cluster,
    machine,
    runner,
    with_beat,
    with_instance,
)

CPU, CUDA = "llama_cpp-cpu", "llama_cpp-cuda"


def asked(card: ModelCard = TINY, **changes: object) -> PlacementRequest:
    return msgspec.structs.replace(PlacementRequest(card=card), **changes)


def report_of(decision: PlacementDecision, node_id: str) -> NodeReport:
    found = decision.report_of(node_id)
    assert found is not None
    return found


def speed(tps: float, weights_gib: float, backend: str = CPU) -> MeasuredSpeed:
    return MeasuredSpeed(backend=backend, weights_bytes=int(weights_gib * GIB), decode_tps=tps)


# Replicas


def test_a_second_replica_goes_to_another_node_and_a_third_comes_back() -> None:
    view = cluster(machine("n1", CPU_TAGS, 64), machine("n2", CPU_TAGS, 32))
    nodes: list[str] = []
    for number in range(3):
        decision = place(view, asked(), NOW)
        nodes += decision.nodes
        view = with_instance(view, TINY, assign(decision, f"i{number}", 1))
    assert nodes == ["n1", "n2", "n1"]


def test_weights_that_are_there_count_more_than_a_node_of_its_own() -> None:
    bare = with_beat(machine("n2", CPU_TAGS, 64, models=()), hub=True)
    card = msgspec.structs.replace(TINY, repo="org/tiny", revision="0" * 40)
    view = cluster(machine("n1", CPU_TAGS, 64), bare)
    view = with_instance(view, card, assign(place(view, asked(card), NOW), "i1", 1))
    assert place(view, asked(card), NOW).nodes == ("n1",)


def test_instances_of_other_models_keep_nobody_away() -> None:
    view = cluster(machine("n1", CPU_TAGS, 256), machine("n2", CPU_TAGS, 64))
    view = with_instance(view, SMALL, assign(place(view, asked(SMALL, node_ids=("n1",)), NOW), "i1", 1))
    assert place(view, asked(), NOW).nodes == ("n1",)


# Speed


def test_the_faster_node_beats_the_emptier_one() -> None:
    fast = machine("n2", CPU_TAGS, 12, speeds=(speed(40.0, 4.6),))
    slow = machine("n1", CPU_TAGS, 64, speeds=(speed(9.0, 4.6),))
    assert place(cluster(fast, slow), asked(SMALL, context_length=4096), NOW).nodes == ("n2",)


def test_a_small_difference_of_speed_decides_nothing() -> None:
    one = machine("n2", CPU_TAGS, 12, speeds=(speed(9.5, 4.6),))
    other = machine("n1", CPU_TAGS, 64, speeds=(speed(9.0, 4.6),))
    assert place(cluster(one, other), asked(SMALL, context_length=4096), NOW).nodes == ("n1",)


def test_the_nearest_size_of_the_same_backend_is_taken() -> None:
    known = (speed(200.0, 0.1), speed(10.0, 4.0), speed(90.0, 4.0, CUDA))
    assert expected_tps(8 * GIB, CPU, known) == 5.0
    assert expected_tps(int(0.1 * GIB), CPU, known) == pytest.approx(200.0)
    assert expected_tps(2 * GIB, CUDA, known) == 180.0
    assert expected_tps(1, CPU, known) == MOST_TPS


def test_without_a_measurement_a_backend_s_kind_is_taken() -> None:
    assert expected_tps(4 * GIB, CPU, ()) == USUAL_GIB_S["cpu"] / 4
    assert expected_tps(4 * GIB, CPU, (speed(90.0, 4.0, CUDA),)) == USUAL_GIB_S["cpu"] / 4
    assert expected_tps(4 * GIB, "new_engine-npu", ()) == 25.0
    assert doublings(0.0) < doublings(0.01) < doublings(20.0) < doublings(50.0)


# Pools of memory


def test_beside_a_discrete_gpu_the_processor_takes_what_fits_only_there() -> None:
    report = report_of(place(cluster(GEFORCE), asked(EXPERTS), NOW), "c1")
    assert (report.filter, report.backend, report.available_bytes) == (None, CPU, 20 * GIB)
    report = report_of(place(cluster(GEFORCE), asked(SMALL), NOW), "c1")
    assert (report.backend, report.available_bytes) == (CUDA, int(10.8 * GIB))


def test_where_neither_fits_the_report_is_of_the_better_backend() -> None:
    report = report_of(place(cluster(GEFORCE), asked(LARGE), NOW), "c1")
    assert (report.filter, report.backend) == ("memory", CUDA)
    assert "have 10.8 GiB" in report.detail


def test_a_card_that_wants_a_gpu_or_no_cpu_isnt_put_on_the_processor() -> None:
    gpu_only = msgspec.structs.replace(EXPERTS, backends=(CUDA,))
    assert report_of(place(cluster(GEFORCE), asked(gpu_only), NOW), "c1").filter == "memory"
    assert report_of(place(cluster(GEFORCE), asked(GPU_ONLY), NOW), "c1").filter == "memory"


def test_each_pool_has_a_ledger_of_its_own() -> None:
    view = cluster(GEFORCE)
    on_cpu = assign(place(view, asked(EXPERTS), NOW), "i1", 1)
    view = with_instance(view, EXPERTS, on_cpu)
    assert room(view, "c1", CUDA) == int(10.8 * GIB)
    assert room(view, "c1", CPU) == 20 * GIB - on_cpu.memory.need_bytes
    on_gpu = assign(place(view, asked(SMALL), NOW), "i2", 1)
    view = with_instance(view, SMALL, on_gpu)
    assert room(view, "c1", CUDA) == int(10.8 * GIB) - on_gpu.memory.need_bytes
    assert room(view, "c1", CPU) == 20 * GIB - on_cpu.memory.need_bytes


def test_one_that_is_no_longer_wanted_holds_memory_of_the_pool_that_it_says() -> None:
    on_cpu = assign(place(cluster(GEFORCE), asked(EXPERTS), NOW), "i1", 1)
    leaving = msgspec.structs.replace(runner(on_cpu, "draining", memory_bytes=GIB), backend=CPU)
    view = cluster(with_beat(GEFORCE, runners=(leaving,)))
    assert rooms(view) == ({"c1": int(10.8 * GIB)}, {"c1": 20 * GIB - on_cpu.memory.need_bytes + GIB})


def test_the_node_admits_against_the_same_pool() -> None:
    on_cpu = assign(place(cluster(GEFORCE), asked(EXPERTS), NOW), "i1", 1)
    facts = GEFORCE.beat
    assert on_cpu.memory.need_bytes > facts.memory.usable_bytes * 1.2
    assert admit(facts, on_cpu, 0) is None
    refusal = admit(facts, on_cpu, 15 * GIB)
    assert refusal is not None
    assert "have 5.0 GiB" in refusal.detail


# Force


def test_a_forced_placement_goes_where_least_lacks_with_a_warning() -> None:
    view = cluster(machine("n1", CPU_TAGS, 8), machine("n2", CPU_TAGS, 24), machine("n3", ("mlx",), 96))
    decision = place(view, asked(LARGE, force=True), NOW)
    assert (decision.outcome, decision.nodes) == ("placed", ("n2",))
    (warning,) = decision.warnings
    assert warning == "n2: forced though memory need 44.4 GiB have 24.0 GiB"
    assert warning in decision.reason
    assert report_of(decision, "n2").context_length == 2048
    assert report_of(decision, "n3").filter == "backend_mismatch", "force bends no other filter"


def test_a_forced_placement_that_fits_is_a_plain_one() -> None:
    forced, plain = place(HOME, asked(SMALL, force=True), NOW), place(HOME, asked(SMALL), NOW)
    assert forced.nodes == plain.nodes
    assert forced.warnings == ()
    assert forced.reason == plain.reason


def test_a_gpu_below_the_card_s_wish_can_be_forced() -> None:
    decision = place(cluster(GEFORCE), asked(GPU_ONLY, force=True), NOW)
    assert decision.outcome == "placed"
    assert "forced though" in decision.warnings[0]


def test_a_context_that_was_asked_for_stays_when_it_is_forced() -> None:
    decision = place(cluster(PLAIN), asked(LARGE, force=True, context_length=4096, n_parallel=2), NOW)
    report = report_of(decision, "d1")
    assert (report.context_length, report.n_parallel, report.kv_cells) == (4096, 2, 4096)


def test_the_node_takes_what_was_forced() -> None:
    given_ = assign(place(cluster(PLAIN), asked(LARGE, force=True), NOW), "i1", 1)
    assert admit(PLAIN.beat, given_, 0) is not None
    assert admit(PLAIN.beat, given_, 0, is_forced=True) is None
    assert admit(with_beat(PLAIN, tags=()).beat, given_, 0, is_forced=True) is not None


def test_nothing_is_left_on_a_node_that_was_forced() -> None:
    given_ = assign(place(cluster(PLAIN), asked(LARGE, force=True), NOW), "i1", 1)
    view = with_instance(cluster(PLAIN), LARGE, given_)
    assert room(view, "d1") == 0
    assert place(view, asked(TINY), NOW).outcome == "unplaceable"
    assert place(view, asked(TINY, force=True), NOW).nodes == ("d1",)


# Cells


def test_the_embedded_model_reserves_no_gigabytes_for_itself() -> None:
    report = report_of(place(cluster(machine("n1", CPU_TAGS, 96)), asked(), NOW), "n1")
    assert report.memory is not None
    assert report.memory.need_bytes < GIB
    assert report.memory.kv_bytes <= 512 * MIB
    wished = report_of(place(cluster(machine("n1", CPU_TAGS, 96)), asked(n_parallel=16), NOW), "n1")
    assert wished.kv_cells == 16 * 8192


def nodes_of(speeds: tuple[MeasuredSpeed, ...], gib: float, ram: float | None) -> NodeView:
    return machine("n1", (*CPU_TAGS, CUDA), gib, ram_gib=ram, speeds=speeds)


@given(
    gib=st.floats(0.1, 64),
    ram=st.none() | st.floats(0, 64),
    card=st.sampled_from((TINY, SMALL, EXPERTS, LARGE)),
    force=st.booleans(),
    tps=st.floats(0, 500),
)
def test_never_beyond_the_pool_unless_it_is_forced_and_said(
    gib: float, ram: float | None, card: ModelCard, *, force: bool, tps: float
) -> None:
    view: ClusterView = cluster(nodes_of((speed(tps, 2.0), speed(tps, 8.0, CUDA)), gib, ram))
    decision = place(view, asked(card, force=force), NOW)
    (report,) = decision.reports
    assert decision.outcome == ("placed" if report.filter is None else "unplaceable")
    if report.filter is None:
        assert report.memory is not None
        assert report.backend is not None
        assert report.available_bytes == room(view, "n1", report.backend)
        assert (report.memory.need_bytes > report.available_bytes) == bool(report.warning)
        assert not report.warning or force
    else:
        assert not force


@given(st.floats(1e-6, 1e6))
def test_doublings_are_the_rounded_logarithm(tps: float) -> None:
    assert abs(doublings(tps) - math.log2(tps)) <= 0.5 + 1e-9
