"""Pictures in folders: ImageFolder layout, with labels, or a flat folder of photographs, without."""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv

from xedge.augment import ZoomFlip
from xedge.data import UNLABELLED, Batch, Data, Options, permutation, split
from xedge.decode import NO_RANGE, UNREADABLE, decode, unreadable
from xedge.errors import UsageError

SUMMARY = "folder:DIR: pictures in class folders (train/ and val/, or split by the seed), or a flat folder, unlabelled"

EXTENSIONS = frozenset((".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"))
OPTIONS = ("size", "resize", "limit", "mean", "std", "crops", "interpolation", "select", "cache")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HEADERS_CHECKED = 10_000


@dataclass(frozen=True)
class View:
    """How a picture becomes an input: the same preprocessing as torchvision's presets.

    Attributes:
        size: of the square input, in pixels.
        resize: the shorter side before the centre crop of `size`.
        interpolation: PIL's filter, always antialiased.
        crops: 1 for the centre crop; otherwise so many random square regions a picture, each between `size` pixels
            and the whole shorter side wide (uniform in the logarithm), resized to `size`.
        seed: of the random regions, which depend on it, on the file's name and on the number of the crop only.
    """

    size: int
    resize: int
    interpolation: InterpolationMode
    crops: int
    seed: int

    def crop(self, picture: Image.Image, name: str, number: int) -> Image.Image:
        """The `number`-th crop of an RGB picture, `size` pixels square."""
        if self.crops == 1:
            small = tv.resize(picture, [self.resize], self.interpolation)
            cut: Image.Image = tv.center_crop(small, [self.size, self.size])
            return cut
        digest = hashlib.sha256(f"{self.seed}/{name}/{number}".encode()).digest()
        u, v, w = (int.from_bytes(digest[8 * i : 8 * i + 8], "big") / 2.0**64 for i in range(3))
        short = min(picture.size)
        side = round(math.exp(math.log(min(self.size, short)) * (1 - u) + math.log(short) * u))
        left, top = int(v * (picture.width - side + 1)), int(w * (picture.height - side + 1))
        region: Image.Image = tv.resized_crop(
            picture, top, left, side, side, [self.size, self.size], self.interpolation
        )
        return region


class Pictures(Dataset[tuple[Tensor, int]]):
    """Pictures decoded when they are read, and kept as uint8 up to a limit of memory.

    Args:
        root: the folder.
        names: of the pictures, relative to it with slashes, so that random crops do not change when the folder moves.
        labels: one for each picture.
        view: the preprocessing; each picture counts `view.crops` times, its crops in a row.
        mean, std: per channel, on the scale 0..1.
        cache_bytes: how much to keep of what has been decoded.
    """

    def __init__(
        self,
        root: Path,
        names: Sequence[str],
        labels: Sequence[int],
        view: View,
        mean: Sequence[float],
        std: Sequence[float],
        cache_bytes: int,
    ) -> None:
        self.root, self.names, self.targets, self.view = root, list(names), list(labels), view
        self._scale = (1.0 / (255.0 * torch.tensor(std, dtype=torch.float64))).float().view(3, 1, 1)
        self._offset = (-torch.tensor(mean, dtype=torch.float64) / torch.tensor(std)).float().view(3, 1, 1)
        self._room = cache_bytes // (3 * view.size**2)
        self._kept: dict[int, Tensor] = {}
        self._last: tuple[str, Image.Image] | None = None

    @property
    def labels(self) -> Tensor:
        """int64 [N], crops counted."""
        return torch.tensor(self.targets, dtype=torch.int64).repeat_interleave(self.view.crops)

    def __len__(self) -> int:
        return len(self.names) * self.view.crops

    def _pixels(self, index: int) -> Tensor:
        """uint8 [3, size, size]."""
        if index in self._kept:
            return self._kept[index]
        at, number = divmod(index, self.view.crops)
        name = self.names[at]
        if self._last is None or self._last[0] != name:
            self._last = (name, decode(self.root / name))
        crop = self.view.crop(self._last[1], name, number)
        pixels = torch.from_numpy(np.array(crop)).permute(2, 0, 1).contiguous()
        if len(self._kept) < self._room:
            self._kept[index] = pixels
        return pixels

    def batch(self, indices: Sequence[int] | Tensor) -> Batch:
        """All of `indices` at once."""
        rows = [range(len(self))[int(i)] for i in indices]
        x = torch.stack([self._pixels(i) for i in rows]).float().mul_(self._scale).add_(self._offset)
        return x, torch.tensor([self.targets[i // self.view.crops] for i in rows], dtype=torch.int64)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        x, y = self.batch([index])
        return x[0], int(y[0])

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, int]]:
        x, y = self.batch(indices)
        return list(zip(x.unbind(), y.tolist(), strict=True))


# -- finding the pictures --------------------------------------------------------------------------------------------


def pictures_in(folder: Path, *, deep: bool) -> list[str]:
    """The pictures of a folder (and of the folders in it), sorted by name, relative to it; hidden ones are left out.

    Strings and no stat per file: ImageNet has 1.3 million.
    """
    found = []
    for here, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [f for f in folders if deep and not f.startswith(".")]
        prefix = Path(here).relative_to(folder).as_posix() + "/" if here != str(folder) else ""
        found += [prefix + f for f in files if not f.startswith(".") and os.path.splitext(f)[1].lower() in EXTENSIONS]
    return sorted(found)


def class_folders(folder: Path) -> tuple[str, ...]:
    """The folders in `folder`, sorted by name, hidden ones left out: the order of torchvision's ImageFolder."""
    return tuple(sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")))


Part = tuple[list[str], list[int]]
"""Names of pictures, relative to the folder given, and labels."""


@dataclass(frozen=True)
class Found:
    """What a folder holds: official train and val where it has them (`val` None otherwise); no names = unlabelled."""

    train: Part
    val: Part | None
    names: tuple[str, ...]


def find(folder: Path) -> Found:
    """Recognise the layout: train/ and val/ (of class folders, or flat), class folders alone, or a flat folder.

    Raises:
        UsageError: no such folder, no pictures, half a layout, a single class, or pictures beside class folders.
    """
    if not folder.is_dir():
        raise UsageError("there is no such folder", where=str(folder), fix="check the path after the colon")
    try:
        below = class_folders(folder)
        if not {"train", "val"} & set(below):
            return Found(listing(folder, "", below), None, below)
        for part in ("train", "val"):
            if part not in below:
                raise UsageError(
                    f"has no {part}/", where=str(folder), fix="give train/ and val/, or class folders alone"
                )
        names, of_val = class_folders(folder / "train"), class_folders(folder / "val")
        if bool(names) != bool(of_val):
            raise UsageError(
                "one of train/ and val/ has class folders, the other not", where=str(folder), fix="lay both out alike"
            )
        if strange := set(of_val) - set(names):
            raise UsageError(
                f"val/ has a class folder {min(strange)} that train/ has not",
                where=str(folder),
                fix="name the classes alike in both",
            )
        return Found(listing(folder, "train/", names), listing(folder, "val/", names), names)
    except PermissionError as e:
        raise UsageError("may not be read", where=str(e.filename), fix="check its permissions") from e


def listing(root: Path, prefix: str, names: tuple[str, ...]) -> Part:
    """The pictures of root/prefix: of its class folders when there are `names`, of a flat folder otherwise.

    Raises:
        UsageError: no pictures, a class folder without any, a single class, or pictures beside class folders.
    """
    folder = root / prefix
    flat = pictures_in(folder, deep=False)
    if not names:
        if not flat:
            known = ", ".join(sorted(e[1:] for e in EXTENSIONS))
            raise UsageError("holds no pictures", where=str(folder), fix=f"xedge reads {known}")
        return [prefix + f for f in flat], [UNLABELLED] * len(flat)
    if flat:
        raise UsageError(
            f"holds both class folders ({names[0]}) and pictures ({flat[0]})",
            where=str(folder),
            fix="move the pictures into class folders, or give a flat folder",
        )
    if len(names) == 1:
        raise UsageError(
            f"has a single class folder, {names[0]}",
            where=str(folder),
            fix=f"give two classes or more, or folder:{folder / names[0]} as unlabelled pictures",
        )
    files: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        if not (folder / name).is_dir():  # val/ need not have every class
            continue
        found = pictures_in(folder / name, deep=True)
        if not found:
            raise UsageError("is a class folder without pictures", where=str(folder / name), fix="remove it or fill it")
        files += [f"{prefix}{name}/{f}" for f in found]
        labels += [label] * len(found)
    return files, labels


def copies_of_others(root: Path, names: Sequence[str]) -> set[int]:
    """Positions of the files that are byte for byte an earlier one. Only files of equal size are read.

    Raises:
        UsageError: a file cannot be read; it is named.
    """
    by_size: dict[int, list[int]] = {}
    copies: set[int] = set()
    try:
        for i, name in enumerate(names):
            by_size.setdefault((root / name).stat().st_size, []).append(i)
        for alike in by_size.values():
            seen: set[bytes] = set()
            for i in alike if len(alike) > 1 else ():
                digest = hashlib.sha256((root / names[i]).read_bytes()).digest()
                if digest in seen:
                    copies.add(i)
                seen.add(digest)
    except OSError as e:
        raise unreadable(root / name, e) from e
    return copies


def check_headers(root: Path, names: Sequence[str], seed: int) -> None:
    """Open pictures, all or a sample of them, without decoding, so that a wrong file fails now and not after an hour.

    Raises:
        UsageError: one of them is not a picture; it is named.
    """
    for i in permutation(len(names), seed, "headers")[:HEADERS_CHECKED].tolist():
        try:
            with Image.open(root / names[i]):
                pass
        except UNREADABLE as e:
            raise unreadable(root / names[i], e) from e


def check_whole(files: Sequence[Path]) -> list[tuple[int, int]]:
    """Read every picture to its end, keeping none, so that a damaged one is found now and not after hours.

    A PNG by the checksums of its chunks, a JPEG at an eighth of its size (2 and 6 ms of a core for 2040x1356 pixels,
    where decoding takes 104 and 39), others as they are.

    Returns:
        Their sizes, (width, height) as stored.

    Raises:
        UsageError: the first that is damaged, truncated, or not a picture; it is named.
    """

    def check(path: Path) -> tuple[int, int]:
        try:
            with Image.open(path) as file:
                size = file.size
                if file.mode == "F":
                    raise ValueError(NO_RANGE)
                if file.format == "PNG":
                    file.verify()
                else:
                    file.draft("L", (1, 1))
                    file.load()
                return size
        except UNREADABLE as e:
            raise unreadable(path, e) from e

    # Pillow's decoders let go of the interpreter's lock; what they warn of ends in an error, or is harmless
    with warnings.catch_warnings(action="ignore"), ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(check, files))


# -- the data --------------------------------------------------------------------------------------------------------


def load(path: str | None, options: Mapping[str, str], *, root: Path | None, seed: int) -> Data:
    """Pictures from ``folder:DIR`` (relative to `root` when there is one and no such folder is here).

    - DIR/train and DIR/val, of class folders or both flat: those splits.
    - DIR/CLASS/...: a seeded, stratified fifth becomes val.
    - DIR/*.jpg: unlabelled; a seeded fifth becomes val.

    `select` is a seeded, stratified tenth of train. A picture, with all its crops, is in one split only.

    Options: ``size`` (224), ``resize`` (shorter side before the centre crop; size * 256 / 224), ``limit`` (pictures
    of train and of val, or of the folder when it has one part), ``mean`` and ``std`` (of ImageNet), ``crops`` (random
    regions a picture; 1 is the centre crop), ``interpolation`` (bilinear, bicubic, lanczos, box, hamming, nearest),
    ``select`` (fraction of train held back), ``cache`` (megabytes of decoded pictures kept; 512).
    """
    return build("folder", path, options, root=root, seed=seed)


def build(
    kind: str, path: str | None, options: Mapping[str, str], *, root: Path | None, seed: int, classes: int | None = None
) -> Data:
    """`load`, for `kind` "folder" or "imagenet"; `classes` is the number required, with train/ and val/."""
    if path is None:
        raise UsageError("needs a folder", where=kind, fix=f"write {kind}:DIR")
    opts = Options.of(f"{kind}:{path}", options, OPTIONS)
    size = opts.integer("size", low=8, high=4096) or 224
    view = View(
        size=size,
        resize=opts.integer("resize", low=size, high=8192) or round(size * 256 / 224),
        interpolation=InterpolationMode(opts.choice("interpolation", "bilinear", (m.value for m in InterpolationMode))),
        crops=opts.integer("crops", high=10000) or 1,
        seed=seed,
    )
    mean = opts.numbers("mean", count=3) or IMAGENET_MEAN
    std = opts.numbers("std", count=3, positive=True) or IMAGENET_STD
    megabytes = opts.integer("cache", low=0, high=1 << 20)
    limit, select = opts.integer("limit"), opts.fraction("select", 0.1)

    folder = Path(path)
    if root is not None and not folder.is_dir() and (root / folder).is_dir():
        folder = root / folder
    found = find(folder)
    if classes is not None and (found.val is None or len(found.names) != classes):
        has = f"{len(found.names)} classes" if found.val else "no train/ and val/"
        raise UsageError(
            f"has {has}, not train/ and val/ of {classes} class folders", where=str(folder), fix="or use folder:DIR"
        )
    notes: list[str] = []
    if limit is not None:
        notes.append(f"limited to {limit} pictures of {'each of train and val' if found.val else 'the folder'}")
    if view.crops > 1:
        notes.append(f"{view.crops} random regions of each picture; all regions of a picture are in one split")

    def part(of: Part, rows: Tensor) -> Part:
        return [of[0][i] for i in rows.tolist()], [of[1][i] for i in rows.tolist()]

    def limited(of: Part) -> Part:
        if limit is None or limit >= len(of[0]):
            return of
        return part(of, split(torch.tensor(of[1]), limit, seed, "limit", cover=False)[1])

    train, val = limited(found.train), found.val and limited(found.val)
    if val is None:
        if copies := copies_of_others(folder, train[0]):
            train = part(train, torch.tensor([i for i in range(len(train[0])) if i not in copies]))
            notes.append(f"{len(copies)} exact copies of pictures were left out, so that val shares none with train")
        rest, held = split(torch.tensor(train[1]), round(len(train[0]) / 5), seed, "folder val")
        notes.append("the folder has no split of its own: val is a seeded fifth")
        val, train = part(train, held), part(train, rest)
    rest, held = split(torch.tensor(train[1]), round(select * len(train[0])), seed, "select")
    select_part, train = part(train, held), part(train, rest)
    if not (train[0] and select_part[0] and val[0]):
        raise UsageError(
            "has too few pictures to give train, select and val one each",
            where=str(folder),
            fix="give three pictures or more, or two of a class",
        )
    check_headers(folder, [*train[0], *select_part[0], *val[0]], seed)
    room = (512 if megabytes is None else megabytes) << 20
    total = len(train[0]) + len(select_part[0]) + len(val[0])

    def pictures(of: Part) -> Pictures:
        return Pictures(folder, of[0], of[1], view, mean, std, room * len(of[0]) // total)

    return Data(
        name=f"{kind}:{folder.name}",
        train=pictures(train),
        select=pictures(select_part),
        val=pictures(val),
        classes=len(found.names) or None,
        class_names=found.names,
        shape=(3, size, size),
        augment=ZoomFlip() if found.names else None,
        mean=mean,
        std=std,
        source=str(folder),
        notes=tuple(notes),
    )
