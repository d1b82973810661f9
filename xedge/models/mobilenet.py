"""MobileNetV1 (Howard et al. 2017, arXiv:1704.04861) and MobileNetV2 (Sandler et al. 2018, arXiv:1801.04381).

Both come with the strides of the papers, for 224x224, and with `small=True` for 28x28 to 64x64: the stem keeps the
resolution, and in V2 so does the first stage that would halve it, as is usual on CIFAR.
"""

from __future__ import annotations

from torch import Tensor, nn

from xedge.models.resnet import initialise


def conv_bn(inside: int, outside: int, kernel: int, stride: int, groups: int, activation: nn.Module) -> nn.Sequential:
    """Convolution, batch norm, activation; the indices 0, 1, 2 are torchvision's."""
    return nn.Sequential(
        nn.Conv2d(inside, outside, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outside),
        activation,
    )


class MobileNetV1(nn.Module):
    """A 3x3 convolution and 13 pairs of a depthwise 3x3 and a pointwise 1x1 convolution, ReLU.

    Images [N, channels, H, W] -> logits [N, classes].
    """

    # (channels out, stride) of each pair: the paper's table 1
    PAIRS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *(((512, 1),) * 5), (1024, 2), (1024, 1))

    def __init__(self, classes: int, channels: int, small: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = [conv_bn(channels, 32, 3, 1 if small else 2, 1, nn.ReLU())]
        inside = 32
        for outside, stride in self.PAIRS:
            layers.append(conv_bn(inside, inside, 3, stride, inside, nn.ReLU()))
            layers.append(conv_bn(inside, outside, 1, 1, 1, nn.ReLU()))
            inside = outside
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(inside, classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.flatten(self.pool(self.features(x))))  # type: ignore[no-any-return]


class InvertedResidual(nn.Module):
    """Expand by 1x1, filter by depthwise 3x3, project by 1x1 without activation; added to the input when the shape
    stays: [N, inside, H, W] -> [N, outside, H/s, W/s]."""

    def __init__(self, inside: int, outside: int, stride: int, expand: int) -> None:
        super().__init__()
        self.adds = stride == 1 and inside == outside
        wide = inside * expand
        layers: list[nn.Module] = [conv_bn(inside, wide, 1, 1, 1, nn.ReLU6())] if expand != 1 else []
        layers += [
            conv_bn(wide, wide, 3, stride, wide, nn.ReLU6()),
            nn.Conv2d(wide, outside, 1, bias=False),
            nn.BatchNorm2d(outside),
        ]
        self.conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return x + y if self.adds else y


class MobileNetV2(nn.Module):
    """A 3x3 convolution, 17 inverted residuals, a 1x1 convolution, ReLU6. The parameters are named as torchvision's,
    so that its weights load.

    Images [N, channels, H, W] -> logits [N, classes].
    """

    # (expansion, channels out, repeats, stride of the first): the paper's table 2
    STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

    def __init__(self, classes: int, channels: int, small: bool, dropout: float) -> None:
        super().__init__()
        layers: list[nn.Module] = [conv_bn(channels, 32, 3, 1 if small else 2, 1, nn.ReLU6())]
        inside = 32
        for expand, outside, repeats, stride in self.STAGES:
            first = 1 if small and outside == 24 else stride
            for i in range(repeats):
                layers.append(InvertedResidual(inside, outside, first if i == 0 else 1, expand))
                inside = outside
        layers.append(conv_bn(inside, 1280, 1, 1, 1, nn.ReLU6()))
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(1280, classes))
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.flatten(self.pool(self.features(x))))  # type: ignore[no-any-return]


def mobilenet_v1(classes: int = 1000, channels: int = 3, small: bool = False) -> MobileNetV1:
    """MobileNetV1 at width 1: 4.2 M parameters and 569 M MACs at 224x224 with 1000 classes."""
    return MobileNetV1(classes, channels, small)


def mobilenet_v2(classes: int = 1000, channels: int = 3, small: bool = False, dropout: float = 0.2) -> MobileNetV2:
    """MobileNetV2 at width 1: 3.5 M parameters and 301 M MACs at 224x224 with 1000 classes."""
    return MobileNetV2(classes, channels, small, dropout)


def mobilenet_v1_small(classes: int = 10, channels: int = 3) -> MobileNetV1:
    """MobileNetV1 for images of 28 to 64 pixels."""
    return mobilenet_v1(classes, channels, small=True)


def mobilenet_v2_small(classes: int = 10, channels: int = 3) -> MobileNetV2:
    """MobileNetV2 for images of 28 to 64 pixels."""
    return mobilenet_v2(classes, channels, small=True)
