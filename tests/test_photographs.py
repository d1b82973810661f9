"""The folders of photographs that the benchmarks read, from made-up shares."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from xedge.benchmarks import photographs


def stamp(path: Path, size: tuple[int, int], colour: tuple[int, int, int]) -> None:
    """Transparent but for a rectangle in the middle of twice its size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cut = Image.new("RGBA", (2 * size[0], 2 * size[1]))
    cut.paste((*colour, 255), (size[0] // 2, size[1] // 2, size[0] // 2 + size[0], size[1] // 2 + size[1]))
    cut.save(path)


def test_things_lie_whole_on_white_squares(tmp_path: Path) -> None:
    share, out = tmp_path / "share", tmp_path / "out"
    stamps = share / "tuxpaint/stamps"
    stamp(stamps / "animals/birds/hen.png", (200, 100), (200, 30, 30))
    stamp(stamps / "animals/birds/cartoon/hen.png", (200, 100), (200, 30, 30))
    stamp(stamps / "animals/bears/toys/teddy.png", (200, 100), (200, 30, 30))
    stamp(stamps / "vehicles/speck.png", (photographs.SMALLEST_THING - 1, 9), (200, 30, 30))
    stamp(stamps / "symbols/letter.png", (200, 100), (200, 30, 30))
    assert photographs.write_things(share, out) == 1
    (made,) = out.iterdir()
    assert made.name == "000-hen.png"
    with Image.open(made) as picture:
        pixels = np.asarray(picture)
    assert pixels.shape == (photographs.SIDE, photographs.SIDE, 3)
    thing = (pixels[..., 1] < 128).nonzero()
    height, width = (int(np.ptp(along)) + 1 for along in thing)
    assert width == pytest.approx(photographs.SIDE / photographs.MARGIN, abs=3)
    assert height == pytest.approx(width / 2, abs=3)
    assert [int(along.min() + along.max()) for along in thing] == pytest.approx([photographs.SIDE - 1] * 2, abs=4)
    assert (pixels[0] == 255).all()


def test_of_a_wallpaper_the_largest_is_taken(tmp_path: Path) -> None:
    share, out = tmp_path / "share", tmp_path / "out"
    for size in ((720, 960), (800, 1066), (90, 120)):
        path = share / f"wallpapers/Sea/contents/images/{size[1]}x{size[0]}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((size[1], size[0]), 50).save(path)
    assert photographs.write(share, out) == 1
    (made,) = out.iterdir()
    with Image.open(made) as picture:
        assert picture.size == (682, photographs.SIDE)


@pytest.mark.parametrize(("flag", "package"), [([], "mate-backgrounds"), (["--things"], "tuxpaint-stamps-default")])
def test_what_to_install_is_said(
    flag: list[str], package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["photographs", str(tmp_path / "out"), "--share", str(tmp_path), *flag])
    with pytest.raises(SystemExit, match=package):
        photographs.main()
