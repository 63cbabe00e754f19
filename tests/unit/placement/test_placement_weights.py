"""Nodes that don't have the weights: who may fetch them, from whom, and onto what disk."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from skulk.cluster.view import ClusterView, NodeView
from skulk.placement.decision import place
from skulk.units import GIB
from skulk.wire.beats import DiskFacts
from skulk.wire.model import ModelCard
from skulk.wire.placement import PlacementDecision, PlacementRequest
from tests.support.states import beat, card, state_of

ON_HUB = msgspec.structs.replace(card(), repo="org/model", revision="c0ffee")


def view_of(**nodes: dict[str, Any]) -> ClusterView:
    """Nodes with changes of their beats; none holds anything unless told."""
    beats = {name: msgspec.structs.replace(beat(name, models=()), **changes) for name, changes in nodes.items()}
    return ClusterView(state=state_of(), nodes={name: NodeView(beat=one, heard_at=0.0) for name, one in beats.items()})


def decided(view: ClusterView, wanted: ModelCard = ON_HUB) -> PlacementDecision:
    return place(view, PlacementRequest(card=wanted), 0.0)


HELD = {"models": beat("x").models}


def test_a_node_that_may_ask_the_hub_takes_a_model_that_nobody_has() -> None:
    decision = decided(view_of(aaaa={}, bbbb={"hub": True}))
    assert (decision.outcome, decision.nodes) == ("placed", ("bbbb",))
    report = decision.report_of("aaaa")
    assert report is not None and report.filter == "weights_missing"
    chosen = decision.report_of("bbbb")
    assert chosen is not None and chosen.score["weights"] == 0.0


def test_a_node_that_has_the_weights_comes_before_one_that_must_fetch_them() -> None:
    assert decided(view_of(aaaa={"hub": True}, bbbb=HELD)).nodes == ("bbbb",)


def test_a_model_of_no_repository_comes_only_from_a_node_that_serves_it() -> None:
    assert decided(view_of(aaaa={"hub": True}), card()).outcome == "unplaceable"
    serving = {**HELD, "files": "10.0.0.2:52417", "role": "management"}
    view = view_of(aaaa={"hub": True}, bbbb=serving)
    assert decided(view, card()).nodes == ("aaaa",)


def test_a_node_without_internet_takes_what_a_neighbour_serves() -> None:
    serving = {**HELD, "files": "10.0.0.2:52417", "role": "management"}
    offline = {"files": "10.0.0.1:52417"}
    assert decided(view_of(aaaa=offline, bbbb=serving)).nodes == ("aaaa",)
    assert decided(view_of(aaaa=offline, bbbb={**serving, "files": None})).outcome == "unplaceable"
    assert decided(view_of(aaaa={}, bbbb=serving)).outcome == "unplaceable"


@pytest.mark.parametrize(("free_bytes", "outcome"), [(GIB, "placed"), (ON_HUB.size_bytes, "unplaceable")])
def test_the_disk_must_have_room_and_the_numbers_are_said(free_bytes: int, outcome: str) -> None:
    disk = DiskFacts(total_bytes=GIB, available_bytes=free_bytes)
    decision = decided(view_of(aaaa={"hub": True, "disk": disk}))
    assert decision.outcome == outcome
    report = decision.report_of("aaaa")
    assert report is not None
    assert outcome == "placed" or "to fetch them its disk needs 607.4 MiB have 95.4 MiB" in report.detail


def test_a_model_that_answers_with_something_else_is_not_placed() -> None:
    speaker = msgspec.structs.replace(ON_HUB, tasks=("TextToSpeech",))
    decision = decided(view_of(aaaa={"hub": True}), speaker)
    assert (decision.outcome, "answers with TextToSpeech, not with text" in decision.reason) == ("unplaceable", True)


def test_an_embedding_model_without_a_cache_is_placed() -> None:
    embedder = msgspec.structs.replace(ON_HUB, tasks=("TextEmbedding",), kv_bytes_per_token=0)
    assert decided(view_of(aaaa={"hub": True}), embedder).outcome == "placed"
