"""Greedy elimination, by DI and by the response (fback), against refits at every step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from observations import Array, drawn, energy, group, observed, seen, whole

from xedge.criteria import di, fback, greedy

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
