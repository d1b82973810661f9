"""calibration/mnist and calibration/fashion_mnist: IDX files, whole, damaged, Debian's and not to be had."""

from __future__ import annotations

import gzip
import struct
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from splits import SPLITS, assert_no_image_is_in_two_splits, everything, nothing_cached

from xedge.calibration import fashion_mnist, mnist
from xedge.data import check
from xedge.errors import UsageError

__all__ = ["nothing_cached"]


def idx(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_idx(at: Path, n: int = 40, *, plain: bool = False) -> Path:
    at.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for part in ("train", "t10k"):
        contents = {
            f"{part}-images-idx3-ubyte": rng.integers(0, 256, (n, 28, 28), dtype=np.uint8),
            f"{part}-labels-idx1-ubyte": (np.arange(n) % 10).astype(np.uint8),
        }
        for name, array in contents.items():
            if plain:
                (at / name).write_bytes(idx(array))
            else:
                (at / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
    return at


@pytest.mark.parametrize("module", [mnist, fashion_mnist])
@pytest.mark.parametrize("plain", [False, True])
def test_idx_files_are_read_from_the_users_folder(tmp_path: Path, module: object, plain: bool) -> None:
    root = write_idx(tmp_path / "d", plain=plain)
    load = module.load  # type: ignore[attr-defined]
    for data in (load(str(root), {}, root=None, seed=0), load(None, {}, root=root, seed=0)):
        assert [len(getattr(check(data), s)) for s in SPLITS] == [30, 10, 40]  # at least one of each class
        assert everything(data.select)[1].sort().values.tolist() == list(range(10))
        assert data.source == str(root)
    rng = np.random.default_rng(0)
    stored = rng.integers(0, 256, (40, 28, 28), dtype=np.uint8)
    first = everything(data.train)[0][0] * data.std[0] + data.mean[0]
    assert any(np.allclose(first.numpy()[0] * 255, picture, atol=1e-3) for picture in stored)


packed = partial(gzip.compress, mtime=0)  # a time in it would name the test anew in every worker


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train-images-idx3-ubyte.gz", b"<html>404</html>", "cannot be read"),
        ("train-images-idx3-ubyte.gz", b"", "not an IDX file"),
        ("train-images-idx3-ubyte.gz", packed(b"garbage garbage garbage"), "not an IDX file"),
        ("train-images-idx3-ubyte.gz", packed(idx(np.zeros((4, 28, 28), np.uint8))[:-5]), "is truncated"),
        ("train-images-idx3-ubyte.gz", packed(idx(np.zeros((40, 28, 28), np.uint8)))[:-20], "cannot be read"),
        ("train-images-idx3-ubyte.gz", packed(idx(np.zeros((4, 28, 28), np.uint8)) + b"1"), "is longer"),
        ("train-images-idx3-ubyte.gz", packed(idx(np.zeros((4, 27, 28), np.uint8))), r"\(27, 28\)"),
        ("train-images-idx3-ubyte.gz", packed(b"\0\0\x08\x03" + b"\xff" * 12), "impossible size"),
        ("train-labels-idx1-ubyte.gz", packed(idx(np.zeros(39, np.uint8))), "39 labels for 40"),
        ("t10k-labels-idx1-ubyte.gz", packed(idx(np.full(40, 11, np.uint8))), "label 11 of 10"),
        ("t10k-labels-idx1-ubyte.gz", packed(idx(np.zeros((0,), np.uint8))), "impossible size"),
    ],
)
def test_damaged_idx_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    write_idx(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        fashion_mnist.load(str(tmp_path), {}, root=None, seed=0)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not fashion_mnist.DEBIAN.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_fashion_mnist_of_debian() -> None:
    data = check(fashion_mnist.load(None, {}, root=None, seed=0))
    assert [len(getattr(data, s)) for s in SPLITS] == [54000, 6000, 10000]
    x, y = everything(data.train)
    assert y.bincount().tolist() == [5400] * 10
    assert float(x.mean()) == pytest.approx(0.0, abs=0.01)
    assert float(x.std()) == pytest.approx(1.0, abs=0.01)
    assert_no_image_is_in_two_splits(data)  # the source has no exact duplicates
    with pytest.raises(UsageError, match="the other one of MNIST and Fashion-MNIST"):
        mnist.load(str(fashion_mnist.DEBIAN), {}, root=None, seed=0)


def test_a_download_that_fails_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import FashionMNIST

    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path / "none")
    monkeypatch.setattr(FashionMNIST, "mirrors", [(tmp_path / "nowhere").as_uri() + "/"])
    with pytest.raises(UsageError, match="apt-get install dataset-fashion-mnist"):
        fashion_mnist.load(None, {}, root=tmp_path / "root", seed=0)
    assert not [p for p in (tmp_path / "root").rglob("*") if p.is_file()]
    with pytest.raises(UsageError, match="does not hold the four IDX files"):
        fashion_mnist.load(str(tmp_path), {}, root=None, seed=0)
