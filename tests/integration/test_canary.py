"""The test after a load, for real: runners whose `llama_decode` is slowed or scrambled, and the way back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from skulk.errors import ServiceError
from skulk.runner.canary import RecordFile
from skulk.wire.runner import RunnerSpec
from tests.support.nats import NatsServer
from tests.support.runner_processes import child_of, faulty_environment, gateway_on, model_spec
from tests.support.whole_node import MODEL, skulk, whole_node

CPU = "llama_cpp-cpu"


@pytest.fixture(scope="module")
def server() -> Iterator[NatsServer]:
    with NatsServer() as server:
        yield server


def spec_in(folder: Path, server: NatsServer) -> RunnerSpec:
    spec = model_spec(server, n_parallel=1, kv_cells=512)
    return msgspec.structs.replace(spec, weights="these", canary_dir=str(folder / "canary"))


def record_in(folder: Path) -> RecordFile:
    """The one record that is kept."""
    (path,) = (folder / "canary").glob("*.json")
    return msgspec.json.decode(path.read_bytes(), type=RecordFile)


def tell(told: Path, fault: str) -> None:
    """How the engines of runners that start from now on are to be."""
    told.write_text(fault)


async def load(spec: RunnerSpec, told: Path, fault: str = "") -> None:
    """Starts a runner whose engine is faulty, or sound, and ends it; raises what it was refused with."""
    tell(told, fault)
    child = child_of(spec, faulty_environment(told))
    try:
        await child.start()
    finally:
        child.kill()
        await child.exited


async def test_a_faulty_llama_decode_is_found_out_and_a_sound_one_is_not(server: NatsServer, tmp_path: Path) -> None:
    spec, told = spec_in(tmp_path, server), tmp_path / "fault"
    with pytest.raises(ServiceError, match=r"one token .* 16 times over") as repeated:
        await load(spec, told, "repeat")
    assert repeated.value.code == "backend_faulty"
    await load(spec, told)
    first = record_in(tmp_path)
    assert (first.backend, len(first.record.tokens), len(first.record.speeds)) == (CPU, 16, 1)
    for fault, words in (
        ("slow", r"tokens a second, less than 0\.3 of the"),
        ("scramble", "another text than at the first load of this file: they part at token 1 of 16"),
        ("nan", "no numbers"),
    ):
        async with gateway_on(server) as gateway:
            with pytest.raises(ServiceError, match=words) as refused:
                await load(spec, told, fault)
            assert refused.value.code == "backend_faulty"
            assert not refused.value.retryable
            status = await gateway.statuses.until(lambda status: status.phase == "failed")
            assert status.error is not None
            assert status.error.code == "backend_faulty"
    assert record_in(tmp_path) == first, "a load that failed leaves no trace"
    await load(spec, told)
    again = record_in(tmp_path).record
    assert (again.tokens, len(again.speeds)) == (first.record.tokens, 2)


async def test_a_node_stops_offering_a_faulty_backend_until_it_is_forgiven(tmp_path: Path) -> None:
    told = tmp_path / "fault"
    tell(told, "")
    home = tmp_path / "home"
    faulty: dict[str, Any] = faulty_environment(told)
    async with whole_node(home, "--place", MODEL, **faulty) as node:
        instance_id = await node.wait_ready()
        node_id = node.facts["node_id"]
        status, _ = await node.call("DELETE", f"/instance/{instance_id}")
        assert status == 200
        tell(told, "scramble")
        status, _ = await node.call("POST", "/place_instance", {"model_id": MODEL})
        assert status == 200

        def reasons(state: dict[str, Any]) -> list[str]:
            return [reason["code"] for reason in state["nodeHealth"][node_id]["reasons"]]

        state = await node.wait_state(lambda state: "backend_quarantined" in reasons(state), 30.0)
        assert state["nodeHealth"][node_id]["level"] == "error"
        state = await node.wait_state(lambda state: state["nodeBackends"][node_id] == [])
        (tagged,) = state["instances"].values()
        assert tagged["MlxRingInstance"]["shardAssignments"]["nodeToRunner"] == {}, "it waits for another node"
        status, refused = await node.call("POST", "/place_instance", {"model_id": MODEL})
        assert status == 400
        assert "llama_cpp-cpu" in refused["error"]["message"]
        tell(told, "")
        doctor = skulk(home, "doctor", "--json")
        assert "another text" in next(row for row in json.loads(doctor.stdout) if row["check"] == CPU)["detail"]
        assert "is offered again" in skulk(home, "doctor", "--forgive", CPU).stderr
        await node.wait_state(lambda state: CPU in state["nodeBackends"][node_id])
        assert "backend_quarantined" not in reasons(await node.state())
        status, _ = await node.call("POST", "/place_instance", {"model_id": MODEL})
        assert status == 200
        await node.wait_ready()
