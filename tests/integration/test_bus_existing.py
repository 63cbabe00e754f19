"""A NATS deployment that others run: what a node may do there is asked at the start, and JetStream keeps the events."""

from __future__ import annotations

import asyncio
import json
import tempfile
from pathlib import Path

import nats
import pytest

from skulk.bus.events_stream import STREAM, SUBJECTS, ensure_events_stream
from skulk.bus.nats_bus import NatsBus
from skulk.bus.permissions import Permissions, check_permissions, needed, probe_permissions
from skulk.bus.subjects import EVENT
from skulk.errors import StartError
from skulk.wire.events import TermBegan
from tests.support import whole_node as whole_node_module
from tests.support.child_processes import no_process_left
from tests.support.nats import NatsServer
from tests.support.states import TERM, record
from tests.support.whole_node import environment, whole_node

ROOT = Path(__file__).resolve().parents[2]
GRANTED = '["skulk.home.v1.>", "_INBOX.>", "$SRV.>"]'


def with_user(publish: str = GRANTED, subscribe: str = GRANTED) -> NatsServer:
    may = f"{{ publish: {publish}, subscribe: {subscribe} }}"
    return NatsServer(f"authorization {{ users: [ {{ user: u, password: p, permissions: {may} }} ] }}")


async def test_a_user_who_may_do_all_that_a_node_does() -> None:
    with with_user() as server:
        found = await probe_permissions(server.url, "home", user="u", password="p")
    assert found == Permissions(max_payload=1_048_576)
    check_permissions(found, "home")


async def test_every_missing_permission_is_named() -> None:
    with with_user(
        publish='["skulk.home.v1.beat.>", "_INBOX.>"]', subscribe='["skulk.home.v1.>", "_INBOX.>"]'
    ) as server:
        found = await probe_permissions(server.url, "home", user="u", password="p")
    publish, _ = needed("home")
    assert set(found.publish) == {one for one in publish if "beat" not in one and "_INBOX" not in one}
    assert set(found.subscribe) == {"$SRV.PING", "$SRV.INFO", "$SRV.STATS"}
    with pytest.raises(StartError, match=r"may not publish to skulk\.home\.v1\.event.* and \d+ more\. Grant it"):
        check_permissions(found, "home")


async def test_another_cluster_s_subjects_are_not_enough() -> None:
    with with_user() as server:
        found = await probe_permissions(server.url, "garage", user="u", password="p")
    assert all("garage" in one for one in (*found.publish, *found.subscribe)) and found.publish and found.subscribe


async def test_messages_that_are_too_small() -> None:
    with NatsServer("max_payload: 65536\n") as server:
        found = await probe_permissions(server.url, "home")
    with pytest.raises(StartError, match=r"64\.0 KiB at most.*needs 256") as caught:
        check_permissions(found, "home")
    assert caught.value.code == "bus_unusable"


async def test_the_example_of_the_guide_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PASSWORD", "sesame")
    example = (ROOT / "deployment" / "nats" / "nats.conf").read_text()
    with NatsServer(example.replace("./jetstream", str(tmp_path))) as server:
        check_permissions(await probe_permissions(server.url, "skulk", user="skulk", password="sesame"), "skulk")
        bus = NatsBus(server.url, cluster="skulk", name="test", user="skulk", password="sesame")
        await bus.connect()
        assert await ensure_events_stream(bus) == ""
        await bus.close()


async def test_a_wrong_password_and_nobody_there() -> None:
    with with_user() as server:
        url = server.url
        with pytest.raises(StartError) as refused:
            await probe_permissions(url, "home", user="u", password="wrong")
    with pytest.raises(StartError) as nobody:
        await probe_permissions(url, "home")
    assert refused.value.code == nobody.value.code == "cluster_not_reached"


async def test_jetstream_keeps_each_event_once_and_no_probe() -> None:
    with tempfile.TemporaryDirectory() as folder:
        with NatsServer(f'jetstream {{ store_dir: "{folder}" }}\n') as server:
            bus = NatsBus(server.url, cluster="home", name="test")
            await bus.connect()
            assert await ensure_events_stream(bus) == ""
            assert await ensure_events_stream(bus) == ""
            await probe_permissions(server.url, "home")
            events = [record(TermBegan(state_hash="0" * 16), seq) for seq in (1, 2)]
            for event in (*events, events[0]):
                await bus.publish(EVENT, event, kind="term_began", subject="cluster")
            await bus.flush()
            client = await nats.connect(server.url)
            stream = client.jetstream()
            async with asyncio.timeout(10.0):
                while (info := await stream.stream_info(STREAM)).state.messages < 2:  # noqa: ASYNC110 - a stream can only be asked
                    await asyncio.sleep(0.02)
            assert (info.state.messages, info.config.subjects) == (2, [SUBJECTS])
            assert (info.config.max_bytes or 0) > 0 and (info.config.max_age or 0) > 0
            kept = await stream.get_msg(STREAM, seq=2)
            assert kept.headers == {"Nats-Msg-Id": f"{TERM.number}.{TERM.node_id}.{TERM.incarnation}-2"}
            assert json.loads(kept.data or b"")["position"]["seq"] == 2
            await client.close()
            await bus.close()


async def test_a_bus_without_jetstream_and_a_stream_of_somebody_else(tmp_path: Path) -> None:
    with NatsServer() as server:
        bus = NatsBus(server.url, cluster="home", name="test")
        await bus.connect()
        assert "has no JetStream" in await ensure_events_stream(bus)
        await bus.close()
    with NatsServer(f'jetstream {{ store_dir: "{tmp_path}" }}\n') as server:
        bus = NatsBus(server.url, cluster="home", name="test")
        await bus.connect()
        client = await nats.connect(server.url)
        await client.jetstream().add_stream(name=STREAM, subjects=["other"])
        assert f"doesn't listen to {SUBJECTS}" in await ensure_events_stream(bus)
        await client.jetstream().update_stream(name=STREAM, subjects=["other", SUBJECTS])
        assert "no bound of bytes" in await ensure_events_stream(bus)
        await client.close()
        await bus.close()


async def test_a_whole_node_on_an_existing_bus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = tmp_path / "store"
    with NatsServer(f'jetstream {{ store_dir: "{store}" }}\n') as server, no_process_left():
        told = {"SKULK_NATS_URL": server.url, "SKULK_EVENTS_STREAM": "1"}
        monkeypatch.setattr(whole_node_module, "environment", lambda home: {**environment(home), **told})
        async with whole_node(tmp_path / "home", "--no-worker", "--no-api") as node:
            assert not (node.home / "nats").exists()
            assert node.facts["nats_url"] == server.url
            await node.wait_output("the events are kept in the stream SKULK_EVENTS")
