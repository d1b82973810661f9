"""ImageNet (ILSVRC 2012): train/ and val/ of 1000 class folders each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from xedge.calibration.folder import build
from xedge.data import Data

SUMMARY = "imagenet:DIR: ILSVRC 2012, train/ and val/ of 1000 class folders, 224x224 after resizing to 256"


def load(path: str | None, options: Mapping[str, str], *, root: Path | None, seed: int) -> Data:
    """ImageNet from ``imagenet:DIR``, or from `root` when no DIR is given.

    Class numbers are the positions of the sorted folder names (the WordNet ids), as in torchvision and timm. `val`
    is the official validation set (ImageNet's test labels are not public); ranking and calibration read train/ only,
    so a copy of val/ alone is refused.

    Options: as of ``folder``.
    """
    if path is None and root is not None:
        path = str(root)
    return build("imagenet", path, options, root=root, seed=seed, classes=1000)
