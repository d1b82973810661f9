"""calibration/digits: its splits, its labels, its options."""

from __future__ import annotations

import pytest
import torch
from splits import SPLITS, assert_no_image_is_in_two_splits, everything, hashes, nothing_cached

from xedge.calibration import digits
from xedge.data import check
from xedge.errors import UsageError

__all__ = ["nothing_cached"]


def test_digits_are_split_without_a_leak() -> None:
    data = check(digits.load(None, {}, root=None, seed=0))
    assert [len(getattr(data, s)) for s in SPLITS] == [1294, 144, 359]
    assert data.shape == (1, 28, 28)
    assert_no_image_is_in_two_splits(data)  # the source has no duplicates
    for name in SPLITS:
        counts = everything(getattr(data, name))[1].bincount(minlength=10)
        share = counts / len(getattr(data, name)) * 1797  # scikit-learn has 174 to 183 of each
        assert bool(((share > 160) & (share < 197)).all())
    x = torch.cat([everything(data.train)[0], everything(data.select)[0]])
    assert float(x.mean()) == pytest.approx(0.0, abs=1e-3)
    assert float(x.std()) == pytest.approx(1.0, abs=1e-3)
    other = digits.load(None, {}, root=None, seed=1)
    assert hashes(other.val) == hashes(data.val)  # so that seeds compare
    assert set(hashes(other.select)) != set(hashes(data.select))
    assert hashes(digits.load(None, {}, root=None, seed=1).train) == hashes(other.train)


def test_digits_are_readable_by_someone_elses_classifier() -> None:
    """Labels belong to their pictures: nearest neighbour on the shrunken pictures is known to give about 98 %."""
    data = digits.load(None, {}, root=None, seed=0)
    (x, y), (xv, yv) = everything(data.train), everything(data.val)
    nearest = torch.cdist(xv.flatten(1), x.flatten(1)).argmin(1)
    assert float((y[nearest] == yv).float().mean()) > 0.96


def test_digits_options() -> None:
    data = digits.load(None, {"limit": "100", "select": "0.2"}, root=None, seed=0)
    assert [len(getattr(data, s)) for s in SPLITS] == [80, 20, 100]
    with pytest.raises(UsageError, match="takes no path"):
        digits.load("x", {}, root=None, seed=0)
    with pytest.raises(UsageError, match="did you mean limit"):
        digits.load(None, {"limits": "3"}, root=None, seed=0)
