"""Bicubic resizing as MATLAB's imresize does it, which is what super-resolution is trained and judged on.

Keys' cubic kernel with a = -0.5 (IEEE Trans. ASSP 29(6), 1981, eq. 15), widened by the factor when the picture shrinks
(that is the antialiasing), weights normalised, and the border mirrored with its edge pixel repeated. Pillow's BICUBIC
is the same inside the picture; at the border it cuts the kernel off instead of mirroring.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray


def cubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys' kernel with a = -0.5."""
    x = np.abs(x)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x <= 1, near, np.where(x <= 2, far, 0.0))


def taps(size: int, out: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Along one axis: weights [out, P] and the positions [out, P] in 0..size-1 that they stand at."""
    factor = out / size
    stretch = min(factor, 1.0)
    width = 4 / stretch
    centre = (np.arange(out) + 0.5) / factor - 0.5
    left = np.floor(centre - width / 2).astype(np.int64)
    at = left[:, None] + np.arange(math.ceil(width) + 2)
    weights = cubic(stretch * (centre[:, None] - at))
    weights /= weights.sum(1, keepdims=True)
    used = (np.abs(weights) > 0).any(0)
    around = at[:, used] % (2 * size)
    return weights[:, used], np.where(around < size, around, 2 * size - 1 - around)


def imresize(picture: NDArray[Any], height: int, width: int) -> NDArray[np.float64]:
    """A picture [H, W, ...] of any real type -> float64 [height, width, ...], neither rounded nor clipped."""
    result = picture.astype(np.float64)
    for axis, out in enumerate((height, width)):
        weights, at = taps(result.shape[axis], out)
        shape = [1] * result.ndim
        shape[axis] = out
        before, result = result, np.zeros((*result.shape[:axis], out, *result.shape[axis + 1 :]))
        for w, i in zip(weights.T, at.T, strict=True):
            result += w.reshape(shape) * before.take(i, axis)
    return result


def to_bytes(picture: NDArray[Any]) -> NDArray[np.uint8]:
    """A picture on the scale 0..255, clipped and rounded (halves upwards, as MATLAB's uint8)."""
    return np.asarray(np.floor(np.clip(picture, 0, 255) + 0.5), np.uint8)
