"""A net that enlarges pictures twice and data for it, so small that a whole `xedge compress` takes seconds.

Used as a user's own file is: `-m tests/tiny_pictures.py:net -d tests/tiny_pictures.py:data`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from xedge.data import Data, Picture, take
from xedge.resample import imresize, to_bytes

HERE = Path(__file__).resolve()
NET = f"{HERE}:net"
DATA = f"{HERE}:data"
SCALE = 2
SIDE = 12


class Net(nn.Module):
    """Convolutions with PReLU and a batch norm, a residual, and a sub-pixel layer over the enlarged input."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.slope = nn.PReLU(16)
        self.second = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.third = nn.Conv2d(16, 24, 3, padding=1)
        self.up, self.shuffle = nn.Conv2d(24, 3 * SCALE * SCALE, 3, padding=1), nn.PixelShuffle(SCALE)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] to [N, 3, 2 H, 2 W]."""
        y = self.slope(self.first(x))
        y = y + self.norm(self.second(y))
        return self.shuffle(self.up(torch.relu(self.third(y)))) + F.interpolate(x, scale_factor=SCALE)


def net() -> Net:
    """The model's factory; its weights are drawn from torch's global generator."""
    return Net()


def picture(seed: int, height: int = 40, width: int = 52) -> NDArray[np.uint8]:
    """Soft blobs and sharp edges, uint8 [H, W, 3]."""
    draw = np.random.default_rng(seed)
    soft = imresize(255 * draw.random((height // 3, width // 3, 3)), height, width)
    y, x = np.mgrid[:height, :width]
    for _ in range(6):
        angle, offset = draw.uniform(0, 3.14), draw.uniform(-10, 10)
        side = np.cos(angle) * (x - width / 2) + np.sin(angle) * (y - height / 2) > offset
        soft[side] += draw.uniform(-60, 60, 3)
    return to_bytes(soft)


def _pair(seed: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    truth = picture(seed)
    return to_bytes(imresize(truth, truth.shape[0] // SCALE, truth.shape[1] // SCALE)), truth


class Patches:
    """Every picture cut into tiles of SIDE x SIDE."""

    def __init__(self, seeds: range) -> None:
        self.pairs: list[tuple[Tensor, Tensor]] = []
        for seed in seeds:
            small, truth = (torch.from_numpy(p / np.float32(255)).permute(2, 0, 1) for p in _pair(seed))
            for top in (0, small.shape[1] - SIDE):
                for left in (0, small.shape[2] - SIDE):
                    y = truth[:, SCALE * top :, SCALE * left :][:, : SCALE * SIDE, : SCALE * SIDE]
                    self.pairs.append((small[:, top : top + SIDE, left : left + SIDE].contiguous(), y.contiguous()))

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.pairs[index]


def data() -> Data:
    """Tiles of pictures, every split with pictures of its own."""
    train, select, val = (Patches(seeds) for seeds in (range(32), range(100, 108), range(200, 208)))
    pictures = tuple(Picture(f"{seed}.png", lambda seed=seed: _pair(seed)) for seed in (200, 201))  # type: ignore[misc]
    return Data(
        name="blobs", train=train, select=select, val=val, classes=None, shape=(3, SIDE, SIDE), scale=SCALE,
        pictures=pictures,
    )  # fmt: skip


def train(path: Path) -> Path:
    """Weights of `net` trained on `data`, in about a second."""
    torch.manual_seed(0)
    model, pairs = net(), data().train
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    for step in range(100):
        x, y = take(pairs, [(16 * step + i) % len(pairs) for i in range(16)])
        optimizer.zero_grad()
        (model(x) - y).abs().mean().backward()
        optimizer.step()
    save_file(model.state_dict(), path)
    return path
