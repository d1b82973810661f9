"""The CIFAR ResNets of He et al. 2016 (arXiv:1512.03385, section 4.2)."""

from __future__ import annotations

from torch import Tensor, nn


class Block(nn.Module):
    """Two 3x3 convolutions with batch norm, added to a shortcut: [N, inside, H, W] -> [N, outside, H/s, W/s]."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inside != outside:
            self.shortcut = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(y + self.shortcut(x))  # type: ignore[no-any-return]


class CifarResNet(nn.Module):
    """6 n + 2 layers: a 3x3 convolution, three stages of n blocks with 16, 32 and 64 channels, a global mean and a
    linear layer. Images [N, channels, H, W] (28 to 64 pixels) -> logits [N, classes].

    The two shortcuts where the size changes are 1x1 convolutions with batch norm (the paper's option B). Option A,
    which pads with zero channels, ties every stage's channels to the positions of the stage before, so that pruning
    could only cut them together. Option B adds 2752 parameters and 0.26 M MACs at 32x32.
    """

    def __init__(self, n: int, classes: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.layer1 = nn.Sequential(*(Block(16, 16, 1) for _ in range(n)))
        self.layer2 = nn.Sequential(*(Block(16 if i == 0 else 32, 32, 2 if i == 0 else 1) for i in range(n)))
        self.layer3 = nn.Sequential(*(Block(32 if i == 0 else 64, 64, 2 if i == 0 else 1) for i in range(n)))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(64, classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.flatten(self.pool(x)))  # type: ignore[no-any-return]


def initialise(model: nn.Module) -> None:
    """He et al. 2015 (arXiv:1502.01852): convolutions normal with the fan out; batch norm 1 and 0; linear 0.01."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)


def resnet20(classes: int = 10, channels: int = 3) -> CifarResNet:
    """ResNet-20, 0.27 M parameters."""
    return CifarResNet(3, classes, channels)


def resnet56(classes: int = 10, channels: int = 3) -> CifarResNet:
    """ResNet-56, 0.86 M parameters (0.85 M in the paper, with option A)."""
    return CifarResNet(9, classes, channels)


def resnet110(classes: int = 10, channels: int = 3) -> CifarResNet:
    """ResNet-110, 1.7 M parameters."""
    return CifarResNet(18, classes, channels)
