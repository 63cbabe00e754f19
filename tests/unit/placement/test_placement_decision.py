"""Decisions: a golden table on a fixed cluster, each filter, outcomes, and laws by property."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skulk.cluster.view import ClusterView, NodeView
from skulk.placement import assign, place, room
from skulk.placement import decision as decision_module
from skulk.units import GIB, MIB
from skulk.wire.beats import Accelerator
from skulk.wire.model import ModelCard
from skulk.wire.placement import PlacementDecision, PlacementRequest
from tests.support.machines import (
    CPU_TAGS,
    FAMILIES,
    GEFORCE,
    HOME,
    LARGE,
    MAC_SMALL,
    MODELS,
    NOW,
    PLAIN,
    SMALL,
    STRIX,
    TINY,
    cluster,
    machine,
    with_beat,
    with_instance,
)

GOLDEN = """
model        strix                     mac-small                 mac-large                 geforce                   plain
tiny         *vulkan 8192/22784        backend_mismatch          backend_mismatch          cuda 8192/22784           cpu 8192/22784
small-8b     *vulkan 131072/131072     backend_mismatch          backend_mismatch          cuda 45568/45568          cpu 131072/131072
large-70b    *vulkan 131072/131072     backend_mismatch          backend_mismatch          memory 44.4 > 10.8 GiB    memory 44.4 > 24.0 GiB
mlx-8b       backend_mismatch          metal 32768/32768         *metal 32768/68608        backend_mismatch          backend_mismatch
window-12b   *vulkan 131072/138240     backend_mismatch          backend_mismatch          cuda 8448/8448            cpu 131072/131072
experts-30b  *vulkan 40960/262144      backend_mismatch          backend_mismatch          cpu 9472/9472             cpu 40960/52736
hybrid-9b    *vulkan 131072/583168     backend_mismatch          backend_mismatch          cuda 131072/131072        cpu 131072/294912
embedder     *vulkan 512/8192          backend_mismatch          backend_mismatch          cuda 512/8192             cpu 512/8192
gpu-only-27b *vulkan 32768/136704      backend_mismatch          backend_mismatch          gpu too small             gpu too small
"""  # noqa: E501 - a table
"""Compute and context/cells where a node can serve the model, a star where it is placed; else the filter."""


def cell_of(decision: PlacementDecision, node_id: str) -> str:
    report = decision.report_of(node_id)
    assert report is not None
    if report.filter is None:
        assert report.backend is not None
        star = "*" if node_id in decision.nodes else ""
        return f"{star}{report.backend.split('-')[1]} {report.context_length}/{report.kv_cells}"
    if report.filter == "memory" and "of GPU memory" in report.detail:
        return "gpu too small"
    if report.filter == "memory":
        _, _, need, unit, _, have, _ = report.detail.split()
        return f"memory {need} > {have} {unit}"
    return report.filter


def row_of(card: ModelCard) -> str:
    decision = place(HOME, PlacementRequest(card=card), NOW)
    assert decision.outcome == "placed"
    return f"{card.model_id:<12} " + " ".join(f"{cell_of(decision, node_id):<25}" for node_id in sorted(HOME.nodes))


def test_the_golden_table() -> None:
    _, *golden = GOLDEN.strip().splitlines()
    assert [row_of(card).rstrip() for card in FAMILIES] == golden


def test_the_reason_of_a_placement_has_the_figures() -> None:
    decision = place(HOME, PlacementRequest(card=TINY), NOW)
    assert decision.reason == (
        "tiny goes to strix on llama_cpp-vulkan: memory need 938.9 MiB have 96.0 GiB, context 8,192 tokens, "
        "16 side by side in 22,784 cells."
    )
    shorter = place(cluster(GEFORCE), PlacementRequest(card=SMALL), NOW)
    assert "context 45,568 tokens (of 131,072: more doesn't fit)" in shorter.reason


def request(card: ModelCard = TINY, **changes: object) -> PlacementRequest:
    return msgspec.structs.replace(PlacementRequest(card=card), **changes)


VULKAN_TAGS = ("llama_cpp", "llama_cpp-vulkan")


def with_gpu(node: NodeView, *, vram_gib: int, gtt_gib: int = 0) -> NodeView:
    gpu = Accelerator(vendor="amd", name="gpu", vram_total_bytes=vram_gib * GIB, gtt_total_bytes=gtt_gib * GIB)
    return with_beat(node, system=msgspec.structs.replace(node.beat.system, accelerators=(gpu,)))


FILTERED = [
    ("lost", machine("d1", CPU_TAGS, 24, heard_at=NOW - 5.0), request(), "silent for 5.0 s"),
    ("suspect", machine("d1", CPU_TAGS, 24, heard_at=NOW - 3.2), request(), "silent for 3.2 s"),
    ("incompatible", with_beat(PLAIN, protocol=2), request(), "speaks version 2 of the bus contract, not 1"),
    ("management", with_beat(PLAIN, role="management"), request(), "runs no models"),
    ("excluded", PLAIN, request(excluded_nodes=("d1",)), "named in excluded_nodes"),
    ("excluded", PLAIN, request(excluded_nodes=("plain",)), "named in excluded_nodes"),
    ("not_selected", PLAIN, request(node_ids=("a1",)), "node_ids names only a1"),
    ("facts_pending", machine("d1", CPU_TAGS, 24, measured=False), request(), "hasn't measured its memory yet"),
    ("backend_mismatch", with_beat(PLAIN, tags=("mlx", "mlx-metal")), request(), "needs llama_cpp-vulkan or"),
    ("backend_mismatch", with_beat(PLAIN, tags=()), request(), "offers nothing"),
    ("weights_missing", machine("d1", CPU_TAGS, 24, models=(SMALL,)), request(), "has no files of tiny"),
    ("memory", machine("d1", CPU_TAGS, 0.25), request(), "memory need 322.2 MiB have 256.0 MiB"),
    (
        "memory",
        machine("d1", CPU_TAGS, 8),
        request(SMALL, context_length=131_072),
        "a context_length of 22,784 would fit",
    ),
    (
        "memory",
        machine("d1", CPU_TAGS, 96),
        request(msgspec.structs.replace(TINY, min_vram_gib=8.0)),
        "its card asks for 8.0 GiB of GPU memory, llama_cpp-cpu has none",
    ),
    (
        "memory",
        with_gpu(machine("d1", VULKAN_TAGS, 24), vram_gib=6),
        request(msgspec.structs.replace(TINY, min_vram_gib=8.0)),
        "its card asks for 8.0 GiB of GPU memory, llama_cpp-vulkan has 6.0 GiB",
    ),
]


@pytest.mark.parametrize(("vram_gib", "gtt_gib", "is_served"), [(7, 0, False), (8, 0, True), (1, 96, True)])
def test_a_card_s_least_gpu_memory_counts_what_an_apu_maps(vram_gib: int, gtt_gib: int, is_served: bool) -> None:
    node = with_gpu(machine("d1", VULKAN_TAGS, 24), vram_gib=vram_gib, gtt_gib=gtt_gib)
    decision = place(cluster(node), request(msgspec.structs.replace(TINY, min_vram_gib=8.0)), NOW)
    assert (decision.outcome == "placed") == is_served


@pytest.mark.parametrize(("name", "node", "asked", "detail"), FILTERED)
def test_each_filter_names_itself_and_its_numbers(
    name: str, node: NodeView, asked: PlacementRequest, detail: str
) -> None:
    other = machine("e1", CPU_TAGS, 96)
    view = cluster(node, other)
    report = place(view, asked, NOW).report_of("d1")
    assert report is not None
    assert report.filter == name
    assert detail in report.detail
    assert report.score == {}


def test_a_drained_node_takes_nothing() -> None:
    report = place(cluster(PLAIN, STRIX, drained=("d1",)), request(), NOW).report_of("d1")
    assert report is not None
    assert (report.filter, report.detail) == ("draining", "maintenance")


def test_a_node_whose_drain_was_ended_serves_again() -> None:
    view = cluster(PLAIN, STRIX, drained=("d1",))
    ended = {name: msgspec.structs.replace(drain, active=False) for name, drain in view.state.drains.items()}
    again = msgspec.structs.replace(view, state=msgspec.structs.replace(view.state, drains=ended))
    report = place(again, request(), NOW).report_of("d1")
    assert report is not None
    assert report.filter != "draining"


def test_every_filter_has_a_remedy_and_every_remedy_a_filter() -> None:
    assert set(decision_module._FILTERS) == set(decision_module._REMEDIES)
    assert {name for name, *_ in FILTERED} | {"draining"} == set(decision_module._FILTERS)


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        (request(min_nodes=2), "can't be spread over 2 nodes: llama.cpp serves it on one"),
        (request(min_nodes=0), "min_nodes is 0"),
        (request(n_parallel=0), "n_parallel is 0; it must lie between 1 and 256"),
        (request(n_parallel=257), "n_parallel is 257"),
        (request(context_length=9000), "context_length is 9,000; tiny takes 1 to 8,192 tokens"),
        (request(context_length=0), "context_length is 0"),
        (request(msgspec.structs.replace(TINY, backends=())), "accepts no backend"),
    ],
)
def test_what_no_node_could_meet_is_said_at_once(asked: PlacementRequest, sentence: str) -> None:
    decision = place(HOME, asked, NOW)
    assert decision.outcome == "unplaceable"
    assert sentence in decision.reason
    assert [report.node_id for report in decision.reports] == sorted(HOME.nodes)


@pytest.mark.parametrize(
    "view",
    [
        cluster(),
        cluster(machine("d1", CPU_TAGS, 24, heard_at=NOW - 4)),
        cluster(machine("d1", CPU_TAGS, 24, measured=False)),
        cluster(machine("d1", CPU_TAGS, 24, measured=False), MAC_SMALL),
    ],
)
def test_facts_that_are_still_arriving_are_pending(view: ClusterView) -> None:
    decision = place(view, request(), NOW)
    assert decision.outcome == "pending"
    assert "try again in a few seconds" in decision.reason


def test_an_excluded_node_without_facts_is_nothing_to_wait_for() -> None:
    view = cluster(machine("d1", CPU_TAGS, 24, measured=False), MAC_SMALL)
    assert place(view, request(excluded_nodes=("d1",)), NOW).outcome == "unplaceable"


def test_a_live_node_that_does_not_fit_beside_a_silent_one_is_unplaceable() -> None:
    view = cluster(machine("d1", CPU_TAGS, 24, heard_at=NOW - 4), MAC_SMALL)
    assert place(view, request(), NOW).outcome == "unplaceable"


def test_the_reason_of_a_refusal_names_the_nearest_nodes_and_the_way_out() -> None:
    decision = place(cluster(GEFORCE, MAC_SMALL, PLAIN), request(LARGE), NOW)
    assert decision.outcome == "unplaceable"
    assert decision.reason == (
        "large-70b fits on none of 3 nodes: geforce: memory need 44.4 GiB have 10.8 GiB; "
        "plain: memory need 44.4 GiB have 24.0 GiB (ruled out before that: 1). "
        "Free memory, ask for a smaller context_length or n_parallel, or take a smaller quantization."
    )


def test_a_long_reason_names_five_nodes_and_counts_the_rest() -> None:
    view = cluster(*(machine(f"n{number}", CPU_TAGS, 1) for number in range(8)))
    assert "; and 3 more" in place(view, request(LARGE), NOW).reason


def test_the_better_backend_beats_the_emptier_node() -> None:
    cuda = machine("c1", ("llama_cpp", "llama_cpp-cuda"), 8)
    assert place(cluster(cuda, PLAIN), request(), NOW).nodes == ("c1",)


def test_more_room_beats_less_load_and_less_load_beats_the_id() -> None:
    wide = machine("n3", CPU_TAGS, 64, load=8)
    assert place(cluster(machine("n1", CPU_TAGS, 4), wide), request(), NOW).nodes == ("n3",)
    busy, idle = machine("n1", CPU_TAGS, 64, load=4), machine("n2", CPU_TAGS, 64)
    assert place(cluster(busy, idle), request(), NOW).nodes == ("n2",)


def test_a_tie_goes_to_the_lower_id() -> None:
    view = cluster(machine("n2", CPU_TAGS, 24), machine("n1", CPU_TAGS, 24))
    assert place(view, request(), NOW).nodes == ("n1",)


def test_the_request_s_or_the_caller_s_parallelism_is_used() -> None:
    report = place(cluster(PLAIN), request(n_parallel=3), NOW, default_parallel=8).reports[0]
    assert (report.n_parallel, report.kv_cells) == (3, 3 * 8192)
    report = place(cluster(PLAIN), request(), NOW, default_parallel=8).reports[0]
    assert report.n_parallel == 8
    assert 8192 < report.kv_cells < 8 * 8192, "nobody asked for eight whole windows of a small model"


def test_fewer_run_side_by_side_where_memory_says_so() -> None:
    card = msgspec.structs.replace(TINY, recurrent_bytes=64 * MIB)
    view = cluster(machine("n1", CPU_TAGS, 1))
    report = place(view, request(card), NOW).reports[0]
    assert (report.filter, report.n_parallel) == (None, 8)
    assert report.memory is not None
    assert report.memory.need_bytes <= GIB
    asked = place(view, request(card, n_parallel=16), NOW).reports[0]
    assert asked.filter == "memory", "what was asked for is given or refused"


def test_an_assignment_says_what_the_report_said() -> None:
    decision = place(HOME, request(SMALL, context_length=32_768, n_parallel=2), NOW)
    given = assign(decision, "i7", 3)
    report = decision.report_of("a1")
    assert report is not None
    assert (given.runner_id, given.epoch, given.node_id) == ("i7-3", 3, "a1")
    assert (given.backend, given.context_length, given.n_parallel) == ("llama_cpp-vulkan", 32_768, 2)
    assert (given.kv_cells, given.memory) == (report.kv_cells, report.memory)


def test_only_a_placement_can_be_assigned() -> None:
    with pytest.raises(AssertionError):
        assign(place(cluster(), request(), NOW), "i1", 1)


def test_two_that_fit_singly_but_not_together() -> None:
    view = cluster(machine("n1", CPU_TAGS, 12))
    asked = request(SMALL, context_length=32_768, n_parallel=1)
    first = place(view, asked, NOW)
    assert first.outcome == "placed"
    second = place(with_instance(view, SMALL, assign(first, "i1", 1)), asked, NOW)
    assert second.outcome == "unplaceable"
    assert "memory need 9.2 GiB have 1.8 GiB" in second.reason


TAGS = [CPU_TAGS, ("llama_cpp", "llama_cpp-vulkan"), ("llama_cpp", "llama_cpp-cuda"), ("mlx", "mlx-metal"), ()]


@st.composite
def machines(draw: st.DrawFn, node_id: str) -> NodeView:
    return machine(
        node_id,
        draw(st.sampled_from(TAGS)),
        draw(st.floats(min_value=0, max_value=128)),
        load=draw(st.floats(min_value=0, max_value=32)),
        cores=draw(st.integers(min_value=0, max_value=64)),
        models=tuple(draw(st.lists(st.sampled_from(MODELS), unique=True, max_size=4))),
        heard_at=NOW - draw(st.sampled_from([0.0, 0.0, 0.0, 3.5, 6.0])),
        measured=draw(st.booleans()) or draw(st.booleans()),
    )


@st.composite
def clusters(draw: st.DrawFn) -> ClusterView:
    count = draw(st.integers(min_value=0, max_value=6))
    nodes = [draw(machines(f"n{number}")) for number in range(count)]
    drained = draw(st.lists(st.sampled_from(["n0", "n1"]), unique=True))
    return cluster(*nodes, drained=tuple(drained))


requests = st.builds(
    PlacementRequest,
    card=st.sampled_from(MODELS),
    excluded_nodes=st.lists(st.sampled_from(["n0", "n3"]), unique=True).map(tuple),
    context_length=st.none() | st.integers(min_value=1, max_value=8192),
    n_parallel=st.none() | st.integers(min_value=1, max_value=32),
)


@given(view=clusters(), asked=requests)
def test_every_node_has_a_report_and_the_chosen_one_fits(view: ClusterView, asked: PlacementRequest) -> None:
    decision = place(view, asked, NOW)
    assert [report.node_id for report in decision.reports] == sorted(view.nodes)
    assert (decision.outcome == "placed") == bool(decision.nodes)
    assert decision.reason
    for report in decision.reports:
        assert (report.filter is None) == bool(report.score)
        if report.filter is None:
            assert report.memory is not None
            assert report.memory.need_bytes <= room(view, report.node_id) == report.available_bytes
        else:
            assert report.detail
            assert report.node_id not in decision.nodes


@given(view=clusters(), asked=requests, seed=st.randoms(use_true_random=False))
def test_the_order_of_nodes_is_irrelevant(view: ClusterView, asked: PlacementRequest, seed: object) -> None:
    names = list(view.nodes)
    seed.shuffle(names)  # type: ignore[attr-defined]
    shuffled = msgspec.structs.replace(view, nodes={name: view.nodes[name] for name in names})
    assert place(shuffled, asked, NOW) == place(view, asked, NOW)


@given(view=clusters(), asked=requests)
def test_nodes_that_are_filtered_change_nothing_for_the_others(view: ClusterView, asked: PlacementRequest) -> None:
    decision = place(view, asked, NOW)
    kept = {report.node_id for report in decision.reports if report.filter is None}
    fewer = msgspec.structs.replace(view, nodes={name: node for name, node in view.nodes.items() if name in kept})
    again = place(fewer, asked, NOW)
    assert again.nodes == decision.nodes
    assert again.reports == tuple(report for report in decision.reports if report.node_id in kept)


@given(view=clusters(), asked=requests, more_gib=st.floats(min_value=0, max_value=64))
def test_more_memory_never_loses_a_placement(view: ClusterView, asked: PlacementRequest, more_gib: float) -> None:
    def grown(node: NodeView) -> NodeView:
        memory = node.beat.memory
        usable = memory.usable_bytes + int(more_gib * GIB)
        return with_beat(node, memory=msgspec.structs.replace(memory, usable_bytes=usable))

    before = place(view, asked, NOW)
    after = place(msgspec.structs.replace(view, nodes={n: grown(v) for n, v in view.nodes.items()}), asked, NOW)
    for old, new in zip(before.reports, after.reports, strict=True):
        if old.filter is None:
            assert new.filter is None
            assert new.context_length >= old.context_length
    assert before.outcome != "placed" or after.outcome == "placed"


@settings(max_examples=30)
@given(view=clusters(), asked=st.lists(requests, min_size=1, max_size=12))
def test_placing_on_and_on_never_promises_more_than_there_is(view: ClusterView, asked: list[PlacementRequest]) -> None:
    promised: dict[str, int] = {}
    for number, one in enumerate(asked):
        decision = place(view, one, NOW)
        if decision.outcome != "placed":
            continue
        given_ = assign(decision, f"i{number}", 1)
        promised[given_.node_id] = promised.get(given_.node_id, 0) + given_.memory.need_bytes
        view = with_instance(view, one.card, given_)
    for node_id, total in promised.items():
        assert total <= view.nodes[node_id].beat.memory.usable_bytes
