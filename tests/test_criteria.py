"""The plain criteria by hand, and what all criteria share."""

from __future__ import annotations

import numpy as np
import pytest
from observations import drawn, group, observed, seen, whole

from xedge import load
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
