"""The nets that restore pictures: the papers' parameter counts, and each through groups, a cut, ONNX and TFLite."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import nn

from xedge.errors import UsageError
from xedge.groups import find_groups
from xedge.metrics import macs, parameters
from xedge.models import BUILT_IN
from xedge.models.hsrn import Block
from xedge.models.upscale import Bicubic
from xedge.onnx_graph import export_float
from xedge.prune import certificate
from xedge.resample import imresize
from xedge.sizes import resized
from xedge.targets.tflite import convert, runner


def factory(name: str) -> Callable[..., nn.Module]:
    module, _, attribute = BUILT_IN[name][0].partition(":")
    made = getattr(importlib.import_module(module), attribute)
    assert callable(made)
    return made


NAMES = [name for name in BUILT_IN if "scale" in inspect.signature(factory(name)).parameters]

# Parameters as the papers and the tables of later papers print them, and of which variant
PUBLISHED: list[tuple[str, dict[str, int], float, int]] = [
    ("srcnn", {"scale": 4}, 69e3, 69_251),  # RGB
    ("vdsr", {"scale": 4}, 668e3, 668_227),  # RGB
    ("vdsr", {"scale": 4, "channels": 1}, 666e3, 665_921),  # Y
    ("srresnet", {"scale": 4}, 1.52e6, 1_523_011),
    ("srresnet", {"scale": 2}, 1.375e6, 1_375_235),
    ("lapsrn", {"scale": 4, "channels": 1}, 0.870e6, 870_112),  # Y
    ("feqe", {"scale": 4}, 96e3, 96_464),
    ("span", {"scale": 4}, 426e3, 426_288),
    ("span", {"scale": 4, "width": 52}, 498e3, 498_208),
    ("dncnn", {"channels": 1}, 556e3, 556_097),  # Y
]


@pytest.mark.parametrize(("name", "options", "printed", "count"), PUBLISHED)
def test_parameters_are_the_papers(name: str, options: dict[str, int], printed: float, count: int) -> None:
    assert parameters(factory(name)(**options)) == count
    assert count == pytest.approx(printed, rel=0.006)


def test_nearest_neighbours_keep_the_multiply_adds_and_save_parameters() -> None:
    plain, near = factory("srresnet")(scale=4), factory("x_srresnet")(scale=4)
    assert macs(plain, (3, 8, 8)).total == macs(near, (3, 8, 8)).total
    assert parameters(plain) - parameters(near) == 2 * 3 * (64 * 64 * 9 + 64)


def test_srcnn_at_the_size_of_pirm_has_its_multiply_adds() -> None:
    counted = macs(factory("srcnn")(scale=4), (3, 18, 32))  # a hundredth of 1280x720
    assert 100 * counted.total == 720 * 1280 * (81 * 3 * 64 + 25 * 64 * 32 + 25 * 32 * 3 + 3 * 25)
    assert 100 * counted.outside == 720 * 1280 * 3 * 25  # the fixed bicubic


def test_the_stages_of_a_hierarchical_block_see_3_9_and_27_pixels() -> None:
    block = Block(4).eval()
    x = torch.zeros(1, 4, 41, 41, requires_grad=True)
    y = x + 1
    for window, side in zip(block.windows, (3, 9, 27), strict=True):
        nn.init.ones_(window.weight)
        y = window(y)
        (felt,) = torch.autograd.grad(y[:, :, 20, 20].sum(), x, retain_graph=True)
        assert int((felt[0, 0, 20] != 0).sum()) == int((felt[0, 0, :, 20] != 0).sum()) == side


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_the_fixed_bicubic_is_matlabs_at_every_pixel_everywhere(scale: int) -> None:
    x = torch.rand(1, 3, 9, 7)
    layer = Bicubic(scale).eval()
    truth = imresize(x[0].permute(1, 2, 0).numpy(), 9 * scale, 7 * scale).transpose(2, 0, 1)[None]
    np.testing.assert_allclose(layer(x), truth, atol=1e-6)
    proto = export_float(layer, (3, 9, 7), 17)
    session = ort.InferenceSession(proto.SerializeToString())
    np.testing.assert_allclose(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0], truth, atol=1e-6)
    np.testing.assert_allclose(runner(convert(proto))(x.numpy()), truth, atol=1e-6)
    other = resized(export_float(layer, (3, 5, 6), 17), 9, 7)  # the mirrored borders move with the size
    session = ort.InferenceSession(other.SerializeToString())
    np.testing.assert_allclose(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0], truth, atol=1e-6)


# Small, but with every part: (scale, options)
SMALL: dict[str, list[dict[str, int]]] = {
    "srcnn": [{"scale": 1}, {"scale": 3}],
    "vdsr": [{"scale": 2, "depth": 4, "width": 12}],
    "dncnn": [{"scale": 1, "depth": 4, "width": 12}],
    "srresnet": [{"scale": 4, "blocks": 2, "width": 8}],
    "x_srresnet": [{"scale": 3, "blocks": 2, "width": 12}, {"scale": 4, "blocks": 1, "width": 8}],
    "lapsrn": [{"scale": 4, "depth": 2, "width": 8}],
    "feqe": [{"scale": 2, "blocks": 2, "width": 16}, {"scale": 4, "blocks": 2, "width": 16}],
    "hsrn": [{"scale": 1, "blocks": 2, "width": 8}, {"scale": 2, "blocks": 1, "width": 8}],
    "span": [{"scale": 4, "blocks": 2, "width": 8}],
}
CASES = [pytest.param(name, options, id=f"{name}-x{options['scale']}") for name in NAMES for options in SMALL[name]]


def small(name: str, options: dict[str, int]) -> nn.Module:
    """With statistics in its batch norms and a last layer that says something, as a trained one has."""
    torch.manual_seed(0)
    model = factory(name)(**options).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
        elif isinstance(module, nn.Conv2d) and float(module.weight.detach().std()) < 2e-3:
            nn.init.normal_(module.weight, std=0.05)
    return model


@pytest.mark.parametrize(("name", "options"), CASES)
def test_half_of_every_group_can_go(name: str, options: dict[str, int]) -> None:
    model, example = small(name, options), torch.rand(1, 3, 16, 16)
    assert model(example).shape == (1, 3, 16 * options["scale"], 16 * options["scale"])
    groups = find_groups(model, example, prune_stem=True)
    keep = groups.whole()
    for group in groups.free:
        keep[group.name][1::2] = False
    proof = certificate(model, groups, keep, example)
    assert proof.ok, proof.reason
    # every convolution but those at the ends loses channels
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    cut = {layer for group in groups.free for layer in (*group.producers, *group.consumers)}
    ends = {"levels.0.enlarge", "levels.1.enlarge"}  # the picture's own three channels
    assert set(layers) - cut <= ends
    reasons = {reason for layer, reason in groups.frozen if layer in layers}
    assert reasons <= {"model output", "model input"}, groups.frozen


@pytest.mark.parametrize(("name", "options"), CASES)
def test_onnx_and_tflite_give_what_torch_gives(name: str, options: dict[str, int]) -> None:
    model, x = small(name, options), torch.rand(1, 3, 16, 12)
    with torch.no_grad():
        truth = model(x).numpy()
    proto = export_float(model, (3, 16, 12), 17)
    session = ort.InferenceSession(proto.SerializeToString())
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    limit = 2e-5 * float(np.abs(truth).max())
    np.testing.assert_allclose(found, truth, atol=limit)
    np.testing.assert_allclose(runner(convert(proto))(x.numpy()), truth, atol=limit)


@pytest.mark.parametrize("name", NAMES)
def test_an_untrained_net_starts_near_an_enlargement_and_trains(name: str) -> None:
    torch.manual_seed(0)
    options = {"blocks": 2} if "blocks" in inspect.signature(factory(name)).parameters else {}
    model = factory(name)(scale=2, **options).train()
    x = nn.functional.interpolate(torch.rand(2, 3, 4, 4), 12, mode="bilinear")
    y = model(x)
    if name not in ("srcnn", "span"):  # these have no picture that they add to
        enlarged = nn.functional.interpolate(x, scale_factor=2, mode="bilinear")
        assert float((y.detach() - enlarged)[..., 3:-3, 3:-3].abs().mean()) < 0.02
    y.square().mean().backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in model.parameters())


@pytest.mark.parametrize(("name", "scale"), [("lapsrn", 3), ("lapsrn", 1), ("feqe", 3), ("srresnet", 5)])
def test_a_scale_that_a_net_is_not_made_for_is_refused(name: str, scale: int) -> None:
    with pytest.raises(UsageError, match=f"not made for scale {scale}"):
        factory(name)(scale=scale)
