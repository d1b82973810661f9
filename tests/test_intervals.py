"""Intervals and gates keep their promises: exact values, third-party references, and simulation of the false alarms."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from xedge.errors import UsageError
from xedge.intervals import (
    CONFIDENCE,
    coverage,
    early_stopping_discard,
    early_stopping_quantile,
    median_interval,
    rank,
    sign_test,
)
from xedge.measure import a_first

FloatArray = NDArray[np.float64]
TRIALS = 20_000


def ends(medians: FloatArray) -> tuple[FloatArray, FloatArray]:
    """The intervals of many trials [T, k] at once; a sample of rows is checked against the real function."""
    k = medians.shape[1]
    ordered = np.sort(medians, axis=1)
    lower, upper = ordered[:, rank(k) - 1], ordered[:, k - rank(k)]
    for row in range(0, len(medians), max(1, len(medians) // 20)):
        one = median_interval(list(medians[row]))
        assert (one.lower, one.upper) == (lower[row], upper[row])
    return lower, upper


@pytest.mark.parametrize(("k", "j"), [(1, 1), (6, 1), (7, 1), (10, 1), (11, 2), (15, 3), (30, 9)])
def test_rank_is_the_largest_that_covers(k: int, j: int) -> None:
    assert rank(k) == j
    assert coverage(k, j) >= CONFIDENCE or j == 1
    assert 2 * (j + 1) > k or coverage(k, j + 1) < CONFIDENCE


@pytest.mark.parametrize("k", [3, 7, 11, 15, 40])
def test_coverage_is_the_binomial_one(k: int) -> None:
    for j in range(1, k // 2 + 1):
        assert coverage(k, j) == pytest.approx(1 - 2 * scipy.stats.binom.cdf(j - 1, k, 0.5), abs=1e-12)


def test_seven_processes_are_the_fewest_that_decide() -> None:
    assert median_interval(range(7)).decide(-1) == "fail"
    assert median_interval(range(6)).decide(-1) == "inconclusive"


def test_the_gate_reads_the_ends_only() -> None:
    interval = median_interval([1.0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11])
    assert (interval.median, interval.lower, interval.upper) == (6, 2, 10)
    decided = [interval.decide(budget) for budget in (1.9, 2, 6, 9.9, 10)]
    assert decided == ["fail", "inconclusive", "inconclusive", "inconclusive", "pass"]


def test_no_values_no_interval() -> None:
    with pytest.raises(UsageError):
        median_interval([])


@given(st.lists(st.floats(0.5, 2), min_size=1, max_size=25))
def test_sign_test_is_scipys(ratios: list[float]) -> None:
    above, n = sum(r > 1 for r in ratios), sum(r != 1 for r in ratios)
    expected = scipy.stats.binomtest(above, n).pvalue if n else 1.0
    assert sign_test(ratios) == pytest.approx(expected)


# "Would discard" lines of LoadGen summaries that submitters published: queries, discarded.
LOADGEN = [(64, 0), (100, 2), (201, 9), (659, 47), (708, 51), (2048, 172), (2116, 178), (2145, 181), (7469, 685)]


@pytest.mark.parametrize(("n", "discarded"), [*LOADGEN, (79944, 7796)])
def test_early_stopping_gives_loadgens_published_counts(n: int, discarded: int) -> None:
    assert early_stopping_discard(n) == discarded
    assert scipy.stats.binom.cdf(discarded + 1, n, 0.1) <= 0.01 < scipy.stats.binom.cdf(discarded + 2, n, 0.1)


def test_early_stopping_has_the_minima_that_loadgen_prints() -> None:
    assert early_stopping_discard(63) is None
    assert early_stopping_discard(661, 0.99) is None
    assert early_stopping_discard(662, 0.99) == 0
    assert early_stopping_quantile(list(range(63))) is None
    assert early_stopping_quantile(list(range(64))) == 63
    assert early_stopping_quantile(list(range(2048, 0, -1))) == 2048 - 172


def test_early_stopping_understates_the_quantile_in_one_of_a_hundred() -> None:
    rng = np.random.default_rng(0)
    values = np.sort(rng.random((TRIALS, 300)), axis=1)
    discard = early_stopping_discard(300)
    assert discard is not None
    low = (values[:, 299 - discard] < 0.9).mean()
    assert 0.003 < low <= 0.0125  # the bound is 0.01; not vacuous either


def processes(rng: np.random.Generator, shape: tuple[int, int], kind: str) -> FloatArray:
    """Medians of fresh processes around a true median of 1."""
    if kind == "lognormal":
        return np.exp(0.04 * rng.standard_normal(shape))
    if kind == "two modes":  # memory layout: one process in two is 6 % slower
        return 1 + 0.06 * (rng.random(shape) - 0.5) + 0.06 * (rng.random(shape) < 0.5) - 0.03
    skewed: FloatArray = 0.98 + 0.02 * rng.exponential(1, shape) / np.log(2)
    return skewed


@pytest.mark.parametrize("kind", ["lognormal", "two modes", "exponential"])
@pytest.mark.parametrize("k", [7, 11, 15])
def test_intervals_cover_what_they_say(k: int, kind: str) -> None:
    rng = np.random.default_rng(k)
    lower, upper = ends(processes(rng, (TRIALS, k), kind))
    exact = median_interval(range(k)).confidence
    covered = ((lower <= 1) & (upper >= 1)).mean()
    assert abs(covered - exact) < 4 * np.sqrt(exact * (1 - exact) / TRIALS)


@pytest.mark.parametrize("k", [7, 11, 15])
def test_a_model_exactly_at_its_budget_fails_in_at_most_one_of_a_hundred(k: int) -> None:
    rng = np.random.default_rng(100 + k)
    lower, _ = ends(processes(rng, (TRIALS, k), "lognormal"))
    assert (lower > 1).mean() <= 0.01


def test_a_model_five_percent_over_its_budget_is_caught() -> None:
    """Where processes differ by 2.5 %, as they do on an idle machine or less."""
    rng = np.random.default_rng(5)
    lower, _ = ends(1.05 * np.exp(0.025 * rng.standard_normal((TRIALS, 11))))
    assert (lower > 1).mean() >= 0.95


def test_an_interval_over_the_runs_of_one_process_would_cry_wolf() -> None:
    """Why fresh processes: the same rule on 101 runs of one process, at the budget."""
    rng = np.random.default_rng(6)
    centre = np.exp(0.03 * rng.standard_normal((4000, 1)))
    lower, _ = ends(centre * np.exp(0.05 * rng.standard_normal((4000, 101))))
    assert (lower > 1).mean() > 0.25


def pair_ratios(rng: np.random.Generator, pairs: int, drift: FloatArray, interleaved: bool) -> FloatArray:
    """Ratios [T, pairs] of two equal models while the device drifts: `drift` [T, 2 pairs] multiplies in time order."""
    times = drift * np.exp(0.02 * rng.standard_normal(drift.shape))
    if not interleaved:
        return np.asarray(times[:, :pairs] / times[:, pairs:])
    first, second = times[:, 0::2], times[:, 1::2]
    swap = np.array([a_first(i) for i in range(pairs)])
    return np.asarray(np.where(swap, first / second, second / first))


def false_alarms(ratios: FloatArray) -> float:
    lower, upper = ends(ratios)
    return float(((lower > 1) | (upper < 1)).mean())


@pytest.mark.parametrize("pairs", [7, 11, 15])
def test_interleaved_pairs_stand_a_drift_that_blocks_do_not(pairs: int) -> None:
    rng = np.random.default_rng(pairs)
    drift = np.broadcast_to(1 + 0.15 * np.linspace(0, 1, 2 * pairs), (TRIALS, 2 * pairs))
    assert false_alarms(pair_ratios(rng, pairs, drift, interleaved=True)) <= 0.02
    assert false_alarms(pair_ratios(rng, pairs, drift, interleaved=False)) > 0.9


def test_speed_changes_inside_some_pairs_only_widen_the_interval() -> None:
    """A neighbour on the same machine: 60 % slower in stretches that begin and end anywhere."""
    rng = np.random.default_rng(9)
    flips = rng.random((TRIALS, 22)) < 0.2
    slow = np.where(np.cumsum(flips, axis=1) % 2, 1.6, 1.0)
    assert false_alarms(pair_ratios(rng, 11, slow, interleaved=True)) <= 0.02


def test_interleaved_pairs_still_see_a_real_difference() -> None:
    rng = np.random.default_rng(10)
    drift = np.broadcast_to(1 + 0.15 * np.linspace(0, 1, 22), (TRIALS, 22))
    lower, _ = ends(1.1 * pair_ratios(rng, 11, drift, interleaved=True))
    assert (lower > 1).mean() > 0.95
