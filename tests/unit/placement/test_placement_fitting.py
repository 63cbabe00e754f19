"""The context that fits a room: the rules, and the closed form against a search."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skulk.placement.fitting import (
    KV_SHARE,
    MIN_CONTEXT,
    Fitter,
    context_limit,
    fit_context,
    largest_context,
    least_need,
    smallest_context,
)
from skulk.placement.memory import CELL_STEP, PARK_MAX, PARK_SHARE, estimate, is_streamed, round_up
from skulk.units import GIB, KIB, MIB
from skulk.wire.beats import EngineFacts
from skulk.wire.model import ModelCard
from tests.support.machines import FAMILIES, LARGE, MODELS, SMALL, TINY

CPU = "llama_cpp-cpu"


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


@given(
    card=st.sampled_from(FAMILIES),
    gib=st.floats(0, 400),
    asked=st.none() | st.integers(1, 512),
    n_parallel=st.sampled_from((1, 4, 16)),
    backend=st.sampled_from((CPU, "mlx-metal")),
)
def test_room_enough_gives_what_that_very_room_would(
    card: ModelCard, gib: float, asked: int | None, n_parallel: int, backend: str
) -> None:
    fitter = Fitter(card, asked, is_capped=True)
    room_bytes = int(gib * GIB)
    again = [fitter.fit(room_bytes, n_parallel, backend) for _ in range(2)]
    assert again == [fitter._fitted(room_bytes, n_parallel, backend, EngineFacts())] * 2


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


shapes = st.builds(
    lambda context, kv, window, part, recurrent, weights: msgspec.structs.replace(
        TINY,
        context_length=context,
        kv_bytes_per_token=kv,
        window=window,
        window_kv_bytes_per_token=kv * part // 8 if window else 0,
        recurrent_bytes=recurrent,
        weights_bytes=weights,
    ),
    st.integers(100, 12_000),
    st.sampled_from((0, 512, 24 * KIB, 320 * KIB)),
    st.sampled_from((0, 0, 256, 1024, 5000)),
    st.integers(0, 8),
    st.sampled_from((0, 0, MIB)),
    st.sampled_from((MIB, 300 * MIB, 2 * GIB)),
)
engines = st.builds(
    EngineFacts,
    process_bytes=st.sampled_from((0, 60 * MIB, 900 * MIB)),
    ubatch=st.sampled_from((64, 512, 700, 2048)),
    kv_type=st.sampled_from(("f16", "q8_0", "q5_1")),
)


def searched(
    card: ModelCard, room_bytes: int, asked: int | None, n_parallel: int, backend: str, engine: EngineFacts
) -> tuple[int, int] | None:
    """Context and cells by trying every number of cells: what the rules mean."""

    def need(context: int, cells: int) -> int:
        return estimate(card, context, n_parallel, cells, backend, engine).need_bytes

    most = largest_context(card, asked)
    least = min(smallest_context(card, None), most)
    contexts = [least, *(c for c in range(CELL_STEP, most + 1, CELL_STEP) if c > least), most]
    context = max((one for one in contexts if need(one, round_up(one)) <= room_bytes), default=None)
    if context is None:
        return None

    def is_shared(cells: int) -> bool:
        kv = estimate(card, context, n_parallel, cells, backend, engine).kv_bytes
        return need(context, cells) <= room_bytes and kv <= room_bytes // KV_SHARE

    single, full = round_up(context), n_parallel * round_up(context)
    if is_shared(full):
        return context, full
    return context, max((cells for cells in range(single, full, CELL_STEP) if is_shared(cells)), default=single)


@given(
    card=shapes,
    room_bytes=st.integers(0, 6 * GIB),
    asked=st.none() | st.integers(1, 14_000),
    n_parallel=st.sampled_from((1, 2, 5)),
    backend=st.sampled_from((CPU, "mlx-metal")),
    engine=engines,
)
def test_the_closed_form_finds_what_a_search_finds(
    card: ModelCard, room_bytes: int, asked: int | None, n_parallel: int, backend: str, engine: EngineFacts
) -> None:
    fit = fit_context(card, room_bytes=room_bytes, asked=asked, n_parallel=n_parallel, backend=backend, engine=engine)
    found = None if fit is None else (fit.context_length, fit.kv_cells)
    assert found == searched(card, room_bytes, asked, n_parallel, backend, engine)
