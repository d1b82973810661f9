"""Tiles without seams, receptive fields, graphs at other sizes, and `xedge upscale`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import ModelProto
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from xedge.errors import UnsupportedGraph, UsageError
from xedge.load import load_model, load_target
from xedge.onnx_graph import Graph, export_float, session
from xedge.sizes import resized, scale_of
from xedge.tiles import THIN, Reach, cut, least_tile, reach, shortest_tile, starts, stitch
from xedge.upscale import Engine, read

if TYPE_CHECKING:
    from tiny_runs import Xedge

pytest_plugins = ["tiny_runs"]


class Wide(nn.Module):
    """Dilations, a stride, a transposed convolution, nearest neighbours, a shuffle, valid padding mended by mirrors."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=2, dilation=2), nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.c, self.d = nn.ConvTranspose2d(8, 6, 4, 2, 1), nn.Conv2d(6, 12, 3, padding=1)
        self.e = nn.Conv2d(3, 3, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.max_pool2d(F.pad(torch.relu(self.a(x)), (1, 1, 1, 1)), 3, 1)
        y = F.pixel_shuffle(self.d(y + self.c(torch.relu(self.b(y)))), 2)
        return self.e(F.pad(y, (2, 2, 2, 2))) + F.interpolate(x, scale_factor=2, mode="bilinear")


class Unshuffled(nn.Module):
    """Works at half the resolution, as FEQE does."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(12, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(self.b(torch.relu(self.a(F.pixel_unshuffle(x, 2)))), 2) + x


class Attention(nn.Module):
    """Each output pixel depends on the mean of the whole picture."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(y * torch.sigmoid(y.mean((2, 3), keepdim=True)))


def exported(model: nn.Module, side: int = 32) -> ModelProto:
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return export_float(model.eval(), (3, side, side), 17)


def runner(proto: ModelProto, height: int, width: int):  # type: ignore[no-untyped-def]
    run = session(resized(proto, height, width), exact=True)
    feed = Graph(proto).inputs[0]
    return lambda x: run.run(None, {feed: x})[0]


# -- receptive fields ------------------------------------------------------------------------------------------------


def touched(proto: ModelProto, side: int, at: int) -> int:
    """The farthest input pixel from its own place that an output pixel of one input pixel's block feels, seen by
    changing single pixels in a line."""
    run, scale = runner(proto, side, side), scale_of(proto)
    draw = np.random.default_rng(0)
    x = draw.random((1, 3, side, side), dtype=np.float32)
    base = run(x)
    block = np.s_[:, :, scale * at : scale * at + scale, scale * at : scale * at + scale]
    far = 0
    for row in range(side):
        moved = x.copy()
        moved[:, :, row] += draw.normal(size=(3, side)).astype(np.float32) * 10
        if not np.array_equal(run(moved)[block], base[block]):
            far = max(far, abs(row - at))
    return far


@pytest.mark.parametrize("make", [Wide, Unshuffled])
def test_the_receptive_field_is_never_too_small(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    proto = exported(make())
    found = reach(proto)
    assert found is not None
    assert found.step == 2
    far = max(touched(proto, 48, at) for at in (22, 23))
    assert far <= found.radius <= 2 * far + 4


def test_plain_convolutions_reach_half_their_kernels() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 9, padding=4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 3, (3, 5), padding=(1, 2))
    )
    assert reach(exported(net)) == Reach(4 + 2, 1)
    assert reach(exported(Attention())) is None
    assert reach(exported(nn.Conv2d(3, 3, 1))) == Reach(0, 1)


@pytest.mark.parametrize(
    ("name", "scale", "least"), [("srcnn", 4, 5), ("feqe", 4, 10), ("span", 4, 15), ("lapsrn", 4, 10)]
)
def test_built_in_nets_have_one(name: str, scale: int, least: int) -> None:
    proto = export_float(load_model(name, classes=None, channels=3, scale=scale).eval(), (3, 16, 16), 17)
    found = reach(proto)
    assert found is not None
    assert least <= found.radius <= 60
    assert Graph(resized(proto, 12, 20)).shapes[Graph(proto).outputs[0]] == (1, 3, 48, 80)


# -- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Wide, Unshuffled])
def test_a_graph_at_another_size_is_the_net_at_that_size(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = make()
    proto = exported(model)
    x = torch.rand(1, 3, 20, 46)
    with torch.no_grad():
        np.testing.assert_allclose(runner(proto, 20, 46)(x.numpy()), model(x).numpy(), atol=2e-4, rtol=1e-4)


def test_a_graph_of_one_size_says_so() -> None:
    flat = nn.Sequential(
        nn.Conv2d(3, 2, 3, padding=1), nn.Flatten(), nn.Linear(2 * 64, 3 * 64), nn.Unflatten(1, (3, 8, 8))
    )
    with pytest.raises(UnsupportedGraph, match=r"one size|8x8"):
        resized(exported(flat, 8), 12, 12)
    with pytest.raises(UnsupportedGraph, match="no enlarged picture"):
        scale_of(exported(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), 8))


# -- tiles -----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 300), st.integers(1, 90), st.integers(0, 20), st.sampled_from([1, 2, 4]))
def test_every_pixel_is_kept_once_and_lies_a_radius_inside(length: int, tile: int, radius: int, step: int) -> None:
    length, tile = length + -length % step, tile + -tile % step
    if tile < length:
        tile = max(tile, shortest_tile(Reach(radius, step)))
    found = starts(length, tile, Reach(radius, step))
    assert [k for _, k, _ in found] == [0, *(end for _, _, end in found[:-1])]
    assert found[-1][2] == length
    for at, kept, end in found:
        assert at % step == 0
        assert kept < end
        assert at == 0 or kept - at >= radius
        assert at + tile >= length or at + tile - end >= radius
        assert 0 <= at <= kept
        assert end <= at + tile


@pytest.fixture(scope="module")
def nets() -> dict[str, tuple[ModelProto, Reach]]:
    torch.manual_seed(0)
    made = {make.__name__: exported(make()) for make in (Wide, Unshuffled)}
    return {name: (proto, found) for name, proto in made.items() if (found := reach(proto)) is not None}


@pytest.mark.parametrize("name", ["Wide", "Unshuffled"])
@pytest.mark.parametrize("size", [(40, 96), (96, 150), (98, 94)])
def test_stitched_tiles_are_the_whole_picture_everywhere(
    nets: dict[str, tuple[ModelProto, Reach]], name: str, size: tuple[int, int]
) -> None:
    proto, found = nets[name]
    tile = (min(size[0], least_tile(found)), min(size[1], least_tile(found) + 6))
    picture = np.random.default_rng(0).random((3, *size), dtype=np.float32)
    whole = runner(proto, *size)(picture[None])[0]
    got = stitch(runner(proto, *tile), picture, tile, found, scale_of(proto))
    assert got.shape == whole.shape
    np.testing.assert_allclose(got, whole, atol=1e-4 * np.abs(whole).max())
    assert len(list(cut(size, tile, found))) > 1


def test_too_small_an_overlap_leaves_seams(nets: dict[str, tuple[ModelProto, Reach]]) -> None:
    """What the test above would catch."""
    proto, found = nets["Wide"]
    picture = np.random.default_rng(0).random((3, 96, 96), dtype=np.float32)
    whole = runner(proto, 96, 96)(picture[None])[0]
    got = stitch(runner(proto, 48, 48), picture, (48, 48), Reach(0, found.step), 2)
    assert np.abs(got - whole).max() > 1e-2 * np.abs(whole).max()


def test_what_is_smaller_than_a_tile_is_mirrored(nets: dict[str, tuple[ModelProto, Reach]]) -> None:
    proto, found = nets["Unshuffled"]
    picture = np.random.default_rng(0).random((3, 17, 9), dtype=np.float32)
    got = stitch(runner(proto, 32, 32), picture, (32, 32), found, 1)
    whole = runner(proto, 32, 32)(np.pad(picture, ((0, 0), (0, 15), (0, 23)), mode="symmetric")[None])[0]
    np.testing.assert_array_equal(got, whole[:, :17, :9])


def engine(proto: ModelProto) -> Engine:
    side = Graph(proto).shapes[Graph(proto).inputs[0]][2]
    return Engine(proto, load_target("host-cpu"), "float32", (side, side), 3, 3, scale_of(proto), reach(proto))


def test_the_limit_of_a_tile_is_said_and_is_true(nets: dict[str, tuple[ModelProto, Reach]]) -> None:
    for proto, found in nets.values():
        made = engine(proto)
        least = shortest_tile(found)
        assert made.tile((200, 300), (least, least)) == (least, least)
        assert least >= 2 * found.radius + found.step
        with pytest.raises(UsageError, match=f"is all overlap; give at least {least}, in multiples of 2$"):
            made.tile((200, 300), (least, least - 2))
        with pytest.raises(UsageError, match=f"{least + 1} is no multiple of 2; give at least {least}, in"):
            made.tile((200, 300), (least + 1, least))
        assert made.tile((9, 300), (least, 10)) == (10, least), "a picture that fits into one tile"


@pytest.mark.parametrize("size", [(1, 1), (1, 30), (30, 1), (2, 3)])
def test_pictures_too_small_for_the_net_are_continued(size: tuple[int, int]) -> None:
    """SRCNN's bicubic layer takes the second row from the border, which a row by itself has not."""
    torch.manual_seed(0)
    model = load_model("srcnn", classes=None, channels=3, scale=2).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    got, tile, _ = engine(export_float(model, (3, 16, 16), 17))(pixels)
    assert tile == tuple(size if min(size) > 1 else (max(n, THIN) for n in size))
    more = [(0, t - n) for t, n in zip(tile, size, strict=True)]
    x = torch.from_numpy(np.pad(pixels, (*more, (0, 0)), mode="symmetric") / np.float32(255)).permute(2, 0, 1)[None]
    with torch.no_grad():
        want = 255 * model(x)[0, :, : 2 * size[0], : 2 * size[1]].clamp(0, 1).permute(1, 2, 0).numpy()
    assert got.shape == (2 * size[0], 2 * size[1], 3)
    assert np.abs(got - want).max() < 0.51


# -- the command -----------------------------------------------------------------------------------------------------


def test_upscale_runs_the_artefact_on_a_picture_of_any_size(xedge: Xedge, restored: Path, tmp_path: Path) -> None:
    import tiny_pictures

    truth = tiny_pictures.picture(9, 61, 83)
    Image.fromarray(truth).save(tmp_path / "in.png")
    outs: dict[str, NDArray[np.int64]] = {}
    for name, words in (("float", ["--original"]), ("host", ["--target", "host-cpu", "--tile", "32x24"])):
        ended = xedge("upscale", restored, tmp_path / "in.png", "-o", tmp_path / f"{name}.png", "--json", *words)
        assert ended.code == 0, ended.err
        assert json.loads(ended.out)["size"] == [166, 122]
        outs[name] = np.asarray(Image.open(tmp_path / f"{name}.png")).astype(np.int64)
    assert outs["float"].shape == (122, 166, 3)
    assert np.abs(outs["float"] - outs["host"]).mean() < 12  # cut in half and six bits, of a hardly trained net
    assert np.abs(outs["float"][::2, ::2] - truth).mean() < 25


def test_upscale_refuses_in_one_line(xedge: Xedge, restored: Path, tmp_path: Path) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "in.png")
    (tmp_path / "no.png").write_text("no picture")
    common = ["upscale", restored]
    for words in (
        [tmp_path / "in.png", "-o", tmp_path / "a.xyz"],
        [tmp_path / "no.png", "-o", tmp_path / "a.png"],
        [tmp_path / "in.png", "-o", tmp_path / "a.png", "--tile", "8x8"],
        [tmp_path / "in.png", "-o", tmp_path / "a.png", "--target", "browser"],
    ):
        ended = xedge(*common, *words)
        assert (ended.code, len(ended.err.strip().splitlines())) == (2, 1), ended.err
        assert not list(tmp_path.glob("a.*"))
    with pytest.raises(UsageError, match="channels"):
        read(tmp_path / "in.png", 4)


def test_upscale_of_a_classifiers_run_is_one_line(xedge: Xedge, finished: Path, tmp_path: Path) -> None:
    Image.new("L", (40, 40)).save(tmp_path / "in.png")
    for words in ([], ["--original"]):
        ended = xedge("upscale", finished, tmp_path / "in.png", "-o", tmp_path / "out.png", *words)
        assert ended.code == 2
        line = f"xedge: {finished}: its net gives no pictures; give the run of a net that restores them\n"
        assert ended.err == line
        assert not (tmp_path / "out.png").exists()


def test_sixteen_bits_are_scaled_to_eight(xedge: Xedge, restored: Path, tmp_path: Path) -> None:
    wide = np.linspace(0, 65535, 24 * 30).reshape(24, 30).astype(np.uint16)
    Image.fromarray(wide).save(tmp_path / "16.png")
    with Image.open(tmp_path / "16.png") as written:
        assert written.mode == "I;16"
    narrow = np.round(wide / 257).astype(np.uint8)
    Image.fromarray(narrow).save(tmp_path / "8.png")
    out = []
    for bits in ("16", "8"):
        ended = xedge("upscale", restored, tmp_path / f"{bits}.png", "-o", tmp_path / f"large-{bits}.png", "--original")
        assert ended.code == 0, ended.err
        out.append(np.asarray(Image.open(tmp_path / f"large-{bits}.png")))
    assert np.array_equal(*out)
    assert np.abs(out[0][::2, ::2, 1].astype(int) - narrow).mean() < 25, "not clipped to white"


def test_transparency_is_kept_or_said_to_be_dropped(xedge: Xedge, restored: Path, tmp_path: Path) -> None:
    import tiny_pictures

    colours, alpha = tiny_pictures.picture(3, 24, 36), tiny_pictures.picture(4, 24, 36)[:, :, 0]
    Image.fromarray(np.dstack([colours, alpha])).save(tmp_path / "clear.png")
    Image.fromarray(np.dstack([colours, np.full_like(alpha, 255)])).save(tmp_path / "opaque.png")
    said = {}
    for name, out in (("clear", "clear-large.png"), ("opaque", "opaque-large.png"), ("clear", "clear-large.jpg")):
        ended = xedge("upscale", restored, tmp_path / f"{name}.png", "-o", tmp_path / out, "--original")
        assert ended.code == 0, ended.err
        assert len(ended.out.splitlines()) == 1
        said[out] = ended.out.strip()
    clear, opaque = (np.asarray(Image.open(tmp_path / f"{name}-large.png")) for name in ("clear", "opaque"))
    assert said["clear-large.png"].endswith("; transparency enlarged by bicubic")
    assert said["clear-large.jpg"].endswith("; transparency dropped, .jpg has none")
    assert said["opaque-large.png"].endswith("overlap 5")
    assert np.array_equal(clear[:, :, :3], opaque), "colours do not depend on it"
    theirs = np.asarray(Image.fromarray(alpha.astype(np.float32)).resize((72, 48), Image.Resampling.BICUBIC))
    inside = np.s_[6:-6, 6:-6]  # Pillow cuts the kernel off at the border
    assert np.abs(clear[:, :, 3][inside] - theirs.clip(0, 255)[inside]).max() < 0.51
