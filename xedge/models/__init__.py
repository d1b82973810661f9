"""The networks of the X-Learning papers, by name. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

BUILT_IN: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "lenet5": ("xedge.models.lenet:lenet5", "LeNet-5 of the pruning literature, 431 k parameters, 28x28"),
        "resnet20": ("xedge.models.resnet:resnet20", "CIFAR ResNet-20, 0.27 M parameters, 28x28 or 32x32"),
        "resnet56": ("xedge.models.resnet:resnet56", "CIFAR ResNet-56, 0.86 M parameters, 28x28 or 32x32"),
        "resnet110": ("xedge.models.resnet:resnet110", "CIFAR ResNet-110, 1.7 M parameters, 28x28 or 32x32"),
        "mobilenet_v1": ("xedge.models.mobilenet:mobilenet_v1", "MobileNetV1, 4.2 M parameters, 224x224"),
        "mobilenet_v2": ("xedge.models.mobilenet:mobilenet_v2", "MobileNetV2, 3.5 M parameters, 224x224"),
        "mobilenet_v1_small": ("xedge.models.mobilenet:mobilenet_v1_small", "MobileNetV1 with strides for 32x32"),
        "mobilenet_v2_small": ("xedge.models.mobilenet:mobilenet_v2_small", "MobileNetV2 with strides for 32x32"),
    }
)
"""name -> (module:factory, one line). A factory takes `classes` and `channels`, and draws its first weights from
torch's global generator."""
