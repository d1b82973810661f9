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
        "srcnn": ("xedge.models.srcnn:srcnn", "SRCNN 9-5-5, 69 k parameters (RGB); any scale"),
        "vdsr": ("xedge.models.srcnn:vdsr", "VDSR, 668 k parameters (RGB); any scale"),
        "dncnn": ("xedge.models.srcnn:dncnn", "DnCNN-17, 558 k parameters (RGB); denoising and deblocking"),
        "srresnet": ("xedge.models.srresnet:srresnet", "SRResNet, 1.52 M parameters at x4, 1.375 M at x2"),
        "x_srresnet": ("xedge.models.srresnet:x_srresnet", "SRResNet with nearest neighbours for sub-pixel layers"),
        "lapsrn": ("xedge.models.lapsrn:lapsrn", "LapSRN, 0.87 M parameters; x2 and x4"),
        "feqe": ("xedge.models.feqe:feqe", "FEQE, 96 k parameters; x2 and x4"),
        "hsrn": ("xedge.models.hsrn:hsrn", "HSRN, windows of 3, 9 and 27 pixels; any scale, denoising, deblocking"),
        "span": ("xedge.models.span:span", "SPAN, 426 k parameters at x4; any scale"),
    }
)
"""name -> (module:factory, one line). A factory takes `classes` and `channels`, or `scale` where it restores pictures.
It draws its first weights from torch's global generator."""
