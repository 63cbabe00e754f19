"""Who is known, and by which one route each is dialled."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skulk.discovery.adverts import Refusal
from skulk.discovery.peers import (
    MAX_PEERS,
    REMEMBERED_S,
    Answer,
    Known,
    Refused,
    due,
    plan,
    standings,
    stuck,
    targets,
    with_answer,
    with_heard,
    with_plan,
    with_refused,
    without_old,
    without_seen,
)

ME = Known(node_id="me")
X1, X2 = "10.0.0.1:7", "10.1.0.1:7"
NO = Answer(at=0.0, problem="port_closed", detail="nobody listens")


def open_of(node_id: str, at: float = 0.0) -> Answer:
    return Answer(at=at, node_id=node_id)


def heard(known: Known = ME, node_id: str = "x", routes: tuple[str, ...] = (X1, X2), now: float = 0.0) -> Known:
    return with_heard(known, node_id, routes, now)


def test_a_node_that_is_heard_gets_one_route() -> None:
    known = with_plan(heard(), {})
    assert known.chosen == {"x": X1}
    assert heard(known) is known
    assert heard(known, "me") is known
    assert heard(known, "y", ("127.0.0.1:7", "169.254.0.1:7")) is known


def test_the_route_that_answers_as_this_peer_is_taken() -> None:
    known = with_plan(heard(), {})
    known = with_plan(with_answer(with_answer(known, X1, NO), X2, open_of("x")), {})
    assert known.chosen == {"x": X2}


@pytest.mark.parametrize("answer", [open_of("y"), open_of("me"), Answer(at=0.0, problem="wrong_token")])
def test_a_route_that_leads_elsewhere_is_not_dialled(answer: Answer) -> None:
    assert plan(with_answer(heard(routes=(X1,)), X1, answer), {}) == {}


def test_nothing_changes_under_a_peer_that_is_joined_by_it() -> None:
    known = with_plan(heard(routes=(X1,)), {})
    moved = heard(known, routes=(X2,))
    assert plan(moved, {"x": X1}) == {"x": X1}
    assert plan(moved, {"x": ""}) == {"x": X2}  # it dialled us: nothing hangs on the old one
    assert plan(moved, {}) == {"x": X2}
    both = with_answer(heard(known), X2, open_of("x"))
    assert plan(both, {"x": ""}) == {"x": X1}


def test_a_named_route_belongs_to_the_node_that_answers_there() -> None:
    known = msgspec.structs.replace(ME, bootstrap=("attic:7", "self:7", X2))
    assert plan(known, {}) == {"attic:7": "attic:7", "self:7": "self:7", X2: X2}
    known = with_answer(with_answer(known, "attic:7", open_of("x")), "self:7", open_of("me"))
    assert targets(known) == {"x": ("attic:7",), X2: (X2,)}
    known = heard(known)
    assert targets(known) == {"x": ("attic:7", X2, X1)}
    assert plan(known, {}) == {"x": "attic:7"}


def test_with_a_token_a_stranger_is_asked_before_it_is_dialled() -> None:
    known = msgspec.structs.replace(ME, bootstrap=("attic:7",), has_token=True)
    assert plan(known, {}) == {} == plan(with_answer(known, "attic:7", NO), {})
    assert plan(with_answer(known, "attic:7", open_of("x")), {}) == {"x": "attic:7"}
    assert plan(heard(msgspec.structs.replace(ME, has_token=True)), {}) == {"x": X1}


def test_a_refused_node_is_not_dialled_until_it_says_otherwise() -> None:
    refused = Refused(refusal=Refusal(problem="incompatible_version", detail="version 2"), routes=(X1,), name="attic")
    known = with_refused(with_plan(heard(), {}), "x", refused)
    assert plan(known, {}) == {} and due(known, frozenset(), 0.0) == ()
    (told,) = standings(known, frozenset(), 0.0)
    assert (told.state, told.problem, told.detail, told.name) == ("apart", "incompatible_version", "version 2", "attic")
    assert with_refused(known, "x", refused) is known
    assert plan(without_seen(known, "x"), {}) == plan(heard(known), {}) == {"x": X1}


def test_peers_are_remembered_for_thirty_days() -> None:
    known = heard(heard(), "y", ("10.0.0.9:7",), now=1_000.0)
    assert without_old(known, REMEMBERED_S - 1.0) is known
    assert set(without_old(known, REMEMBERED_S).neighbours) == {"y"}
    assert heard(known, now=10.0) is known and heard(known, now=4_000.0).neighbours["x"].heard_at == 4_000.0


def test_there_is_a_bound_of_peers_and_the_oldest_go() -> None:
    known = ME
    for number in range(MAX_PEERS + 2):
        known = heard(known, f"n{number}", (X1,), now=float(number))
    assert len(known.neighbours) == MAX_PEERS and "n0" not in known.neighbours and "n1001" in known.neighbours


def test_who_is_asked_and_when() -> None:
    known = heard(routes=(X1,))
    assert due(known, frozenset(), 0.0) == (X1,) and due(known, {"x"}, 0.0) == ()
    asked = with_answer(known, X1, NO)
    assert due(asked, frozenset(), 1.9) == () and due(asked, frozenset(), 2.0) == (X1,)
    barred = with_answer(known, X1, Answer(at=0.0, problem="other_cluster"))
    assert due(barred, frozenset(), 9.9) == () and due(barred, frozenset(), 10.0) == (X1,)
    long_gone = with_answer(asked, X1, msgspec.structs.replace(NO, at=700.0))
    assert due(long_gone, frozenset(), 729.0) == () and due(long_gone, frozenset(), 730.0) == (X1,)


def test_with_many_to_ask_nobody_is_left_out() -> None:
    known = heard(heard(routes=(X1,)), "y", ("10.0.0.9:7", "10.0.0.8:7"))
    known = with_answer(with_answer(known, X1, msgspec.structs.replace(NO, at=2.0)), "10.0.0.8:7", NO)
    assert due(known, frozenset(), 9.0) == ("10.0.0.9:7", "10.0.0.8:7", X1)


def test_a_good_route_that_nobody_takes_up_is_dialled_anew() -> None:
    known = with_plan(heard(routes=(X1,)), {})
    once = with_answer(known, X1, open_of("x", 10.0))
    assert stuck(once, frozenset(), 10.5) == ()
    twice = with_answer(once, X1, open_of("x", 12.0))
    assert stuck(twice, frozenset(), 12.5) == ("x",)
    assert stuck(twice, {"x"}, 12.5) == stuck(twice, frozenset(), 20.0) == ()


def test_what_a_person_is_told() -> None:
    known = with_plan(heard(routes=(X1,)), {})
    assert [one.state for one in standings(known, {"x", "z"}, 0.0)] == ["joined", "joined"]
    assert [one.state for one in standings(known, frozenset(), 0.0)] == ["trying"]
    closed = with_answer(known, X1, NO)
    assert [one.state for one in standings(closed, frozenset(), 2.9)] == ["trying"]
    (told,) = standings(closed, frozenset(), 3.0)
    assert (told.peer, told.state, told.problem, told.detail) == ("x", "apart", "port_closed", "nobody listens")
    (told,) = standings(with_answer(known, X1, open_of("y")), frozenset(), 0.0)
    assert (told.problem, told.detail) == ("other_program", f"another node, y, answers at {X1}")


ROUTES = st.sampled_from([X1, X2, "10.0.0.3:7", "attic:7"])
NODES = st.sampled_from(["me", "x", "y", "z"])
ANSWERS = st.builds(
    Answer,
    at=st.floats(0.0, 100.0),
    node_id=st.one_of(st.just(""), NODES),
    problem=st.sampled_from([None, "port_closed", "wrong_token", "other_cluster"]),
)
KNOWN = st.builds(
    Known,
    node_id=st.just("me"),
    has_token=st.booleans(),
    bootstrap=st.lists(ROUTES, unique=True).map(tuple),
    answers=st.dictionaries(ROUTES, ANSWERS),
)


@given(KNOWN, st.lists(st.tuples(NODES, st.lists(ROUTES, max_size=3))), st.dictionaries(NODES, ROUTES))
def test_a_plan_has_one_route_a_peer_and_none_that_leads_elsewhere(
    known: Known, words: list[tuple[str, list[str]]], joined: dict[str, str]
) -> None:
    for node_id, routes in words:
        known = with_heard(known, node_id, tuple(routes), 0.0)
    planned = with_plan(known, joined)
    for peer, route in planned.chosen.items():
        assert peer != "me" and route in targets(known)[peer]
        answer = known.answers.get(route)
        assert answer is None or (answer.node_id in ("", peer) and answer.problem in (None, "port_closed"))
    # It is stable: nothing that stays the same is dialled anew.
    assert with_plan(planned, joined) is planned
    for one in standings(planned, frozenset(joined), 1_000.0):
        assert one.peer != "me" or "me" in joined
        assert (one.problem is None) == (one.state != "apart")
