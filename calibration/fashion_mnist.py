"""Fashion-MNIST (Xiao et al. 2017, arXiv:1708.07747), and the reader of the IDX files it shares with MNIST."""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from xedge.augment import CropFlip, black
from xedge.data import Data, Options, as_tensor, cache_folder, fetch, from_tensors
from xedge.errors import UsageError

SUMMARY = "Fashion-MNIST: 60000 + 10000 pictures of clothes, 28x28 grey, 10 classes"

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
MEAN, STD = (0.2860,), (0.3530,)
NAMES_OF_CLASSES = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
# IDX files carry no name, and those of MNIST and Fashion-MNIST are called alike: the first labels tell them apart.
FIRST_LABELS = (9, 0, 0, 3, 0, 2, 7, 2, 5, 5)
FIRST_LABELS_OF_MNIST = (5, 0, 4, 1, 9, 2, 1, 3, 1, 4)
FIX = "apt-get install dataset-fashion-mnist, or give --data-root DIR with the four .gz files"

FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def read_idx(path: Path, dimensions: int) -> Tensor:
    """An IDX file of unsigned bytes, plain or gzipped, as uint8 with `dimensions` dimensions.

    The header is two zero bytes, the type (8 = unsigned byte), the number of dimensions, and each of them as a big
    endian 32-bit number (http://yann.lecun.com/exdb/mnist). No more is unpacked than the header announces.

    Raises:
        UsageError: not this format, truncated, or longer than its header says; the file is named.
    """
    fix = "download or install it again"
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            head = file.read(4 + 4 * dimensions)
            if len(head) < 4 + 4 * dimensions or head[:4] != bytes((0, 0, 8, dimensions)):
                raise UsageError(f"is not an IDX file of {dimensions} dimensions", where=str(path), fix=fix)
            shape = struct.unpack(f">{dimensions}I", head[4:])
            size = int(np.prod(shape, dtype=np.uint64))
            if not 0 < size <= 1 << 31:
                raise UsageError(f"announces an impossible size {shape}", where=str(path), fix=fix)
            body = file.read(size + 1)
    except (OSError, EOFError, zlib.error) as e:
        raise UsageError(f"cannot be read ({e})", where=str(path), fix=fix) from e
    if len(body) != size:
        state = "is truncated" if len(body) < size else "is longer than its header says"
        raise UsageError(f"{state}: {size} bytes announced, {min(len(body), size)} there", where=str(path), fix=fix)
    return as_tensor(np.frombuffer(body, np.uint8).reshape(shape))


def find(folders: Sequence[Path]) -> list[Path] | None:
    """The four files, gzipped or plain, in the first folder that has them all."""
    for folder in folders:
        found = []
        for name in FILES:
            here = [p for p in (folder / f"{name}.gz", folder / name) if p.is_file()]
            found += here[:1]
        if len(found) == len(FILES):
            return found
    return None


def read_official(
    files: Sequence[Path], classes: int, *, other: tuple[int, ...]
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(train images, labels), (test images, labels) from the four files in the order of FILES.

    Args:
        other: the first training labels of the data set that has the same file names.

    Raises:
        UsageError: images and labels do not match, a label is out of range, or it is the other data set.
    """
    sets = []
    for images_at, labels_at in zip(files[::2], files[1::2], strict=True):
        images, labels = read_idx(images_at, 3), read_idx(labels_at, 1).to(torch.int64)
        if tuple(images.shape[1:]) != (28, 28):
            raise UsageError(f"pictures are {tuple(images.shape[1:])}, not (28, 28)", where=str(images_at))
        if len(images) != len(labels):
            raise UsageError(f"{len(labels)} labels for {len(images)} pictures", where=str(labels_at))
        if int(labels.max()) >= classes:
            raise UsageError(f"label {int(labels.max())} of {classes} classes", where=str(labels_at))
        sets.append((images.unsqueeze(1), labels))
    if tuple(sets[0][1][: len(other)].tolist()) == other:
        raise UsageError(
            "these are the files of the other one of MNIST and Fashion-MNIST",
            where=str(files[1]),
            fix="check --data and --data-root",
        )
    return sets[0], sets[1]


def locate(
    name: str, folders: Sequence[Path], root: Path | None, mirrors: Sequence[str], md5: Mapping[str, str], fix: str
) -> list[Path]:
    """The four files: in one of `folders`, or downloaded under `root` (the user's cache when None)."""
    if files := find(folders):
        return files
    folder = (root or cache_folder()) / name
    return find([folder]) or [
        fetch([m + f"{n}.gz" for m in mirrors], folder / f"{n}.gz", md5=md5[f"{n}.gz"], fix=fix) for n in FILES
    ]


def load(path: str | None, options: Mapping[str, str], *, root: Path | None, seed: int) -> Data:
    """Fashion-MNIST as float32 [1, 28, 28]: from ``fashion-mnist:DIR``, from `root`, from Debian's package
    dataset-fashion-mnist, or downloaded.

    Options: ``limit`` (images of each official split), ``select`` (fraction of train held back).
    """
    from torchvision.datasets import FashionMNIST

    opts = Options.of("fashion-mnist", options, ("limit", "select"))
    if path is not None and find([Path(path)]) is None:
        raise UsageError("does not hold the four IDX files", where=path, fix=FIX)
    base = [Path(path)] if path is not None else []
    if root is not None:
        base += [root, root / "fashion-mnist", root / "FashionMNIST" / "raw"]
    files = locate("fashion-mnist", [*base, DEBIAN], root, FashionMNIST.mirrors, dict(FashionMNIST.resources), FIX)
    train, val = read_official(files, 10, other=FIRST_LABELS_OF_MNIST)
    return from_tensors(
        "fashion-mnist",
        train,
        val,
        seed=seed,
        classes=10,
        class_names=NAMES_OF_CLASSES,
        mean=MEAN,
        std=STD,
        augment=CropFlip(padding=2, fill=black(MEAN, STD), flip=True),
        source=str(files[0].parent),
        select=opts.fraction("select", 0.1),
        limit=opts.integer("limit"),
    )
