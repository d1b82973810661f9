"""calibration/npz: the layouts it reads, and what is wrong with the others."""

from __future__ import annotations

import hashlib
import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from npz_files import X, Y, saved
from splits import SPLITS, assert_no_image_is_in_two_splits, everything, hashes, nothing_cached

from xedge.calibration import npz
from xedge.data import UNLABELLED, check
from xedge.errors import UsageError

__all__ = ["nothing_cached"]


def test_npz_layouts(tmp_path: Path) -> None:
    data = check(npz.load(saved(tmp_path, x=X, y=Y), {}, root=None, seed=0))
    assert (data.classes, data.shape) == (3, (3, 4, 5))
    assert [len(getattr(data, s)) for s in SPLITS] == [21, 3, 6]
    assert_no_image_is_in_two_splits(data)
    assert set(hashes(data.train)) < {hashlib.sha256(row.tobytes()).hexdigest() for row in X}  # untouched

    own = npz.load(saved(tmp_path, x_train=X, y_train=Y, x_test=X[:5] + 1, y_test=Y[:5]), {}, root=None, seed=0)
    assert torch.equal(everything(own.val)[0], torch.from_numpy(X[:5] + 1))
    assert len(own.train) + len(own.select) == 30

    for name in ("input", "x"):
        free = check(npz.load(saved(tmp_path, **{name: X}), {}, root=None, seed=0))
        assert free.classes is None
        assert set(everything(free.val)[1].tolist()) == {UNLABELLED}

    named = npz.load(
        saved(tmp_path, pictures=X, other=X, kind=Y[:, None]), {"x": "pictures", "y": "kind"}, root=None, seed=0
    )
    assert named.classes == 3

    bytes_ = np.arange(30 * 4 * 5 * 3, dtype=np.uint32).astype(np.uint8).reshape(30, 4, 5, 3)
    grey = npz.load(saved(tmp_path, x=bytes_), {"layout": "nhwc", "mean": "0.5", "std": "2"}, root=None, seed=0)
    assert grey.shape == (3, 4, 5)
    first = everything(grey.train)[0][0]
    wanted = (torch.from_numpy(bytes_).permute(0, 3, 1, 2) / 255 - 0.5) / 2
    assert bool((wanted - first).abs().amax((1, 2, 3)).min() < 1e-6)
    flat = npz.load(saved(tmp_path, x=bytes_[..., 0]), {}, root=None, seed=0)
    assert flat.shape == (1, 4, 5)
    assert npz.load("d.npz", {}, root=tmp_path, seed=0).shape == (1, 4, 5)


NAN = X.copy()
NAN[7, 0, 0, 0] = np.nan


@pytest.mark.parametrize(
    ("arrays", "options", "message"),
    [
        ({"x": NAN}, {}, "image 7 holds NaN"),
        ({"x": X.astype(np.float64) * 1e300}, {}, "holds NaN or infinity"),
        ({"x": X.astype(np.int64)}, {}, "int64, neither"),
        ({"x": X.astype(np.complex64)}, {}, "complex64, neither"),
        ({"x": X[0, 0]}, {}, r"not \[N, C, H, W\]"),
        ({"x": X[:0]}, {}, r"not \[N, C, H, W\]"),
        ({"x": X[:2]}, {}, "cannot be split"),
        ({"x": X.transpose(0, 2, 3, 1).repeat(2, 1)}, {}, "layout=nhwc"),
        ({"x": X, "y": Y[:-1]}, {}, "29 labels for 30"),
        ({"x": X, "y": Y.astype(float)}, {}, "not whole numbers"),
        ({"x": X, "y": np.eye(3)[Y]}, {}, "not one-hot"),
        ({"x": X, "y": Y - 1}, {}, "holds -1"),
        ({"x": X, "y": Y}, {"classes": "2"}, "label 2 of 2"),
        ({"x": X, "y": Y * 0}, {}, "one class"),
        ({"x": X, "y": Y}, {"y": "z"}, "no array 'z'"),
        ({"x": X}, {"x": "z"}, "no array 'z'"),
        ({"a": X, "b": X}, {}, "name the array with"),
        ({}, {}, "holds nothing"),
        ({"x_train": X, "x_val": X[..., 1:]}, {}, "unlike"),
        ({"x_train": X, "y_train": Y, "x_val": X}, {}, "only one of the two"),
        ({"x": X}, {"mean": "1,2"}, "3 numbers"),
        ({"x": X}, {"std": "0"}, "3 positive numbers"),
        ({"x": X}, {"shape": "3"}, "unknown option"),
        ({"x": np.array([{"a": 1}], dtype=object)}, {}, "cannot be read"),
    ],
)
def test_npz_errors(tmp_path: Path, arrays: dict[str, np.ndarray], options: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        npz.load(saved(tmp_path, **arrays), options, root=None, seed=0)
    assert "\n" not in str(caught.value)


def test_npz_files_that_are_none(tmp_path: Path) -> None:
    good = Path(saved(tmp_path, x=X)).read_bytes()
    bad = tmp_path / "bad.npz"
    array = io.BytesIO()
    np.save(array, X)
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 0xFF
    cases = {
        b"": "cannot",
        b"text": "cannot",
        good[:-40]: "cannot",
        bytes(flipped): "cannot",
        array.getvalue(): "single",
    }
    cases[pickle.dumps(print)] = "cannot be read"
    for content, message in cases.items():
        bad.write_bytes(content)
        with pytest.raises(UsageError, match=message) as caught:
            npz.load(str(bad), {}, root=None, seed=0)
        assert "bad.npz" in str(caught.value)
    for path in (str(tmp_path / "gone.npz"), str(tmp_path)):
        with pytest.raises(UsageError, match="no such file"):
            npz.load(path, {}, root=None, seed=0)
    with pytest.raises(UsageError, match="write npz:FILE"):
        npz.load(None, {}, root=None, seed=0)
