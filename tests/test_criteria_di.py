"""Discriminant information, DI loss and Fisher's ratios against refits, derivatives and cases by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from observations import LABELS, Array, drawn, energy, group, moments, observed, seen, whole

from xedge.criteria import Criterion, dfdr, di, diloss, fdr, greedy
from xedge.errors import UsageError
from xedge.moments import Moments
from xedge.teacher import Teacher


def refitted(x: Array, y: Array, rho: float, channels: Sequence[int], *, standardise: bool) -> float:
    """DI of some channels at a fixed ridge, from the data alone."""
    if not len(channels):
        return 0.0
    a = (x - x.mean(0))[:, channels].T
    if standardise:
        a = a / np.sqrt((a**2).sum(1, keepdims=True))
    count = y.sum(0)
    taught = y * np.where(count > 0, 1 / np.sqrt(np.maximum(count, 1)), 0)
    c = a @ (taught - taught.mean(0))
    return float(np.trace(c.T @ np.linalg.solve(a @ a.T + rho * np.eye(len(a)), c)))


# ---- di: exact leave-one-out ----


@settings(max_examples=25)
@given(seed=st.integers(0, 2**31), c=st.integers(2, 8))
def test_leave_one_out_is_the_refit(seed: int, c: int) -> None:
    x, y = drawn(seed, c)
    rho = di.EPS  # the mean variance of standardised channels is one
    full = refitted(x, y, rho, range(c), standardise=True)
    want = [full - refitted(x, y, rho, [j for j in range(c) if j != i], standardise=True) for i in range(c)]
    got = di.score(group(c), observed(seen(x, y)), whole(c))
    np.testing.assert_allclose(got, np.array(want) / energy(y), rtol=0, atol=1e-9)
    assert di.solve(moments(x, y), LABELS, di.EPS, standardise=True).di == pytest.approx(full, abs=1e-9)


@settings(max_examples=25)
@given(seed=st.integers(0, 2**31), c=st.integers(2, 8), eps=st.floats(1e-4, 2))
def test_di_never_rises_when_a_channel_goes(seed: int, c: int, eps: float) -> None:
    x, y = drawn(seed, c)
    order = np.random.default_rng(seed).permutation(c).tolist()
    rho = di.solve(moments(x, y), LABELS, eps).rho
    kept = [refitted(x, y, rho, order[:k], standardise=False) for k in range(c + 1)]
    assert np.all(np.diff(kept) >= -1e-10)
    assert 0 <= kept[-1] <= energy(y) + 1e-10
    assert np.all(di.score(group(c), observed(seen(x, y)), whole(c)) >= 0)


@settings(max_examples=25)
@given(seed=st.integers(0, 2**31))
def test_free_of_scale_as_the_ridge_vanishes(seed: int) -> None:
    x, y = drawn(seed, 5)
    gain = np.random.default_rng(seed).lognormal(0, 2, 5)

    def losses(features: Array, rho: float) -> Array:
        m = moments(features, y)
        one = di.solve(m, LABELS, rho)
        return np.asarray(np.sum(one.readout**2, 1) / np.diag(one.inverse))

    np.testing.assert_allclose(losses(x * gain, 1e-13), losses(x, 1e-13), rtol=1e-3, atol=1e-7)
    # Standardised, at any ridge.
    for criterion in (di.score, fdr.score, dfdr.score, greedy.score):
        np.testing.assert_allclose(
            criterion(group(5), observed(seen(x * gain, y)), whole(5)),
            criterion(group(5), observed(seen(x, y)), whole(5)),
            rtol=1e-6,
            atol=1e-9,
        )


def test_a_constant_channel_is_worth_nothing_whatever_its_rounding(seed: int) -> None:
    x, y = drawn(seed, 4)
    labels = torch.from_numpy(y).float()
    for constant in np.random.default_rng(seed).uniform(0.1, 10, 40):
        features = torch.from_numpy(x).float()
        features[:, 2] = float(constant)
        # About zero: the scatter of the constant is what float32 products leave, of either sign.
        m = Moments.of(features, labels, shift=np.zeros(4))
        one = di.solve(m, LABELS, di.EPS, standardise=True)
        assert np.isfinite(one.inverse).all()
        assert not one.readout[2].any()


# ---- diloss: the paper's score ----


@settings(max_examples=25)
@given(seed=st.integers(0, 2**31), c=st.integers(1, 7))
def test_diloss_is_the_derivative_of_di_by_the_channels_scale(seed: int, c: int) -> None:
    x, y = drawn(seed, c)
    rho = di.solve(moments(x, y), LABELS, diloss.EPS).rho
    a = x - x.mean(0)
    assert rho == pytest.approx(float((a**2).sum() / c))  # relative: tr(S) / C
    got = diloss.score(group(c), observed(seen(x, y)), whole(c))
    for i in range(c):
        up, down = np.ones(c), np.ones(c)
        up[i], down[i] = 1 + 1e-5, 1 - 1e-5
        slope = refitted(x * up, y, rho, range(c), standardise=False) - refitted(
            x * down, y, rho, range(c), standardise=False
        )
        assert got[i] == pytest.approx(slope / 2e-5 / energy(y), rel=1e-5, abs=1e-9)


def test_diloss_of_one_channel_by_hand() -> None:
    """Two classes of two, x = -1, -1, 1, 1: S = S_B = 4, rho = 4, G = P X Y^T, so 2 * 4 * (1/8)^2 * 4 = 1/2 of 1."""
    x = np.array([[-1.0], [-1], [1], [1]])
    y = np.eye(2)[[0, 0, 1, 1]]
    o = observed(seen(x, y), teacher=Teacher("labels", 2))
    assert diloss.score(group(1), o, whole(1))[0] == pytest.approx(0.5, abs=1e-12)


# ---- fdr, dfdr ----


def within_and_whole(x: Array, y: Array) -> tuple[Array, Array]:
    """S_W and S by their definitions, of channels of unit scatter."""
    a = x - x.mean(0)
    a = a / np.sqrt((a**2).sum(0))
    inside = a - (y @ (y.T @ a / np.maximum(y.sum(0), 1)[:, None]))
    return inside.T @ inside, a.T @ a


@settings(max_examples=25)
@given(seed=st.integers(0, 2**31), c=st.integers(1, 8))
def test_fdr_is_between_over_within_of_each_channel_alone(seed: int, c: int) -> None:
    x, y = drawn(seed, c)
    s_w, s = within_and_whole(x, y)
    want = (np.diag(s) - np.diag(s_w)) / (np.diag(s_w) + di.EPS)
    np.testing.assert_allclose(fdr.score(group(c), observed(seen(x, y)), whole(c)), want, rtol=1e-8, atol=1e-12)


def test_fdr_of_two_classes_by_hand() -> None:
    """Classes of two, means -2 and 2 (or 1 and 1), variances 1: S_B = 2 * 2 / 4 * 4^2 = 16 and S_W = 4, of S = 20."""
    x = np.array([[-3.0, 0], [-1, 2], [1, 3], [3, -1]])
    o = observed(seen(x, np.eye(2)[[0, 0, 1, 1]]), teacher=Teacher("labels", 2))
    got = fdr.score(group(2), o, whole(2))
    # The second: means 1 and 1, so nothing between.
    np.testing.assert_allclose(got, [(16 / 20) / (4 / 20 + di.EPS), 0], atol=1e-12)


@settings(max_examples=25)
@given(seed=st.integers(0, 2**31), c=st.integers(2, 8))
def test_dfdr_is_the_loss_of_the_determinants_ratio(seed: int, c: int) -> None:
    x, y = drawn(seed, c)
    s_w, s = within_and_whole(x, y)

    def value(channels: Sequence[int]) -> float:
        pick, ridge = np.ix_(channels, channels), di.EPS * np.eye(len(channels))
        return float(np.linalg.slogdet(s[pick] + ridge)[1] - np.linalg.slogdet(s_w[pick] + ridge)[1])

    want = [value(range(c)) - value([j for j in range(c) if j != i]) for i in range(c)]
    got = dfdr.score(group(c), observed(seen(x, y)), whole(c))
    np.testing.assert_allclose(got, want, rtol=1e-7, atol=1e-9)
    assert (got >= 0).all()


def test_dfdr_of_one_channel_is_log_of_one_more_than_fdr(seed: int) -> None:
    x, y = drawn(seed, 1)
    o = observed(seen(x, y))
    got = dfdr.score(group(1), o, whole(1))
    np.testing.assert_allclose(got, np.log1p(fdr.score(group(1), o, whole(1))), rtol=1e-9)


@pytest.mark.parametrize("criterion", [fdr.score, dfdr.score])
def test_without_classes_there_is_no_fishers_ratio(criterion: Criterion) -> None:
    x, y = drawn(0, 3)
    with pytest.raises(UsageError, match="compares classes and the teacher has none"):
        criterion(group(3), observed(seen(x, y), teacher=Teacher("logits", 4)), whole(3))
