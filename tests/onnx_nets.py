"""Whole nets with random weights as ONNX models, and four images for each."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
import torchvision
from one_node import images
from qdq import export
from torch import nn

from xedge.models.mobilenet import mobilenet_v1
from xedge.models.resnet import resnet20


def lenet() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
    )


class SuperResolution(nn.Module):
    """A residual trunk, a long skip, and PixelShuffle: four axes out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.slope = nn.Conv2d(3, 16, 3, padding=1), nn.PReLU(16)
        self.trunk = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1))
        self.last, self.shuffle = nn.Conv2d(16, 12, 3, padding=1), nn.PixelShuffle(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.slope(self.first(x))
        return self.shuffle(self.last(y + self.trunk(y)))


class Mixture(nn.Module):
    """Concat, split, channel shuffle, gates, padding, upsampling, transposed convolution, a wide flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.Hardsigmoid())
        self.shuffle, self.pool = nn.ChannelShuffle(2), nn.AvgPool2d(3, 2, 1)
        self.up, self.wide = nn.ConvTranspose2d(8, 8, 4, 2, 1), nn.Upsample(scale_factor=2, mode="nearest")
        self.head = nn.Linear(16 * 8 * 8, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.hardswish(self.norm(self.first(x)))
        y = self.shuffle(y * self.gate(y))
        a, b = y.chunk(2, 1)
        y = self.pool(torch.cat([b, nn.functional.leaky_relu(a, 0.2)], 1))
        y = torch.cat([torch.sigmoid(self.wide(y)), torch.tanh(self.up(y))], 1)
        return self.head(self.pool(y).flatten(1))


def efficientnet_lite0() -> nn.Module:
    lite = pytest.importorskip("efficientnet_lite_pytorch", reason="needs efficientnet-lite-pytorch")
    return lite.EfficientNet.from_name("efficientnet-lite0")


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int], float]] = {
    # The last number: least SNR in dB between LiteRT and ONNX Runtime on the same int8 graph. LiteRT's reference
    # kernels round a sum twice (`test_which_kernels_round_as_the_graph_says`), which moves some 0.1 % of the elements
    # of a layer by one step, and later layers carry that on: the deeper the net, the lower. 1 LSB of noise at the
    # output alone would be about 45 dB; quantisation itself costs more (24 dB on this resnet18, 37 dB on mobilenet_v2).
    "lenet": (lenet, (1, 28, 28), 38.0),
    "superresolution": (SuperResolution, (3, 12, 12), 35.0),
    "mixture": (Mixture, (3, 32, 32), 30.0),
    "resnet20": (resnet20, (3, 32, 32), 24.0),
    "mobilenet_v1": (lambda: mobilenet_v1(10), (3, 64, 64), 24.0),
    "efficientnet_lite0": (efficientnet_lite0, (3, 64, 64), 24.0),
    "resnet18": (torchvision.models.resnet18, (3, 64, 64), 24.0),
    "mobilenet_v2": (torchvision.models.mobilenet_v2, (3, 64, 64), 33.0),
    "mobilenet_v3_small": (torchvision.models.mobilenet_v3_small, (3, 64, 64), 28.0),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[onnx.ModelProto, np.ndarray]]:
    """A net of NETS as ONNX, once per file, with running statistics that fit the images."""
    folder = tmp_path_factory.mktemp("onnx")

    @functools.cache
    def get(name: str) -> tuple[onnx.ModelProto, np.ndarray]:
        torch.manual_seed(0)
        make, shape, _ = NETS[name]
        net, x = make(), images(4, *shape)
        with torch.no_grad():
            for _ in range(3):
                net.train()(torch.from_numpy(x))
        return export(net, torch.from_numpy(x[:1]), folder / f"{name}.onnx"), x

    return get


Exported = Callable[[str], tuple[onnx.ModelProto, np.ndarray]]
