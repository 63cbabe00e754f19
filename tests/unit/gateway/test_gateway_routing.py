"""The view's words about runners as the routing reads them, and what the gateway keeps between requests."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from skulk.cluster.view import ClusterView
from skulk.gateway.routing import Router, seed_of
from skulk.placement.prefixes import NO_PREFIX, filter_of, prefix_of
from skulk.wire.generation import TextPrompt
from skulk.wire.state import Instance
from tests.support.states import assignment, instance, state_of, status

PROMPT = prefix_of(TextPrompt(text="Once upon a time there was a fox. " * 60))
THERE = filter_of(mark.digest for mark in PROMPT.marks)
NAMES = ("i1", "i2", "i3")


def view_of(**figures: dict[str, Any]) -> ClusterView:
    assigned = {name: assignment(name, node_id=f"node-{name}") for name in NAMES}
    instances = state_of(*(instance(name, assigned=found) for name, found in assigned.items()))
    told = (
        msgspec.structs.replace(status(found, instance_id=name), **figures.get(name, {}))
        for name, found in assigned.items()
    )
    return ClusterView(state=instances, runners={one.runner_id: one for one in told})


def ready(view: ClusterView) -> tuple[Instance, ...]:
    return tuple(view.state.instances.values())


def order(router: Router, view: ClusterView, request_id: str = "request-1", **sent: int) -> list[str]:
    counts = {f"{name}-1": count for name, count in sent.items()}
    return [one.instance_id for one in router.ordered(view, ready(view), PROMPT, request_id, counts)]


def test_every_ready_instance_stands_in_the_order_once() -> None:
    assert sorted(order(Router(), view_of())) == list(NAMES)
    assert Router().ordered(view_of(), (), NO_PREFIX, "r", {}) == ()


def test_the_same_request_is_sent_the_same_way_and_others_otherwise() -> None:
    router, view = Router(), view_of()
    assert order(router, view, "one") == order(router, view, "one")
    firsts = {order(router, view, f"request-{number:08}")[0] for number in range(40)}
    assert firsts == set(NAMES)
    assert seed_of("11111111-aaaaaaaa") == seed_of("22222222-aaaaaaaa") != seed_of("11111111-aaaaaaab")


@pytest.mark.parametrize(
    ("figures", "sent"),
    [
        ({"i2": {"prefixes": THERE}}, {}),
        ({"i2": {"prefixes": THERE, "active": 3}}, {}),
        ({"i2": {"prefixes": THERE, "request_s": 0.1, "waiting": 6}}, {}),
        ({"i1": {"active": 4, "waiting": 9}, "i3": {"active": 4, "waiting": 9}, "i2": {"prefixes": THERE}}, {"i2": 1}),
    ],
)
def test_the_figures_of_a_status_decide(figures: dict[str, Any], sent: dict[str, int]) -> None:
    assert {order(Router(), view_of(**figures), f"r{number}", **sent)[0] for number in range(20)} == {"i2"}


def test_what_this_gateway_has_sent_there_outweighs_a_status_that_doesn_t_know_it() -> None:
    view = view_of(i2={"prefixes": THERE, "request_s": 60.0})
    assert "i2" not in {order(Router(), view, f"r{number}", i2=40)[0] for number in range(20)}


def test_a_filter_is_opened_once_and_again_when_it_has_changed() -> None:
    router = Router()
    assert order(router, view_of(i2={"prefixes": THERE}))[0] == "i2"
    held = router._held["i2-1"][1]
    order(router, view_of(i2={"prefixes": THERE}))
    assert router._held["i2-1"][1] is held
    order(router, view_of(i2={"prefixes": ""}))
    assert router._held["i2-1"][1] is not held


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skulk.gateway.routing.MOST_KEPT", 2)
    router = Router()
    order(router, view_of())
    assert len(router._held) == 2


def test_an_instance_whose_runner_is_not_known_any_more_is_left_out() -> None:
    view = view_of()
    lonely = msgspec.structs.replace(view, runners={"i1-1": view.runners["i1-1"]})
    assert order(Router(), lonely) == ["i1"]
