"""MNIST (LeCun et al. 1998), in the IDX files that torchvision downloads too."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from xedge.augment import CropFlip, black
from xedge.calibration.fashion_mnist import FIRST_LABELS, find, locate, read_official
from xedge.data import Data, Options, from_tensors
from xedge.errors import UsageError

SUMMARY = "MNIST: 60000 + 10000 handwritten digits, 28x28 grey, 10 classes"

MEAN, STD = (0.1307,), (0.3081,)
FIX = "give --data-root DIR with the four .gz files of MNIST, or use the data sets digits or fashion-mnist"


def load(path: str | None, options: Mapping[str, str], *, root: Path | None, seed: int) -> Data:
    """MNIST as float32 [1, 28, 28]: from ``mnist:DIR``, from `root` (torchvision's layout too), or downloaded.

    Options: ``limit`` (images of each official split), ``select`` (fraction of train held back).
    """
    from torchvision.datasets import MNIST

    opts = Options.of("mnist", options, ("limit", "select"))
    if path is not None and find([Path(path)]) is None:
        raise UsageError("does not hold the four IDX files", where=path, fix=FIX)
    base = [Path(path)] if path is not None else []
    if root is not None:
        base += [root / "mnist", root / "MNIST" / "raw", root]
    files = locate("mnist", base, root, MNIST.mirrors, dict(MNIST.resources), FIX)
    train, val = read_official(files, 10, other=FIRST_LABELS)
    return from_tensors(
        "mnist",
        train,
        val,
        seed=seed,
        classes=10,
        class_names=tuple("0123456789"),
        mean=MEAN,
        std=STD,
        augment=CropFlip(padding=2, fill=black(MEAN, STD)),
        source=str(files[0].parent),
        select=opts.fraction("select", 0.1),
        limit=opts.integer("limit"),
    )
