"""LeNet-5 as the pruning literature measures it."""

from __future__ import annotations

from torch import Tensor, nn


class LeNet5(nn.Module):
    """Caffe's LeNet (Jia et al. 2014), which descends from LeCun et al. 1998: two convolutions of 5x5 without
    padding, each with max pooling by 2, and two linear layers. Han et al. 2015 (arXiv:1506.02626) and most papers on
    pruning since call it LeNet-5 and count 431 k parameters.

    Images [N, channels, 28, 28] -> logits [N, classes].
    """

    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 20, 5)
        self.relu1 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.relu2 = nn.ReLU()
        self.pool2 = nn.MaxPool2d(2)
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(50 * 4 * 4, 500)
        self.relu3 = nn.ReLU()
        self.fc2 = nn.Linear(500, classes)
        for layer in (self.conv1, self.conv2, self.fc1):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(_bias(layer))
        nn.init.normal_(self.fc2.weight, std=0.01)
        nn.init.zeros_(self.fc2.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool1(self.relu1(self.conv1(x)))
        x = self.pool2(self.relu2(self.conv2(x)))
        x = self.relu3(self.fc1(self.flatten(x)))
        return self.fc2(x)  # type: ignore[no-any-return]


def _bias(layer: nn.Conv2d | nn.Linear) -> Tensor:
    assert layer.bias is not None
    return layer.bias


def lenet5(classes: int = 10, channels: int = 1) -> LeNet5:
    """LeNet-5 for 28x28 images, He initialisation."""
    return LeNet5(classes, channels)
