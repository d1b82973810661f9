"""Discriminant components: eigenvectors of P S_B, whose values add up to DI and are no more than the classes allow."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import nn

from xedge.criteria.di import EPS, scatters, solve
from xedge.dca import components, explained
from xedge.groups import find_groups
from xedge.iterate import information
from xedge.models.srresnet import x_srresnet
from xedge.moments import Moments
from xedge.observe import observe
from xedge.teacher import Teacher

Array = NDArray[np.float64]


def drawn(seed: int, c: int, classes: int = 4, n: int = 80) -> tuple[Moments, Array, NDArray[np.int64]]:
    r = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), r.integers(classes, size=n - classes)])
    x = r.normal(size=(classes, c))[labels] + r.normal(size=(n, c)) @ r.normal(size=(c, c))
    return Moments.of(torch.from_numpy(x), torch.from_numpy(np.eye(classes)[labels])), x, labels


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**31), c=st.integers(1, 9), standardise=st.booleans(), eps=st.sampled_from([1e-3, 0.1, 1.0])
)
def test_components_are_eigenvectors_and_their_values_add_up_to_di(
    seed: int, c: int, standardise: bool, eps: float
) -> None:
    moments, _, _ = drawn(seed, c)
    teacher = Teacher("labels", 4)
    one = solve(moments, teacher, eps, standardise=standardise)
    got = components(moments, teacher, eps, standardise=standardise)
    s, cross = scatters(moments, teacher, standardise=standardise)
    s_b = cross @ cross.T
    np.testing.assert_allclose(one.inverse @ s_b @ got.vectors, got.vectors * got.values, atol=1e-8)
    k = len(got.values)
    np.testing.assert_allclose(got.vectors.T @ (s + one.rho * np.eye(c)) @ got.vectors, np.eye(k), atol=1e-8)
    assert got.values.sum() == pytest.approx(one.di, abs=1e-10)
    assert (np.diff(got.values) <= 1e-12).all()
    assert (got.values <= 1 + 1e-12).all()  # a direction can at most be the class


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_labels_leave_one_component_less_than_there_are_classes(seed: int, classes: int) -> None:
    moments, _, _ = drawn(seed, 8, classes)
    values = components(moments, Teacher("labels", classes), EPS).values
    assert (values[: classes - 1] > 1e-3).all()
    np.testing.assert_allclose(values[classes - 1 :], 0, atol=1e-12)


def test_subspace_is_that_of_linear_discriminant_analysis(seed: int) -> None:
    """scikit-learn's LDA maximises between over within scatter; without a ridge these are the same directions."""
    moments, x, labels = drawn(seed, 6)
    lda = LinearDiscriminantAnalysis(solver="eigen").fit(x, labels)
    got = components(moments, Teacher("labels", 4), 1e-12)
    for k in range(3):
        a, b = got.vectors[:, k], lda.scalings_[:, k]
        assert abs(a @ b) / np.linalg.norm(a) / np.linalg.norm(b) == pytest.approx(1, abs=1e-6)
    ratio = got.values[:3] / (1 - got.values[:3])  # of total scatter to of within scatter
    np.testing.assert_allclose(ratio / ratio.sum(), lda.explained_variance_ratio_[:3], rtol=1e-6)


def test_a_dead_layer_has_nothing_to_explain() -> None:
    moments = Moments.of(torch.ones(12, 3, dtype=torch.float64), torch.eye(4, dtype=torch.float64).repeat(3, 1))
    np.testing.assert_array_equal(components(moments, Teacher("labels", 4), EPS, standardise=True).values, np.zeros(3))


def test_curves_of_a_model_end_at_the_information_of_all_channels(seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(80, 4)
    ).eval()
    groups = find_groups(model, torch.zeros(1, 3, 8, 8))
    x, y = torch.randn(64, 3, 8, 8), torch.arange(64) % 4
    seen = observe(model, groups, [(x, y)], Teacher("labels", 4), gradients=False)
    curves, di = explained(seen, groups), information(seen, groups)
    assert list(curves) == list(di) == ["0", "2"]
    for name, curve in curves.items():
        assert (np.diff(curve) >= 0).all()
        assert curve[-1] == pytest.approx(di[name], abs=1e-9)
        assert curve[2] == pytest.approx(curve[-1], abs=1e-9)  # four classes, three components


def test_a_group_read_at_two_resolutions_has_one_curve() -> None:
    """As in nets that enlarge by nearest neighbours: a pixel of the finer map stands for fewer of the truth's."""
    torch.manual_seed(0)
    model = x_srresnet(2, blocks=1, width=8).eval()
    groups = find_groups(model, torch.zeros(1, 3, 8, 8))
    pairs = [(torch.rand(8, 3, 8, 8), torch.rand(8, 3, 16, 16))]
    seen = observe(model, groups, pairs, Teacher("images", 3, pictures="residual"), gradients=False)
    curves, di = explained(seen, groups), information(seen, groups)
    taps = {g.name: {min(8, len(s.pooled.cross()[0])) for s, _ in seen.of(g)} for g in groups.free}
    assert any(len(lengths) > 1 for lengths in taps.values())
    for name, curve in curves.items():
        assert len(curve) == max(taps[name])
        assert curve[-1] == pytest.approx(di[name], abs=1e-9)
