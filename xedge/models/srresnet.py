"""SRResNet (Ledig et al. 2017, arXiv:1609.04802), as it was and with nearest neighbours for the sub-pixel layers."""

from __future__ import annotations

from torch import Tensor, nn

from xedge.models.upscale import bilinear, conv, quiet, stages


def norm(width: int, norms: bool) -> nn.Module:
    """A batch norm, or nothing."""
    return nn.BatchNorm2d(width) if norms else nn.Identity()


class Block(nn.Module):
    """Convolution, batch norm, PReLU, convolution, batch norm, added to the input."""

    def __init__(self, width: int, norms: bool) -> None:
        super().__init__()
        self.conv1, self.bn1, self.act = conv(width, width), norm(width, norms), nn.PReLU(width)
        self.conv2, self.bn2 = conv(width, width), norm(width, norms)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))  # type: ignore[no-any-return]


class SRResNet(nn.Module):
    """A convolution, `blocks` residual blocks with a skip around all, stages that enlarge, and a convolution, added to
    the input enlarged bilinearly (as in MSRResNet, Wang et al. 2018). First and last convolution are 3x3, not 9x9, and
    each PReLU has a slope per channel: 1.375 M parameters at scale 2 and 1.52 M at 4, which are the papers' numbers.
    Later nets have no batch norms (`norms=False`; EDSR, Lim et al. 2017).

    Pictures [N, channels, H, W] on 0..1 -> [N, channels, scale H, scale W].
    """

    def __init__(self, scale: int, channels: int, blocks: int, width: int, nearest: bool, norms: bool = True) -> None:
        super().__init__()
        self.base = bilinear(scale)
        self.head, self.act = conv(channels, width), nn.PReLU(width)
        self.blocks = nn.Sequential(*(Block(width, norms) for _ in range(blocks)))
        self.conv, self.bn = conv(width, width), norm(width, norms)
        self.up = stages(width, scale, nearest=nearest, prelu=True)
        self.tail = conv(width, channels)
        quiet(self.tail)

    def forward(self, x: Tensor) -> Tensor:
        first = self.act(self.head(x))
        y = first + self.bn(self.conv(self.blocks(first)))
        return self.base(x) + self.tail(self.up(y))  # type: ignore[no-any-return]


def srresnet(scale: int = 4, channels: int = 3, blocks: int = 16, width: int = 64) -> SRResNet:
    """SRResNet with sub-pixel convolutions."""
    return SRResNet(scale, channels, blocks, width, nearest=False)


def x_srresnet(scale: int = 4, channels: int = 3, blocks: int = 16, width: int = 64, norms: bool = True) -> SRResNet:
    """SRResNet (NNI): nearest neighbours and learnable convolutions, the form that X-Learning prunes."""
    return SRResNet(scale, channels, blocks, width, nearest=True, norms=norms)
