"""Small nets with the structures that matter to Q/DQ, and each one's graph, calibration, scales and flavours, once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
import torch
import torchvision
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor, nn

from xedge.export import write_flavour
from xedge.onnx_graph import export_float, session
from xedge.quantize import ScaleTable, quantize
from xedge.ranges import Calibration, calibrate
from xedge.target import Flavour

FLAVOURS: tuple[Flavour, ...] = ("tensorrt", "litert", "onnxruntime")


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Batch norms that do something: a fresh one is nearly the identity, so folding it wrongly would not show."""
    draw = torch.Generator().manual_seed(seed)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            n = m.num_features
            m.weight.data = torch.rand(n, generator=draw) * 0.8 + 0.6
            m.bias.data = torch.randn(n, generator=draw) * 0.2
            m.running_mean = torch.randn(n, generator=draw) * 0.2
            m.running_var = torch.rand(n, generator=draw) + 0.5
    return model.eval()


def residual() -> nn.Module:
    """ResNet-18's structure, narrow: a stem with pooling, a plain residual block, one with a strided shortcut."""
    block = torchvision.models.resnet.BasicBlock
    shortcut = nn.Sequential(nn.Conv2d(16, 24, 1, 2, bias=False), nn.BatchNorm2d(24))
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
        block(16, 16), block(16, 24, 2, shortcut), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10),
    )  # fmt: skip


def mobile() -> nn.Module:
    """MobileNetV2, narrow and with fewer repeats."""
    setting = [[1, 8, 1, 1], [6, 16, 2, 2]]
    net = torchvision.models.MobileNetV2(10, inverted_residual_setting=setting, width_mult=0.5)
    net.features[-1] = torchvision.ops.Conv2dNormActivation(8, 32, 1, activation_layer=nn.ReLU6)
    net.classifier = nn.Linear(32, 10)
    return net


def shuffle() -> nn.Module:
    """ShuffleNetV2: splits, concatenations, channel shuffles."""
    return torchvision.models.ShuffleNetV2([2, 2, 2], [8, 16, 32, 64, 64], num_classes=10)


def dense() -> nn.Module:
    """DenseNet: concatenations, and batch norms that no convolution precedes."""
    return torchvision.models.DenseNet(8, (2, 2), 16, num_classes=10)


def plain() -> nn.Module:
    """Convolutions and a linear layer, shallow."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 16, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "plain": plain, "residual": residual, "mobile": mobile, "shuffle": shuffle, "dense": dense
}  # fmt: skip
SHAPE = (3, 32, 32)


@dataclass(frozen=True)
class Quantised:
    """One net on its way: never change what it holds, the tests share it."""

    model: nn.Module
    proto: onnx.ModelProto
    calibration: Calibration
    table: ScaleTable
    flavour: dict[Flavour, onnx.ModelProto]


def images(n: int, seed: int, shape: tuple[int, ...] = SHAPE) -> NDArray[np.float32]:
    """Random pictures [n, C, H, W]."""
    return np.random.default_rng(seed).standard_normal((n, *shape)).astype(np.float32)


@functools.cache
def quantised(name: str, bits: float = 5.0) -> Quantised:
    """A net of MAKERS, quantised to `bits` and written in every flavour."""
    torch.manual_seed(0)
    model = randomised(MAKERS[name]())
    proto = export_float(model, SHAPE, 17)
    found = calibrate(proto, lambda: images(8, 0)[:, None])
    table = quantize(proto, found, mean_bits=bits)
    return Quantised(model, proto, found, table, {f: write_flavour(proto, table, f) for f in FLAVOURS})


def run(proto: onnx.ModelProto, x: NDArray[np.float32], *, exact: bool = True) -> Tensor:
    """Logits of a batch, image by image, in ONNX Runtime."""
    s = session(proto, exact=exact)
    name = s.get_inputs()[0].name
    return torch.from_numpy(np.concatenate([s.run(None, {name: x[i : i + 1]})[0] for i in range(len(x))]))


def constants(proto: onnx.ModelProto) -> dict[str, NDArray[np.generic]]:
    """Initializers by name."""
    return {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}


def edited(
    proto: onnx.ModelProto, name: str, change: Callable[[NDArray[np.generic]], NDArray[np.generic]]
) -> onnx.ModelProto:
    """A copy with one initializer changed."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    tensor = next(t for t in copy.graph.initializer if t.name == name)
    before = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array(np.asarray(change(before)).astype(before.dtype), name))
    return copy


def fits(values: np.ndarray, bits: np.ndarray, axis: int) -> bool:
    """Whether each channel's integers are among 2^b: from -2^(b-1) on, or odd ones."""
    for q, b in zip(np.moveaxis(values.astype(int), axis, 0), bits.astype(int), strict=True):
        half = 2**b // 2
        plain = q.min() >= -half and q.max() < max(half, 1)
        odd = b not in (0, 4, 8) and bool((q % 2 == 1).all()) and abs(q).max() < 2**b
        if not (plain or odd) or abs(q).max() > 127:
            return False
    return True
