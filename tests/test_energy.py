"""Structural energy against its definition, by refits and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from xedge.criteria.di import scale, solve
from xedge.criteria.greedy import EPS
from xedge.energy import deleterious, energy, energy_path
from xedge.moments import Moments
from xedge.teacher import Teacher

Array = NDArray[np.float64]
LABELS = Teacher("labels", 3)


def drawn(seed: int, c: int, n: int = 50) -> tuple[Moments, Array, Array]:
    r = np.random.default_rng(seed)
    labels = r.choice(3, n, p=[0.6, 0.3, 0.1])
    x = r.normal(size=(3, c))[labels] + r.normal(size=(n, c)) @ r.normal(size=(c, c))
    y = np.eye(3)[labels]
    return Moments.of(torch.from_numpy(x), torch.from_numpy(y)), x, y


def information(moments: Moments, channels: list[int]) -> float:
    """DI of some channels refitted, relative to the teacher's energy."""
    if not channels:
        return 0.0
    one = solve(moments.select(np.array(channels)), LABELS, EPS, standardise=True)
    return one.di / scale(moments, LABELS)


@settings(max_examples=25)
@given(seed=st.integers(0, 2**31), c=st.integers(1, 9), lam=st.floats(0, 0.3))
def test_path_is_the_energy_of_refits_and_stops_where_it_is_highest(seed: int, c: int, lam: float) -> None:
    first, second = drawn(seed, c)[0], drawn(seed + 1, c)[0]
    path = energy_path([first, second], LABELS, lam)
    assert sorted(path.order.tolist()) == list(range(c))
    for k in range(c + 1):
        left = sorted(path.order[k:].tolist())
        di = information(first, left) + information(second, left)
        assert path.di[k] == pytest.approx(di, abs=1e-9)
        assert path.energy[k] == pytest.approx(di - lam * len(left), abs=1e-9)
        assert path.energy[k] == pytest.approx(energy(path.di[k], lam, len(left)))
    assert path.stop < c
    assert path.energy[path.stop] == path.energy[:c].max()
    assert path.keep.sum() == c - path.stop
    assert not path.keep[path.order[: path.stop]].any()


@settings(max_examples=25)
@given(seed=st.integers(0, 2**31), c=st.integers(2, 9))
def test_a_higher_price_never_keeps_more(seed: int, c: int) -> None:
    moments, _, _ = drawn(seed, c)
    kept = [int(energy_path([moments], LABELS, lam).keep.sum()) for lam in (0.0, 0.01, 0.03, 0.1, 0.3, 2.0)]
    assert kept == sorted(kept, reverse=True)
    assert kept[-1] == 1  # more than all there is to say


def test_channels_that_say_nothing_or_nothing_new_go_first() -> None:
    """Two good channels, a copy of the first, and a dead one; any small price removes just these two."""
    r = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 40)
    good = np.array([[3.0, 0], [-3, 0], [0, 3]])[labels] + r.normal(size=(120, 2))
    x = np.concatenate([good, good[:, :1], np.zeros((120, 1))], 1)
    path = energy_path([Moments.of(torch.from_numpy(x), torch.from_numpy(np.eye(3)[labels]))], LABELS, 0.05)
    assert path.stop == 2
    assert path.order[0] == 3
    assert path.order[1] in (0, 2)
    assert path.di[0] == pytest.approx(path.di[1])


def test_deleterious_by_hand() -> None:
    """Two classes of two. x = -1, -1, 1, 1 scores 1/2 (test_criteria_di); with a channel that differs inside the
    classes only beside it, S = 4 I, the ridge and G of the first are as before and the second's G is 0."""
    x = np.array([[-1.0, 1], [-1, -1], [1, 1], [1, -1]])
    moments = Moments.of(torch.from_numpy(x), torch.from_numpy(np.eye(2)[[0, 0, 1, 1]]))
    one = solve(moments, Teacher("labels", 2), 1.0)
    for lam, want in ((0.0, [False, False]), (0.4, [False, True]), (0.6, [True, True])):
        assert deleterious(one, lam).tolist() == want
