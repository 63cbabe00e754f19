"""Layout, step splitting, thread counts, load failures: the engine's pure parts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skulk.batching.step import StepRow
from skulk.engines.llama_cpp.failures import context_failure, load_failure
from skulk.engines.llama_cpp.layout import (
    CELL_STEP,
    KV_TYPES,
    Layout,
    calls_of,
    idle_cell_s,
    kv_type_of,
    layout_of,
    split_rows,
)
from skulk.engines.llama_cpp.threads import physical_cores
from skulk.engines.protocol import LoadSpec
from skulk.errors import StartError


def spec(context_length: int, n_parallel: int, kv_cells: int, n_batch: int = 2048) -> LoadSpec:
    return LoadSpec(
        path="m.gguf",
        backend="llama_cpp-cpu",
        context_length=context_length,
        n_parallel=n_parallel,
        kv_cells=kv_cells,
        n_batch=n_batch,
    )


@pytest.mark.parametrize(
    ("context_length", "n_parallel", "kv_cells", "unified", "n_ctx", "window"),
    [
        (2048, 4, 8192, False, 8192, 2048),
        (2048, 4, 8191, True, 7936, 2048),
        (2048, 1, 2048, True, 2048, 2048),
        (1000, 4, 4000, False, 4 * 768, 768),
        (1000, 4, 4096, False, 4096, 1000),
        (100, 1, 100, True, 256, 100),
        (100, 2, 200, False, 512, 100),
        (4096, 2, 1024, True, 1024, 1024),
    ],
)
def test_layouts(context_length: int, n_parallel: int, kv_cells: int, unified: bool, n_ctx: int, window: int) -> None:
    layout = layout_of(spec(context_length, n_parallel, kv_cells))
    assert (layout.unified, layout.n_ctx, layout.window) == (unified, n_ctx, window)


@given(st.integers(1, 200_000), st.integers(1, 64), st.integers(1, 2_000_000))
def test_no_layout_takes_more_than_was_admitted(context_length: int, n_parallel: int, kv_cells: int) -> None:
    layout = layout_of(spec(context_length, n_parallel, kv_cells))
    streams = 1 if layout.unified else n_parallel
    assert layout.n_ctx <= max(kv_cells, streams * CELL_STEP)
    assert layout.n_ctx % (streams * CELL_STEP) == 0
    assert 0 < layout.window <= context_length and layout.window * streams <= layout.n_ctx
    assert 0 < layout.n_ubatch <= layout.n_batch <= layout.n_ctx


def test_cache_types() -> None:
    assert kv_type_of("f16") == 1 and kv_type_of("q8_0") == 8
    with pytest.raises(StartError, match="f32, f16") as caught:
        kv_type_of("Q8_0")
    assert caught.value.code == "config_invalid" and caught.value.exit_status == 2
    assert len(set(KV_TYPES.values())) == len(KV_TYPES)


rows = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 100), st.booleans()), min_size=1, max_size=8).map(
    lambda drawn: tuple(
        StepRow(slot=slot, tokens=tuple(range(slot * 100, slot * 100 + count)), start=start, sample=sample)
        for slot, (count, start, sample) in enumerate(drawn)
    )
)


@given(rows, st.integers(1, 50))
def test_split_rows_computes_every_token_once_in_order(plan: tuple[StepRow, ...], limit: int) -> None:
    calls = split_rows(plan, limit)
    parts = [row for call in calls for row in call]
    assert all(0 < sum(len(row.tokens) for row in call) <= limit for call in calls)
    assert all(sum(len(row.tokens) for row in call) == limit for call in calls[:-1])
    for row in plan:
        own = [part for part in parts if part.slot == row.slot]
        assert tuple(token for part in own for token in part.tokens) == row.tokens
        assert [part.start for part in own] == [
            row.start + sum(len(p.tokens) for p in own[:n]) for n in range(len(own))
        ]
        assert [part.sample for part in own] == [False] * (len(own) - 1) + [row.sample]
    assert [part.slot for part in parts] == sorted(part.slot for part in parts)


def test_split_rows_leaves_what_fits() -> None:
    row = StepRow(slot=0, tokens=(1, 2), start=5, sample=True)
    assert split_rows((row,), 2) == ((row,),)


def row(slot: int, count: int) -> StepRow:
    return StepRow(slot=slot, tokens=(7,) * count, start=0, sample=True)


def layout(*, unified: bool, n_batch: int = 2048, n_ubatch: int = 512) -> Layout:
    return Layout(unified=unified, n_ctx=8192, window=1024, n_batch=n_batch, n_ubatch=n_ubatch)


def test_a_chunk_keeps_its_rows_beside_others_that_decode() -> None:
    plan = (row(3, 1), row(0, 1), row(1, 1), row(2, 64))
    shapes = [[(r.slot, len(r.tokens)) for r in call] for call in calls_of(plan, layout(unified=False))]
    assert shapes == [[(0, 1), (1, 1), (3, 1)], [(2, 64)]]
    shapes = [[(r.slot, len(r.tokens)) for r in call] for call in calls_of(plan, layout(unified=True))]
    assert shapes == [[(0, 1), (1, 1), (2, 64), (3, 1)]]


@given(rows, st.integers(4, 50), st.integers(1, 50), st.booleans())
def test_calls_compute_every_token_once_within_their_limits(
    plan: tuple[StepRow, ...], n_batch: int, n_ubatch: int, unified: bool
) -> None:
    calls = calls_of(plan, layout(unified=unified, n_batch=n_batch, n_ubatch=min(n_ubatch, n_batch)))
    for call in calls:
        assert 0 < sum(len(part.tokens) for part in call) <= n_batch
        assert [part.slot for part in call] == sorted({part.slot for part in call})
        assert unified or len({len(part.tokens) for part in call}) == 1
    for whole in plan:
        parts = [part for call in calls for part in call if part.slot == whole.slot]
        assert tuple(token for part in parts for token in part.tokens) == whole.tokens
        assert [part.start for part in parts] == [
            whole.start + sum(len(p.tokens) for p in parts[:n]) for n in range(len(parts))
        ]
        assert [part.sample for part in parts] == [False] * (len(parts) - 1) + [whole.sample]


def test_an_idle_cell_costs_what_it_does_to_others_and_never_nothing() -> None:
    assert idle_cell_s(512, own_s=0.256, beside_s=0.0256) == pytest.approx(5e-5)
    assert idle_cell_s(512, own_s=0.512, beside_s=-0.001) == pytest.approx(0.001 / 32), "less than steps differ by"
    assert idle_cell_s(512, own_s=-0.001, beside_s=-0.001) == 0.0


class TestThreads:
    def cpu(self, root: Path, number: int, package: int, core: int) -> None:
        topology = root / f"cpu{number}" / "topology"
        topology.mkdir(parents=True)
        (topology / "physical_package_id").write_text(f"{package}\n")
        (topology / "core_id").write_text(f"{core}\n")

    @pytest.fixture
    def affinity(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)

    @pytest.mark.usefixtures("affinity")
    def test_two_threads_of_a_core_count_once(self, tmp_path: Path) -> None:
        for number, (package, core) in enumerate([(0, 0), (0, 1), (0, 0), (1, 0), (1, 1)]):
            self.cpu(tmp_path, number, package, core)
        assert physical_cores(tmp_path, tmp_path / "none") == 3

    @pytest.mark.usefixtures("affinity")
    def test_without_topology_each_cpu_is_a_core(self, tmp_path: Path) -> None:
        assert physical_cores(tmp_path, tmp_path / "none") == 4

    @pytest.mark.usefixtures("affinity")
    @pytest.mark.parametrize(
        ("quota", "cores"),
        [("max 100000", 4), ("150000 100000", 2), ("50000 100000", 1), ("900000 100000", 4), ("rubbish", 4), ("", 4)],
    )
    def test_a_containers_quota_counts(self, tmp_path: Path, quota: str, cores: int) -> None:
        (tmp_path / "cpu.max").write_text(quota)
        assert physical_cores(tmp_path, tmp_path / "cpu.max") == cores

    def test_this_machine_has_cores(self) -> None:
        assert 1 <= physical_cores() <= (os.cpu_count() or 1)


class TestFailures:
    """Lines as llama.cpp really writes them."""

    @pytest.mark.parametrize(
        ("lines", "code", "says"),
        [
            (
                [
                    "llama_model_load: error loading model: tensor 'blk.1' data is not within the file bounds, bad",
                    "llama_model_load_from_file_impl: failed to load model",
                ],
                "model_file_invalid",
                "cut short",
            ),
            (
                [
                    "gguf_init_from_reader: failed to read key-value pairs",
                    "llama_model_load: error loading model: llama_model_loader: failed to load model from /m.gguf",
                    "llama_model_load_from_file_impl: failed to load model",
                ],
                "model_file_invalid",
                "failed to read key-value pairs",
            ),
            (
                ["llama_model_load: error loading model: unknown model architecture: 'lxxma'"],
                "model_file_invalid",
                "architecture 'lxxma'",
            ),
            (
                ["load_tensors: failed to load GGUF split from /m-00002-of-00002.gguf"],
                "model_file_invalid",
                "all parts",
            ),
            (
                ["llama_model_load: error loading model: check_tensor_dims: tensor 'output.weight' has wrong shape"],
                "model_file_invalid",
                "wrong shape",
            ),
            (
                [
                    "ggml_backend_cpu_buffer_type_alloc_buffer: failed to allocate buffer of size 99",
                    "alloc_tensor_range: failed to allocate CPU buffer of size 99",
                    "llama_model_load: error loading model: unable to allocate CPU buffer",
                ],
                "runner_failed",
                "not enough memory",
            ),
            ([], "model_file_invalid", "no reason given"),
        ],
    )
    def test_a_load_failure_is_a_sentence(self, lines: list[str], code: str, says: str) -> None:
        error = load_failure("/m.gguf", 12_345, lines, "v1")
        assert error.code == code and says in error.detail and "/m.gguf" in error.detail
        assert "error loading model" not in error.detail

    def test_a_context_failure_has_its_numbers(self) -> None:
        error = context_failure(
            65_536, 16, "f16", ["llama_init_from_model: failed to initialize the context: no memory"]
        )
        assert error.code == "runner_failed"
        assert all(part in error.detail for part in ("65,536", "16 sequences", "f16", "no memory", "shorter context"))
