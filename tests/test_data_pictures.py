"""calibration/folder and calibration/imagenet: folders of pictures, with and without classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from npz_files import X, saved
from PIL import Image
from splits import SPLITS, assert_no_image_is_in_two_splits, everything, hashes, nothing_cached

from xedge.calibration import folder, imagenet, npz
from xedge.data import check
from xedge.errors import UsageError

__all__ = ["nothing_cached"]


def picture(at: Path, seed: int, size: tuple[int, int] = (40, 30)) -> Path:
    at.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(at)
    return at


def flat(at: Path, n: int) -> Path:
    for i in range(n):
        picture(at / f"{i:03}.png", i)
    return at


SMALL = {"size": "16"}


def test_a_flat_folder_is_unlabelled_and_split_by_picture(tmp_path: Path) -> None:
    root = flat(tmp_path / "flat", 20)
    (root / "notes.txt").write_text("not a picture")
    (root / ".hidden.png").write_bytes(b"")
    data = check(folder.load(str(root), {**SMALL, "crops": "5"}, root=None, seed=0))
    assert data.classes is None
    assert data.augment is None
    assert [len(getattr(data, s)) for s in SPLITS] == [14 * 5, 2 * 5, 4 * 5]
    names = [set(getattr(data, s).names) for s in SPLITS]
    assert sum(map(len, names)) == len(set.union(*names)) == 20
    assert_no_image_is_in_two_splits(data)
    assert len(set(hashes(data.train))) == 70  # crops of a picture differ
    again = folder.load(str(root), {**SMALL, "crops": "5", "cache": "0"}, root=None, seed=0)
    assert hashes(again.train) == hashes(data.train)
    other = folder.load(str(root), {**SMALL, "crops": "5"}, root=None, seed=1)
    assert set(hashes(other.val)) != set(hashes(data.val))
    moved = (tmp_path / "flat").rename(tmp_path / "moved")
    assert hashes(folder.load("moved", {**SMALL, "crops": "5"}, root=tmp_path, seed=0).val) == hashes(data.val)
    few = folder.load(str(moved), {**SMALL, "limit": "10"}, root=None, seed=0)
    assert [len(getattr(few, s)) for s in SPLITS] == [7, 1, 2]


def test_copies_of_a_picture_never_meet_in_two_splits(tmp_path: Path) -> None:
    root = flat(tmp_path / "copies", 6)
    for i in range(6):
        for j in range(4):
            (root / f"{i:03}-copy{j}.png").write_bytes((root / f"{i:03}.png").read_bytes())
    data = folder.load(str(root), SMALL, root=None, seed=0)
    assert sum(len(getattr(data, s)) for s in SPLITS) == 6
    assert any("24 exact copies" in note for note in data.notes)
    assert_no_image_is_in_two_splits(data)
    arrays = npz.load(saved(tmp_path, x=np.concatenate([X, X, X])), {}, root=None, seed=0)
    assert sum(len(getattr(arrays, s)) for s in SPLITS) == 30
    assert any("60 exact copies" in note for note in arrays.notes)
    assert_no_image_is_in_two_splits(arrays)
    with pytest.raises(UsageError, match="1 different images cannot be split"):
        npz.load(saved(tmp_path, x=np.zeros_like(X)), {}, root=None, seed=0)


def test_preprocessing_is_torchvisions_preset(tmp_path: Path) -> None:
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms._presets import ImageClassification

    root = tmp_path / "f"
    for i, size in enumerate([(60, 41), (33, 90), (300, 200)]):
        picture(root / f"{i}.png", i, size)
    data = folder.load(str(root), {"size": "28", "interpolation": "bicubic"}, root=None, seed=0)
    theirs = ImageClassification(crop_size=28, resize_size=32, interpolation=InterpolationMode.BICUBIC)
    for name in SPLITS:
        part = getattr(data, name)
        torch.testing.assert_close(part[0][0], theirs(Image.open(root / part.names[0])), atol=1e-5, rtol=1e-5)


def test_every_kind_of_picture_becomes_upright_rgb(tmp_path: Path) -> None:
    grey = np.linspace(0, 255, 16 * 24, dtype=np.uint8).reshape(16, 24)
    colour = np.stack([grey, 255 - grey, np.full_like(grey, 7)], 2)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    wide = np.minimum(grey.astype(np.int64) * 257 + 100, 65535).astype(np.uint16)
    Image.fromarray(wide).save(tmp_path / "sixteen.png")
    Image.fromarray(np.dstack([colour, grey])).save(tmp_path / "alpha.png")
    Image.fromarray(colour).quantize(32).save(tmp_path / "palette.png", transparency=bytes(range(32)))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 270 degrees
    Image.fromarray(colour).save(tmp_path / "turned.png", exif=exif)

    def read(name: str) -> np.ndarray:
        decoded = folder.decode(tmp_path / name)
        assert decoded.mode == "RGB"
        return np.asarray(decoded)

    for name in ("grey.png", "sixteen.png"):
        assert np.array_equal(read(name), np.dstack([grey] * 3))
    assert np.array_equal(read("alpha.png"), colour)
    assert read("palette.png").shape == colour.shape
    assert np.array_equal(read("turned.png"), np.rot90(colour, -1))


@pytest.mark.parametrize("kind", ["truncated", "empty", "text", "broken png"])
def test_a_damaged_picture_is_named(tmp_path: Path, kind: str) -> None:
    root = flat(tmp_path, 6)
    victim = root / "003.png"
    good = picture(root / "003.png", 3, (200, 200)).read_bytes()
    broken = bytearray(good)
    broken[5000:9000] = b"\0" * 4000
    victim.write_bytes({"truncated": good[:20000], "empty": b"", "text": b"hello", "broken png": bytes(broken)}[kind])

    def read_all() -> None:
        data = folder.load(str(root), SMALL, root=None, seed=0)
        for name in SPLITS:
            everything(getattr(data, name))

    with pytest.raises(UsageError, match=r"003\.png: cannot be decoded") as caught:
        read_all()
    assert "\n" not in str(caught.value)


def test_class_folders_with_and_without_official_splits(tmp_path: Path) -> None:
    for part, n in (("train", 10), ("val", 3)):
        for c, name in enumerate(("zebra", "ant", "cow")):
            if part == "val" and name == "cow":
                continue  # val need not have every class, and its numbers must not shift
            for i in range(n):
                picture(tmp_path / "both" / part / name / "deep" / f"{i}.png", 100 * c + i + 1000 * n)
    data = check(folder.load(str(tmp_path / "both"), SMALL, root=None, seed=0))
    assert data.class_names == ("ant", "cow", "zebra")
    assert [len(getattr(data, s)) for s in SPLITS] == [27, 3, 6]
    assert everything(data.select)[1].sort().values.tolist() == [0, 1, 2]
    assert everything(data.val)[1].tolist() == [0, 0, 0, 2, 2, 2]
    assert all(n.startswith("val/") for n in data.val.names)  # type: ignore[attr-defined]
    assert not any(n.startswith("val/") for s in ("train", "select") for n in getattr(data, s).names)
    assert_no_image_is_in_two_splits(data)

    single = check(folder.load(str(tmp_path / "both" / "train"), SMALL, root=None, seed=0))
    assert [len(getattr(single, s)) for s in SPLITS] == [21, 3, 6]
    assert sorted(everything(single.val)[1].tolist()) == [0, 0, 1, 1, 2, 2]
    crops = folder.load(str(tmp_path / "both"), {**SMALL, "crops": "2"}, root=None, seed=0)
    assert crops.val.labels.tolist() == everything(crops.val)[1].tolist()  # type: ignore[attr-defined]


def test_folders_that_cannot_be_understood(tmp_path: Path) -> None:
    def fails(name: str, message: str, options: dict[str, str] | None = None) -> None:
        with pytest.raises(UsageError, match=message):
            folder.load(str(tmp_path / name), options or SMALL, root=None, seed=0)

    fails("absent", "no such folder")
    (tmp_path / "empty").mkdir()
    fails("empty", "holds no pictures")
    picture(tmp_path / "one" / "cat" / "0.png", 0)
    fails("one", "single class folder")
    picture(tmp_path / "mixed" / "cat" / "0.png", 0)
    picture(tmp_path / "mixed" / "0.png", 0)
    fails("mixed", "both class folders")
    picture(tmp_path / "half" / "train" / "cat" / "0.png", 0)
    fails("half", "has no val/")
    picture(tmp_path / "uneven" / "train" / "cat" / "0.png", 0)
    picture(tmp_path / "uneven" / "val" / "0.png", 0)
    fails("uneven", "the other not")
    for name in ("train/cat", "train/dog", "val/cow"):
        picture(tmp_path / "strange" / name / "0.png", 0)
    fails("strange", "class folder cow that train/ has not")
    picture(tmp_path / "hollow" / "cat" / "0.png", 0)
    (tmp_path / "hollow" / "dog").mkdir()
    fails("hollow", "without pictures")
    flat(tmp_path / "two", 2)
    fails("two", "too few pictures")
    flat(tmp_path / "ok", 3)
    fails("ok", "unknown interpolation", {"interpolation": "cubic"})
    fails("ok", "did you mean crops", {"crop": "3"})
    fails("ok", "not between 32 and", {"size": "32", "resize": "16"})
    with pytest.raises(UsageError, match="write folder:DIR"):
        folder.load(None, {}, root=None, seed=0)


def test_imagenet_wants_a_thousand_classes_and_a_train_folder(tmp_path: Path) -> None:
    content = picture(tmp_path / "one.png", 0).read_bytes()
    for part in ("train", "val"):
        for c in range(1000):
            below = tmp_path / "net" / part / f"n{c:08}"
            below.mkdir(parents=True)
            for i in range(2 if part == "train" else 1):
                (below / f"{i}.png").write_bytes(content)
    data = check(imagenet.load(str(tmp_path / "net"), {"size": "16", "limit": "1500"}, root=None, seed=0))
    assert data.classes == 1000
    assert len(data.train) + len(data.select) == 1500
    assert data.val.labels.tolist() == list(range(1000))  # type: ignore[attr-defined]
    assert imagenet.load(None, {"size": "16"}, root=tmp_path / "net", seed=0).shape == (3, 16, 16)
    with pytest.raises(UsageError, match="no train/ and val/"):
        imagenet.load(str(tmp_path / "net" / "val"), {}, root=None, seed=0)
    for name in ("train/cat", "train/dog", "val/cat"):
        picture(tmp_path / "tiny" / name / "0.png", 0)
    with pytest.raises(UsageError, match="has 2 classes"):
        imagenet.load(str(tmp_path / "tiny"), {}, root=None, seed=0)
