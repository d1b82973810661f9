"""Plain stacks of convolutions that work at the size of the output: SRCNN, VDSR, DnCNN.

All of them take the small picture and enlarge it themselves by bicubic; at scale 1 they denoise or deblock.
"""

from __future__ import annotations

from torch import Tensor, nn

from xedge.models.resnet import initialise
from xedge.models.upscale import conv, enlarged, quiet


class SRCNN(nn.Module):
    """SRCNN 9-5-5 (Dong et al. 2016, arXiv:1501.00092): three convolutions of 9x9, 5x5 and 5x5 with 64 and 32
    channels. With RGB in and out 69 251 parameters (the papers' 69 K; on Y alone 57 281).

    Pictures [N, channels, H, W] on 0..1 -> [N, channels, scale H, scale W].
    """

    def __init__(self, scale: int, channels: int) -> None:
        super().__init__()
        self.up = enlarged(scale)
        self.conv1 = conv(channels, 64, 9)
        self.relu1 = nn.ReLU()
        self.conv2 = conv(64, 32, 5)
        self.relu2 = nn.ReLU()
        self.conv3 = conv(32, channels, 5)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        return self.conv3(self.relu2(self.conv2(self.relu1(self.conv1(x)))))  # type: ignore[no-any-return]


class Stack(nn.Module):
    """`depth` convolutions of 3x3 with 64 channels and ReLU, whose result is added to the (enlarged) input.

    VDSR (Kim et al. 2016, arXiv:1511.04587): depth 20; with RGB 668 227 parameters (668 K; on Y alone 665 921).
    DnCNN (Zhang et al. 2017, arXiv:1608.03981): depth 17 and batch norm in the layers between; 558 403 (on one channel
    556 097). Its minus sign is left to the last layer.

    Pictures [N, channels, H, W] on 0..1 -> [N, channels, scale H, scale W].
    """

    def __init__(self, scale: int, channels: int, depth: int, width: int, norm: bool) -> None:
        super().__init__()
        self.up = enlarged(scale)
        layers: list[nn.Module] = [conv(channels, width), nn.ReLU()]
        for _ in range(depth - 2):
            if norm:
                layers += [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            else:
                layers += [conv(width, width), nn.ReLU()]
        last = conv(width, channels)
        self.body = nn.Sequential(*layers, last)
        initialise(self)
        quiet(last)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        return x + self.body(x)  # type: ignore[no-any-return]


def srcnn(scale: int = 2, channels: int = 3) -> SRCNN:
    """SRCNN 9-5-5."""
    return SRCNN(scale, channels)


def vdsr(scale: int = 2, channels: int = 3, depth: int = 20, width: int = 64) -> Stack:
    """VDSR."""
    return Stack(scale, channels, depth, width, norm=False)


def dncnn(scale: int = 1, channels: int = 3, depth: int = 17, width: int = 64) -> Stack:
    """DnCNN."""
    return Stack(scale, channels, depth, width, norm=True)
