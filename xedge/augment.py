"""Random changes of training batches, a whole batch at a time, drawn from a generator of the caller's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

Augment = Callable[[Tensor, torch.Generator], Tensor]
"""A batch [N, C, H, W] in, a randomly changed batch of the same shape out. The same generator state, the same batch."""

PairAugment = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]
"""Inputs [N, C, H, W] and true pictures [N, C', s H, s W], changed together."""


@dataclass(frozen=True)
class CropFlip:
    """Random shift by up to `padding` pixels, the border filled with `fill`, and a mirror image half of the time.

    The augmentation of He et al. 2016 (arXiv:1512.03385, section 4.2), for a whole batch at once.

    Args:
        padding: pixels on each side.
        fill: per channel, in normalised units: -mean / std is black.
        flip: whether to mirror.
    """

    padding: int
    fill: tuple[float, ...] = (0.0,)
    flip: bool = False

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """x float32 [N, C, H, W] -> the same shape. Draws 3 N numbers from `generator`."""
        n, _, h, w = x.shape
        draws = torch.rand(3, n, generator=generator, device=generator.device).to(x.device)
        dy, dx = (draws[:2] * (2 * self.padding + 1)).long().clamp(max=2 * self.padding)
        fill = torch.tensor(self.fill, dtype=x.dtype, device=x.device).view(-1, 1, 1)
        padded = functional.pad(x - fill, [self.padding] * 4) + fill
        windows = padded.unfold(2, h, 1).unfold(3, w, 1)  # a view [N, C, 2p+1, 2p+1, H, W]
        out = windows[torch.arange(n, device=x.device), :, dy, dx]
        if self.flip:
            out = torch.where((draws[2] < 0.5).view(-1, 1, 1, 1), out.flip(3), out)
        return out


def black(mean: Sequence[float], std: Sequence[float]) -> tuple[float, ...]:
    """The normalised value of a black pixel, per channel."""
    return tuple(-m / s for m, s in zip(mean, std, strict=True))


@dataclass(frozen=True)
class ZoomFlip:
    """A random rectangle of each image, enlarged to the whole, and a mirror image half of the time.

    The rectangle has `area` of the image and the sides' ratio `ratio`, both uniform, the ratio in its logarithm
    (Szegedy et al. 2015, arXiv:1409.4842, section 6), and always fits inside.

    Args:
        area: smallest and largest fraction.
        ratio: smallest and largest width over height.
    """

    area: tuple[float, float] = (0.35, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """x float32 [N, C, H, W] -> the same shape, bilinear. Draws 5 N numbers from `generator`."""
        a, r, u, v, flip = torch.rand(5, len(x), generator=generator, device=generator.device).to(x.device)
        area = self.area[0] + a * (self.area[1] - self.area[0])
        ratio = torch.exp(math.log(self.ratio[0]) + r * math.log(self.ratio[1] / self.ratio[0]))
        # in units of the whole side, so the grid's -1..1 is scaled by them
        width, height = (area * ratio).sqrt().clamp(max=1.0), (area / ratio).sqrt().clamp(max=1.0)
        mirror = torch.where(flip < 0.5, -1.0, 1.0)
        theta = torch.zeros(len(x), 2, 3, device=x.device, dtype=x.dtype)
        theta[:, 0, 0], theta[:, 0, 2] = width * mirror, (2 * u - 1) * (1 - width)
        theta[:, 1, 1], theta[:, 1, 2] = height, (2 * v - 1) * (1 - height)
        grid = functional.affine_grid(theta, list(x.shape), align_corners=False)
        return functional.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)


@dataclass(frozen=True)
class Turns:
    """Each pair mirrored, upended and transposed by three coins: the eight positions of a square.

    Args:
        noise: for denoising: standard deviation, on the scale 0..255, of new noise that each call puts on the truth in
            place of the input's own, clipped and rounded to 8 bits.
    """

    noise: float | None = None

    def __call__(self, x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Square pictures [N, C, H, H] and [N, C', s H, s H] -> the same shapes. Draws 3 N numbers, and the noise."""
        coins = (torch.rand(3, len(x), generator=generator, device=generator.device) < 0.5).to(x.device)
        for change, coin in zip(_TURNS, coins, strict=True):
            coin = coin.view(-1, 1, 1, 1)
            x, y = torch.where(coin, change(x), x), torch.where(coin, change(y), y)
        if self.noise is not None:
            grain = torch.randn(y.shape, generator=generator, device=generator.device).to(y)
            x = (y * 255 + self.noise * grain).round().clamp(0, 255) / 255
        return x, y


_TURNS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: x.flip(3),
    lambda x: x.flip(2),
    lambda x: x.transpose(2, 3),
)
