"""Criteria against what they claim to be: refits, derivatives, and cases worked by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from xedge import load
from xedge.channels import ChannelGroup
from xedge.criteria import (
    Criterion,
    bn_scale,
    dfdr,
    di,
    diloss,
    fback,
    fdr,
    fpgm,
    greedy,
    magnitude,
    output,
    random,
    taylor,
)
from xedge.errors import UsageError
from xedge.moments import Moments
from xedge.observe import Observed, Seen, Tap
from xedge.teacher import Teacher

Array = NDArray[np.float64]
LABELS = Teacher("labels", 4)


def moments(x: Array, y: Array) -> Moments:
    return Moments.of(torch.from_numpy(x), torch.from_numpy(y))


def drawn(seed: int, c: int, n: int = 60) -> tuple[Array, Array]:
    """Correlated features [n, c] of very unlike scales that know something of unequal classes, and one-hot labels."""
    r = np.random.default_rng(seed)
    labels = r.choice(4, n, p=[0.5, 0.3, 0.15, 0.05])
    x = r.normal(size=(4, c))[labels] + 2 * r.normal(size=(n, c)) @ r.normal(size=(c, c)) / np.sqrt(c)
    return x * r.lognormal(0, 1.5, c) + 5 * r.normal(size=c), np.eye(4)[labels]


def seen(x: Array, y: Array, name: str = "tap", groups: Mapping[str, int] | None = None, **facts: Array) -> Seen:
    """A tap that sees x [N, C]; its pixels are the same samples."""
    c = x.shape[1]
    at, blocks = 0, {}
    for group, size in (groups or {"g": c}).items():
        blocks[group] = np.arange(at, at + size)[:, None]
        at += size
    return Seen(
        tap=Tap(name, blocks),
        pooled=moments(x, y),
        pixels=moments(x, np.zeros((len(x), 0))),
        taylor=facts.get("taylor", np.zeros(c)),
        weight=facts.get("weight", np.zeros((1, c, 1, 1))),
        fisher=facts.get("fisher", np.ones(len(facts["weight"]) if "weight" in facts else 1)),
    )


def observed(
    *taps: Seen,
    teacher: Teacher = LABELS,
    producers: Sequence[Array] = (),
    norms: Sequence[Array] = (),
    seed: int = 0,
) -> Observed:
    return Observed({s.tap.layer: s for s in taps}, teacher, 60, seed, {"g": list(producers)}, {"g": list(norms)})


def group(size: int, name: str = "g") -> ChannelGroup:
    return ChannelGroup(name, size, ())


def whole(size: int) -> NDArray[np.bool_]:
    return np.ones(size, bool)


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


def energy(y: Array) -> float:
    return float((y.sum(0) > 0).sum() - 1)


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


# ---- greedy ----


def successive(taps: Sequence[tuple[Array, Array]], rhos: Sequence[float]) -> tuple[list[int], list[float]]:
    """Greedy elimination by refitting everything at every step: P from S, and the trained energy c^T P c, anew."""
    left = list(range(len(taps[0][0])))

    def value(channels: list[int]) -> float:
        total = 0.0
        for (s, c), rho in zip(taps, rhos, strict=True):
            sub = s[np.ix_(channels, channels)] + rho * np.eye(len(channels))
            total += float(np.sum(c[channels] * np.linalg.solve(sub, c[channels]))) if channels else 0.0
        return total

    order, costs = [], []
    while left:
        before = value(left)
        loss = [before - value([j for j in left if j != i]) for i in left]
        best = int(np.argmin(loss))
        costs.append(loss[best])
        order.append(left.pop(best))
    return order, costs


@pytest.mark.parametrize("block", [1, 3, 64])
@pytest.mark.parametrize(("size", "taps"), [(1, 1), (7, 1), (9, 3), (24, 2)])
def test_elimination_is_successive_refits(
    monkeypatch: pytest.MonkeyPatch, seed: int, size: int, taps: int, block: int
) -> None:
    monkeypatch.setattr(greedy, "BLOCK", block)
    r = np.random.default_rng(seed)
    problems, rhos, inverses, readouts = [], [], [], []
    for t in range(taps):
        x = r.normal(size=(40, size)) @ r.normal(size=(size, size))
        s, c, rho = x.T @ x, x.T @ r.normal(size=(40, 3 + t)), 0.5 + t
        problems.append((s, c))
        rhos.append(rho)
        inverses.append(np.linalg.inv(s + rho * np.eye(size)))
        readouts.append(inverses[-1] @ c)
    given_p, given_g = [p.copy() for p in inverses], [g.copy() for g in readouts]
    order, costs = greedy.eliminate(inverses, [g @ g.T for g in readouts])
    want_order, want_costs = successive(problems, rhos)
    assert order.tolist() == want_order
    np.testing.assert_allclose(costs, want_costs, rtol=1e-7, atol=1e-9)
    total = sum(float(np.sum(c * g)) for (_, c), g in zip(problems, readouts, strict=True))
    assert costs.sum() == pytest.approx(total)  # all of DI is spent in the end
    for before, after in zip([*given_p, *given_g], [*inverses, *readouts], strict=True):
        np.testing.assert_array_equal(before, after)


def plainly(inverses: Sequence[Array], readouts: Sequence[Array]) -> tuple[list[int], list[float]]:
    """The docstring's two lines at every step, on whole matrices."""
    ps, gs = [p.copy() for p in inverses], [g.copy() for g in readouts]
    left, order, costs = list(range(len(ps[0]))), [], []
    while left:
        loss = np.sum([(g**2).sum(1) / np.diag(p) for p, g in zip(ps, gs, strict=True)], axis=0)
        i = int(loss.argmin())
        costs.append(float(loss[i]))
        order.append(left.pop(i))
        gs = [np.delete(g - np.outer(p[:, i], g[i]) / p[i, i], i, 0) for p, g in zip(ps, gs, strict=True)]
        ps = [np.delete(np.delete(p - np.outer(p[:, i], p[i]) / p[i, i], i, 0), i, 1) for p in ps]
    return order, costs


@pytest.mark.parametrize("size", [63, 64, 65, 150])
def test_blocks_of_removals_are_the_plain_downdates(seed: int, size: int) -> None:
    """Over several blocks, with two taps and channels that are nearly copies."""
    r = np.random.default_rng(seed)
    inverses, readouts = [], []
    for outputs in (10, 200):
        x = r.normal(size=(size, size // 2)) @ r.normal(size=(size // 2, 3 * size)) + 0.1 * r.normal(
            size=(size, 3 * size)
        )
        s = np.corrcoef(x)
        inverses.append(np.linalg.inv(s + 1e-3 * np.eye(size)))
        readouts.append(inverses[-1] @ s @ r.normal(size=(size, outputs)) / np.sqrt(size * outputs))
    order, costs = greedy.eliminate(inverses, [g @ g.T for g in readouts])
    want_order, want_costs = plainly(inverses, readouts)
    assert order.tolist() == want_order
    np.testing.assert_allclose(costs, want_costs, rtol=1e-9, atol=1e-9 * max(want_costs))


def test_greedy_score_sorts_into_the_order_of_removal(seed: int) -> None:
    x, y = drawn(seed, 9)
    got = greedy.score(group(9), observed(seen(x, y)), whole(9))
    a = x - x.mean(0)
    a /= np.sqrt((a**2).sum(0))
    taught = y / np.sqrt(np.maximum(y.sum(0), 1))
    order, costs = successive([(a.T @ a, a.T @ (taught - taught.mean(0)))], [greedy.EPS])
    assert np.argsort(got, kind="stable").tolist() == order
    np.testing.assert_allclose(got[order], np.maximum.accumulate(costs) / energy(y), rtol=1e-6)


def test_of_a_duplicated_channel_greedy_keeps_one_and_one_shot_drops_both(seed: int) -> None:
    r = np.random.default_rng(seed)
    labels = np.repeat(np.arange(4), 50)
    means = np.array([[3.0, 0, 0.4], [-3, 0, 0.4], [0, 1.2, -0.4], [0, -1.2, -0.4]])
    x = means[labels] + r.normal(size=(200, 3)) * 0.5
    x = np.concatenate([x, x[:, :1]], 1)  # channel 3 is channel 0, the best one
    o = observed(seen(x, np.eye(4)[labels]))
    one_shot = np.argsort(di.score(group(4), o, whole(4)))
    assert set(one_shot[:2].tolist()) == {0, 3}
    in_turn = np.argsort(greedy.score(group(4), o, whole(4)))
    assert set(in_turn[:2].tolist()) != {0, 3}
    assert len({0, 3} & set(in_turn[:2].tolist())) == 1
    assert int(in_turn[-1]) in (0, 3)


def test_scores_of_taps_add_up(seed: int) -> None:
    """Also where a tap has another group's channels in front."""
    x1, y = drawn(seed, 4)
    r = np.random.default_rng(seed)
    x2 = x1[:, 1:] ** 2 + r.normal(size=(60, 3))
    facts = {"taylor": r.random(4), "weight": r.normal(size=(5, 4, 1, 9)), "fisher": r.random(5)}
    first = seen(x1, y, "a", {"other": 1, "g": 3}, **facts)
    second = seen(x2, y, "b", None, taylor=r.random(3))
    alone = seen(x1[:, 1:], y, "a", None, taylor=facts["taylor"][1:])
    for criterion in (fdr.score, dfdr.score, di.score, diloss.score, taylor.score):
        both = criterion(group(3), observed(first, second), whole(3))
        parts = [criterion(group(3), observed(s), whole(3)) for s in (alone, second)]
        np.testing.assert_allclose(both, parts[0] + parts[1], rtol=1e-10)
    # The summed losses decide the greedy's every step; a tap that counts twice changes nothing but the unit.
    twice = greedy.score(group(3), observed(alone, seen(x1[:, 1:], y, "again")), whole(3))
    np.testing.assert_allclose(twice, 2 * greedy.score(group(3), observed(alone), whole(3)), rtol=1e-9)


# ---- fback ----


def test_fback_is_the_loss_of_the_refitted_response(seed: int) -> None:
    """Teacher: the consumer's response of each output and kernel tap, times the root of its Fisher information.

    Costs of the greedy are the rises of min |Y - B X|^2 / N + rho |B|^2, by least squares on the data.
    """
    r = np.random.default_rng(seed)
    c, n = 4, 50
    x = r.normal(size=(n, c)) @ r.normal(size=(c, c)) + 3
    w, fisher = r.normal(size=(3, c, 1, 2)), np.array([0.5, 2.0, 7.0])
    got = fback.score(group(c), observed(seen(x, np.eye(4)[r.integers(4, size=n)], weight=w, fisher=fisher)), whole(c))
    a = (x - x.mean(0)).T / np.sqrt(n)
    teacher = (np.sqrt(fisher)[:, None, None] * w[:, :, 0]).transpose(0, 2, 1).reshape(6, c) @ a
    rho = fback.EPS * float(np.trace(a @ a.T)) / c

    def error(channels: list[int]) -> float:
        if not channels:
            return float(np.sum(teacher**2))
        left = np.concatenate([a[channels], np.sqrt(rho) * np.eye(len(channels))], 1).T
        right = np.concatenate([teacher, np.zeros((6, len(channels)))], 1).T
        b = np.linalg.lstsq(left, right, rcond=None)[0]
        return float(np.sum((right - left @ b) ** 2))

    left, costs = list(range(c)), []
    order = []
    while left:
        rises = [error([j for j in left if j != i]) - error(left) for i in left]
        costs.append(min(rises))
        order.append(left.pop(int(np.argmin(rises))))
    assert np.argsort(got).tolist() == order
    np.testing.assert_allclose(got[order], np.maximum.accumulate(costs), rtol=1e-6)


def test_fback_by_hand() -> None:
    """Uncorrelated channels, so that nothing can be refitted: F w^2 var, up to the ridge."""
    x = np.array([[1.0, 2], [1, -2], [-1, 2], [-1, -2]])
    o = observed(
        seen(x, np.eye(4), weight=np.array([[3.0, 1.0], [0.0, 2.0]])[:, :, None, None], fisher=np.array([5.0, 0.5]))
    )
    got = fback.score(group(2), o, whole(2))
    # 5 * 3^2 * 1 = 45 and (5 * 1 + .5 * 4) * 4 = 28
    np.testing.assert_allclose(got, [45, 28], rtol=0.01)


def test_a_copied_channel_costs_the_response_nothing_once(seed: int) -> None:
    r = np.random.default_rng(seed)
    x = r.normal(size=(50, 2))
    x = np.concatenate([x, x[:, :1]], 1)
    o = observed(seen(x, np.eye(4)[r.integers(4, size=50)], weight=np.ones((1, 3, 1, 1))))
    first, *rest = np.sort(fback.score(group(3), o, whole(3)))
    assert first < 0.01 * min(rest)


# ---- the plain ones ----


def test_taylor_and_magnitude_by_hand() -> None:
    x, y = drawn(0, 3)
    facts = seen(x, y, taylor=np.array([1.0, 4, 9]))
    np.testing.assert_array_equal(taylor.score(group(3), observed(facts), whole(3)), [1, 4, 9])
    one = np.array([[1.0, -1], [0, -6], [2, 2]])  # L1 norms 2, 6, 4; mean 4
    two = np.array([[3.0], [0], [0]])  # 3, 0, 0; mean 1
    o = observed(facts, producers=[one, two])
    np.testing.assert_allclose(magnitude.score(group(3), o, whole(3)), [(0.5 + 3) / 2, 0.75, 0.5])
    np.testing.assert_array_equal(magnitude.score(group(3), observed(facts), whole(3)), np.ones(3))
    np.testing.assert_array_equal(
        magnitude.score(group(3), observed(facts, producers=[np.zeros((3, 2))]), whole(3)), np.zeros(3)
    )


def test_output_is_the_share_of_the_response_that_is_lost() -> None:
    """As fback's case by hand with F = 1: 9 * 1 and (1 + 4) * 4, of their sum; in another unit, the same."""
    x = np.array([[1.0, 2], [1, -2], [-1, 2], [-1, -2]])
    w = np.array([[3.0, 1.0], [0.0, 2.0]])[:, :, None, None]
    for unit in (1.0, 1e3):
        got = output.score(
            group(2), observed(seen(unit * x, np.eye(4), weight=w, fisher=np.array([5.0, 0.5]))), whole(2)
        )
        np.testing.assert_allclose(got, [9 / 29, 20 / 29], rtol=0.01)


def test_scale_of_the_batch_norms_by_hand() -> None:
    x, y = drawn(0, 3)
    o = observed(seen(x, y), norms=[np.array([1.0, 4, 2]), np.array([3.0, 0, 2])])
    np.testing.assert_array_equal(bn_scale.score(group(3), o, whole(3)), [2, 2, 2])
    with pytest.raises(UsageError, match=r"^g: bn-scale needs a batch norm.*--exclude '\^g\$'"):
        bn_scale.score(group(3), observed(seen(x, y)), whole(3))


def test_distances_from_the_other_filters_by_hand() -> None:
    """Filters at 0, 3 and 4 on a line: sums 7, 4, 5, mean 16 / 3. The middle one is the geometric median."""
    x, y = drawn(0, 3)
    line = np.array([[0.0, 0], [3, 0], [4, 0]])
    got = fpgm.score(group(3), observed(seen(x, y), producers=[line]), whole(3))
    np.testing.assert_allclose(got, np.array([7, 4, 5]) * 3 / 16)
    # Not the norm: moved away from zero, scaled and turned, the same.
    turn = np.array([[0.6, -0.8], [0.8, 0.6]])
    two = fpgm.score(group(3), observed(seen(x, y), producers=[line, 5 + 7 * line @ turn]), whole(3))
    np.testing.assert_allclose(two, got)
    copies = np.array([[0.1, 0.7], [0.1, 0.7], [0.1, 0.7]])
    np.testing.assert_array_equal(fpgm.score(group(3), observed(seen(x, y), producers=[copies]), whole(3)), np.zeros(3))
    np.testing.assert_array_equal(fpgm.score(group(3), observed(seen(x, y)), whole(3)), np.ones(3))


def test_random_repeats_itself_and_differs_by_group_and_seed() -> None:
    x, y = drawn(0, 3)

    def draws(name: str, seed: int) -> list[float]:
        return random.score(group(50, name), observed(seen(x, y), seed=seed), whole(50)).tolist()

    assert draws("g", 1) == draws("g", 1)
    assert draws("g", 1) != draws("g", 2)
    assert draws("g", 1) != draws("h", 1)
    assert all(0 < v < 1 for v in draws("g", 1))


# ---- what all share ----

EVERY: tuple[tuple[str, Criterion], ...] = (
    ("fdr", fdr.score), ("dfdr", dfdr.score), ("di", di.score), ("diloss", diloss.score), ("greedy", greedy.score),
    ("fback", fback.score), ("output", output.score), ("taylor", taylor.score), ("magnitude", magnitude.score),
    ("bn-scale", bn_scale.score), ("fpgm", fpgm.score), ("random", random.score),
)  # fmt: skip


@pytest.mark.parametrize(("name", "criterion"), EVERY)
def test_a_channel_that_is_gone_scores_nothing_and_the_others_as_if_it_had_never_been(
    seed: int, name: str, criterion: Criterion
) -> None:
    x, y = drawn(seed, 5)
    r = np.random.default_rng(seed)
    w, t, p, b = r.normal(size=(3, 5, 1, 1)), r.random(5), r.normal(size=(5, 6)), r.random(5)
    keep = np.array([True, False, True, True, False])
    got = criterion(group(5), observed(seen(x, y, weight=w, taylor=t), producers=[p], norms=[b]), keep)
    assert got.shape == (5,)
    assert got.dtype == np.float64
    assert not got[~keep].any()
    assert (got[keep] > 0).all()
    if name not in ("random", "magnitude"):  # whose unit is drawn from, or averaged over, the whole group
        small = seen(x[:, keep], y, weight=w[:, keep], taylor=t[keep])
        o = observed(small, producers=[p[keep]], norms=[b[keep]])
        np.testing.assert_allclose(got[keep], criterion(group(3), o, whole(3)), rtol=1e-9)


@pytest.mark.parametrize("criterion", [c for name, c in EVERY if name != "random"])
def test_order_of_the_channels_does_not_matter(seed: int, criterion: Criterion) -> None:
    x, y = drawn(seed, 6)
    r = np.random.default_rng(seed)
    w, t, p, b = r.normal(size=(3, 6, 1, 1)), r.random(6), r.normal(size=(6, 6)), r.random(6)
    order = r.permutation(6)
    straight = criterion(group(6), observed(seen(x, y, weight=w, taylor=t), producers=[p], norms=[b]), whole(6))
    other = seen(x[:, order], y, weight=w[:, order], taylor=t[order])
    turned = observed(other, producers=[p[order]], norms=[b[order]])
    np.testing.assert_allclose(criterion(group(6), turned, whole(6)), straight[order], rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("criterion", [c for name, c in EVERY[:7]])
def test_dead_channels_are_finite_and_least(seed: int, criterion: Criterion) -> None:
    x, y = drawn(seed, 5)
    x[:, 3] = 0
    got = criterion(group(5), observed(seen(x, y, weight=np.ones((2, 5, 1, 1)))), whole(5))
    assert np.isfinite(got).all()
    assert got[3] == pytest.approx(0, abs=1e-12)
    assert got.argmin() == 3
    x[:] = 1.0
    assert np.isfinite(criterion(group(5), observed(seen(x, y, weight=np.ones((2, 5, 1, 1)))), whole(5))).all()


@pytest.mark.parametrize(("name", "criterion"), EVERY)
def test_criteria_are_found_by_name(name: str, criterion: Criterion) -> None:
    assert load.load_criterion(name) is criterion
