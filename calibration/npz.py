"""Arrays of a user's own, from one .npz file."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xedge.data import Data, Options, as_tensor, from_tensors, split
from xedge.errors import UsageError

SUMMARY = "npz:FILE: arrays x [N, C, H, W] and y [N], or x_train, y_train, x_val, y_val; without y it is unlabelled"

FIX = "save it with numpy.savez(FILE, x=..., y=...)"


def read(path: Path) -> dict[str, NDArray[Any]]:
    """Every array of the file, by name. Object arrays are pickles and are refused.

    Raises:
        UsageError: missing, not an npz file, damaged, or holding Python objects.
    """
    if not path.is_file():
        raise UsageError("there is no such file", where=str(path), fix="check the path after npz:")
    try:
        with path.open("rb") as stream:
            file = np.load(stream, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise UsageError("is a single array, not an npz file", where=str(path), fix=FIX)
            with file:
                return {name: file[name] for name in file.files}
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as e:
        raise UsageError(f"cannot be read ({str(e) or type(e).__name__})", where=str(path), fix=FIX) from e


def images(array: NDArray[Any], where: str, layout: str) -> Tensor:
    """Images as uint8 or float32 [N, C, H, W]; `layout` is nchw, nhwc, or empty when the user did not say.

    Raises:
        UsageError: another number of dimensions or type, no image, or a value that is not finite.
    """
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4 and layout == "nhwc":
        array = array.transpose(0, 3, 1, 2)
    if array.ndim != 4 or 0 in array.shape:
        raise UsageError(f"has shape {array.shape}, not [N, C, H, W]", where=where, fix="reshape it")
    if not layout and array.shape[3] in (1, 3, 4) and array.shape[1] > 4:
        raise UsageError(
            f"has shape {array.shape}, with the channels last", where=where, fix="add ?layout=nhwc, or transpose it"
        )
    if array.dtype == np.uint8:
        return as_tensor(np.ascontiguousarray(array))
    if array.dtype.kind != "f":
        raise UsageError(f"is {array.dtype}, neither uint8 nor floating point", where=where, fix="convert it")
    with np.errstate(over="ignore"):
        array = np.ascontiguousarray(array, dtype=np.float32)
    if not np.isfinite(array).all():
        bad = int(np.flatnonzero(~np.isfinite(array).all(axis=(1, 2, 3)))[0])
        raise UsageError(f"image {bad} holds NaN or infinity", where=where, fix="remove or repair it")
    return as_tensor(array)


def labels(array: NDArray[Any], count: int, where: str) -> Tensor:
    """Class numbers as int64 [N]; [N, 1] is taken too.

    Raises:
        UsageError: not integers, another length, or negative.
    """
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise UsageError(
            f"is {array.dtype} {array.shape}, not whole numbers [N]",
            where=where,
            fix="store class numbers, not one-hot",
        )
    if len(array) != count:
        raise UsageError(f"has {len(array)} labels for {count} images", where=where, fix="store one label an image")
    if array.min() < 0:
        raise UsageError(f"holds {array.min()}", where=where, fix="number the classes from 0")
    return as_tensor(array.astype(np.int64))


def load(path: str | None, options: Mapping[str, str], *, root: Path | None, seed: int) -> Data:
    """Arrays from ``npz:FILE`` (relative to `root` when there is one and no such file is here).

    With x_train and y_train, and x_val (or x_test) and y_val, the splits are the file's own. With one array of
    images (``x``, or the name of the model's input) and perhaps ``y``, a stratified fifth becomes val.
    float32 is taken as it is, which is how calibration arrays are stored; uint8 is divided by 255.

    Options: ``x``, ``y`` (names of the arrays), ``layout`` (nchw, nhwc), ``mean``, ``std`` (subtracted and divided,
    one number or one for each channel), ``classes``, ``limit`` (images of train and of val), ``select`` (fraction of
    train held back).
    """
    known = ("x", "y", "layout", "mean", "std", "classes", "limit", "select")
    if path is None:
        raise UsageError("needs a file", where="npz", fix="write npz:FILE")
    opts = Options.of(f"npz:{path}", options, known)
    file = Path(path)
    if root is not None and not file.is_file() and (root / file).is_file():
        file = root / file
    arrays = read(file)
    layout = opts.choice("layout", "", ("nchw", "nhwc", ""))

    def get(key: str) -> tuple[Tensor, Tensor | None, str]:
        """The images called `key`, the labels that belong to them, and where they are."""
        where = f"{file}, array {key}"
        x = images(arrays[key], where, layout)
        names = (opts.values["y"],) if "y" in opts.values else (f"y{key[1:]}",) if key[:2] == "x_" else ("y", "labels")
        found = [name for name in names if name in arrays]
        if "y" in opts.values and not found:
            raise UsageError(f"has no array {names[0]!r}", where=str(file), fix=f"it has {', '.join(sorted(arrays))}")
        y = labels(arrays[found[0]], len(x), f"{file}, array {found[0]}") if found else None
        return x, y, where

    notes: tuple[str, ...] = ()
    if "x_train" in arrays and "x" not in options:
        x, y, where = get("x_train")
        val_key = next((k for k in ("x_val", "x_test") if k in arrays), None)
    else:
        x, y, where = get(_only_images(arrays, options, str(file)))
        val_key = None
    if val_key is None:
        first = _without_copies(x)
        if len(first) < 3:
            raise UsageError(
                f"{len(first)} different images cannot be split into train, select and val",
                where=where,
                fix="give more",
            )
        copies = len(x) - len(first)
        x, y = x[first], None if y is None else y[first]
        held = torch.full((len(x),), 0) if y is None else y
        rest, part = split(held, max(1, len(x) // 5), 0, "npz val")
        xv, yv = x[part], None if y is None else y[part]
        x, y = x[rest], None if y is None else y[rest]
        notes = ("the file has no split of its own: val is a fixed, stratified fifth",)
        if copies:
            notes += (f"{copies} exact copies of images were left out, so that val shares none with train",)
    else:
        xv, yv, where_val = get(val_key)
        if xv.shape[1:] != x.shape[1:] or xv.dtype != x.dtype:
            raise UsageError(
                f"is {xv.dtype} {tuple(xv.shape[1:])}, unlike {where}", where=where_val, fix="store it alike"
            )
        if (y is None) != (yv is None):
            raise UsageError("only one of the two splits has labels", where=str(file), fix="store y_train and y_val")
    classes = None
    if y is not None and yv is not None:
        highest = int(max(y.max(), yv.max()))
        classes = opts.integer("classes", low=2) or highest + 1
        if highest >= classes:
            raise UsageError(f"label {highest} of {classes} classes", where=str(file), fix="check y or ?classes=")
        if classes < 2:
            raise UsageError("all labels are 0: one class", where=str(file), fix="give labels of two classes or more")
    channels = x.shape[1]
    return from_tensors(
        file.stem,
        (x, y),
        (xv, yv),
        seed=seed,
        classes=classes,
        mean=opts.numbers("mean", count=channels) or (),
        std=opts.numbers("std", count=channels, positive=True) or (),
        source=str(file),
        notes=notes,
        select=opts.fraction("select", 0.1),
        limit=opts.integer("limit"),
    )


def _without_copies(x: Tensor) -> Tensor:
    """Positions, int64 [M], of the images [N, C, H, W] that are not byte for byte an earlier one."""
    first = {hashlib.sha256(row.numpy().tobytes()).digest(): i for i, row in reversed(list(enumerate(x)))}
    return torch.tensor(sorted(first.values()), dtype=torch.int64)


def _only_images(arrays: Mapping[str, NDArray[Any]], options: Mapping[str, str], where: str) -> str:
    """The name of the array of images: option x, "x", or the only array of 3 or 4 dimensions."""
    if "x" in options:
        if options["x"] not in arrays:
            raise UsageError(f"has no array {options['x']!r}", where=where, fix=f"it has {', '.join(sorted(arrays))}")
        return options["x"]
    if "x" in arrays:
        return "x"
    pictures = [name for name, array in arrays.items() if array.ndim in (3, 4)]
    if len(pictures) != 1:
        raise UsageError(
            f"holds {', '.join(sorted(arrays)) or 'nothing'}, of which {len(pictures)} look like images [N, C, H, W]",
            where=where,
            fix="name the array with ?x=NAME",
        )
    return pictures[0]
