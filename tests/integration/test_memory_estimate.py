"""What placement estimates, held against what a real runner's process really takes after its load: within 10 %."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from skulk.models.card import card_from_gguf
from skulk.models.gguf import read_header
from skulk.placement.memory import estimate
from skulk.telemetry import probe_engine
from skulk.units import MIB
from skulk.wire.beats import EngineFacts, RunnerStatus
from skulk.wire.model import ModelCard, ModelFile
from tests.support.gguf import embedded_model
from tests.support.model_shapes import Shape
from tests.support.nats import NatsServer
from tests.support.runner_processes import gateway_on, model_spec, running
from tools.make_model import write_model

BACKEND = "llama_cpp-cpu"
# Steps of this many rows: a warm-up of 512 takes seconds of a core.
UBATCH = 64
WIDE = Shape(layers=6, width=1024, heads=16, kv_heads=4, key_length=64, value_length=64, feed_forward=2816)
MODELS: dict[str, tuple[str, str, Shape]] = {
    "llama": ("llama", "Q8_0", WIDE._replace(context=32_768)),
    "long heads": (
        "qwen3",
        "Q8_0",
        WIDE._replace(key_length=128, value_length=128, layers=2, feed_forward=2048, context=32_768),
    ),
    "experts": ("qwen3moe", "Q4_K", WIDE._replace(feed_forward=512, experts=16, experts_used=4, context=32_768)),
    "window": ("gemma3", "Q4_K", WIDE._replace(layers=12, window=512, window_every=6, context=32_768)),
}
# context length, sequences side by side, cells of all of them
SHAPES = {
    "embedded": ((2048, 1, 2048), (8192, 1, 8192), (2048, 16, 6144)),
    "llama": ((4096, 1, 4096), (16_384, 8, 32_768)),
    "long heads": ((8192, 4, 32_768),),
    "experts": ((8192, 8, 16_384),),
    "window": ((8192, 8, 65_536), (32_768, 4, 32_768)),
}


@pytest.fixture(scope="module")
def server() -> Iterator[NatsServer]:
    with NatsServer() as server:
        yield server


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def process_bytes() -> int:
    """What a runner takes without a model."""
    probe = asyncio.run(probe_engine((sys.executable, "-m", "skulk.runner.probe")))
    assert probe.process_bytes > 20 * MIB, probe.problem
    return probe.process_bytes


def file_of(name: str, folder: Path) -> Path:
    """The model's file, written once."""
    if name == "embedded":
        return embedded_model()
    path = folder / f"{name.replace(' ', '-')}.gguf"
    architecture, quantization, shape = MODELS[name]
    return path if path.exists() else write_model(path, architecture, shape, quantization=quantization)


def card_of(path: Path) -> ModelCard:
    body = path.read_bytes()
    header = read_header(lambda offset, length: body[offset : offset + length], len(body), path.name)
    return card_from_gguf([header], model_id="m", files=[ModelFile(name=path.name, size_bytes=len(body))])


async def loaded(server: NatsServer, path: Path, engine: EngineFacts, shape: tuple[int, int, int]) -> RunnerStatus:
    """The status of a runner that was told the estimate and has measured itself."""
    context_length, n_parallel, kv_cells = shape
    expected = estimate(card_of(path), context_length, n_parallel, kv_cells, BACKEND, engine).expected_bytes
    told: dict[str, Any] = {
        "backend": BACKEND,
        "context_length": context_length,
        "n_parallel": n_parallel,
        "kv_cells": kv_cells,
        "n_ubatch": engine.ubatch,
        "kv_type": engine.kv_type,
        "expected_bytes": expected,
    }
    async with gateway_on(server) as gateway, running(model_spec(server, path, **told)):
        return await gateway.statuses.until(lambda status: status.loaded_bytes > 0)


@pytest.mark.parametrize(("name", "shape"), [(name, shape) for name, shapes in SHAPES.items() for shape in shapes])
async def test_a_runner_takes_what_was_estimated(
    server: NatsServer, folder: Path, process_bytes: int, name: str, shape: tuple[int, int, int]
) -> None:
    engine = EngineFacts(process_bytes=process_bytes, ubatch=UBATCH)
    status = await loaded(server, file_of(name, folder), engine, shape)
    assert 0.9 <= status.loaded_bytes / status.expected_bytes <= 1.1, (
        f"measured {status.loaded_bytes / MIB:.1f} MiB, expected {status.expected_bytes / MIB:.1f} MiB"
    )


async def test_the_cache_s_type_counts(server: NatsServer, process_bytes: int) -> None:
    engine = EngineFacts(process_bytes=process_bytes, ubatch=UBATCH, kv_type="q8_0")
    status = await loaded(server, embedded_model(), engine, (8192, 2, 16_384))
    assert 0.9 <= status.loaded_bytes / status.expected_bytes <= 1.1, status
