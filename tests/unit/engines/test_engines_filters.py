"""Filters and draws in numpy against the definitions, written down as plainly as can be."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skulk.engines.llama_cpp.draw import Drawer, pick, uniform
from skulk.engines.llama_cpp.filters import (
    Candidates,
    Logits,
    cut_xtc,
    keep_min_p,
    keep_top_k,
    keep_top_n_sigma,
    keep_top_p,
    keep_typical,
    leading,
)

# Quarters: sums of few of them are exact, and ties are frequent.
FEW = st.lists(st.integers(-40, 40).map(lambda quarters: quarters / 4), min_size=1, max_size=40)
SHARES = st.floats(0.01, 0.99)


def row_of(values: list[float]) -> Candidates:
    logits = np.array(values, dtype=np.float32)
    return Candidates(logits, float(logits.max()))


def wide_row(seed: int, size: int = 49_152, spread: float = 4.0) -> Candidates:
    """As a model's: one wide hump, some tokens far above it, some banned."""
    random = np.random.default_rng(seed)
    logits = random.normal(0, spread, size).astype(np.float32)
    logits[random.integers(0, size, 5)] += np.float32(8)
    logits[random.integers(0, size, 100)] = -np.inf
    return Candidates(logits, float(logits.max()))


def kept(candidates: Candidates) -> list[int]:
    """Ids of what can be drawn; the invariants hold."""
    logits = candidates.logits.tolist()
    assert candidates.peak == max(logits) > -math.inf
    ids = list(range(len(logits))) if candidates.ids is None else candidates.ids.tolist()
    if candidates.ids is not None:
        pairs = [(-logit, token) for logit, token in zip(logits, ids, strict=True)]
        assert pairs == sorted(pairs), "from the best to the worst, of equals the lower id first"
    return sorted(token for token, logit in zip(ids, logits, strict=True) if logit > -math.inf)


def shares(logits: Logits) -> list[float]:
    weights = np.exp(logits.astype(np.float64) - float(logits.max()))
    return (weights / weights.sum()).tolist()


def ranked(logits: Logits) -> list[int]:
    """Ids from the best to the worst; of equal ones the lower first."""
    return np.lexsort((np.arange(logits.size), -logits)).tolist()


def is_open_at(sums: list[float], bound: float) -> bool:
    """Whether a cut at this bound is clear: no running sum so near that rounding decides."""
    return all(abs(total - bound) > 1e-5 for total in sums)


@given(FEW, st.integers(1, 45))
def test_top_k_keeps_the_best_and_of_equals_the_lower_ids(values: list[float], k: int) -> None:
    row = row_of(values)
    assert kept(keep_top_k(row, k)) == sorted(ranked(row.logits)[:k])


@given(FEW, SHARES)
def test_top_p_keeps_the_fewest_that_reach_it(values: list[float], p: float) -> None:
    row = row_of(values)
    found = shares(row.logits)
    order = ranked(row.logits)
    sums = np.cumsum([found[token] for token in order]).tolist()
    if is_open_at(sums, p):
        count = next((place + 1 for place, total in enumerate(sums) if total >= p), len(sums))
        assert kept(keep_top_p(row, p)) == sorted(order[:count])


@given(FEW, SHARES)
def test_min_p_compares_with_the_best(values: list[float], p: float) -> None:
    row = row_of(values)
    margins = [logit - row.peak - math.log(p) for logit in row.logits.tolist()]
    if all(abs(margin) > 1e-5 for margin in margins):
        assert kept(keep_min_p(row, p)) == [token for token, margin in enumerate(margins) if margin >= 0]


@given(FEW, SHARES)
def test_typical_keeps_the_nearest_to_the_expected_surprise(values: list[float], p: float) -> None:
    row = row_of(values)
    found = shares(row.logits)
    entropy = -sum(share * math.log(share) for share in found)
    distances = [abs(-math.log(share) - entropy) for share in found]
    order = sorted(range(len(found)), key=lambda token: distances[token])
    sums = np.cumsum([found[token] for token in order]).tolist()
    if is_open_at(sums, p):
        count = next((place + 1 for place, total in enumerate(sums) if total > p), len(sums))
        # Of equally near ones any may be the last.
        last = distances[order[count - 1]]
        chosen = kept(keep_typical(row, p))
        assert len(chosen) == count
        assert {token for token in order if distances[token] < last - 1e-6} <= set(chosen)
        assert all(distances[token] <= last + 1e-6 for token in chosen)


@given(FEW, st.floats(0.1, 5.0))
def test_top_n_sigma_counts_from_the_best(values: list[float], n: float) -> None:
    row = row_of(values)
    bound = max(values) - n * float(np.std(values))
    if all(abs(value - bound) > 1e-4 for value in values):
        assert kept(keep_top_n_sigma(row, n)) == [token for token, value in enumerate(values) if value >= bound]


@given(FEW, st.floats(0.01, 0.5))
def test_xtc_leaves_the_last_of_the_top_choices(values: list[float], threshold: float) -> None:
    row = row_of(values)
    found = shares(row.logits)
    if is_open_at(found, threshold):
        above = [token for token in ranked(row.logits) if found[token] >= threshold]
        gone = set(above[:-1])
        assert kept(cut_xtc(row, threshold)) == [token for token in range(len(values)) if token not in gone]


@pytest.mark.parametrize("threshold", [0.0, 1e-30])
def test_xtc_never_ends_at_a_banned_token(threshold: float) -> None:
    row = row_of([1.0, -math.inf, 0.0, 2.0])
    assert kept(cut_xtc(row, threshold)) == [2]


@pytest.mark.parametrize(
    ("narrow", "reference"),
    [
        (lambda row: keep_top_k(row, 40), 40),
        (lambda row: keep_top_k(row, 5000), 5000),
        (lambda row: keep_top_p(row, 0.95), 0.95),
        (lambda row: keep_top_p(row, 0.9999), 0.9999),
    ],
)
@pytest.mark.parametrize("spread", [0.01, 4.0])
def test_wide_rows_are_cut_as_by_sorting_them(
    narrow: Callable[[Candidates], Candidates], reference: float, spread: float
) -> None:
    """Rows of a real size, peaked and flat: the guess of how many are needed is exact after all."""
    row = wide_row(3, spread=spread)
    order = ranked(row.logits)
    count = int(reference)
    if reference < 1:
        sums = np.cumsum(np.array(shares(row.logits))[order])
        count = int(np.searchsorted(sums, reference)) + 1
    chosen = set(kept(narrow(row)))
    # Rounding may move the cut of a sum by a few of the least probable.
    slack = 0 if reference >= 1 else count // 1000 + 1
    assert abs(len(chosen) - count) <= slack
    assert set(order[: count - slack]) <= chosen <= set(order[: count + slack])


@given(st.integers(0, 2**32), st.integers(1, 400))
@settings(max_examples=20)
def test_the_leading_ones_are_among_those_found(seed: int, count: int) -> None:
    logits = wide_row(seed, size=20_000).logits
    found = leading(logits, count)
    assert count <= found.size <= 4 * count + 64
    assert np.count_nonzero(logits >= logits[found].min()) == found.size, "nothing in between is left out"


@given(st.integers(0, 2**32), st.sampled_from([3, 1000, 1025, 5000]))
@settings(max_examples=20)
def test_kept_ones_are_sorted_however_many(seed: int, size: int) -> None:
    logits = np.random.default_rng(seed).integers(-50, 50, size).astype(np.float32) / np.float32(4)
    logits[::3] *= -1
    chosen = keep_top_k(Candidates(logits, float(logits.max())), size - 1)
    assert chosen.ids is not None
    assert chosen.ids.tolist() == ranked(logits)[: size - 1]


def test_filters_follow_one_another() -> None:
    row = wide_row(1)
    narrowed = keep_min_p(keep_top_p(keep_top_k(row, 40), 0.9), 0.02)
    best = ranked(row.logits)[:40]
    found = np.array(shares(row.logits[best]))
    nucleus = int(np.searchsorted(np.cumsum(found), 0.9)) + 1
    expected = [token for token, share in zip(best[:nucleus], found, strict=False) if share >= 0.02 * found[0]]
    assert kept(narrowed) == sorted(expected)


class TestUniform:
    def test_it_is_a_function_of_its_arguments(self) -> None:
        assert uniform(1, 2) == uniform(1, 2)
        numbers = {uniform(key, position, place) for key in range(5) for position in range(5) for place in (-1, 0, 1)}
        assert len(numbers) == 75

    def test_no_two_places_are_one(self) -> None:
        last = uniform(9, 4, 3 * 512 - 1)
        assert last not in {uniform(9, 5, place) for place in (-1, 0, 1)}

    @given(st.integers(0, 2**64 - 1), st.integers(0, 2**40), st.integers(-1, 1535))
    def test_it_lies_below_one(self, key: int, position: int, place: int) -> None:
        assert 0 <= uniform(key, position, place) < 1

    def test_numbers_are_spread_evenly(self) -> None:
        counts = Counter(int(uniform(7, position, place) * 10) for position in range(4000) for place in (-1, 0, 1))
        # 9 degrees of freedom: beyond 27.9 lies one case in a thousand, and these numbers never change.
        assert sum((count - 1200) ** 2 / 1200 for count in counts.values()) < 27.9

    @pytest.mark.parametrize("step", [(1, 0, 0), (0, 1, 0), (0, 0, 1)], ids=["key", "position", "place"])
    def test_neighbours_tell_nothing_of_each_other(self, step: tuple[int, int, int]) -> None:
        pairs: Counter[tuple[int, int]] = Counter()
        for count in range(10_000):
            key, position, place = (7 + 2 * count, 5, 0) if step[0] else (7, 2 * count, 0)
            other = uniform(key + step[0], position + step[1], place + step[2])
            pairs[int(uniform(key, position, place) * 10), int(other * 10)] += 1
        # 99 degrees of freedom: beyond 148.2 lies one case in a thousand.
        assert sum((pairs[a, b] - 100) ** 2 / 100 for a in range(10) for b in range(10)) < 148.2


class TestPick:
    def test_each_index_has_its_share_and_none_has_the_empty_one(self) -> None:
        weights = np.array([0, 3, 0, 0, 1, 4, 0], dtype=np.float32)
        counts = Counter(pick(weights, (n + 0.5) / 800) for n in range(800))
        assert counts == {1: 300, 4: 100, 5: 400}
        assert pick(weights, 0.0) == 1 and pick(weights, 1 - 2**-53) == 5

    @given(st.lists(st.floats(0, 1, width=32), min_size=1).filter(any), st.floats(0, 1, exclude_max=True))
    def test_what_is_picked_has_weight(self, weights: list[float], u: float) -> None:
        assert weights[pick(np.array(weights, dtype=np.float32), u)] > 0


def chi_square(counts: Counter[int], expected: list[float]) -> tuple[float, int]:
    """Statistic and degrees of freedom, over tokens expected at least ten times; the others as one."""
    draws = counts.total()
    cells = [(counts[token], share * draws) for token, share in enumerate(expected) if share * draws >= 10]
    rest = draws - sum(count for count, _ in cells), draws - sum(wanted for _, wanted in cells)
    if rest[1] >= 10:
        cells.append(rest)
    return sum((count - wanted) ** 2 / wanted for count, wanted in cells), len(cells) - 1


class TestDrawer:
    @pytest.mark.parametrize(
        ("temperature", "is_dense", "banned"),
        [(0.3, False, False), (0.3, False, True), (1.0, True, False), (3.0, True, True)],
    )
    def test_tokens_come_with_their_probabilities(self, temperature: float, is_dense: bool, banned: bool) -> None:
        """Parted rows, and those that aren't worth parting."""
        logits = np.random.default_rng(5).normal(0, 2, 700).astype(np.float32)
        if banned:
            logits[::7] = -np.inf
        in_head = np.count_nonzero(logits >= logits.max() - temperature * math.log(logits.size / 4))
        assert (in_head > logits.size / 4) == is_dense
        row = Candidates(logits, float(logits.max()))
        drawer = Drawer(logits.size)
        counts = Counter(drawer.draw(row, temperature, 11, position) for position in range(4000))
        statistic, freedom = chi_square(counts, shares(logits / np.float32(temperature)))
        # The mean is the freedom, the variance twice that; the draws never change, so this fails for good or never.
        assert statistic < freedom + 4 * math.sqrt(2 * freedom), (statistic, freedom)
        assert not banned or all(token % 7 for token in counts)

    def test_a_heavy_tail_comes_with_its_probabilities(self) -> None:
        """Nearly all tokens just below the head: together they weigh more than the best."""
        logits = np.full(64, -math.log(16) - 0.1, dtype=np.float32)
        logits[5], logits[6], logits[40:] = 0.0, -1.0, -math.log(16) - 1
        drawer = Drawer(64)
        row = Candidates(logits, 0.0)
        counts = Counter(drawer.draw(row, 1.0, 4, position) for position in range(8000))
        statistic, freedom = chi_square(counts, shares(logits))
        assert freedom == 63
        assert statistic < freedom + 4 * math.sqrt(2 * freedom)

    @pytest.mark.parametrize("peak", [1e9, 3e5, -1e9])
    @pytest.mark.parametrize("temperature", [1e-6, 1.0, 100.0])
    def test_great_logits_are_drawn_from_too(self, peak: float, temperature: float) -> None:
        """Where float32 has no number between the best and those that can't be drawn any more."""
        logits = np.full(5000, peak - 1e6, dtype=np.float32)
        logits[[7, 4000]] = peak
        drawer = Drawer(5000)
        drawn = {drawer.draw(Candidates(logits, float(logits.max())), temperature, 1, place) for place in range(40)}
        assert drawn == {7, 4000}

    def test_few_candidates_come_with_theirs(self) -> None:
        row = keep_top_k(row_of([0.0, 1.0, -3.0, 1.5, 0.5, 1.2]), 4)
        drawer = Drawer(6)
        counts = Counter(drawer.draw(row, 2.0, 3, position) for position in range(4000))
        assert set(counts) == {1, 3, 4, 5}
        expected = [0.0] * 6
        assert row.ids is not None
        for token, share in zip(row.ids.tolist(), shares(row.logits / np.float32(2)), strict=True):
            expected[token] = share
        statistic, freedom = chi_square(counts, expected)
        assert statistic < freedom + 4 * math.sqrt(2 * freedom)

    @given(FEW, st.floats(0.05, 5.0), st.integers(0, 2**64 - 1), st.integers(0, 10_000))
    @settings(max_examples=50)
    def test_a_draw_is_a_function_of_key_position_and_candidates(
        self, values: list[float], temperature: float, key: int, position: int
    ) -> None:
        row = row_of(values)
        token = Drawer(len(values)).draw(row, temperature, key, position)
        other = Drawer(len(values))
        other.draw(row_of([value + 1 for value in values[::-1]]), 1.0, 5, 6)
        assert other.draw(row, temperature, key, position) == token
