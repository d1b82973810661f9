"""LapSRN (Lai et al. 2017, arXiv:1704.03915): a Laplacian pyramid, each level twice the size of the one before."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from xedge.models.resnet import initialise
from xedge.models.upscale import factors, only, quiet


class Level(nn.Module):
    """Ten 3x3 convolutions and a transposed one that doubles the features; a 3x3 makes the detail that is added to the
    picture, which a transposed convolution has doubled."""

    def __init__(self, channels: int, depth: int, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(depth):
            layers += [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.LeakyReLU(0.2)]
        layers += [nn.ConvTranspose2d(width, width, 4, 2, 1, bias=False), nn.LeakyReLU(0.2)]
        self.features = nn.Sequential(*layers)
        self.detail = nn.Conv2d(width, channels, 3, padding=1, bias=False)
        self.enlarge = nn.ConvTranspose2d(channels, channels, 4, 2, 1, bias=False, groups=channels)

    def forward(self, x: Tensor, picture: Tensor) -> tuple[Tensor, Tensor]:
        x = self.features(x)
        return x, self.enlarge(picture) + self.detail(x)


class LapSRN(nn.Module):
    """Levels for scale 2 or 4, without biases. On Y alone, as in its paper, 870 112 parameters at scale 4 (0.870 M);
    with RGB 873 632.

    Pictures [N, channels, H, W] on 0..1 -> [N, channels, scale H, scale W].
    """

    def __init__(self, scale: int, channels: int, depth: int, width: int) -> None:
        super().__init__()
        self.head = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.act = nn.LeakyReLU(0.2)
        self.levels = nn.ModuleList(Level(channels, depth, width) for _ in factors(only(scale, 2, 4)))
        initialise(self)
        slope = torch.tensor([0.25, 0.75, 0.75, 0.25])
        for level in self.levels:
            assert isinstance(level, Level)
            quiet(level.detail)
            with torch.no_grad():
                level.enlarge.weight.copy_(torch.outer(slope, slope).expand_as(level.enlarge.weight))

    def forward(self, x: Tensor) -> Tensor:
        picture, x = x, self.act(self.head(x))
        for level in self.levels:
            x, picture = level(x, picture)
        return picture


def lapsrn(scale: int = 4, channels: int = 3, depth: int = 10, width: int = 64) -> LapSRN:
    """LapSRN."""
    return LapSRN(scale, channels, depth, width)
