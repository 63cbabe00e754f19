"""Whole nodes through what lasts: one stands still, all of them go down, the network falls apart and heals.

Not among the suites of `make test`: `make test-faults` runs it (minutes; what cuts links needs root and namespaces).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.mesh.test_mesh_hosts import HostNode, is_full, node, until
from tests.support.child_processes import no_process_left
from tests.support.mesh import free_ports
from tests.support.namespaces import lan
from tests.support.whole_node import MODEL, NAMED_PEERS, WholeNode, text_of, whole_node

STANDS_S = 10.0
SETTLE_S = 60.0
JOIN_S = 60.0
MESSAGES = [{"role": "user", "content": "Name three rivers."}]
ASKED: dict[str, Any] = {"temperature": 0, "max_tokens": 12}
PLACE = {"model_id": MODEL, "context_length": 512}


async def trio(stack: AsyncExitStack, folder: Path, ports: list[int]) -> list[WholeNode]:
    """Three nodes that name each other; they start at the same moment."""
    peers = ",".join(f"127.0.0.1:{port}" for port in ports)

    def up(name: str, port: int) -> Any:
        words = ("--route-port", str(port), "--bootstrap-peers", peers)
        return stack.enter_async_context(whole_node(folder / name, *words, scope=NAMED_PEERS))

    nodes = list(await asyncio.gather(*(up(f"n{at}", port) for at, port in enumerate(ports))))
    await agree(nodes)
    return nodes


async def agree(nodes: list[WholeNode]) -> str:
    """Waits until all show all, follow one master and show one state; the master's id."""
    names = {one.facts["node_id"] for one in nodes}
    deadline = time.monotonic() + SETTLE_S
    while True:
        states = await asyncio.gather(*(one.state() for one in nodes))
        masters = {state["master"] for state in states}
        shown = {json.dumps(sorted(state["instances"])) for state in states}
        if all(set(state["lastSeen"]) == names for state in states) and len(masters) == len(shown) == 1:
            master = masters.pop()
            if master in names:
                return str(master)
        assert time.monotonic() < deadline, f"{masters} {shown}"
        await asyncio.sleep(0.2)


async def placed(node: WholeNode, **more: Any) -> str:
    """A ready instance's id."""
    status, told = await node.call("POST", "/place_instance", {**PLACE, **more})
    assert status == 200, told
    await node.wait_state(lambda state: is_ready(state, told["instance_id"]), SETTLE_S)
    return told["instance_id"]


def is_ready(state: dict[str, Any], instance_id: str) -> bool:
    body = state["instances"][instance_id]["MlxRingInstance"]
    runners = body["shardAssignments"]["nodeToRunner"].values()
    return any("RunnerReady" in state["runners"].get(runner, {}) for runner in runners)


def family(node: WholeNode) -> list[psutil.Process]:
    """The launcher and everything that it started."""
    launcher = psutil.Process(node.process.pid)
    return [launcher, *launcher.children(recursive=True)]


@pytest.mark.parametrize("who", ["worker", "master"])
async def test_a_node_that_stands_still_for_ten_seconds_comes_back_to_one_cluster(tmp_path: Path, who: str) -> None:
    with no_process_left():
        async with AsyncExitStack() as stack:
            nodes = await trio(stack, tmp_path, free_ports(3))
            master = await agree(nodes)
            leads = next(one for one in nodes if one.facts["node_id"] == master)
            others = [one for one in nodes if one is not leads]
            serves, stands = others[0], others[1] if who == "worker" else leads
            if who == "worker":
                serves = stands
            instance = await placed(leads, node_ids=[serves.facts["node_id"]])
            asked = next(one for one in others if one is not stands)
            expected = text_of([event async for event in asked.stream(MESSAGES, **ASKED)])
            stopped = family(stands)
            for process in stopped:
                process.send_signal(signal.SIGSTOP)
            try:
                await asyncio.sleep(STANDS_S)
                state = await asked.state()
                assert state["master"] != stands.facts["node_id"], "somebody else leads by now"
                assert list(state["instances"]) == [instance]
                if who == "master":
                    # nothing but placing waits for a master: the answer comes while one is missing
                    assert text_of([event async for event in asked.stream(MESSAGES, **ASKED)]) == expected
            finally:
                for process in stopped:
                    process.send_signal(signal.SIGCONT)
            await agree(nodes)
            for one in nodes:
                await one.wait_state(lambda state: is_ready(state, instance), SETTLE_S)
            assert text_of([event async for event in asked.stream(MESSAGES, **ASKED)]) == expected
            _, told = await asked.call("GET", "/v1/diagnostics/cluster")
            runners = [found for one in told["nodes"] for found in one["diagnostics"]["supervisorRunners"]]
            assert len(runners) == 1, runners


async def test_after_a_restart_of_everything_the_placements_come_back(tmp_path: Path) -> None:
    ports = free_ports(3)
    with no_process_left():
        async with AsyncExitStack() as stack:
            nodes = await trio(stack, tmp_path, ports)
            instances = {await placed(nodes[at], node_ids=[nodes[at].facts["node_id"]]) for at in (0, 2)}
            await asyncio.gather(*(one.stop(signal.SIGKILL) for one in nodes))
        async with AsyncExitStack() as stack:
            nodes = await trio(stack, tmp_path, ports)
            for one in nodes:
                state = await one.wait_state(lambda state: all(is_ready(state, name) for name in instances), SETTLE_S)
                assert set(state["instances"]) == instances


async def test_a_runner_that_crashes_five_times_is_given_up_and_a_new_placement_is_not(tmp_path: Path) -> None:
    with no_process_left():
        async with whole_node(tmp_path / "home", "--place", MODEL) as one:
            instance = await one.wait_ready()
            expected = text_of([event async for event in one.stream(MESSAGES, **ASKED)])
            told = await crash_until_given_up(one)
            assert "5 crashes within 10 min: not started again" in told
            assert "runner" not in one.children()
            status, refused = await one.call("POST", "/v1/chat/completions", {"model": MODEL, "messages": MESSAGES})
            assert (status, refused["error"]["code"]) == (502, "runner_failed"), refused
            assert "not started again" in refused["error"]["message"]
            assert (await one.call("DELETE", f"/instance/{instance}"))[0] == 200
            await placed(one)
            assert text_of([event async for event in one.stream(MESSAGES, **ASKED)]) == expected


async def crash_until_given_up(one: WholeNode) -> str:
    """Kills each new life of the only runner until there is none; what is told of it then."""
    async with asyncio.timeout(SETTLE_S):
        while True:
            (runner,) = (await one.state())["runners"].values()
            if "not started again" in (told := json.dumps(runner)):
                return told
            if (pid := one.children().get("runner")) is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            await asyncio.sleep(0.1)


ASK = """
import json, sys, urllib.request
method, path, body = sys.argv[1], sys.argv[2], sys.argv[3].encode() or None
asked = urllib.request.Request("http://127.0.0.1:52415" + path, data=body, method=method)
print(urllib.request.urlopen(asked, timeout=60).read().decode())
"""


def ask(one: HostNode, method: str, path: str, body: Any = None) -> Any:
    """One call of a host's API, from there."""
    command = [*one.host.prefix, sys.executable, "-c", ASK, method, path, "" if body is None else json.dumps(body)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, f"{method} {path}: {done.stderr[-1000:]}"
    return json.loads(done.stdout)


def place(one: HostNode, **wish: Any) -> str:
    """The id of an instance that a host's node was asked to place."""
    return ask(one, "POST", "/place_instance", {**PLACE, **wish})["instance_id"]


def follow_one(states: list[dict[str, Any]]) -> bool:
    return len({state["master"] for state in states}) == 1


def settles(nodes: list[HostNode], is_so: Callable[[list[dict[str, Any]]], bool]) -> list[dict[str, Any]]:
    """The states of nodes, once they are so."""
    deadline = time.monotonic() + SETTLE_S
    while True:
        states = [ask(one, "GET", "/state") for one in nodes]
        if is_so(states):
            return states
        assert time.monotonic() < deadline, json.dumps(states)[:3000]
        time.sleep(0.2)


def test_a_node_that_cannot_reach_the_master_serves_and_places_its_model_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.mesh.test_mesh_hosts.UP", ("up",))
    with no_process_left(), lan(3) as hosts, ExitStack() as stack:
        leads = stack.enter_context(node(hosts[0], tmp_path))
        until((leads.home / "node.json").exists, JOIN_S, [leads])
        between = stack.enter_context(node(hosts[1], tmp_path))
        until(lambda: (between.home / "node.json").exists() and is_full([leads, between]), JOIN_S, [leads, between])
        settles([leads, between], lambda states: {state["master"] for state in states} == {leads.node_id})
        hosts[0].cut(hosts[2])
        hosts[2].cut(hosts[0])
        late = stack.enter_context(node(hosts[2], tmp_path, "--place", MODEL))
        until((late.home / "node.json").exists, JOIN_S, [late])
        until(lambda: "will be placed when a master can be asked" in told_by(late), JOIN_S, [late])
        state = ask(late, "GET", "/state")
        assert (state["master"], state["instances"]) == (None, {})
        assert between.node_id in state["lastSeen"]
        hosts[0].heal(hosts[2])
        hosts[2].heal(hosts[0])
        settles(
            [leads, between, late],
            lambda states: follow_one(states) and all(len(state["instances"]) == 1 for state in states),
        )
        (instance,) = ask(late, "GET", "/state")["instances"]
        settles([late], lambda states: is_ready(states[0], instance))


def told_by(one: HostNode) -> str:
    """What a node has said so far."""
    return (one.home.parent / f"{one.home.name}.log").read_text()


def test_halves_go_on_apart_and_become_one_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.mesh.test_mesh_hosts.UP", ("up",))
    with no_process_left(), lan(4) as hosts, ExitStack() as stack:
        nodes = [stack.enter_context(node(host, tmp_path, SKULK_REPLACE_AFTER="4")) for host in hosts]
        until(lambda: is_full(nodes), JOIN_S, nodes)
        until(lambda: all((one.home / "node.json").exists() for one in nodes), JOIN_S, nodes)
        names = [one.node_id for one in nodes]
        settles(
            nodes, lambda states: len({state["master"] for state in states}) == 1 and len(states[0]["lastSeen"]) == 4
        )
        left, right = nodes[:2], nodes[2:]
        before = {
            ask(nodes[at], "POST", "/place_instance", {**PLACE, "node_ids": [names[at]]})["instance_id"]
            for at in (0, 2)
        }
        roaming = ask(nodes[0], "POST", "/place_instance", {**PLACE, "excluded_nodes": names[:2]})["instance_id"]
        before.add(roaming)
        settles(nodes, lambda states: all(is_ready(state, name) for state in states for name in before))
        for one in left:
            for other in right:
                one.host.cut(other.host)
                other.host.cut(one.host)
        masters: set[str] = set()
        for half, ids in ((left, set(names[:2])), (right, set(names[2:]))):
            states = settles(half, lambda states, ids=ids: {state["master"] for state in states} <= ids)
            masters |= {state["master"] for state in states}
            settles(half, lambda states, ids=ids: all(set(state["lastSeen"]) == ids for state in states))
        assert len(masters) == 2, "each half has a master of its own"
        made = {place(half[1]) for half in (left, right)}
        for one in left:
            for other in right:
                one.host.heal(other.host)
                other.host.heal(one.host)
        wanted = before | made

        def is_one(states: list[dict[str, Any]]) -> bool:
            return (
                follow_one(states)
                and all(set(state["instances"]) == wanted and set(state["lastSeen"]) == set(names) for state in states)
                and all(is_ready(state, name) for state in states for name in wanted)
            )

        settles(nodes, is_one)
        until(lambda: is_full(nodes), JOIN_S, nodes)
        told = ask(nodes[0], "GET", "/v1/diagnostics/cluster")
        runners = [found["runnerId"] for one in told["nodes"] for found in one["diagnostics"]["supervisorRunners"]]
        assert len(runners) == len(wanted), f"each instance runs once: {runners}"
