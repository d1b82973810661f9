"""SPAN (Wan et al. 2024, arXiv:2311.12770), the winner of NTIRE 2024's efficient super-resolution, as it is deployed:
its training form's parallel branches are one 3x3 convolution each."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from xedge.models.upscale import conv


class Block(nn.Module):
    """Three 3x3 convolutions with SiLU between; what they find and the input are weighed by sigmoid(found) - 1/2,
    attention without parameters."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.act1 = conv(width, width), nn.SiLU()
        self.conv2, self.act2 = conv(width, width), nn.SiLU()
        self.conv3 = conv(width, width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first = self.act1(self.conv1(x))
        found = self.conv3(self.act2(self.conv2(first)))
        return (found + x) * (torch.sigmoid(found) - 0.5), first


class SPAN(nn.Module):
    """A convolution, six blocks, the first features with those of the first block, of within the last and of behind it
    joined by 1x1, and a sub-pixel convolution: 426 288 parameters at scale 4 with 48 channels, 498 208 with 52.

    Pictures [N, channels, H, W] on 0..1 -> [N, channels, scale H, scale W].
    """

    def __init__(self, scale: int, channels: int, blocks: int, width: int) -> None:
        super().__init__()
        self.head = conv(channels, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.conv = conv(width, width)
        self.join = conv(4 * width, width, 1)
        self.tail = conv(width, channels * scale**2)
        self.shuffle = nn.PixelShuffle(scale)

    def forward(self, x: Tensor) -> Tensor:
        first = x = self.head(x)
        behind = []
        for block in self.blocks:
            x, inner = block(x)
            behind.append(x)
        joined = self.join(torch.cat([first, self.conv(x), behind[0], inner], 1))
        return self.shuffle(self.tail(joined))  # type: ignore[no-any-return]


def span(scale: int = 4, channels: int = 3, blocks: int = 6, width: int = 48) -> SPAN:
    """SPAN with 48 channels."""
    return SPAN(scale, channels, blocks, width)
