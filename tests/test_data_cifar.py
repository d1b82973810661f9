"""calibration/cifar: the binary files, their archive, and what is refused."""

from __future__ import annotations

import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from splits import assert_no_image_is_in_two_splits, everything, hashes, nothing_cached

from xedge.calibration import cifar
from xedge.data import check
from xedge.errors import UsageError

__all__ = ["nothing_cached"]


def cifar_folder(at: Path, name: str, n: int = 20) -> cifar.Version:
    version = cifar.VERSIONS[name]
    (at / version.folder).mkdir(parents=True)
    rng = np.random.default_rng(1)
    for file in (*version.train, *version.val):
        rows = rng.integers(0, 256, (n, version.label_bytes + 3072), dtype=np.uint8)
        rows[:, : version.label_bytes] = 0
        rows[:, 0] = np.arange(n) % version.classes // 5  # CIFAR-100's superclass; CIFAR-10 has no such byte
        rows[:, version.label_bytes - 1] = np.arange(n) % version.classes
        (at / version.folder / file).write_bytes(rows.tobytes())
    return version


@pytest.mark.parametrize("name", cifar.NAMES)
def test_cifar_from_its_folder_and_from_its_archive(tmp_path: Path, name: str) -> None:
    version = cifar_folder(tmp_path / "a", name, 200)
    one = check(cifar.load(None, {"name": name}, root=tmp_path / "a", seed=0))
    assert one.shape == (3, 32, 32)
    assert one.classes == version.classes
    assert len(one.train) + len(one.select) == 200 * len(version.train)
    assert_no_image_is_in_two_splits(one)
    assert one.superclasses == (tuple(i // 5 for i in range(100)) if name == "cifar100" else ())
    per_class = everything(one.val)[1].bincount(minlength=version.classes)  # the fine label, not the coarse one
    assert per_class.tolist() == [200 // version.classes] * version.classes
    with tarfile.open(tmp_path / version.archive, "w:gz") as archive:
        archive.add(tmp_path / "a" / version.folder, version.folder)
    before = sorted(tmp_path.iterdir())
    two = cifar.load(str(tmp_path / version.archive), {"name": name}, root=None, seed=0)
    assert hashes(one.train) == hashes(two.train)
    assert sorted(tmp_path.iterdir()) == before  # nothing was unpacked
    # red, green and blue planes, in that order
    record = (tmp_path / "a" / version.folder / version.val[0]).read_bytes()[version.label_bytes :]
    x = everything(one.val)[0][0]
    for c in range(3):
        value = float(x[c, 0, 1]) * version.std[c] + version.mean[c]
        assert round(value * 255) == record[1024 * c + 1]


def test_cifar_refuses_pickles_and_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "p" / "cifar-10-batches-py"
    python.mkdir(parents=True)
    (python / "data_batch_1").write_bytes(pickle.dumps({}))
    for given_path, root in ((None, tmp_path / "p"), (str(python), None)):
        with pytest.raises(UsageError, match="never unpickles"):
            cifar.load(given_path, {"name": "cifar10"}, root=root, seed=0)
    version = cifar_folder(tmp_path / "b", "cifar10")
    victim = tmp_path / "b" / version.folder / "data_batch_3.bin"
    good = victim.read_bytes()
    for content, message in (
        (good[:-1], "whole number of records"),
        (b"", "whole number"),
        (b"\xff" + good[1:], "label"),
    ):
        victim.write_bytes(content)
        with pytest.raises(UsageError, match=message) as caught:
            cifar.load(None, {"name": "cifar10"}, root=tmp_path / "b", seed=0)
        assert victim.name in str(caught.value)
    victim.unlink()
    with pytest.raises(UsageError, match="cannot be read"):
        cifar.load(None, {}, root=tmp_path / "b", seed=0)
    (tmp_path / version.archive).write_bytes(b"not a tar")
    with pytest.raises(UsageError, match="cannot be read"):
        cifar.load(str(tmp_path), {}, root=None, seed=0)
    with pytest.raises(UsageError, match="did you mean"):
        cifar.load(None, {"name": "cifar11"}, root=None, seed=0)
    monkeypatch.setattr(cifar, "URL", (tmp_path / "nowhere").as_uri() + "/")
    with pytest.raises(UsageError, match="cannot be downloaded"):
        cifar.load(None, {"name": "cifar100"}, root=tmp_path / "fresh", seed=0)
