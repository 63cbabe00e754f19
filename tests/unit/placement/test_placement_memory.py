"""Estimates by hand-worked figures."""

from __future__ import annotations

import msgspec
import pytest

from skulk.placement.memory import estimate
from skulk.units import GIB, KIB, MIB
from skulk.wire.beats import EngineFacts
from tests.support.machines import MLX, SMALL, TINY, model

CPU = "llama_cpp-cpu"


def test_the_parts_of_an_estimate_by_hand() -> None:
    card = model("m", weights_gib=1, kv_kib=100, context=8192, embedding=1000, vocabulary=50_000)
    memory = estimate(card, 4096, 4, 4096, CPU)
    assert memory.weights_bytes == GIB
    assert memory.process_bytes == 256 * 50_000 + 48 * 4096
    assert memory.headroom_bytes == GIB * 110 // 100 - GIB - memory.process_bytes
    assert memory.kv_bytes == 4096 * 100 * KIB
    assert memory.compute_bytes == 512 * (16 * 1000 * 4 + 2 * 4096) + 4 * 50_000 * 4
    assert memory.need_bytes == memory.expected_bytes + memory.headroom_bytes


def test_what_a_node_measured_of_a_runner_is_estimated_and_never_more_than_needed() -> None:
    without = estimate(SMALL, 8192, 1, 8192, CPU)
    small = estimate(SMALL, 8192, 1, 8192, CPU, EngineFacts(process_bytes=60 * MIB))
    assert small.process_bytes - without.process_bytes == 60 * MIB
    assert small.need_bytes == without.need_bytes, "the headroom covers it"
    huge = estimate(SMALL, 8192, 1, 8192, CPU, EngineFacts(process_bytes=4 * GIB))
    assert huge.headroom_bytes == 0
    assert huge.need_bytes == huge.expected_bytes


def test_rows_and_cache_type_are_the_node_s() -> None:
    plain = estimate(SMALL, 8192, 1, 8192, CPU)
    assert estimate(SMALL, 8192, 1, 8192, CPU, EngineFacts(kv_type="q8_0")).kv_bytes == plain.kv_bytes * 17 // 32
    assert estimate(SMALL, 8192, 1, 8192, CPU, EngineFacts(kv_type="f32")).kv_bytes == 2 * plain.kv_bytes
    assert estimate(SMALL, 8192, 1, 8192, CPU, EngineFacts(kv_type="of a newer one")).kv_bytes == plain.kv_bytes
    few = estimate(SMALL, 8192, 1, 8192, CPU, EngineFacts(ubatch=128))
    outputs = 4 * SMALL.vocabulary_size
    assert 4 * (few.compute_bytes - outputs) == plain.compute_bytes - outputs


def test_a_card_s_activations_count() -> None:
    card = msgspec.structs.replace(TINY, activations=3 * 1536 + 4 * 576)
    seen = 13.5 * MIB + 8192 * KIB + 4 * 49_152
    assert estimate(card, 8192, 1, 8192, CPU).compute_bytes == seen, "to the byte what llama.cpp asks for"


@pytest.mark.parametrize(
    ("n_parallel", "kv_cells", "narrow"),
    [
        (1, 16_384, 1024 + 512),  # the window and one step's rows
        (4, 16_384, 4 * 1024 + 512),  # a unified cache: each sequence's window
        (4, 4 * 16_384, 4 * (1024 + 512)),  # a stream each
        (32, 16_384, 16_384),  # never more than the layers that see everything
    ],
)
def test_layers_with_a_window_keep_less(n_parallel: int, kv_cells: int, narrow: int) -> None:
    card = msgspec.structs.replace(SMALL, window=1024, window_kv_bytes_per_token=100 * KIB)
    memory = estimate(card, 16_384, n_parallel, kv_cells, CPU)
    assert memory.kv_bytes == kv_cells * (card.kv_bytes_per_token - 100 * KIB) + narrow * 100 * KIB


def test_small_weights_are_lifted_to_the_floor() -> None:
    memory = estimate(TINY, 8192, 1, 8192, CPU)
    assert memory.weights_bytes + memory.process_bytes + memory.headroom_bytes == 256 * MIB


def test_mlx_needs_more_headroom() -> None:
    memory = estimate(MLX, 4096, 1, 4096, "mlx-metal")
    assert memory.weights_bytes + memory.headroom_bytes == MLX.weights_bytes * 130 // 100


def test_recurrent_state_counts_once_a_sequence() -> None:
    card = msgspec.structs.replace(TINY, recurrent_bytes=MIB)
    assert estimate(card, 1024, 8, 1024, CPU).kv_bytes - estimate(TINY, 1024, 8, 1024, CPU).kv_bytes == 8 * MIB


def test_cells_are_rounded_up_to_256() -> None:
    assert estimate(TINY, 300, 1, 300, CPU).kv_bytes == 512 * TINY.kv_bytes_per_token


def test_the_mask_of_full_streams_spans_one_stream_only() -> None:
    unified = estimate(TINY, 1024, 16, 15 * 1024, CPU)
    streamed = estimate(TINY, 1024, 16, 16 * 1024, CPU)
    assert streamed.compute_bytes < unified.compute_bytes


def test_the_estimate_covers_what_llama_cpp_was_seen_to_ask_for() -> None:
    """The 135M model with flash attention: 13.5 MiB and 1 KiB a cell to compute, 0.19 MiB for a row of logits."""
    for cells in (512, 2048, 8192, 16_384):
        seen = 13.51 * MIB + cells * KIB + 0.1875 * MIB
        assert seen <= estimate(TINY, cells, 1, cells, CPU).compute_bytes <= 1.4 * seen


def test_a_context_smaller_than_its_cells_is_a_defect() -> None:
    with pytest.raises(AssertionError):
        estimate(TINY, 4096, 1, 2048, CPU)
