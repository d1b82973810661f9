"""HSRN (after Kung and Hou 2020): hierarchical multi-stage blocks, for super-resolution, denoising and deblocking."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from xedge.models.upscale import bilinear, conv, quiet, stages


class Block(nn.Module):
    """Three stages of 3x3 windows, each over the windows of the one before: dilations 1, 3 and 9 tile them without
    overlap, so that 27 weights a pair of channels see 3x3, 9x9 and 27x27 pixels. A 1x1 convolution fuses the stages,
    and its result is added to the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.windows = nn.ModuleList(conv(width, width, dilation=dilation) for dilation in (1, 3, 9))
        self.acts = nn.ModuleList(nn.ReLU() for _ in self.windows)
        self.fuse = conv(3 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y, stages_ = x, []
        for window, act in zip(self.windows, self.acts, strict=True):
            y = act(window(y))
            stages_.append(y)
        return x + self.fuse(torch.cat(stages_, 1))  # type: ignore[no-any-return]


class HSRN(nn.Module):
    """A convolution, `blocks` hierarchical blocks with a skip around all, nearest-neighbour stages that enlarge, and a
    convolution, added to the input (enlarged bilinearly).

    Pictures [N, channels, H, W] on 0..1 -> [N, channels, scale H, scale W].
    """

    def __init__(self, scale: int, channels: int, blocks: int, width: int) -> None:
        super().__init__()
        self.base = bilinear(scale)
        self.head = conv(channels, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(blocks)))
        self.up = stages(width, scale, nearest=True)
        # behind a bare sum it would only clip, and nets that restore have lost all behind it for good
        self.act = nn.ReLU() if scale > 1 else nn.Identity()
        self.tail = conv(width, channels)
        quiet(self.tail)

    def forward(self, x: Tensor) -> Tensor:
        first = self.head(x)
        y = self.act(self.up(first + self.blocks(first)))
        return self.base(x) + self.tail(y)  # type: ignore[no-any-return]


def hsrn(scale: int = 2, channels: int = 3, blocks: int = 8, width: int = 48) -> HSRN:
    """HSRN with 8 blocks of 48 channels."""
    return HSRN(scale, channels, blocks, width)
