"""Bits: the budget holds, hulls and the water-filling are what theory says, and brute force finds nothing better."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from xedge.bits import allocate, closed_form, compare, lower_hull
from xedge.errors import UsageError

Array = NDArray[np.float64]


def tables(seed: int, n: int, levels: int, *, convex: bool) -> Array:
    """Falling distortions [n, levels]; convex in the level or of any falling shape, of very unlike sizes."""
    r = np.random.default_rng(seed)
    gains = r.random((n, levels - 1)) + 0.01
    if convex:
        gains = -np.sort(-gains, axis=1)
    falling = np.concatenate([np.cumsum(gains[:, ::-1], 1)[:, ::-1], np.zeros((n, 1))], 1)
    return np.asarray(falling * r.lognormal(0, 1, (n, 1)))


def loss(distortion: Array, levels: NDArray[np.int64], bits: NDArray[np.int64]) -> float:
    return float(distortion[np.arange(len(bits)), np.searchsorted(levels, bits)].sum())


def optimum(levels: NDArray[np.int64], distortion: Array, weights: NDArray[np.int64], budget: int) -> float:
    """By brute force."""
    best = np.inf
    for choice in itertools.product(range(len(levels)), repeat=len(weights)):
        at = np.array(choice)
        if int((levels[at] * weights).sum()) <= budget:
            best = min(best, float(distortion[np.arange(len(at)), at].sum()))
    return best


problems = {
    "seed": st.integers(0, 2**31),
    "n": st.integers(1, 5),
    "levels": st.sampled_from([(2, 3, 4, 5), (0, 2, 3, 8), (4, 8)]),
    "part": st.floats(0, 1),
}


@settings(max_examples=80)
@given(**problems)
def test_convex_and_equal_weights_reach_the_integer_optimum(
    seed: int, n: int, levels: tuple[int, ...], part: float
) -> None:
    widths = np.arange(levels[0], levels[0] + len(levels))  # unit steps: every budget can be spent to the last bit
    distortion = tables(seed, n, len(widths), convex=True)
    weights = np.full(n, 3)
    low, high = int(weights.sum() * widths[0]), int(weights.sum() * widths[-1])
    budget = round(low + part * (high - low))
    bits = allocate(widths, distortion, weights, budget)
    assert loss(distortion, widths, bits) == pytest.approx(optimum(widths, distortion, weights, budget), abs=1e-12)


@settings(max_examples=150)
@given(convex=st.booleans(), **problems)
def test_any_problem(seed: int, n: int, levels: tuple[int, ...], part: float, convex: bool) -> None:
    widths = np.array(levels)
    distortion = tables(seed, n, len(widths), convex=convex)
    weights = np.random.default_rng(seed).integers(1, 40, n)
    low, high = int(weights.sum() * widths[0]), int(weights.sum() * widths[-1])
    budget = round(low + part * (high - low))
    bits = allocate(widths, distortion, weights, budget)
    left = budget - int((bits * weights).sum())
    assert set(bits.tolist()) <= set(levels)
    assert left >= 0
    got = loss(distortion, widths, bits)
    # The greedy solves the relaxed problem up to its first step that does not fit: one step is all it can lose.
    best = optimum(widths, distortion, weights, budget)
    steps = [
        distortion[i, a] - distortion[i, b]
        for i in range(n)
        for a, b in itertools.pairwise(lower_hull(widths, distortion[i]))
    ]
    assert best - 1e-12 <= got <= best + max(steps, default=0.0) + 1e-12
    # No worse than equal bits.
    for j, width in enumerate(levels):
        if weights.sum() * width <= budget:
            assert got <= distortion[:, j].sum() + 1e-12
    # Nothing that fits and helps is left out.
    for i in range(n):
        for j, width in enumerate(levels):
            if width > bits[i] and (width - bits[i]) * weights[i] <= left:
                assert distortion[i, j] >= distortion[i, np.searchsorted(widths, bits[i])]


def test_a_heavy_channel_is_not_starved_by_a_light_one() -> None:
    """The steepest steps first would give the light channel all it can have, and end worse than equal bits."""
    widths = np.array([2, 3, 4, 5, 6, 7, 8])
    light = np.array([110, 10, 8, 6, 4, 2, 0.0])
    heavy = np.array([19, 0, 0, 0, 0, 0, 0.0])
    bits = allocate(widths, np.stack([light, heavy]), np.array([1, 10]), 33)
    assert bits.tolist() == [3, 3]


def test_what_the_hull_cannot_pay_a_shorter_step_does() -> None:
    widths = np.array([2, 4, 8])
    distortion = np.array([[10.0, 7.0, 0.0]])  # 4 bits lie above the line from 2 to 8
    assert lower_hull(widths, distortion[0]) == [0, 2]
    assert allocate(widths, distortion, np.array([5]), 30).tolist() == [4]
    assert allocate(widths, distortion, np.array([5]), 40).tolist() == [8]


def test_a_useless_bit_is_not_bought() -> None:
    distortion = np.array([[3.0, 3.0, 3.0], [5.0, 1.0, 1.5]])
    assert allocate(np.array([2, 4, 8]), distortion, np.array([1, 1]), 100).tolist() == [2, 4]


def test_budget_below_the_least_level() -> None:
    with pytest.raises(UsageError, match=r"1\.50 bits a weight is below the least width of 2;"):
        allocate(np.array([2, 4]), np.ones((2, 2)), np.array([3, 1]), 6)


@given(seed=st.integers(0, 2**31), n=st.integers(1, 9), convex=st.booleans())
def test_lower_hull(seed: int, n: int, convex: bool) -> None:
    r = np.random.default_rng(seed)
    levels = np.cumsum(r.integers(1, 4, n))
    distortion = tables(seed, 1, n, convex=True)[0] if convex else r.random(n)
    hull = lower_hull(levels, distortion)
    assert hull[0] == 0
    assert np.all(np.diff(hull) > 0)
    assert np.all(np.diff(distortion[hull]) < 0)
    slopes = np.diff(distortion[hull]) / np.diff(levels[hull])
    assert np.all(np.diff(slopes) > 0)  # strictly convex
    # No point lies below it; beyond its last vertex nothing is lower.
    on = np.interp(levels, levels[hull], distortion[hull])
    assert np.all(distortion >= on - 1e-12)


def test_points_on_a_line_are_no_vertices() -> None:
    assert lower_hull(np.array([0, 1, 2, 3]), np.array([2.0, 1, 0, 0])) == [0, 2]


# ---- the closed form ----


def filled(seed: int, n: int, mean: float) -> tuple[Array, Array, Array]:
    r = np.random.default_rng(seed)
    sensitivity, weights = r.lognormal(0, 3, n), r.integers(1, 500, n).astype(np.float64)
    return sensitivity, weights, closed_form(sensitivity, weights, mean * weights.sum())


@given(seed=st.integers(0, 2**31), n=st.integers(1, 12), mean=st.floats(0.05, 9))
def test_closed_form_meets_the_budget_and_the_conditions_of_karush_kuhn_tucker(seed: int, n: int, mean: float) -> None:
    sensitivity, weights, bits = filled(seed, n, mean)
    assert np.all(bits >= 0)
    assert weights @ bits == pytest.approx(mean * weights.sum(), rel=1e-9)
    # What one more bit of budget would gain: equal wherever bits are given, no more where none are.
    gain = sensitivity * np.log(4) * 4.0**-bits / weights
    given_bits = bits > 1e-9
    price = gain[given_bits].max()
    np.testing.assert_allclose(gain[given_bits], price, rtol=1e-6)
    assert np.all(gain <= price * (1 + 1e-6))


@given(seed=st.integers(0, 2**31), n=st.integers(2, 8), mean=st.floats(0.5, 6))
def test_no_transfer_between_two_channels_improves_the_closed_form(seed: int, n: int, mean: float) -> None:
    sensitivity, weights, bits = filled(seed, n, mean)
    total = float(sensitivity @ 4.0**-bits)
    for i, j in itertools.permutations(range(n), 2):
        moved = bits.copy()
        moved[i] += 1e-3 / weights[i]
        moved[j] -= 1e-3 / weights[j]
        if moved[j] >= 0:
            assert float(sensitivity @ 4.0**-moved) >= total * (1 - 1e-12)


def test_closed_form_by_hand() -> None:
    # Equal weights, 16 times the sensitivity: two bits more.
    np.testing.assert_allclose(closed_form(np.array([16.0, 1.0]), np.ones(2), 6.0), [4, 2])
    # The least sensitive channel would go below zero: it gets none, and the others share its part.
    np.testing.assert_allclose(closed_form(np.array([16.0, 1.0, 1e-6]), np.ones(3), 4.0), [3, 1, 0])
    np.testing.assert_allclose(closed_form(np.array([4.0, 0.0]), np.ones(2), 3.0), [3, 0])


def test_integer_allocation_approaches_the_closed_form(seed: int) -> None:
    """With D = s 4^-b and fine levels the greedy on hulls gives the water-filling, up to the size of the steps."""
    sensitivity, weights, bits = filled(seed, 30, 4.0)
    fine = 8
    levels = np.arange(0, 16 * fine)
    distortion = sensitivity[:, None] * 4.0 ** (-levels[None, :] / fine)
    got = allocate(levels, distortion, weights.astype(np.int64), int(4.0 * weights.sum() * fine)) / fine
    assert np.average(np.abs(got - bits), weights=weights) < 0.5 / fine
    least = float(sensitivity @ 4.0**-bits)
    assert least * (1 - 1e-9) <= float(sensitivity @ 4.0**-got) <= least * 1.02


@given(seed=st.integers(0, 2**31), n=st.integers(1, 8), mean=st.floats(0.1, 7))
def test_a_closed_form_with_a_ceiling_keeps_to_it_and_to_the_budget(seed: int, n: int, mean: float) -> None:
    r = np.random.default_rng(seed)
    sensitivity, weights, most = r.lognormal(0, 4, n), r.integers(1, 50, n).astype(float), r.integers(1, 8, n)
    budget = mean * weights.sum()
    bits = closed_form(sensitivity, weights, budget, most.astype(float))
    assert (bits >= 0).all()
    assert (bits <= most + 1e-9).all()
    assert weights @ bits == pytest.approx(min(budget, float(weights @ most)), rel=1e-9)
    gain = sensitivity * 4.0**-bits / weights  # equal between the bounds, no more at 0, no less at the ceiling
    inside = (bits > 1e-9) & (bits < most - 1e-9)
    if inside.any():
        np.testing.assert_allclose(gain[inside], gain[inside].max(), rtol=1e-6)
        assert (gain[bits <= 1e-9] <= gain[inside].max() * (1 + 1e-6)).all()
        assert (gain[bits >= most - 1e-9] >= gain[inside].min() * (1 - 1e-6)).all()


@given(seed=st.integers(0, 2**31), part=st.floats(0, 1))
def test_the_closed_form_beside_the_optimum(seed: int, part: float) -> None:
    """Where D = s 4^-b it is as good up to one step; where D has another shape it may lose, and never spends more."""
    r = np.random.default_rng(seed)
    levels, n = np.arange(9), 12
    weights, least = np.full(n, 7), r.integers(0, 3, n)
    low = int(weights @ least)
    budget = low + round(part * (8 * int(weights.sum()) - low))
    for shape in (r.lognormal(0, 2, (n, 1)) * 4.0**-levels, tables(seed, n, 9, convex=True)):
        found = compare(shape, weights, budget, least, allocate(levels, shape, weights, budget, least))
        assert found.closed >= found.optimum * (1 - 1e-9), "equal weights and convex: nothing beats the optimum"
    exact = r.lognormal(0, 2, (n, 1)) * 4.0**-levels
    found = compare(exact, weights, budget, least, allocate(levels, exact, weights, budget, least))
    assert found.closed <= 2.5 * found.optimum
    assert found.apart <= 1
    assert f"{found.closed / found.optimum:.2f} times" in found.words()
