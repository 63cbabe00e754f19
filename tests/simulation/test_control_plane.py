"""The whole control plane through loss, repetition, delay and broken connections, on a clock of its own.

A failure names its seed: ``run(seed, nodes, leaders)`` is the same run again.
"""

from __future__ import annotations

import asyncio

import pytest

from skulk.errors import SkulkError
from skulk.wire.commands import PlacementReply
from tests.support.simulated_cluster import SimulatedCluster
from tests.support.virtual_time import VirtualLoop

ROUGH_S = 40.0
QUIET_S = 60.0


async def rough_times(cluster: SimulatedCluster) -> list[asyncio.Task[object]]:
    """Commands and broken connections at random moments; returns the commands."""
    dice = cluster.random
    commands: list[asyncio.Task[object]] = []
    breaks: list[asyncio.Task[None]] = []
    end = asyncio.get_running_loop().time() + ROUGH_S
    while asyncio.get_running_loop().time() < end:
        await asyncio.sleep(dice.uniform(0.0, 1.0))
        cluster.check()
        throw = dice.random()
        known = sorted(cluster.replica.view.state.instances)
        if throw < 0.35:
            commands.append(asyncio.create_task(cluster.place()))
        elif throw < 0.45:
            commands.append(asyncio.create_task(cluster.place(ensure=True)))
        elif throw < 0.65 and known:
            commands.append(asyncio.create_task(cluster.delete(dice.choice(known))))
        elif throw < 0.8:
            breaks.append(asyncio.create_task(cluster.break_one()))
        elif throw < 0.9:
            cluster.clock.wall_offset_s = dice.uniform(-1e6, 1e6)
    await asyncio.gather(*breaks)
    cluster.is_rough = False
    return commands


async def simulate(seed: int, nodes: int, leaders: int) -> None:
    cluster = SimulatedCluster(seed, nodes, leaders)
    await cluster.start()
    try:
        commands = await rough_times(cluster)
        async with asyncio.timeout(QUIET_S):
            answers = [await command for command in commands]
        for _ in range(int(QUIET_S)):
            await asyncio.sleep(1.0)
            cluster.check()
            if cluster.agree():
                break
        assert cluster.agree(), "they didn't come to one state"
        assert all(len(made) == 1 for made in cluster.witness.created.values()), "a command was carried out twice"
        if leaders == 1:
            _check_nothing_lost(cluster, answers)
    finally:
        await cluster.stop()


def _check_nothing_lost(cluster: SimulatedCluster, answers: list[object]) -> None:
    there = set(cluster.replica.view.state.instances)
    placed: set[str] = set()
    asked_gone: set[str] = set()
    for answer in answers:
        assert isinstance(answer, tuple)
        command, reply = answer
        if isinstance(reply, PlacementReply):
            placed.add(reply.instance_id)
        elif isinstance(reply, SkulkError):
            assert reply.code in {"no_master", "instance_not_found", "deadline_exceeded", "facts_pending"}, reply.code
        asked_gone.add(getattr(command, "instance_id", None) or "")
    assert placed - there <= asked_gone, "a placement that was told is lost"


def run(seed: int, nodes: int, leaders: int) -> None:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(simulate(seed, nodes, leaders))


@pytest.mark.parametrize("nodes", [1, 2, 3])
@pytest.mark.parametrize("seed", range(6))
def test_one_leader_loses_no_placement(seed: int, nodes: int) -> None:
    run(seed, nodes, 1)


@pytest.mark.parametrize("nodes", [2, 3])
@pytest.mark.parametrize("seed", range(6))
def test_several_leaders_write_in_terms_of_their_own_and_come_to_one_state(seed: int, nodes: int) -> None:
    run(seed, nodes, nodes)
