"""scikit-learn's handwritten digits: 1797 pictures, inside the package, so that a first run needs no network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch.nn import functional

from xedge.augment import CropFlip, black
from xedge.data import Data, Options, from_tensors, split
from xedge.errors import UsageError

SUMMARY = "1797 handwritten digits of scikit-learn, 8x8 made 28x28, 10 classes, offline"

# Of the 80 % that is not val, on the scale 0..1, after the enlarging.
MEAN, STD = (0.3050,), (0.3245,)


def load(path: str | None, options: Mapping[str, str], *, root: Path | None, seed: int) -> Data:
    """The digits as float32 [1, 28, 28], ten classes.

    scikit-learn ships no official split. `val` is a stratified fifth that does not depend on `seed`, so that results
    of different seeds compare; `select` is a stratified tenth of the rest, and does.

    Options: ``limit`` (images of train and of val), ``select`` (fraction held back). `root` is not used.
    """
    from sklearn.datasets import load_digits  # half a second, and only here

    if path is not None:
        raise UsageError("takes no path", where=f"digits:{path}", fix="write digits alone, or folder:DIR")
    opts = Options.of("digits", options, ("limit", "select"))
    bunch = load_digits()
    small = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16.0  # 0..16 in the file
    images = functional.interpolate(small, size=(28, 28), mode="bilinear", align_corners=False)
    labels = torch.tensor(bunch.target, dtype=torch.int64)
    rest, held = split(labels, len(labels) // 5, 0, "digits val")
    return from_tensors(
        "digits",
        (images[rest], labels[rest]),
        (images[held], labels[held]),
        seed=seed,
        classes=10,
        class_names=tuple("0123456789"),
        mean=MEAN,
        std=STD,
        augment=CropFlip(padding=2, fill=black(MEAN, STD)),
        source="sklearn.datasets.load_digits",
        notes=("scikit-learn has no official test split: val is a fixed, stratified fifth",),
        select=opts.fraction("select", 0.1),
        limit=opts.integer("limit"),
    )
