"""Photographs of Debian's packages as a flat folder of unlabelled pictures.

    python -m xedge.benchmarks.photographs OUT
    python -m xedge.benchmarks.photographs OUT --things

reads gnome-backgrounds, mate-backgrounds and plasma-workspace-wallpapers (apt-get install them), takes the largest
picture of each wallpaper, scales its shorter side to 512 pixels and writes it as PNG. With --things it reads
tuxpaint-stamps-default instead: animals, plants, food, vehicles and tools, cut out, each put on a white square. These
are what ImageNet's classes are about; wallpapers are mostly not. The result is the same each time.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

FOLDERS = ("backgrounds/gnome", "backgrounds/mate", "wallpapers")
THINGS = ("animals", "food", "hobbies", "household", "plants", "sports", "vehicles")
DRAWN = frozenset(("cartoon", "toys"))
SIDE = 512
SMALLEST = 720
SMALLEST_THING = 100
MARGIN = 1.1
"""Side of the white square over the thing's longer side."""


def pictures(share: Path) -> list[Path]:
    """The largest file of each wallpaper, thumbnails left out, in a fixed order."""
    found: dict[str, tuple[int, Path]] = {}
    for folder in FOLDERS:
        for path in sorted((share / folder).rglob("*")):
            if path.suffix.lower() not in (".jpg", ".jpeg", ".png", ".webp") or "screenshot" in path.stem:
                continue
            if not path.is_file() or path.is_symlink():
                continue
            # plasma: NAME/contents/images/WxH.jpg; gnome: NAME-l, NAME-d (light and dark differ); mate: NAME_WxH
            name = re.sub(r"[_-]?\d+x\d+[a-z]*", "", str(path.relative_to(share).with_suffix("")))
            size = path.stat().st_size
            if name not in found or size > found[name][0]:
                found[name] = (size, path)
    return [path for _, (_, path) in sorted(found.items())]


def write(share: Path, out: Path) -> int:
    """Write the scaled pictures; returns how many."""
    out.mkdir(parents=True, exist_ok=True)
    count = 0
    for path in pictures(share):
        try:
            with Image.open(path) as opened:
                image = ImageOps.exif_transpose(opened).convert("RGB")
        except (UnidentifiedImageError, OSError):
            continue
        if min(image.size) < SMALLEST:
            continue
        part = SIDE / min(image.size)
        image = image.resize((round(image.width * part), round(image.height * part)), Image.Resampling.LANCZOS)
        image.save(out / f"{count:03d}-{re.sub(r'[^A-Za-z0-9]+', '-', path.parent.name + '-' + path.stem)}.png")
        count += 1
    return count


def write_things(share: Path, out: Path) -> int:
    """Write the stamps that are photographs of at least SMALLEST_THING pixels; returns how many."""
    out.mkdir(parents=True, exist_ok=True)
    count = 0
    for folder in THINGS:
        for path in sorted((share / "tuxpaint/stamps" / folder).rglob("*.png")):
            with Image.open(path) as opened:
                stamp = opened.convert("RGBA")
            stamp = stamp.crop(stamp.getchannel("A").getbbox())
            if DRAWN & set(path.parts) or max(stamp.size) < SMALLEST_THING:
                continue
            side = round(MARGIN * max(stamp.size))
            square = Image.new("RGBA", (side, side), "white")
            square.alpha_composite(stamp, ((side - stamp.width) // 2, (side - stamp.height) // 2))
            square.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS).save(
                out / f"{count:03d}-{path.stem}.png"
            )
            count += 1
    return count


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--share", type=Path, default=Path("/usr/share"))
    parser.add_argument("--things", action="store_true", help="stamps in place of wallpapers")
    arguments = parser.parse_args()
    count = (write_things if arguments.things else write)(arguments.share, arguments.out)
    if count == 0:
        wallpapers = "gnome-backgrounds mate-backgrounds plasma-workspace-wallpapers"
        fix = f"apt-get install {'tuxpaint-stamps-default' if arguments.things else wallpapers}"
        sys.exit(f"photographs: no pictures under {arguments.share}; {fix}")
    print(f"{count} pictures in {arguments.out}")


if __name__ == "__main__":
    main()
