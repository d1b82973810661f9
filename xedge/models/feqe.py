"""FEQE (Vu et al., ECCV Workshops 2018), the winner of PIRM 2018's super-resolution for smartphones."""

from __future__ import annotations

from torch import Tensor, nn

from xedge.models.upscale import conv, enlarged, only, quiet


class Block(nn.Module):
    """Convolution, ReLU, convolution, added to the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.act, self.conv2 = conv(width, width), nn.ReLU(), conv(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.act(self.conv1(x)))  # type: ignore[no-any-return]


class FEQE(nn.Module):
    """The picture, enlarged by bicubic, is folded down by desubpixel layers (space to depth) and 1x1 convolutions, goes
    through residual blocks of 16 channels there, comes back by 1x1 convolutions and pixel shuffles, and is added to the
    enlarged picture. 96 464 parameters at scale 4 (96 K).

    Pictures [N, 3, H, W] on 0..1 -> [N, 3, scale H, scale W].
    """

    def __init__(self, scale: int, blocks: int, width: int) -> None:
        super().__init__()
        self.enlarge = enlarged(only(scale, 2, 4))
        if scale == 4:
            self.down = nn.Sequential(nn.PixelUnshuffle(2), conv(12, width // 4, 1), nn.PixelUnshuffle(2))
            up = [conv(width, 4 * width, 1), nn.PixelShuffle(2)]
        else:
            self.down = nn.Sequential(conv(3, width // 4, 1), nn.PixelUnshuffle(2))
            up = []
        self.body = nn.Sequential(*(Block(width) for _ in range(blocks)), conv(width, width))
        last = conv(width, 12, 1)
        self.up = nn.Sequential(*up, last, nn.PixelShuffle(2))
        quiet(last)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enlarge(x)
        return x + self.up(self.body(self.down(x)))  # type: ignore[no-any-return]


def feqe(scale: int = 4, blocks: int = 20, width: int = 16) -> FEQE:
    """FEQE."""
    return FEQE(scale, blocks, width)
