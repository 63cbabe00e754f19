"""Three whole nodes on loopback, of which the first dies: the others meet again after each restart; `/state` tells."""

from __future__ import annotations

import asyncio
import signal
from contextlib import AsyncExitStack
from pathlib import Path

from tests.support.child_processes import no_process_left
from tests.support.mesh import free_ports
from tests.support.whole_node import WholeNode, whole_node

ROUNDS_S = 60.0


async def shows_all(*nodes: WholeNode) -> None:
    """Waits until the state of each shows every one, and one master."""
    names = {node.facts["node_id"] for node in nodes}

    def is_so(state: dict[str, object]) -> bool:
        topology = state["topology"]
        assert isinstance(topology, dict)
        return set(topology["nodes"]) == names and state["master"] in names

    await asyncio.gather(*(node.wait_state(is_so, ROUNDS_S) for node in nodes))


async def test_the_first_of_three_dies_and_the_others_restart_in_turn_and_then_at_once(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    named = ("--no-worker", "--bootstrap-peers", f"127.0.0.1:{port}")

    async def up(stack: AsyncExitStack, name: str, *words: str) -> WholeNode:
        return await stack.enter_async_context(whole_node(tmp_path / name, *(words or named)))

    with no_process_left():
        async with AsyncExitStack() as all_of_them:
            first, two, three = await asyncio.gather(
                up(all_of_them, "a", "--no-worker", "--route-port", str(port)),
                up(all_of_them, "b"),
                up(all_of_them, "c"),
            )
            await shows_all(first, two, three)
            await first.stop(signal.SIGKILL)
            await shows_all(two, three)
            await two.stop()
            two = await up(all_of_them, "b")
            await shows_all(two, three)
            await three.stop()
            three = await up(all_of_them, "c")
            await shows_all(two, three)
            await asyncio.gather(two.stop(), three.stop())
            two, three = await asyncio.gather(up(all_of_them, "b"), up(all_of_them, "c"))
            await shows_all(two, three)
