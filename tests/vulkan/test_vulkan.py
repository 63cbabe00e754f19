"""llama.cpp on Vulkan for real, on a driver that computes on the processor (Mesa's lavapipe)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import msgspec
import pytest

from skulk.engines.canary import PROMPT, TOKENS, CanaryRecord, Recital, fault_of, with_recital
from skulk.engines.llama_cpp.loader import load
from skulk.engines.protocol import LoadSpec
from skulk.errors import ServiceError
from skulk.telemetry import EngineProbe, tags_of
from tests.support.nats import NatsServer
from tests.support.runner_processes import child_of, faulty_environment, model_spec
from tests.support.whole_node import whole_node

VULKAN = "llama_cpp-vulkan"
MODEL = "test/two-layers"
# The first pipelines are compiled by the driver, on the processor.
WAIT_S = 240.0


def recited(path: Path, backend: str, follow: tuple[int, ...] = ()) -> Recital:
    spec = LoadSpec(path=str(path), backend=backend, context_length=512, kv_cells=512, n_ubatch=64)
    engine = load(spec, lambda _: True)
    try:
        return engine.recite(PROMPT, TOKENS, follow)
    finally:
        engine.close()


def test_the_build_offers_vulkan_and_nothing_is_wanting(probe: EngineProbe) -> None:
    assert "vulkan" in probe.computes
    assert tags_of(("vulkan",), probe) == (("llama_cpp", VULKAN), ())
    assert tags_of((), probe).tags == ("llama_cpp", VULKAN), "nothing declared means detect"
    assert tags_of(("vulkan", "cpu"), probe).tags == ("llama_cpp", VULKAN, "llama_cpp-cpu")


def test_layers_are_offloaded_and_compute_as_on_the_processor(
    probe: EngineProbe, two_layers: Path, caplog: pytest.LogCaptureFixture
) -> None:
    del probe
    caplog.set_level(logging.DEBUG)
    on_cpu = recited(two_layers, "llama_cpp-cpu")
    assert not any("Vulkan0" in record.getMessage() for record in caplog.records), "no GPU is touched for the processor"
    on_gpu = recited(two_layers, VULKAN, on_cpu.tokens)
    lines = [record.getMessage() for record in caplog.records]
    assert any("offloaded 3/3 layers to GPU" in line for line in lines)
    assert any("Vulkan0" in line and "KV buffer size" in line for line in lines)
    record: CanaryRecord = with_recital(None, msgspec.structs.replace(on_cpu, step_s=0.0))
    assert fault_of(on_gpu, record) == "", (on_gpu, on_cpu)


async def test_a_node_serves_on_vulkan(probe: EngineProbe, two_layers: Path, tmp_path: Path) -> None:
    del probe
    folders: dict[str, Any] = {"SKULK_MODELS_PATH": str(two_layers.parents[2]), "SKULK_LLAMA_CPP_BACKENDS": "vulkan"}
    async with whole_node(tmp_path, **folders) as node:
        state = await node.wait_state(lambda state: any(state["nodeBackends"].values()), WAIT_S)
        assert list(state["nodeBackends"].values()) == [["llama_cpp", VULKAN]]
        status, placed = await node.call("POST", "/place_instance", {"model_id": MODEL})
        assert status == 200, placed
        await node.wait_ready(WAIT_S)
        state = await node.state()
        (instance,) = state["instances"].values()
        (shard,) = instance["MlxRingInstance"]["shardAssignments"]["runnerToShard"].values()
        assert shard["PipelineShardMetadata"]["resolvedBackend"] == VULKAN
        body: dict[str, Any] = {"model": MODEL, "prompt": "1, 2, 3,", "max_tokens": 4}
        status, answer = await node.call("POST", "/v1/completions", body)
        assert status == 200, answer
        assert answer["usage"]["completion_tokens"] == 4


async def test_a_gpu_that_computes_nonsense_is_found_out(probe: EngineProbe, two_layers: Path, tmp_path: Path) -> None:
    del probe
    told = tmp_path / "fault"
    with NatsServer() as server:
        spec = model_spec(server, two_layers, backend=VULKAN, n_parallel=1, kv_cells=512)
        spec = msgspec.structs.replace(spec, weights="these", canary_dir=str(tmp_path / "canary"))
        for fault, words in (("", ""), ("scramble", "another text"), ("nan", "no numbers"), ("", "")):
            told.write_text(fault)
            child = child_of(spec, faulty_environment(told))
            try:
                if words:
                    with pytest.raises(ServiceError, match=words) as refused:
                        await child.start()
                    assert refused.value.code == "backend_faulty"
                else:
                    await child.start()
            finally:
                child.kill()
                await child.exited


async def test_a_driver_that_is_away_degrades_the_node_and_says_so(probe: EngineProbe, tmp_path: Path) -> None:
    del probe
    away: dict[str, Any] = {"VK_DRIVER_FILES": "/nowhere.json", "VK_ICD_FILENAMES": "/nowhere.json"}
    async with whole_node(tmp_path, SKULK_LLAMA_CPP_BACKENDS="vulkan", **away) as node:
        state = await node.wait_state(lambda state: any(state["nodeBackends"].values()), WAIT_S)
        assert list(state["nodeBackends"].values()) == [["llama_cpp", "llama_cpp-cpu"]]
        (health,) = state["nodeHealth"].values()
        found = {reason["code"]: reason for reason in health["reasons"]}
        assert "vulkaninfo" in found["gpu_device_missing"]["remediation"]
