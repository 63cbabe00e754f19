"""Streams through lost messages, lost runners and lost gateways: the real inboxes, outboxes and dispatchers (DESIGN 6).

A seed is one of six stories, each with its own demand besides "once and in order":

    messages   chunks, life signs and resends are lost, doubled and late   every answer whole, at its first runner
    runners    a node dies or stands still, another has a replica          every answer whole, no gap above 4.5 s
    gateways   clients leave, a gateway dies or comes back as another one  6.5 s later no runner works for the gone
    hangs      a runner lives and says nothing                             as "runners"; it is killed and comes back
    thrice     three nodes die, each as a request has moved there          two resumptions, then an error, and no more
    poison     a request crashes whatever computes it, and is sent again   two runners crash, and never a third
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from typing import Final
from unittest import mock

import msgspec

from skulk.bus import core
from skulk.bus.subjects import MASTER_PLACE
from skulk.cluster.liveness import RUNNER_SILENT_S
from skulk.cluster.view import ClusterView
from skulk.errors import SkulkError
from skulk.gateway import dispatch
from skulk.wire.commands import PlaceModel
from skulk.wire.placement import PlacementRequest
from tests.support.simulated_faults import Decoded
from tests.support.simulated_stream_cluster import MODEL, POISON, REQUEST_S, Gateway, SimulatedRunner, StreamCluster
from tests.support.states import GIB, card
from tests.support.virtual_time import VirtualLoop

GONE_S: Final = 6.5
"""5 s of a gateway's silence, its last beat on the way, and the look for it."""
BACK_S: Final = RUNNER_SILENT_S + 8.0
"""The silence of a runner, the look for it, its new start, and the word of it."""
LONG: Final = 400
RESUMPTIONS: Final = 2
LOST: Final = ("runner_failed", "stream_lost")


async def lost_messages(cluster: StreamCluster) -> None:
    """A network that loses, doubles and delays what streams say."""
    cluster.is_lossy, cluster.prefill_s = True, 6.0
    asking = [_asked(cluster, cluster.random.randrange(1, 60)) for _ in range(8)]
    await asyncio.gather(*asking)
    for gateway in cluster.gateways:
        assert not gateway.dispatcher.failovers, f"lost messages cost a runner: {gateway.dispatcher.failovers}"


async def lost_runners(cluster: StreamCluster) -> None:
    """The node of one replica dies or stands still; the other one is well."""
    asking = [asyncio.create_task(_asked(cluster, cluster.random.randrange(20, 120))) for _ in range(8)]
    await asyncio.sleep(cluster.random.uniform(1.0, 8.0))
    victim = cluster.random.choice([name for name in sorted(cluster.lives) if cluster.lives[name].machine.used])
    if cluster.random.random() < 0.5:
        await cluster.kill_node(victim)
    else:
        cluster.freeze(victim)
        await asyncio.sleep(cluster.random.uniform(2.0, 6.0))
        cluster.thaw(victim)
    await asyncio.gather(*asking)


async def lost_gateways(cluster: StreamCluster) -> None:
    """Clients go away in the middle of their answers, and a gateway with all of its own."""
    leaving = [_asked(cluster, 2_000, leave_after=cluster.random.randrange(1, 30)) for _ in range(4)]
    staying = [asyncio.create_task(cluster.gateways[-1].ask(2_000)) for _ in range(3)]
    await asyncio.gather(*leaving)
    fresh = "0002" if cluster.random.random() < 0.5 else None
    await cluster.replace_gateway(fresh)
    await asyncio.sleep(2.5 if fresh else GONE_S)
    orphaned = cluster.orphaned()
    for task in staying:
        task.cancel()
    await asyncio.gather(*staying, return_exceptions=True)
    assert not orphaned, f"runners still work at {orphaned}, which nobody reads"


async def hung_runners(cluster: StreamCluster) -> None:
    """A runner hangs; the other one is well, and so is the node, which kills it."""
    asking = [asyncio.create_task(_asked(cluster, cluster.random.randrange(20, 120))) for _ in range(8)]
    await asyncio.sleep(cluster.random.uniform(7.0, 9.0))
    victim = cluster.random.choice(cluster.runners)
    victim.hang()

    def is_back(view: ClusterView) -> bool:
        status = view.runners.get(victim.runner_id)
        return status is not None and status.restarts == 1 and status.phase == "ready"

    for gateway in cluster.gateways:
        assert await gateway.replica.wait_until(is_back, BACK_S), f"{victim.runner_id} hangs and isn't started anew"
    await asyncio.gather(*asking)
    await asyncio.gather(*(_asked(cluster, 20) for _ in range(4)))


async def lost_thrice(cluster: StreamCluster) -> None:
    """Wherever a request goes, that node dies, until nobody may go on with it, though somebody could."""
    gateway = cluster.gateways[0]
    asking = [asyncio.create_task(_code_of(gateway, cluster.random.randrange(20, 200), f"p{n}")) for n in range(4)]
    target = asyncio.create_task(_code_of(gateway, LONG, "target"))
    for resumed in range(RESUMPTIONS + 1):
        runner = await _at_work(cluster, gateway, resumed)
        await asyncio.sleep(cluster.random.uniform(1.0, 3.0))
        await cluster.kill_node(runner.node_id)
    assert await target in LOST, f"the request that was lost three times ended with {target.result() or 'all it had'}"
    await asyncio.sleep(2.0)
    assert not cluster.orphaned(), f"somebody works at {cluster.orphaned()}, which has ended"
    codes = await asyncio.gather(*asking)
    assert set(codes) <= {"", *LOST}
    resumed = max(cluster.resumed.values())
    assert resumed == RESUMPTIONS, f"a request was resumed {resumed} times: {cluster.resumed}"
    lost = 1 + sum(code != "" for code in codes)
    often = sum(count == RESUMPTIONS for count in cluster.resumed.values())
    assert lost <= often, f"{lost} requests were given up, {often} had been resumed {RESUMPTIONS} times"


async def _at_work(cluster: StreamCluster, gateway: Gateway, resumed: int) -> SimulatedRunner:
    """The runner of the long request, once it has been resumed so often and a token of it has come."""
    while True:
        await asyncio.sleep(0.1)
        run = next((run for run in gateway.open.values() if run.generation.limits.max_tokens == LONG), None)
        if run is None or run.resumptions != resumed or run.is_finding or not run.has_sent:
            continue
        found = (one for one in cluster.runners if one.runner_id == run.runner_id)
        if any(key[0] == run.request_id for one in cluster.runners for key in one.open):
            return next(found)


async def poisoned(cluster: StreamCluster) -> None:
    """A request that crashes its runner comes again and again; nobody but it has to care."""
    gateway = cluster.gateways[0]
    texts = [f"innocent {number}" for number in range(6)]
    innocent = [
        asyncio.create_task(_code_of(gateway, cluster.random.randrange(20, 120), text, cluster.random.uniform(0, 6)))
        for text in texts
    ]
    await asyncio.sleep(cluster.random.uniform(0.5, 4.0))
    for _ in range(5):
        code = await _code_of(gateway, 30, POISON)
        assert code == "request_crashed_runner", f"a request that crashes runners ended with {code or 'no error'}"
        await asyncio.sleep(cluster.random.uniform(0.0, 4.0))
    assert cluster.crashes == 2, f"one request crashed {cluster.crashes} runners"
    for text, code in zip(texts, await asyncio.gather(*innocent), strict=True):
        # who was at work beside it both times can't be told from it
        is_unlucky = cluster.hit[text] >= 2 and code == "request_crashed_runner"
        assert not code or is_unlucky, f"{text!r}, hit {cluster.hit[text]} times, ended with {code}"
    await cluster.until_ready(3)
    await asyncio.gather(*(_asked(cluster, 20) for _ in range(4)))


async def _code_of(gateway: Gateway, tokens: int, text: str, after_s: float = 0.0) -> str:
    """How a request ended: whole (empty), or the code of its one error."""
    await asyncio.sleep(after_s)
    try:
        await gateway.ask(tokens, text=text)
    except SkulkError as error:
        return error.code
    return ""


async def _asked(cluster: StreamCluster, tokens: int, leave_after: int | None = None) -> None:
    await asyncio.sleep(cluster.random.uniform(0.0, 6.0))
    gateway = cluster.random.choice(cluster.gateways)
    try:
        await gateway.ask(tokens, leave_after)
    except SkulkError as error:
        raise AssertionError(f"an answer of {tokens} tokens ended with {error.code}: {error.detail}") from error


Story = Callable[[StreamCluster], Awaitable[None]]
STORIES: Final[tuple[tuple[Story, int, int], ...]] = (
    (lost_messages, 3, 2),
    (lost_runners, 3, 2),
    (lost_gateways, 3, 2),
    (hung_runners, 3, 2),
    (lost_thrice, 5, 4),
    (poisoned, 4, 3),
)
"""Each with its nodes, and how many of them have a replica."""


async def simulate_streams(seed: int) -> None:
    """One story.

    Raises:
        AssertionError: what didn't hold.
    """
    story, nodes, replicas = STORIES[seed % len(STORIES)]
    cluster = StreamCluster(seed, nodes)
    await cluster.start()
    try:
        async with asyncio.timeout(60.0):
            await cluster.gateways[0].replica.wait_until(lambda view: len(view.nodes) == nodes, 60.0)
        plain = card(MODEL, weights_bytes=GIB)
        files = tuple(msgspec.structs.replace(file, sha256="5" * 64) for file in plain.files)
        pinned = msgspec.structs.replace(plain, files=files)
        request = PlacementRequest(card=pinned, context_length=2048, n_parallel=16)
        for number in range(replicas):
            elsewhere = msgspec.structs.replace(request, excluded_nodes=cluster.hosts())
            command = PlaceModel(command_id=f"p{number}", request=elsewhere)
            await cluster.gateways[0].masters.ask(MASTER_PLACE, command)
        await cluster.until_ready(replicas)
        async with asyncio.timeout(REQUEST_S * 2):
            await story(cluster)
        cluster.check()
    finally:
        await cluster.stop()


def run_streams(seed: int) -> None:
    """`simulate_streams` on a clock of its own."""
    numbers = map("request-{:08d}".format, itertools.count())
    with (
        mock.patch.object(core, "decode", Decoded()),
        mock.patch.object(dispatch, "new_id", side_effect=numbers),
        asyncio.Runner(loop_factory=VirtualLoop) as runner,
    ):
        runner.run(simulate_streams(seed))
