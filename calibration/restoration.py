"""Pairs of pictures made from a folder of good ones: small and whole, noisy and clean, JPEG and original."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from xedge.augment import Turns
from xedge.data import Batch, Data, Options, Picture, permutation, split
from xedge.decode import decode
from xedge.errors import UsageError, nearest
from xedge.resample import imresize, to_bytes

from .folder import check_whole, copies_of_others, pictures_in

SUMMARY = "sr:DIR?scale=4, denoise:DIR?sigma=30, deblock:DIR?q=10: pairs made from the pictures of a folder"
NAMES = ("sr", "denoise", "deblock")

TESTS: Mapping[str, tuple[str, ...]] = {
    "Set5": ("set5",),
    "Set14": ("set14",),
    "BSD100": ("bsd100", "b100", "bsds100"),
    "Urban100": ("urban100",),
    "Kodak24": ("kodak24", "kodak"),
    "BSD68": ("bsd68", "cbsd68"),
    "LIVE1": ("live1",),
    "Classic5": ("classic5",),
}
"""The field's test sets, and the names (in lower case) under which their folders are handed around."""

INSIDE = ("HR", "original", "GTmod12", "GTmod", "image_SRF_{scale}")
"""Folders of a test set that hold its true pictures, when they do not lie in the set's folder itself."""

STEPS = (0.7548776662466927, 0.5698402909980532)
"""1 / p and 1 / p^2, p the plastic number, the root of p^3 = p + 1."""

SMALLEST = 8
"""Side of a patch, at least."""

Bytes = NDArray[np.uint8]
Degrade = Callable[[Bytes, str], Bytes]
"""A true picture [H, W, 3] and its name -> the input that a net gets."""


def shrink(truth: Bytes, scale: int) -> Bytes:
    """The picture `scale` times smaller, by antialiased bicubic as MATLAB's imresize, rounded to 8 bits as stored."""
    return to_bytes(imresize(truth, truth.shape[0] // scale, truth.shape[1] // scale))


def noisy(truth: Bytes, name: str, sigma: float) -> Bytes:
    """White Gaussian noise of deviation `sigma` (of 255), the same for each name; clipped and rounded to 8 bits."""
    key = int.from_bytes(hashlib.sha256(f"{name}/{sigma:g}".encode()).digest()[:8], "big")
    grain = torch.randn(truth.shape, generator=torch.Generator().manual_seed(key >> 1), dtype=torch.float64)
    return to_bytes(truth + sigma * grain.numpy())


def jpeg(truth: Bytes, quality: int) -> Bytes:
    """The picture after libjpeg at a quality of 1 to 95, colours at half resolution as is usual."""
    file = io.BytesIO()
    Image.fromarray(truth).save(file, "JPEG", quality=quality, subsampling="4:2:0")
    return np.asarray(Image.open(file).convert("RGB"))


class Pairs(Dataset[tuple[Tensor, Tensor]]):
    """Square patches of pictures, `each` of them from every picture, and of what they were before.

    The corners follow the additive recurrence of the plastic number (Roberts 2018), which spreads any number of points
    evenly, from a start that depends on the seed and on the picture's name only.

    Args:
        pictures: whole, none smaller than a patch.
        scale: how much larger the truth is.
        patch: side of the input in pixels.
        each: patches of a picture.
        seed: of the corners.
        room: bytes of decoded pictures to keep.
    """

    def __init__(self, pictures: Sequence[Picture], scale: int, patch: int, each: int, seed: int, room: int) -> None:
        self.pictures, self.scale, self.patch, self.each = list(pictures), scale, patch, each
        self._room = room
        self._kept: dict[int, tuple[Bytes, Bytes]] = {}
        self._last: tuple[int, tuple[Bytes, Bytes]] = (-1, (np.zeros((0, 0, 3), np.uint8),) * 2)
        digests = [hashlib.sha256(f"{seed}/{p.name}".encode()).digest() for p in pictures]
        self._start = [tuple(int.from_bytes(d[8 * i : 8 * i + 8], "big") / 2.0**64 for i in (0, 1)) for d in digests]

    def __len__(self) -> int:
        return len(self.pictures) * self.each

    def _whole(self, at: int) -> tuple[Bytes, Bytes]:
        if at in self._kept:
            return self._kept[at]
        if self._last[0] != at:
            self._last = (at, self.pictures[at].load())
        size = sum(a.nbytes for a in self._last[1])
        if size <= self._room:
            self._room -= size
            self._kept[at] = self._last[1]
        return self._last[1]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        at, number = divmod(range(len(self))[index], self.each)
        small, truth = self._whole(at)
        top, left = (
            int((start + number * step) % 1.0 * (n - self.patch + 1))
            for start, step, n in zip(self._start[at], STEPS, small.shape[:2], strict=True)
        )

        def cut(whole: Bytes, k: int) -> Tensor:
            part = whole[k * top : k * (top + self.patch), k * left : k * (left + self.patch)]
            return torch.from_numpy(part.transpose(2, 0, 1).astype(np.float32) / np.float32(255))

        return cut(small, 1), cut(truth, self.scale)

    def batch(self, indices: Sequence[int] | Tensor) -> Batch:
        """All of `indices` at once."""
        pairs = [self[int(i)] for i in indices]
        return torch.stack([x for x, _ in pairs]), torch.stack([y for _, y in pairs])

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
        return [self[i] for i in indices]


# -- which pictures --------------------------------------------------------------------------------------------------


def listing(folder: Path) -> list[Path]:
    """The pictures that lie in a folder.

    Raises:
        UsageError: no such folder, or none in it.
    """
    if not folder.is_dir():
        raise UsageError("there is no such folder", where=str(folder), fix="check the path after the colon")
    if not (found := [folder / name for name in pictures_in(folder, deep=False)]):
        raise UsageError("holds no pictures", where=str(folder), fix="give a folder of PNG or JPEG pictures")
    return found


def test_set(name: str, folder: Path, root: Path | None, scale: int) -> list[Path]:
    """The true pictures of a test set: of a folder, or of a set by its name in or beside the data or in the root.

    Raises:
        UsageError: it is nowhere.
    """
    if Path(name).is_dir():
        places = [Path(name)]
    else:
        known = {alias: names for names in TESTS.values() for alias in names}
        if name.lower() not in known:
            raise UsageError(f"there is no test set {name!r}", where=str(folder), fix=nearest(name, TESTS))
        near = [folder, folder.parent, *([root] if root else [])]
        places = [
            below
            for place in near
            if place.is_dir()
            for below in sorted(place.iterdir())
            if below.is_dir() and below.name.lower() in known[name.lower()]
        ]
    for place in places:
        for inside in ("", *(part.format(scale=scale) for part in INSIDE)):
            if (place / inside).is_dir() and (found := pictures_in(place / inside, deep=False)):
                true = [f for f in found if not re.search(r"_(LR|bicubic|nearest|glasner|kim|A\+|SRCNN|ScSR)\.", f)]
                return [place / inside / f for f in true]
    raise UsageError(
        f"the test set {name} is not here", where=str(folder), fix=f"put its pictures into {folder}/{name}"
    )


@dataclass(frozen=True)
class Chosen:
    """Pictures by split, and facts for the report."""

    train: list[Path]
    select: list[Path]
    val: list[Path]
    notes: tuple[str, ...]


def choose(folder: Path, test: str | None, root: Path | None, scale: int, opts: Options, seed: int) -> Chosen:
    """Split by picture. val: the test set named; the names in a list; or a fifth that no seed changes.

    Raises:
        UsageError: a list that names no picture of the folder, or too few pictures.
    """
    found = listing(folder)
    notes: list[str] = []
    if test is not None and test.endswith(".txt"):
        try:
            names = {line.strip() for line in Path(test).read_text(encoding="utf-8").splitlines()} - {""}
        except (OSError, UnicodeDecodeError) as e:
            raise UsageError(f"cannot be read ({e})", where=test, fix="give one picture's name a line") from e
        if missing := names - {p.name for p in found}:
            raise UsageError(f"names {min(missing)}, which is not in {folder}", where=test, fix="mend the list")
        val = [p for p in found if p.name in names]
        found = [p for p in found if p.name not in names]
    elif test is not None:
        val = test_set(test, folder, root, scale)
        found = [p for p in found if p not in val]
    else:
        val = [found[i] for i in permutation(len(found), 0, "restoration val")[: max(1, len(found) // 5)].sort().values]
        found = [p for p in found if p not in val]
        notes.append("val is a fixed fifth of the folder's pictures")
    everything = [*val, *found]
    if copies := copies_of_others(Path(), [str(p) for p in everything]):
        gone = {everything[i] for i in copies}
        val, found = [p for p in val if p not in gone], [p for p in found if p not in gone]
        notes.append(f"{len(copies)} exact copies of pictures were left out, so that no two splits share one")
    if (limit := opts.integer("limit")) is not None and limit < len(found):
        found = [found[i] for i in permutation(len(found), seed, "limit")[:limit].sort().values]
        notes.append(f"limited to {limit} pictures of train")
    count = max(1, round(opts.fraction("select", 0.1) * len(found)))
    rest, held = split(torch.zeros(len(found), dtype=torch.int64), count, seed, "select")
    if not (len(rest) and len(held) and val):
        raise UsageError(
            "has too few pictures to give train, select and val one each", where=str(folder), fix="give three or more"
        )
    return Chosen([found[i] for i in rest], [found[i] for i in held], val, tuple(notes))


def check_pictures(files: Sequence[Path], scale: int, patch: int) -> None:
    """Read every picture once, so that none stops the training later.

    Raises:
        UsageError: one is damaged, or its input is smaller than a patch; it is named.
    """
    for file, (width, height) in zip(files, check_whole(files), strict=True):
        if (short := min(width, height) // scale) < patch:
            raise UsageError(
                f"is {width // scale}x{height // scale}{' once shrunk' * (scale > 1)}, smaller than a patch of {patch}",
                where=str(file),
                fix="remove it" + (f", or add patch={short}" if short >= SMALLEST else ""),
            )


# -- the data --------------------------------------------------------------------------------------------------------


def load(path: str | None, options: Mapping[str, str], *, root: Path | None, seed: int) -> Data:
    """Pairs from the pictures of DIR (relative to `root` when there is one and no such folder is here), which stay
    in one split each, whole pictures with all their patches. Values are 0..1, never normalised.

    - ``sr:DIR?scale=4``: the input is the picture made 2, 3 or 4 times smaller.
    - ``denoise:DIR?sigma=30``: with white noise of deviation sigma (of 255), clipped and rounded as a file stores it
      (much of the literature leaves it unclipped). Training draws it anew for every batch.
    - ``deblock:DIR?q=10``: after JPEG of quality q.

    Options: ``scale``, ``sigma`` or ``q``; ``test`` (a folder, or Set5, Set14, BSD100, Urban100, Kodak24, BSD68, LIVE1
    or Classic5 where its folder is in or beside DIR or in the data root, or a .txt list of pictures of DIR: they
    become val); ``patch`` (side of the input, 48), ``patches`` (of each training picture, 32), ``tiles`` (of each
    held-out picture, 16), ``limit`` (training pictures), ``select`` (fraction of them held back), ``cache`` (megabytes
    of decoded pictures kept, 1024).
    """
    kind = options["name"]
    level = {"sr": "scale", "denoise": "sigma", "deblock": "q"}[kind]
    if path is None:
        raise UsageError("needs a folder", where=kind, fix=f"write {kind}:DIR")
    opts = Options.of(
        f"{kind}:{path}", {k: v for k, v in options.items() if k != "name"},
        (level, "test", "patch", "patches", "tiles", "limit", "select", "cache"),
    )  # fmt: skip
    low, high, usual = {"sr": (2, 4, 4), "denoise": (1, 100, 30), "deblock": (1, 95, 10)}[kind]
    strength = opts.integer(level, low=low, high=high) or usual
    scale = strength if kind == "sr" else 1
    patch = opts.integer("patch", low=SMALLEST, high=1024) or 48
    folder = Path(path)
    if root is not None and not folder.is_dir() and (root / folder).is_dir():
        folder = root / folder
    chosen = choose(folder, opts.values.get("test"), root, scale, opts, seed)
    check_pictures([*chosen.train, *chosen.select, *chosen.val], scale, patch)
    degrade: dict[str, Degrade] = {
        "sr": lambda truth, _: shrink(truth, scale),
        "denoise": lambda truth, name: noisy(truth, name, strength),
        "deblock": lambda truth, _: jpeg(truth, strength),
    }
    total = len(chosen.train) + len(chosen.select) + len(chosen.val)
    megabytes = opts.integer("cache", low=0, high=1 << 20)
    room = (1024 if megabytes is None else megabytes) << 20

    def picture(file: Path) -> Picture:
        def make() -> tuple[Bytes, Bytes]:
            truth = np.asarray(decode(file))
            truth = truth[: truth.shape[0] // scale * scale, : truth.shape[1] // scale * scale]
            return degrade[kind](truth, file.name), truth

        return Picture(file.name, make)

    def pairs(files: Sequence[Path], each: int) -> Pairs:
        return Pairs([picture(f) for f in files], scale, patch, each, seed, room * len(files) // total)

    tiles = opts.integer("tiles") or 16
    words = {"sr": f"{scale} times smaller", "denoise": f"noise {strength}", "deblock": f"JPEG quality {strength}"}
    return Data(
        name=f"{kind}:{folder.name}",
        train=pairs(chosen.train, opts.integer("patches") or 32),
        select=pairs(chosen.select, tiles),
        val=pairs(chosen.val, tiles),
        classes=None,
        shape=(3, patch, patch),
        source=str(folder),
        notes=(words[kind], *chosen.notes),
        scale=scale,
        augment_pairs=Turns(noise=strength if kind == "denoise" else None),
        pictures=tuple(picture(f) for f in chosen.val),
    )
