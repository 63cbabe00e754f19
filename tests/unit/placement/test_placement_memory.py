"""Estimates by hand-worked figures, and the context that fits."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skulk.placement.memory import (
    CELL_STEP,
    KV_SHARE,
    MIN_CONTEXT,
    PARK_MAX,
    PARK_SHARE,
    context_limit,
    estimate,
    fit_context,
    is_streamed,
    least_need,
    round_up,
)
from skulk.units import GIB, KIB, MIB
from skulk.wire.beats import EngineFacts
from skulk.wire.model import ModelCard
from tests.support.machines import LARGE, MLX, MODELS, SMALL, TINY, model

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


def test_parked_states_take_what_is_left_up_to_a_share() -> None:
    def parked(room_bytes: int, backend: str = CPU) -> tuple[int, int]:
        fit = fit_context(TINY, room_bytes=room_bytes, asked=8192, n_parallel=1, backend=backend)
        assert fit is not None
        assert fit.context_length == 8192
        parts = fit.memory
        assert parts.need_bytes == (parts.expected_bytes + parts.headroom_bytes + parts.park_bytes)
        return parts.park_bytes, parts.kv_bytes

    need = estimate(TINY, 8192, 1, 8192, CPU).need_bytes
    assert parked(need)[0] == 0, "not a token of context is given for it"
    assert parked(need + MIB)[0] == MIB
    park, kv = parked(64 * GIB)
    assert park == kv // PARK_SHARE
    assert parked(64 * GIB, "mlx-metal")[0] == 0, "that engine parks nothing"
    large = fit_context(SMALL, room_bytes=96 * GIB, asked=None, n_parallel=16, backend=CPU)
    assert large is not None
    assert large.memory.park_bytes == PARK_MAX


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


def test_plenty_of_room_gives_the_trained_context_and_full_streams() -> None:
    fit = fit_context(TINY, room_bytes=64 * GIB, asked=None, n_parallel=16, backend=CPU)
    assert fit is not None
    assert (fit.context_length, fit.kv_cells) == (8192, 16 * 8192)
    assert is_streamed(fit.context_length, 16, fit.kv_cells)


def test_kv_beyond_one_context_stays_within_its_share_of_the_room() -> None:
    fit = fit_context(TINY, room_bytes=4 * GIB, asked=None, n_parallel=16, backend=CPU)
    assert fit is not None
    assert fit.context_length == 8192
    assert 8192 < fit.kv_cells < 16 * 8192
    share = 4 * GIB // KV_SHARE
    assert share - CELL_STEP * TINY.kv_bytes_per_token < fit.memory.kv_bytes <= share


def test_one_context_may_take_more_than_the_share() -> None:
    fit = fit_context(SMALL, room_bytes=24 * GIB, asked=None, n_parallel=16, backend=CPU)
    assert fit is not None
    assert fit.context_length == fit.kv_cells == 131_072
    assert fit.memory.kv_bytes > 24 * GIB // KV_SHARE


def test_little_room_gives_a_smaller_context() -> None:
    fit = fit_context(SMALL, room_bytes=10 * GIB, asked=None, n_parallel=16, backend=CPU)
    assert fit is not None
    assert MIN_CONTEXT < fit.context_length < 131_072
    larger = estimate(SMALL, fit.context_length + CELL_STEP, 16, fit.context_length + CELL_STEP, CPU)
    assert larger.need_bytes > 10 * GIB


def test_no_room_is_no_fit() -> None:
    need = least_need(SMALL, None, 16, CPU).need_bytes
    assert fit_context(SMALL, room_bytes=need - 1, asked=None, n_parallel=16, backend=CPU) is None
    just = fit_context(SMALL, room_bytes=need, asked=None, n_parallel=16, backend=CPU)
    assert just is not None
    assert just.context_length == MIN_CONTEXT


@pytest.mark.parametrize(
    ("asked", "trained", "most", "expected"),
    [
        (None, 8192, None, 8192),
        (None, 8192, 4096, 4096),
        (5000, 8192, None, 4864),
        (8192, 8192, 4096, 4096),
        (100, 8192, None, 100),
        (None, 100, None, 100),
        (None, 1000, None, 768),
    ],
)
def test_the_window_is_the_least_of_asked_trained_and_card(
    asked: int | None, trained: int, most: int | None, expected: int
) -> None:
    card = msgspec.structs.replace(TINY, context_length=trained, max_context_tokens=most)
    fit = fit_context(card, room_bytes=64 * GIB, asked=asked, n_parallel=2, backend=CPU)
    assert fit is not None
    assert fit.context_length == expected
    assert fit.kv_cells == 2 * round_up(expected)


cards = st.sampled_from(MODELS)
rooms = st.integers(min_value=0, max_value=200 * GIB)
askeds = st.none() | st.integers(min_value=1, max_value=200_000)
parallels = st.integers(min_value=1, max_value=64)


@given(card=cards, room_bytes=rooms, asked=askeds, n_parallel=parallels)
def test_a_fit_is_within_room_limits_and_cells(
    card: ModelCard, room_bytes: int, asked: int | None, n_parallel: int
) -> None:
    fit = fit_context(card, room_bytes=room_bytes, asked=asked, n_parallel=n_parallel, backend=CPU)
    if fit is None:
        return
    assert fit.memory.need_bytes <= room_bytes
    assert fit.context_length <= min(context_limit(card), asked or context_limit(card))
    assert fit.context_length % CELL_STEP == 0 or fit.context_length < CELL_STEP
    assert fit.kv_cells % CELL_STEP == 0
    assert round_up(fit.context_length) <= fit.kv_cells <= n_parallel * round_up(fit.context_length)
    park = fit.memory.park_bytes
    assert 0 <= park <= min(fit.memory.kv_bytes // PARK_SHARE, PARK_MAX)
    without = msgspec.structs.replace(fit.memory, park_bytes=0, need_bytes=fit.memory.need_bytes - park)
    assert without == estimate(card, fit.context_length, n_parallel, fit.kv_cells, CPU)


@given(card=cards, room_bytes=rooms, more=st.integers(min_value=0, max_value=50 * GIB), n_parallel=parallels)
def test_more_room_never_gives_a_smaller_context(card: ModelCard, room_bytes: int, more: int, n_parallel: int) -> None:
    before = fit_context(card, room_bytes=room_bytes, asked=None, n_parallel=n_parallel, backend=CPU)
    after = fit_context(card, room_bytes=room_bytes + more, asked=None, n_parallel=n_parallel, backend=CPU)
    if before is None:
        return
    assert after is not None
    assert after.context_length >= before.context_length


@given(asked=st.integers(min_value=256, max_value=131_072), n_parallel=parallels)
def test_the_figure_of_a_refusal_is_the_room_that_would_do(asked: int, n_parallel: int) -> None:
    need = least_need(LARGE, asked, n_parallel, CPU).need_bytes
    fit = fit_context(LARGE, room_bytes=need, asked=asked, n_parallel=n_parallel, backend=CPU)
    short = fit_context(LARGE, room_bytes=need - 1, asked=asked, n_parallel=n_parallel, backend=CPU)
    assert fit is not None
    assert fit.context_length == asked // CELL_STEP * CELL_STEP
    assert short is None or short.context_length < fit.context_length
