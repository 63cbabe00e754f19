"""Sixteen streams at once: each says what it says alone. `tests/exhaustive` does the same with every layer."""

from __future__ import annotations

from typing import Any

from tests.support.engines import load_small
from tests.support.gguf import embedded_model
from tests.support.many_streams import CELLS, STREAMS, WINDOW, compare_streams
from tests.support.real_models import FEW, exact_copy, short_copy
from tests.support.reuse_cases import EXACT

SETTINGS: dict[str, Any] = {"n_parallel": STREAMS, "context_length": WINDOW}


def test_with_exact_weights_the_texts_are_those_alone() -> None:
    engine = load_small(exact_copy(layers=FEW), kv_cells=CELLS["unified"], **SETTINGS, **EXACT)
    try:
        compare_streams(engine, shortest=12, max_tokens=6, close=0.001)
    finally:
        engine.close()


def test_with_bit_invariant_settings_the_logits_are_those_alone() -> None:
    """A stream each and no flash attention: nothing of a batch shows, though weights are quantised."""
    engine = load_small(short_copy(), kv_cells=CELLS["streams"], flash_attention="off", **SETTINGS)
    try:
        compare_streams(engine, shortest=12, max_tokens=6, close=0.0)
    finally:
        engine.close()


def test_the_quantised_model_differs_only_where_two_tokens_are_as_likely() -> None:
    """The whole model with the settings of production, in a unified cache: its kernels round by the batch's shape."""
    engine = load_small(embedded_model(), kv_cells=CELLS["unified"], **SETTINGS)
    try:
        compare_streams(engine, shortest=3, max_tokens=5, gap=0.5)
    finally:
        engine.close()
