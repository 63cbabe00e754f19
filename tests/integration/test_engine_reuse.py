"""What is reused on the real model: the same text as without, exactly where weights and cache are exact.

Its first layers alone are enough for that, and quick; `tests/exhaustive` plays all of them.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.loaded import LoadedEngines
from tests.support.real_models import FEW, exact_copy, short_copy, story
from tests.support.reuse_cases import ALL_CASES, CELLS, EXACT, SETTINGS, Cases, run_case


@pytest.fixture(scope="module")
def engines() -> Iterator[LoadedEngines]:
    with LoadedEngines() as engines:
        yield engines


@pytest.mark.parametrize(
    ("layout", "case"), [one for one in ALL_CASES if one[1] not in ("recomputed", "cancelled_aside")]
)
def test_with_exact_weights_the_text_is_the_same(engines: LoadedEngines, layout: str, case: str) -> None:
    engine = engines.get(exact_copy(layers=FEW), kv_cells=CELLS[layout], **SETTINGS, **EXACT)
    run_case(Cases(engine, story(engine.tokens_of), close=0.001), case)


@pytest.mark.parametrize("case", ["next_turn", "concurrent"])
def test_quantised_it_differs_only_where_two_tokens_are_as_likely(engines: LoadedEngines, case: str) -> None:
    """With the settings of production."""
    engine = engines.get(short_copy(), kv_cells=CELLS["unified"], **SETTINGS)
    run_case(Cases(engine, story(engine.tokens_of), close=float("inf"), gap=0.5), case)
