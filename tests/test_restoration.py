"""Bicubic resizing against MATLAB's, and the pairs that calibration/restoration.py makes."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from xedge import load
from xedge.augment import Turns
from xedge.data import Data, batches, check, take
from xedge.errors import UsageError
from xedge.resample import imresize, taps, to_bytes

SPLITS = ("train", "select", "val")


def matrix(size: int, out: int) -> np.ndarray:
    weights, at = taps(size, out)
    dense = np.zeros((out, size))
    np.add.at(dense, (np.arange(out)[:, None], at), weights)
    return dense


# -- bicubic ---------------------------------------------------------------------------------------------------------


def test_the_weights_are_matlabs_by_hand() -> None:
    # Keys' kernel at 1/8, 3/8 ... for a half and at 0, 1/3, 2/3 ... for a third; the mirror repeats the edge pixel.
    half = [-3, -9, 29, 111, 111, 29, -9, -3]
    np.testing.assert_allclose(256 * matrix(16, 8)[4], [0] * 5 + half + [0] * 3, atol=1e-12)
    np.testing.assert_allclose(256 * matrix(16, 8)[0, :5], [111 + 29, 111 - 9, 29 - 3, -9, -3], atol=1e-12)
    third = [-1, -2, 0, 9, 21, 27, 21, 9, 0, -2, -1]
    np.testing.assert_allclose(81 * matrix(27, 9)[4], [0] * 8 + third + [0] * 8, atol=1e-12)
    np.testing.assert_allclose(81 * matrix(27, 9)[0, :7], [21 + 9, 27 + 0, 21 - 2, 9 - 1, 0, -2, -1], atol=1e-12)
    np.testing.assert_allclose(128 * matrix(8, 16)[6:8, 1:6], [[-3, 29, 111, -9, 0], [0, -9, 111, 29, -3]], atol=1e-12)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_away_from_the_border_it_is_pillows_and_torchs(scale: int) -> None:
    generator = np.random.default_rng(scale)
    picture = (255 * generator.random((24 * scale, 20 * scale))).astype(np.float32)
    got = imresize(picture, 24, 20)[3:-3, 3:-3]
    pillow = np.asarray(Image.fromarray(picture).resize((20, 24), Image.Resampling.BICUBIC))
    np.testing.assert_allclose(got, pillow[3:-3, 3:-3], atol=1e-4)
    torchs = functional.interpolate(
        torch.from_numpy(picture)[None, None].double(), (24, 20), mode="bicubic", antialias=True
    )
    np.testing.assert_allclose(got, torchs[0, 0, 3:-3, 3:-3], atol=1e-9)


@pytest.mark.parametrize(("size", "out"), [(12, 6), (12, 4), (13, 5), (4, 16), (7, 7), (3, 1)])
def test_every_row_of_weights_sums_to_one_and_straight_lines_stay_straight(size: int, out: int) -> None:
    dense = matrix(size, out)
    np.testing.assert_allclose(dense.sum(1), 1, atol=1e-12)
    np.testing.assert_allclose(dense, dense[::-1, ::-1], atol=1e-12)
    if size == out:
        np.testing.assert_allclose(dense, np.eye(size), atol=1e-12)


def test_bytes_are_rounded_with_halves_upwards_and_clipped() -> None:
    assert to_bytes(np.array([-3.0, 0.49, 0.5, 1.5, 254.5, 300.0])).tolist() == [0, 0, 1, 2, 255, 255]


MATLABS = {
    (3, 2): """
        116 187 237 171  94  61 135 191 187  75  91 142 140 124 108
         43  92 143 149 164 163 119 123 118  44  38  80 151 118  62
         13  21  47 107 195 228 115  81  70  24  19  56 137 105  48
        146  98  49  49  71 107 148 159 132  58 124 176  61  85 146
        118 139 144  92 116 168 201 188 159 140 167 158  27  69 153
         61 151 218 145 174 219 201 164 146 187 148  84  48  76 115
        102 132 151 119  90  72  72  72  83 114  60  31 144 130  80
         81 121 154 133  87  41  19  67 116  95 108 140 183 180 163
         37  95 152 150 117  73  35 108 179 130 174 214 153 176 219
          3  29  73 131 136 120 116 162 214 229 147  54  35  62  96
         67  54  51  83 153 187 111 141 210 255 149  22  13  42  74
        142  99  53  43 164 237  77 103 197 254 159  42  31  59  91""",
    (1, 2): """
        105 140 126  81 109
        110 134 153 114  93
        108 108  94 127 146
         67 126 162 149  62""",
    (1, 3): """
        115 135  97 101
        113 119 124 125
         81 157 118  64""",
}
"""MATLAB's imresize(uint8(PRINTED), by, "bicubic") as the tests of GNU Octave's image package 2.14.0 give it
(imresize.m, "reference results from matlab"). Of uint8 MATLAB rounds after each axis, rows first."""

PRINTED = np.array([
    [116, 227, 153, 69, 146, 194, 59, 130, 139, 106],
    [2, 47, 137, 249, 90, 75, 16, 24, 158, 44],
    [155, 68, 46, 84, 166, 156, 69, 204, 32, 152],
    [71, 221, 137, 230, 210, 153, 192, 115, 30, 118],
    [107, 143, 108, 52, 51, 73, 101, 21, 175, 90],
    [54, 158, 143, 77, 26, 168, 113, 229, 165, 225],
    [9, 47, 133, 135, 130, 207, 236, 43, 19, 73],
    [129, 60, 59, 243, 64, 181, 249, 56, 32, 86],
])  # fmt: skip


@pytest.mark.parametrize("by", MATLABS)
def test_it_is_what_matlab_printed(by: tuple[int, int]) -> None:
    up, down = by
    matlabs = np.array([line.split() for line in MATLABS[by].strip().splitlines()], np.int64)
    # Where the size is no multiple, MATLAB keeps the factor; so does a picture continued by its mirror images, then cut
    continued = np.pad(PRINTED, ((0, 16), (0, 20)), "symmetric")
    height, width = (n * up // down for n in continued.shape)
    rows = to_bytes(imresize(continued, height, continued.shape[1]))
    off = to_bytes(imresize(rows, height, width))[: matlabs.shape[0], : matlabs.shape[1]] - matlabs
    assert np.count_nonzero(off) <= (by == (3, 2))  # of 180: 250.5 between the axes, which MATLAB rounded down
    assert np.abs(off).max() <= 1


def test_in_floating_point_it_is_matlabs_to_the_last_digit_printed() -> None:
    # the same file, "values from MATLAB": imresize([10, 6], [3, 3], "cubic")
    expected = [[10.27777777777777, 8, 5.72222222222222]] * 3
    np.testing.assert_allclose(imresize(np.array([[10, 6]]), 3, 3), expected, atol=1e-13)


# -- pairs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve smooth pictures of different sizes, one of them grey, one twice."""
    folder = tmp_path_factory.mktemp("photographs")
    generator = np.random.default_rng(0)
    for i in range(12):
        small = (255 * generator.random((9, 8, 3))).astype(np.uint8)
        picture = Image.fromarray(small).resize((97 + i, 90), Image.Resampling.BICUBIC)
        (picture.convert("L") if i == 3 else picture).save(folder / f"{i:02d}.png")
    (folder / "copy.png").write_bytes((folder / "05.png").read_bytes())
    return folder


def made(folder: Path, spec: str, seed: int = 0) -> Data:
    kind, _, options = spec.partition("?")
    return load.load_data(f"{kind}:{folder}?{options}", root=None, seed=seed)


@pytest.mark.parametrize("spec", ["sr?scale=2&patch=16", "sr?scale=3&patch=16", "denoise?sigma=30", "deblock?q=10"])
def test_splits_are_by_picture_and_patches_repeat(photographs: Path, spec: str) -> None:
    data = check(made(photographs, spec))
    assert data.restores
    assert data.classes is None
    names = [{p.name for p in getattr(data, split).pictures} for split in SPLITS]
    assert sum(map(len, names)) == len(set.union(*names)) == 12  # the copy is left out
    assert [p.name for p in data.pictures] == sorted(names[2])
    again = made(photographs, spec)
    for split in SPLITS:
        x, y = take(getattr(data, split), [0, 5, len(getattr(data, split)) - 1])
        assert tuple(x.shape[1:]) == data.shape
        assert y.shape[2] == (data.scale or 0) * x.shape[2]
        assert all(torch.equal(a, b) for a, b in zip((x, y), take(getattr(again, split), [0, 5, -1]), strict=True))
    other = made(photographs, spec, seed=1)
    assert [p.name for p in other.pictures] == [p.name for p in data.pictures]  # no seed moves the held-out pictures
    assert {p.name for p in other.select.pictures} != names[1] or not torch.equal(other.train[0][1], data.train[0][1])


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_a_patch_is_where_its_truth_is(photographs: Path, scale: int) -> None:
    data = made(photographs, f"sr?scale={scale}&patch=16")
    small, truth = data.pictures[0].load()
    assert truth.shape == (scale * small.shape[0], scale * small.shape[1], 3)
    np.testing.assert_array_equal(small, to_bytes(imresize(truth, *small.shape[:2])))
    for x, y in (data.val[i] for i in range(4)):
        mean = functional.avg_pool2d(y, scale)
        assert float((mean - x).abs().mean()) < 0.01  # any shift would show: the pictures are gradients
        np.testing.assert_allclose(255 * x, (255 * x).round(), atol=1e-4)


def test_patches_spread_over_the_whole_picture(photographs: Path) -> None:
    data = made(photographs, "deblock?q=10&patch=16&patches=64")
    picture = data.train.pictures[0].load()[1]
    seen = np.zeros(picture.shape[:2], bool)
    flat = {picture[t : t + 16, s : s + 16].tobytes(): (t, s) for t in range(75) for s in range(picture.shape[1] - 15)}
    for i in range(64):
        patch = (255 * data.train[i][1]).round().byte().permute(1, 2, 0).contiguous().numpy()
        top, left = flat[patch.tobytes()]
        seen[top : top + 16, left : left + 16] = True
    assert seen.mean() > 0.8


def test_noise_has_its_deviation_and_is_drawn_anew_for_training_only(photographs: Path) -> None:
    data = made(photographs, "denoise?sigma=30&patch=64")
    x, y = next(batches(data.val, 64))
    inside = (y > 0.4) & (y < 0.6)
    assert abs(float((x - y)[inside].std()) * 255 - 30) < 0.7
    draws = [data.augmented(x, y, torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(draws[0][0], draws[1][0])
    fresh, truth = draws[2]
    assert abs(float((fresh - truth)[(truth > 0.4) & (truth < 0.6)].std()) * 255 - 30) < 0.7
    assert not torch.equal(fresh - truth, draws[0][0] - draws[0][1])
    np.testing.assert_array_equal(data.pictures[0].load()[0], data.pictures[0].load()[0])


def test_jpeg_gets_worse_with_its_quality(photographs: Path) -> None:
    error = []
    for q in (10, 20, 30):
        x, y = next(batches(made(photographs, f"deblock?q={q}").val, 64))
        error.append(float((x - y).square().mean()))
    assert error[0] > error[1] > error[2] > 0


def test_turns_move_both_pictures_alike_and_reach_all_eight_positions() -> None:
    x = torch.arange(9.0).view(1, 1, 3, 3).expand(200, 1, 3, 3)
    a, b = Turns()(x, x.repeat_interleave(2, 2).repeat_interleave(2, 3), torch.Generator().manual_seed(0))
    assert torch.equal(a, b[:, :, ::2, ::2])
    assert len({tuple(row.flatten().tolist()) for row in a}) == 8


def test_a_test_set_is_found_by_name_in_its_usual_layouts(photographs: Path, tmp_path: Path) -> None:
    train = tmp_path / "DIV2K"
    train.mkdir()
    files = sorted(photographs.glob("0*.png"))
    for f in files[:5]:
        (train / f.name).write_bytes(f.read_bytes())
    inside = tmp_path / "set5" / "image_SRF_2"
    inside.mkdir(parents=True)
    for f in files[6:8]:
        (inside / f"img_{f.stem}_SRF_2_HR.png").write_bytes(f.read_bytes())
        (inside / f"img_{f.stem}_SRF_2_LR.png").write_bytes(f.read_bytes())
    data = made(train, "sr?scale=2&patch=16&test=Set5")
    assert [p.name for p in data.pictures] == ["img_06_SRF_2_HR.png", "img_07_SRF_2_HR.png"]
    assert len(data.train.pictures) + len(data.select.pictures) == 5
    (inside / "same.png").write_bytes(files[0].read_bytes())
    shared = made(train, f"sr?scale=2&patch=16&test={inside}")
    assert len(shared.train.pictures) + len(shared.select.pictures) == 4  # the test set keeps the picture
    listed = tmp_path / "held out.txt"
    (train / "03.png").rename(train / "an old mill.png")
    listed.write_text("00.png\n\nan old mill.png \n")
    assert [p.name for p in made(train, f"sr?scale=2&patch=16&test={listed}").pictures] == ["00.png", "an old mill.png"]
    listed.write_text("09.png\n")
    for options in (f"test={listed}", "test=Set14", "test=Set55", f"test={tmp_path / 'no.txt'}"):
        with pytest.raises(UsageError):
            made(train, f"sr?scale=2&patch=16&{options}")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("scale=5", "between"),
        ("sigma=3", "sigma"),
        ("scale=2&patch=64", "is 4.x45 once shrunk, smaller than a patch of 64; remove it, or add patch=45"),
        ("limit=1", "too few"),
        ("scale=2&scale=3", "gives scale more than once; give it once"),
    ],
)
def test_bad_options_are_one_line(photographs: Path, options: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        made(photographs, f"sr?{options}")


def test_a_picture_that_cannot_be_decoded_is_named_when_the_data_are_loaded(photographs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photographs"
    shutil.copytree(photographs, folder)
    picture = Image.open(photographs / "06.png")
    large = picture.resize((400, 380))
    for kind, quality in (("PNG", None), ("JPEG", 90), ("WEBP", 90), ("TIFF", None), ("BMP", None)):
        victim = folder / f"zz.{kind.lower()}"
        large.save(victim, kind, **({"quality": quality} if quality else {}))
        whole = victim.read_bytes()
        made(folder, "denoise?sigma=30")
        middle = len(whole) // 2
        broken = {"cut": whole[: middle + 3000], "short": whole[:9], "text": b"no picture"}
        if kind == "PNG":
            broken["altered"] = whole[:middle] + bytes(50) + whole[middle + 50 :]
        for content in broken.values():
            victim.write_bytes(content)
            for spec in ("sr?scale=4&patch=16", "denoise?sigma=30", "deblock?q=10"):
                with pytest.raises(UsageError, match=rf"zz\.{kind.lower()}: cannot be decoded"):
                    made(folder, spec)
        victim.unlink()
    Image.fromarray(np.zeros((90, 90), np.float32)).save(folder / "range.tiff")
    with pytest.raises(UsageError, match=r"range\.tiff: cannot be decoded \(floating-point"):
        made(folder, "deblock?q=10")


def test_data_of_a_users_own_are_checked(photographs: Path) -> None:
    good = made(photographs, "sr?scale=2&patch=16")

    def like(x: torch.Tensor, y: torch.Tensor) -> Data:
        pairs = [(x, y)] * 3
        return Data(name="own", train=pairs, select=pairs, val=pairs, classes=None, shape=(3, 8, 8), scale=2)

    x, y = take(check(like(torch.rand(3, 8, 8), torch.rand(3, 16, 16))).train, [0, 1])
    assert (x.shape, y.shape) == ((2, 3, 8, 8), (2, 3, 16, 16))
    for truth in (torch.rand(3, 8, 8), torch.rand(3, 16, 16).double(), 2 + torch.rand(3, 16, 16)):
        with pytest.raises(UsageError, match="true picture"):
            check(like(torch.rand(3, 8, 8), truth))
    with pytest.raises(UsageError, match="wants data with classes"):
        load.load_model("lenet5", classes=None, channels=3, scale=good.scale)
