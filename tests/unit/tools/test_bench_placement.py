"""The benchmark of placement decides on a cluster that is like one: each kind of machine gets some models."""

from __future__ import annotations

import random

import pytest

from tools import bench_placement


def test_its_cluster_has_every_kind_and_every_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    dice = random.Random(1)
    cards = bench_placement.models(dice)
    assert len({card.model_id for card in cards}) == bench_placement.MODELS
    assert {card.format for card in cards} == {"gguf", "mlx"}
    row = bench_placement.measure(10, 40)
    assert 0 < row.placed < 40, "some models are too large for every node"
    assert row.p50_ms <= row.p99_ms
    assert bench_placement.main(["--nodes", "5", "--decisions", "5"]) == 0
    assert capsys.readouterr().out.startswith("| nodes | decisions/s | p50 ms | p99 ms |")
