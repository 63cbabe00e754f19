"""What `tests/integration` shows on the model's first layers, on all of them: `make test-engine`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.gguf import embedded_model
from tests.support.loaded import LoadedEngines
from tests.support.many_streams import CELLS as MANY_CELLS
from tests.support.many_streams import STREAMS, WINDOW, compare_streams
from tests.support.real_models import exact_copy, story
from tests.support.reuse_cases import ALL_CASES, CELLS, EXACT, SETTINGS, Cases, run_case
from tests.support.tiny_models import ARCHITECTURES, story_of_numbers, write_tiny

LAYOUTS = tuple(MANY_CELLS)
MANY = {"n_parallel": STREAMS, "context_length": WINDOW}


@pytest.fixture(scope="module")
def engines() -> Iterator[LoadedEngines]:
    with LoadedEngines() as engines:
        yield engines


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sixteen_streams_with_exact_weights(engines: LoadedEngines, layout: str) -> None:
    engine = engines.get(exact_copy(), kv_cells=MANY_CELLS[layout], **MANY, **EXACT)
    compare_streams(engine, shortest=20, max_tokens=24, close=0.01)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sixteen_streams_with_exact_weights_as_in_production(engines: LoadedEngines, layout: str) -> None:
    """Flash attention and a cache of half precision; a text may turn where two tokens are as good as equal."""
    engine = engines.get(exact_copy(), kv_cells=MANY_CELLS[layout], **MANY)
    compare_streams(engine, shortest=20, max_tokens=24, gap=0.02)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sixteen_streams_quantised(engines: LoadedEngines, layout: str) -> None:
    engine = engines.get(embedded_model(), kv_cells=MANY_CELLS[layout], **MANY)
    compare_streams(engine, shortest=20, max_tokens=24, gap=0.5)


def test_sixteen_streams_with_bit_invariant_settings(engines: LoadedEngines) -> None:
    engine = engines.get(embedded_model(), kv_cells=MANY_CELLS["streams"], flash_attention="off", **MANY)
    compare_streams(engine, shortest=20, max_tokens=24, close=0.0)


@pytest.mark.parametrize(("layout", "case"), ALL_CASES)
def test_what_is_reused_with_exact_weights(engines: LoadedEngines, layout: str, case: str) -> None:
    engine = engines.get(exact_copy(), kv_cells=CELLS[layout], **SETTINGS, **EXACT)
    run_case(Cases(engine, story(engine.tokens_of), close=0.01), case)


@pytest.mark.parametrize(("layout", "case"), ALL_CASES)
def test_what_is_reused_quantised(engines: LoadedEngines, layout: str, case: str) -> None:
    engine = engines.get(embedded_model(), kv_cells=CELLS[layout], **SETTINGS)
    run_case(Cases(engine, story(engine.tokens_of), close=float("inf"), gap=0.5), case)


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize(("architecture", "layout"), [(name, layout) for name in ARCHITECTURES for layout in LAYOUTS])
def test_random_arrivals(
    engines: LoadedEngines, tmp_path_factory: pytest.TempPathFactory, architecture: str, layout: str, seed: int
) -> None:
    path = tmp_path_factory.getbasetemp() / f"{architecture}.gguf"
    if not path.exists():
        write_tiny(path, architecture)
    engine = engines.get(path, kv_cells=CELLS[layout], **SETTINGS)
    Cases(engine, story_of_numbers(), close=0.1, gap=0.1).at_random(seed)
