"""The built-in networks against the numbers that their papers print, and against torchvision."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
import torch
from torch import nn

from xedge.metrics import macs, parameters
from xedge.models import BUILT_IN


def make(name: str, **arguments: int) -> nn.Module:
    module, _, attribute = BUILT_IN[name][0].partition(":")
    torch.manual_seed(0)
    model = getattr(importlib.import_module(module), attribute)(**arguments)
    assert isinstance(model, nn.Module)
    return model


CLASSIFIERS = ("xedge.models.lenet", "xedge.models.resnet", "xedge.models.mobilenet")

# Option B's two projections: 16 x 32 and 32 x 64 weights, and their batch norms' scales and shifts.
PROJECTIONS = 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64
# He et al. with option A. MACs: convolutions and the linear layer at 32x32.
OPTION_A = {
    "resnet20": (269_722, 40_551_040),
    "resnet56": (853_018, 125_485_696),
    "resnet110": (1_727_962, 252_887_680),
}


@pytest.mark.parametrize("name", OPTION_A)
def test_cifar_resnets_are_the_papers_plus_the_two_projections(name: str) -> None:
    model = make(name)
    assert parameters(model) - PROJECTIONS == OPTION_A[name][0]
    counted = macs(model, (3, 32, 32))
    assert counted.total - (16 * 32 * 16 * 16 + 32 * 64 * 8 * 8) == OPTION_A[name][1]
    depth = int(name.removeprefix("resnet"))
    assert len(counted.layers) == depth + 2  # 6 n + 2, and two projections


def test_lenet5_has_the_431k_parameters_of_the_pruning_literature() -> None:
    model = make("lenet5")
    counted = macs(model, (1, 28, 28))
    assert parameters(model) == 431_080
    # Han et al. 2015, table 3: 576 k, 3200 k, 800 k and 10 k operations, two for each MAC
    assert counted.layers == {"conv1": 288_000, "conv2": 1_600_000, "fc1": 400_000, "fc2": 5_000}


@pytest.mark.parametrize(
    ("name", "count", "operations"),
    [("mobilenet_v1", 4_231_976, 568_740_352), ("mobilenet_v2", 3_504_872, 300_774_272)],
)
def test_mobilenets_have_the_papers_parameters_and_macs(name: str, count: int, operations: int) -> None:
    model = make(name)
    assert parameters(model) == count
    assert macs(model, (3, 224, 224)).total == operations


def test_mobilenet_v2_takes_torchvisions_weights_and_gives_its_outputs() -> None:
    from torchvision.models import mobilenet_v2

    torch.manual_seed(1)
    theirs = mobilenet_v2(num_classes=7).eval()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    ours = make("mobilenet_v2", classes=7).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("name", [n for n, (where, _) in BUILT_IN.items() if where.split(":")[0] in CLASSIFIERS])
def test_every_classifier_exports_and_trains_with_other_channels_and_classes(name: str) -> None:
    model = make(name, classes=7, channels=2)
    x = torch.randn(2, 2, 28, 28)
    y = model.train()(x)
    assert y.shape == (2, 7)
    y.square().sum().backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in model.parameters())
    if name != "resnet110":  # the same code as resnet20, and slow to trace
        program = torch.export.export(model.eval(), (x,))
        with torch.no_grad():
            torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize(("name", "side"), [("mobilenet_v1_small", 2), ("mobilenet_v2_small", 4)])
def test_the_small_mobilenets_keep_resolution_on_small_images(name: str, side: int) -> None:
    small, large = make(name, classes=10), make(name.removesuffix("_small"), classes=10)
    assert parameters(small) == parameters(large)
    features = small.features
    assert isinstance(features, nn.Module)
    with torch.no_grad():
        assert features.eval()(torch.zeros(1, 3, 32, 32)).shape[2:] == (side, side)
    assert macs(small, (3, 32, 32)).total > 3.5 * macs(large, (3, 32, 32)).total


def test_the_seed_of_torch_decides_the_weights_and_activations_start_near_unit_scale() -> None:
    a, b = make("resnet20").state_dict(), make("resnet20").state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    model = make("lenet5").train()
    seen: list[float] = []
    for layer in (model.conv1, model.conv2, model.fc1):
        assert isinstance(layer, nn.Module)
        layer.register_forward_hook(lambda _m, _i, out: seen.append(float(out.detach().square().mean())))
    model(torch.randn(64, 1, 28, 28))
    assert 1.6 < seen[0] < 2.4  # He et al. 2015, equation 10: twice the input's second moment, before ReLU
    assert all(1.0 < power < 100.0 for power in seen)  # max pooling adds to it


def test_the_table_of_models_imports_no_torch() -> None:
    code = "import sys, xedge.models; assert len(xedge.models.BUILT_IN) >= 6; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
