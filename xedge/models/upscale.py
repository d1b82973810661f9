"""Ways to enlarge features and pictures: sub-pixel, nearest neighbour and convolution, and bicubic as a fixed layer."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from xedge.errors import UsageError
from xedge.resample import taps

FACTORS: Mapping[int, tuple[int, ...]] = {1: (), 2: (2,), 3: (3,), 4: (2, 2)}
"""Scale -> the factors of its stages, as is usual."""


class Bicubic(nn.Module):
    """[N, C, H, W] -> [N, C, s H, s W] exactly as MATLAB's imresize, borders mirrored, neither rounded nor clipped.

    A depthwise 5x5 convolution makes the s x s pixels that lie on each input pixel, and a pixel shuffle lays them out:
    operators that every runtime has, where its own cubic has another kernel (a = -0.75) or none. The weights are
    constants: not trained, not pruned, not stored with the model.
    """

    weight: Tensor

    def __init__(self, scale: int, channels: int = 3) -> None:
        super().__init__()
        self.scale, self.channels = scale, channels
        weights, at = taps(9, 9 * scale)
        rows = np.zeros((scale, 5))
        for phase in range(scale):
            np.add.at(rows[phase], at[4 * scale + phase] - 2, weights[4 * scale + phase])
        square = np.einsum("ph,qw->pqhw", rows, rows).reshape(scale**2, 1, 5, 5)
        self.register_buffer("weight", torch.from_numpy(square).float().repeat(channels, 1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x[:, :, 1:2], x[:, :, :1], x, x[:, :, -1:], x[:, :, -2:-1]], 2)
        x = torch.cat([x[..., 1:2], x[..., :1], x, x[..., -1:], x[..., -2:-1]], 3)
        return functional.pixel_shuffle(functional.conv2d(x, self.weight, groups=self.channels), self.scale)


def enlarged(scale: int) -> nn.Module:
    """`Bicubic`, or nothing where there is nothing to enlarge."""
    return nn.Identity() if scale == 1 else Bicubic(scale)


def bilinear(scale: int) -> nn.Module:
    """A bilinear enlargement, which runtimes have in integers too: what a net adds its detail to."""
    return nn.Identity() if scale == 1 else nn.Upsample(scale_factor=scale, mode="bilinear", align_corners=False)


def conv(inside: int, outside: int, kernel: int = 3, dilation: int = 1) -> nn.Conv2d:
    """A convolution that keeps the size."""
    return nn.Conv2d(inside, outside, kernel, padding=kernel // 2 * dilation, dilation=dilation)


def stages(width: int, scale: int, *, nearest: bool, prelu: bool = False) -> nn.Sequential:
    """[N, width, H, W] -> [N, width, s H, s W] by factors of 2 (or 3), each with a 3x3 convolution.

    Args:
        nearest: enlarge by nearest neighbour before the convolution; otherwise the convolution makes f x f times the
            channels, which a pixel shuffle lays out (sub-pixel convolution, Shi et al. 2016, arXiv:1609.05158). The
            multiply-adds are the same, the parameters 1 / f^2, and there is nothing to shuffle.
        prelu: a PReLU behind each.
    """
    layers: list[nn.Module] = []
    for factor in factors(scale):
        if nearest:
            layers += [nn.Upsample(scale_factor=factor, mode="nearest"), conv(width, width)]
        else:
            layers += [conv(width, width * factor**2), nn.PixelShuffle(factor)]
        layers += [nn.PReLU(width)] if prelu else []
    return nn.Sequential(*layers)


def factors(scale: int) -> tuple[int, ...]:
    """The factors of a scale. Raises UsageError for a scale that nets are not made for."""
    return FACTORS[only(scale, *FACTORS)]


def only(scale: int, *known: int) -> int:
    """The scale, if a net is made for it.

    Raises:
        UsageError: it is not.
    """
    if scale not in known:
        raise UsageError(f"this net is not made for scale {scale}", fix=f"use {', '.join(map(str, known))}")
    return scale


def quiet(last: nn.Conv2d) -> None:
    """Small weights in the last layer: a net that adds to its input starts near the identity."""
    nn.init.normal_(last.weight, std=1e-3)
    if last.bias is not None:
        nn.init.zeros_(last.bias)
