"""These tests need the Vulkan build of the engine and a Vulkan driver: `make test-vulkan` sets both up."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from skulk.telemetry import EngineProbe, probe_engine
from tests.support.model_shapes import Shape
from tools.make_model import write_model


@pytest.fixture(scope="session")
def probe() -> EngineProbe:
    found = asyncio.run(probe_engine((sys.executable, "-m", "skulk.runner.probe")))
    if not found.gpu_offload:
        pytest.skip("the installed engine has no GPU offload: run 'make test-vulkan'")
    return found


@pytest.fixture(scope="session")
def two_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two layers with the real vocabulary; lavapipe is slow."""
    folder = tmp_path_factory.mktemp("vulkan") / "test" / "two-layers"
    folder.mkdir(parents=True)
    shape = Shape(layers=2, width=256, heads=4, kv_heads=2, key_length=64, value_length=64, feed_forward=512)
    return write_model(folder / "two-layers.Q8_0.gguf", "qwen3", shape, quantization="Q8_0")
