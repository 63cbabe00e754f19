"""Two processes with one id: the later one stops, late messages of an earlier life harm nobody."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from skulk.errors import StartError
from skulk.node.twins import Twins
from tests.support.states import beat

EARLIER = msgspec.structs.replace(beat("aaaa"), incarnation="0000", started_at=500.0)


def told(twins: Twins, *heard: tuple[float, float]) -> None:
    """Beats of the earlier process: when each was written, and when it was heard."""
    for at, now in heard:
        twins.heard(msgspec.structs.replace(EARLIER, at=at), now)


async def test_the_one_that_was_started_later_stops_with_a_sentence() -> None:
    twins = Twins("aaaa", "0001", 900.0)
    told(twins, (1.0, 10.0), (2.0, 11.0), (3.0, 12.0))
    async with asyncio.timeout(1.0):
        with pytest.raises(StartError, match="its home was copied") as stopped:
            await twins.stop_for_one()
    assert stopped.value.code == "node_id_in_use"


@pytest.mark.parametrize(
    "heard",
    [
        ((1.0, 10.0), (2.0, 10.1), (3.0, 10.2), (4.0, 10.3)),
        ((1.0, 10.0), (1.0, 11.0), (1.0, 12.0)),
        ((1.0, 10.0), (2.0, 15.0)),
    ],
    ids=["a heap", "one message again", "too few"],
)
async def test_late_messages_of_an_earlier_life_are_no_twin(heard: tuple[tuple[float, float], ...]) -> None:
    twins = Twins("aaaa", "0001", 900.0)
    told(twins, *heard)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await twins.stop_for_one()


async def test_the_earlier_one_and_other_nodes_go_on() -> None:
    first, other = Twins("aaaa", "0001", 100.0), Twins("bbbb", "0001", 900.0)
    for twins in (first, other):
        told(twins, (1.0, 10.0), (2.0, 11.0), (3.0, 12.0))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await twins.stop_for_one()
