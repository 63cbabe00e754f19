"""Whose turn it is: bounded, fair between keys, interactive before batch, nobody lost."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from skulk.gateway.turns import Ticket, Turns, enter, leave, turn, without
from skulk.wire.generation import Priority

KEYS = st.sampled_from(["a", "b", "c"])
PRIORITIES: st.SearchStrategy[Priority] = st.sampled_from(["interactive", "batch"])
MOVES = st.lists(
    st.one_of(
        st.tuples(st.just("comes"), KEYS, PRIORITIES, st.integers(1, 3)),
        st.tuples(st.just("done"), st.integers(0, 50)),
        st.tuples(st.just("goes away"), st.integers(0, 50)),
    ),
    max_size=80,
)


class World:
    """A queue in use, and what everybody was told."""

    def __init__(self, window: int, limit: int) -> None:
        self.window, self.limit = window, limit
        self.turns = Turns()
        self.working: list[Ticket] = []
        self.refused: list[Ticket] = []

    def comes(self, ticket: Ticket) -> None:
        before = self.turns
        entered = enter(before, ticket, window=self.window, limit=self.limit)
        self.turns = entered.turns
        if entered.outcome == "goes":
            assert not before.waiting, "nobody who waits is passed"
            self.working.append(ticket)
        elif entered.outcome == "refused":
            self.refused.append(ticket)
            own = sum(one.key == ticket.key for one in before.waiting)
            keys = {one.key for one in before.waiting} | {ticket.key}
            most = max(sum(one.key == key for one in before.waiting) for key in keys)
            assert own >= self.limit // len(keys) or most <= self.limit // len(keys), "no key takes another's share"
        if entered.displaced is not None:
            assert entered.displaced.key != ticket.key
            self.refused.append(entered.displaced)
        self.call()

    def call(self) -> None:
        while True:
            before = self.turns
            self.turns, ticket = turn(before, window=self.window)
            if ticket is None:
                assert not before.waiting or before.working, "nobody waits before idle slots"
                return
            rivals = [one for one in before.waiting if one.key != ticket.key and one.priority == ticket.priority]
            mine = before.working.get(ticket.key, 0)
            assert all(before.working.get(one.key, 0) >= mine for one in rivals), "a key with less at work waited"
            assert ticket.priority == "interactive" or all(one.priority == "batch" for one in before.waiting)
            same = [one for one in before.waiting if (one.key, one.priority) == (ticket.key, ticket.priority)]
            assert same[0] == ticket, "within a key and a priority the order of arrival counts"
            self.working.append(ticket)

    def check(self, came: int, gone: int, done: int) -> None:
        assert came == len(self.working) + len(self.turns.waiting) + len(self.refused) + gone + done
        assert self.turns.busy == sum(ticket.weight for ticket in self.working)
        assert len(self.turns.waiting) <= self.limit
        assert self.turns.busy <= self.window or len(self.working) == 1


@given(MOVES, st.integers(1, 6), st.integers(1, 8))
def test_whatever_happens_the_shares_hold(moves: list[tuple[object, ...]], window: int, limit: int) -> None:
    world = World(window, limit)
    came = gone = done = 0
    for move in moves:
        match move:
            case ("comes", str(key), priority, int(weight)):
                came += 1
                is_batch = priority == "batch"
                world.comes(
                    Ticket(number=came, key=key, priority="batch" if is_batch else "interactive", weight=weight)
                )
            case ("done", int(which)) if world.working:
                ticket = world.working.pop(which % len(world.working))
                world.turns = leave(world.turns, ticket)
                done += 1
                world.call()
            case ("goes away", int(which)) if world.turns.waiting:
                ticket = world.turns.waiting[which % len(world.turns.waiting)]
                world.turns = without(world.turns, ticket)
                gone += 1
                world.call()
            case _:
                continue
        world.check(came, gone, done)


def test_a_key_that_is_alone_has_all_and_gives_way_when_another_comes() -> None:
    world = World(window=4, limit=10)
    for number in range(1, 13):
        world.comes(Ticket(number=number, key="greedy"))
    assert (len(world.working), len(world.turns.waiting)) == (4, 8)
    world.comes(Ticket(number=13, key="modest"))
    world.turns = leave(world.turns, world.working.pop(0))
    world.call()
    assert world.working[-1].key == "modest", "it is next, though eight came before it"


def test_a_queue_full_of_one_key_makes_room_for_another() -> None:
    world = World(window=1, limit=4)
    for number in range(1, 6):
        world.comes(Ticket(number=number, key="greedy", priority="batch" if number == 3 else "interactive"))
    world.comes(Ticket(number=6, key="modest"))
    assert [ticket.number for ticket in world.refused] == [3], "its batch request leaves first"
    world.comes(Ticket(number=7, key="greedy"))
    assert [ticket.number for ticket in world.refused] == [3, 7]
