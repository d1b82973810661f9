"""Photographs of Debian's wallpaper packages as a flat folder of unlabelled pictures.

    python -m xedge.benchmarks.photographs OUT

reads gnome-backgrounds, mate-backgrounds and plasma-workspace-wallpapers (apt-get install them), takes the largest
picture of each wallpaper, scales its shorter side to 512 pixels and writes it as PNG. The result is the same each time.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

FOLDERS = ("backgrounds/gnome", "backgrounds/mate", "wallpapers")
SIDE = 512
SMALLEST = 720


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


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--share", type=Path, default=Path("/usr/share"))
    arguments = parser.parse_args()
    count = write(arguments.share, arguments.out)
    if count == 0:
        fix = "apt-get install gnome-backgrounds mate-backgrounds plasma-workspace-wallpapers"
        sys.exit(f"photographs: no pictures under {arguments.share}; {fix}")
    print(f"{count} pictures in {arguments.out}")


if __name__ == "__main__":
    main()
