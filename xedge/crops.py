"""What a compressed net makes of held-out pictures, to look at: crops side by side, with PSNR and SSIM of each crop."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from xedge.data import Picture, spread
from xedge.image_metrics import luma, psnr, ssim
from xedge.judge import MOST_DB
from xedge.report import Crop
from xedge.resample import imresize, to_bytes
from xedge.target import Target
from xedge.upscale import Engine

FOLDER = "crops"
SIDE = 120
"""Pixels of a crop, at most: four beside each other, each twice as large, fit the page."""
MOST = 3
"""Pictures that are shown."""

Bytes = NDArray[np.uint8]


def crops(run: Path, target: Target, form: str, pictures: Sequence[Picture], folder: Path) -> None:
    """Cut the busiest part out of some pictures and write it as each model restores it, and `crops.json`.

    Args:
        run: with the graphs of the original and of `target`'s artefact. form: the artefact's.
        folder: to write into; it is made.
    """
    folder.mkdir()
    original, compressed = (Engine.of(run, target, form, original=one) for one in (True, False))
    reached = [e.reach.radius for e in (original, compressed) if e.reach is not None]
    rows: list[dict[str, Any]] = []
    for at in spread(len(pictures), min(MOST, len(pictures))).tolist():
        small, truth = pictures[at].load()
        scale = truth.shape[0] // small.shape[0]
        top, left, side = busiest(truth, scale)
        # As much of the input around the crop as its pixels depend on, and as bicubic reads.
        margin = max([4, *reached])
        y, x, n = top // scale, left // scale, side // scale
        y0, x0 = max(0, y - margin), max(0, x - margin)
        window = np.ascontiguousarray(small[y0 : y + n + margin, x0 : x + n + margin])
        inside = np.s_[scale * (y - y0) : scale * (y - y0 + n), scale * (x - x0) : scale * (x - x0 + n)]
        plain = to_bytes(imresize(window, scale * window.shape[0], scale * window.shape[1]))[inside]
        shown = {
            "bicubic" if scale > 1 else "input": plain,
            "original": original(window)[0][inside],
            "compressed": compressed(window)[0][inside],
            "truth": truth[top : top + side, left : left + side],
        }
        files = {}
        for name, pixels in shown.items():
            files[name] = f"{len(rows)}-{name}.png"
            Image.fromarray(pixels).save(folder / files[name], optimize=True)
        rows.append(asdict(_crop(pictures[at].name, target.name, (left, top, side), shown, files)))
    (folder / "crops.json").write_text(json.dumps(rows, sort_keys=True) + "\n")


def _crop(
    picture: str, target: str, where: tuple[int, int, int], shown: dict[str, Bytes], files: dict[str, str]
) -> Crop:
    planes = {n: torch.from_numpy(p / np.float32(255)).permute(2, 0, 1) for n, p in shown.items()}
    truth = planes.pop("truth")
    return Crop(
        picture=picture,
        target=target,
        left=where[0],
        top=where[1],
        side=where[2],
        psnr={n: min(psnr(truth, p), MOST_DB) for n, p in planes.items()},
        ssim={n: ssim(truth, p) for n, p in planes.items()},
        files=files,
    )


def busiest(truth: Bytes, scale: int) -> tuple[int, int, int]:
    """(top, left, side) of the square where Y changes most from pixel to pixel, in multiples of `scale`."""
    y = luma(torch.from_numpy(truth / np.float32(255)).permute(2, 0, 1))
    side = min(SIDE, *y.shape) // scale * scale
    change = (y[1:, 1:] - y[:-1, 1:]).abs() + (y[1:, 1:] - y[1:, :-1]).abs()
    change = torch.nn.functional.pad(change, (0, 1, 0, 1))[None, None]
    stride = max(scale, side // 4 // scale * scale)
    sums = torch.nn.functional.avg_pool2d(change, side, stride)[0, 0]
    row, column = divmod(int(sums.argmax()), sums.shape[1])
    return row * stride, column * stride, side


def read(folder: Path) -> tuple[Crop, ...]:
    """What `crops` wrote."""
    return tuple(Crop(**row) for row in json.loads((folder / "crops.json").read_text()))
