"""SRResNet (Ledig et al. 2017, arXiv:1609.04802), as it was, modified, and with nearest neighbours for the sub-pixel
layers."""

from __future__ import annotations

from torch import Tensor, nn

from xedge.models.upscale import bilinear, conv, quiet, stages

CALM = 0.1
"""Of first weights in blocks without batch norms, as ESRGAN's authors have it."""


def norm(width: int, modified: bool) -> nn.Module:
    """A batch norm, or nothing."""
    return nn.Identity() if modified else nn.BatchNorm2d(width)


def activation(width: int, modified: bool) -> nn.Module:
    """A PReLU, or a ReLU."""
    return nn.ReLU() if modified else nn.PReLU(width)


class Block(nn.Module):
    """Convolution, batch norm, PReLU, convolution, batch norm, added to the input; modified without batch norms and
    with a ReLU."""

    def __init__(self, width: int, modified: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(width, width), norm(width, modified)
        self.act = activation(width, modified)
        self.conv2, self.bn2 = conv(width, width), norm(width, modified)
        if modified:  # what batch norms would hold down, small first weights do: at 64 channels training diverged
            for layer in (self.conv1, self.conv2):
                layer.weight.data *= CALM

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))  # type: ignore[no-any-return]


class SRResNet(nn.Module):
    """A convolution, `blocks` residual blocks with a skip around all, stages that enlarge, and a convolution, added to
    the input enlarged bilinearly (as in MSRResNet, Wang et al. 2018). First and last convolution are 3x3, not 9x9, and
    each PReLU has a slope per channel: 1.375 M parameters at scale 2 and 1.52 M at 4, which are the papers' numbers.
    Modified, it has no batch norms, and ReLU everywhere (MSRResNet leaks .1 outside of its blocks).

    Pictures [N, channels, H, W] on 0..1 -> [N, channels, scale H, scale W].
    """

    def __init__(
        self, scale: int, channels: int, blocks: int, width: int, nearest: bool, modified: bool = False
    ) -> None:
        super().__init__()
        self.base = bilinear(scale)
        self.head, self.act = conv(channels, width), activation(width, modified)
        self.blocks = nn.Sequential(*(Block(width, modified) for _ in range(blocks)))
        self.conv, self.bn = conv(width, width), norm(width, modified)
        self.up = stages(width, scale, nearest=nearest, active=lambda: activation(width, modified))
        self.tail = conv(width, channels)
        quiet(self.tail)

    def forward(self, x: Tensor) -> Tensor:
        first = self.act(self.head(x))
        y = first + self.bn(self.conv(self.blocks(first)))
        return self.base(x) + self.tail(self.up(y))  # type: ignore[no-any-return]


def srresnet(scale: int = 4, channels: int = 3, blocks: int = 16, width: int = 64) -> SRResNet:
    """SRResNet with sub-pixel convolutions."""
    return SRResNet(scale, channels, blocks, width, nearest=False)


def x_srresnet(scale: int = 4, channels: int = 3, blocks: int = 16, width: int = 64) -> SRResNet:
    """SRResNet (NNI): nearest neighbours and learnable convolutions, the form that X-Learning prunes."""
    return SRResNet(scale, channels, blocks, width, nearest=True)


def msrresnet(scale: int = 4, channels: int = 3, blocks: int = 16, width: int = 64) -> SRResNet:
    """Modified SRResNet (Wang et al., ESRGAN, ECCV Workshops 2018), with sub-pixel convolutions."""
    return SRResNet(scale, channels, blocks, width, nearest=False, modified=True)


def x_msrresnet(scale: int = 4, channels: int = 3, blocks: int = 16, width: int = 64) -> SRResNet:
    """Modified SRResNet with nearest neighbours and learnable convolutions."""
    return SRResNet(scale, channels, blocks, width, nearest=True, modified=True)
