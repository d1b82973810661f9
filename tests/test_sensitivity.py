"""Sensitivities: each is the noise it says it is, in a unit that layers share, and no budget is exceeded."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from flavours import plain, randomised
from onnx import ModelProto, helper, numpy_helper
from torch import Tensor, nn

from xedge.metrics import kl
from xedge.onnx_graph import Graph, export_float, session
from xedge.quantize import LEVELS, Sensitivity, dequantised, error_tables, noise_tables, quantize, round_layers
from xedge.ranges import Calibration, calibrate, patch_moments
from xedge.rounding import RIDGED, RIDGES, Layer, choose_ridges, layers_of, rounded
from xedge.sensitivity import PROBE_BITS, Sample, distortions, fisher, information, layer_weights
from xedge.teacher import Teacher

HOWS: tuple[Sensitivity, ...] = ("output", "fisher", "di", "kfac", "uniform", "mse")
SHAPE = (3, 12, 12)
LABELS = Teacher("labels", 4)


def net() -> nn.Module:
    torch.manual_seed(1)
    made = plain()
    made[-1] = nn.Linear(16, 4)
    return randomised(made)


@functools.cache
def prepared() -> tuple[nn.Module, ModelProto, Calibration]:
    model = net()
    proto = export_float(model, SHAPE, 17)
    return model, proto, calibrate(proto, lambda: (x for x, _ in samples()))


def samples(count: int = 24) -> Iterator[Sample]:
    draw = np.random.default_rng(0)
    for i in range(count):
        yield (draw.standard_normal((1, *SHAPE)) + i % 4 - 1.5).astype(np.float32), i % 4


def outputs(proto: ModelProto) -> Tensor:
    run = session(proto)
    return torch.cat([torch.from_numpy(run.run(None, {Graph(proto).inputs[0]: x})[0]) for x, _ in samples()])


@functools.cache
def tables(how: Sensitivity) -> dict[str, np.ndarray]:
    model, proto, calibration = prepared()
    return distortions(how, model, proto, calibration, samples, LABELS)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("bits", [2.0, 3.7, 6.0])
def test_no_budget_is_exceeded_and_equal_bits_are_never_better(how: Sensitivity, bits: float) -> None:
    _, proto, calibration = prepared()
    found = tables(how)
    for name, t in found.items():
        assert t.shape == (len(Graph(proto).array(name)), len(LEVELS))
        assert np.isfinite(t).all()
        assert (t >= 0).all()
    table = quantize(proto, calibration, mean_bits=bits, tables=found)
    assert table.mean_bits() <= bits + 1e-9
    own = sum(found[n][np.arange(len(w.bits)), w.bits].sum() for n, w in table.weights.items())
    assert own <= sum(t[:, int(bits)].sum() for t in found.values()) + 1e-12
    assert bool(outputs(dequantised(proto, table.weights)).isfinite().all())


def test_uniform_gives_equal_bits() -> None:
    _, proto, calibration = prepared()
    table = quantize(proto, calibration, mean_bits=4, tables=tables("uniform"))
    assert {int(b) for w in table.weights.values() for b in w.bits} == {4}


def test_mse_is_the_weights_own_error() -> None:
    _, proto, calibration = prepared()
    layers = layers_of(proto, calibration.patches)
    for name, w in round_layers(proto, layers, {n: np.full(len(la.rows), 3) for n, la in layers.items()}, {}).items():
        shape = [-1] + [1] * (w.values.ndim - 1)
        error = Graph(proto).array(name) - w.values * w.scale.reshape(shape)
        np.testing.assert_allclose(
            tables("mse")[name][:, 3], (error.astype(float) ** 2).reshape(len(w.bits), -1).sum(1), rtol=1e-4
        )


def test_a_layers_weight_makes_its_table_predict_the_divergence() -> None:
    _, proto, calibration = prepared()
    layers = layers_of(proto, calibration.patches)
    noise = noise_tables(layers, feedback=True)
    alpha = layer_weights(proto, layers, noise, samples())
    base = outputs(proto)
    for name in layers:
        lost = []
        for b in (3, PROBE_BITS, 5):
            one = round_layers(proto, layers, {n: np.full(len(la.rows), b) for n, la in layers.items()}, {})[name]
            lost.append(kl(base, outputs(dequantised(proto, {name: one}))))
        assert alpha[name] * noise[name][:, PROBE_BITS].sum() == pytest.approx(lost[1], rel=0.2, abs=1e-4)
        assert alpha[name] * noise[name][:, 3].sum() == pytest.approx(lost[0], rel=0.9, abs=2e-4), "the same unit"


def test_few_images_flatter_their_own_errors_and_others_do_not() -> None:
    """A layer of 60 inputs that calibration saw 30 times: feedback hides errors where those 30 do not vary."""
    draw = np.random.default_rng(0)
    mix = draw.standard_normal((60, 60)) * np.geomspace(1, 0.05, 60)
    weight = draw.standard_normal((8, 60))

    def seen(count: int) -> dict[str, Layer]:
        x = draw.standard_normal((count, 60)) @ mix
        x -= x.mean(0)
        node = helper.make_node("Conv", ["x", "w"], ["y"])
        return {"w": Layer(node, "w", weight[:, None], (x.T @ x / count)[None], np.zeros((1, 60)), 1, False)}

    own, others, true = seen(30), seen(200), seen(20_000)
    want = noise_tables(own, true, feedback=True)["w"][:, 4].sum()
    assert noise_tables(own, feedback=True)["w"][:, 4].sum() < 0.7 * want
    assert noise_tables(own, others, feedback=True)["w"][:, 4].sum() == pytest.approx(want, rel=0.2)


def test_bits_and_ridges_are_chosen_on_images_held_back() -> None:
    model, proto, calibration = prepared()
    held = patch_moments(proto, (x + 0.5 for x, _ in samples(12)))
    chosen = choose_ridges(proto, calibration, held)
    assert chosen.held is held
    judges, layers = layers_of(proto, held), layers_of(proto, chosen.patches)
    for name, layer in layers.items():
        noise = []
        for ridge in RIDGES:
            q, scale = rounded(replace(layer, ridge=ridge), np.full(len(layer.rows), RIDGED), feedback=True)
            noise.append(judges[name].distortion(layer.rows - q * scale[:, None, None]).sum())
        assert layer.ridge == RIDGES[int(np.argmin(noise))]
    for how in ("output", "kfac"):
        found = distortions(how, model, proto, chosen, samples, LABELS)
        assert any(not np.allclose(found[n], t) for n, t in tables(how).items())


def test_with_plenty_of_images_the_ridge_is_small_and_with_few_it_is_large() -> None:
    draw = np.random.default_rng(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 64)).eval()
    proto = export_float(model, (3, 4, 4), 17)
    mix = draw.standard_normal((48, 48))

    def seen(count: int) -> list[np.ndarray]:
        return [(draw.standard_normal(48) @ mix).reshape(1, 3, 4, 4).astype(np.float32) for _ in range(count)]

    held = patch_moments(proto, seen(500))
    ridges = []
    for count in (24, 2000):
        images = seen(count)
        chosen = choose_ridges(proto, calibrate(proto, functools.partial(iter, images)), held)
        ridges.append(next(iter(chosen.patches.values())).ridge)
    assert ridges[0] == RIDGES[-1] > ridges[1]


class Wide(nn.Module):
    """Logits that read the first channel strongly, the second hardly, the third not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 3, padding=1)
        self.head = nn.Linear(3, 4, bias=False)
        with torch.no_grad():
            self.head.weight *= torch.tensor([3.0, 0.1, 0.0])

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x).mean((2, 3)))


def test_fisher_is_the_mean_squared_gradient() -> None:
    """du = dlogits @ W / pixels at each pixel, E dlogits dlogits^T = diag(p) - p p^T for labels of the model's own."""
    torch.manual_seed(0)
    model = Wide().eval()
    proto = export_float(model, SHAPE, 17)
    names = [n.input[1] for n in Graph(proto).weighted()]
    many = [s for _ in range(40) for s in samples()]
    found = fisher(model, proto, names, many, 0)
    with torch.no_grad():
        p = torch.cat([model(torch.from_numpy(x)).softmax(1) for x, _ in samples()])
        w = model.head.weight
        second = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        want = torch.einsum("lo,nlk,ko->o", w, second, w) / len(p) / (SHAPE[1] * SHAPE[2]) / 2
        head = torch.diagonal(second.mean(0)) / 2
    first, last = names
    np.testing.assert_allclose(found[first], want.numpy(), rtol=0.15, atol=1e-9)
    np.testing.assert_allclose(found[last], head.numpy(), rtol=0.15)


def test_information_is_lost_where_the_labels_are_read() -> None:
    """A channel that tells the classes apart costs more than one of noise, and scaling a channel changes nothing."""
    torch.manual_seed(0)
    model = Wide().eval()
    with torch.no_grad():
        model.first.weight[1:] -= model.first.weight[1:].mean((2, 3), keepdim=True)  # blind to the classes' brightness
    costs = {}
    for scale in (1.0, 50.0):
        with torch.no_grad():
            model.first.weight[0] *= scale
        proto = export_float(model, SHAPE, 17)
        calibration = calibrate(proto, lambda: (x for x, _ in samples()))
        layers = layers_of(proto, calibration.patches)
        g, c = information(proto, layers, samples(200), LABELS)["first.weight"]
        noise = layers["first.weight"].distortion(layers["first.weight"].rows, c)
        costs[scale] = g * noise  # relative noise of one
    assert costs[1.0][0] > 2 * costs[1.0][1]
    np.testing.assert_allclose(costs[50.0], costs[1.0], rtol=0.05)


def test_tables_are_of_the_rounding_that_is_used() -> None:
    _, proto, calibration = prepared()
    for layer in layers_of(proto, calibration.patches).values():
        near, fed = (error_tables(layer, feedback=f) for f in (False, True))
        assert (fed <= near).all()
        assert fed[:, 2:7].sum() < near[:, 2:7].sum() or layer.rows[0].size < 10
        np.testing.assert_allclose(near[:, 0], layer.distortion(layer.rows))


class Strided(nn.Module):
    """Convolutions of every form: strided and padded unevenly, depthwise, grouped and dilated, then a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU(),
            nn.Conv2d(8, 6, 3, padding=2, dilation=2, groups=2, bias=False), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


def test_fisher_along_the_errors_is_the_divergence_they_cause() -> None:
    """Half of E (delta . G)^2 is the divergence to second order: one channel rounded to 6 bits at a time."""
    torch.manual_seed(0)
    model = randomised(Strided().eval())
    proto = export_float(model, SHAPE, 17)
    calibration = calibrate(proto, lambda: (x for x, _ in samples()))
    found = distortions("fisher", model, proto, calibration, lambda: (s for _ in range(6) for s in samples()), LABELS)
    base, graph = outputs(proto), Graph(proto)
    for name, layer in layers_of(proto, calibration.patches).items():
        bits = np.full(len(layer.rows), 6)
        whole = dequantised(proto, round_layers(proto, {name: layer}, {name: bits}, {}))
        rounded_graph = Graph(whole)
        (node,) = (n for n in rounded_graph.weighted() if n.input[1] == name)
        new = [rounded_graph.array(name), rounded_graph.array(node.input[2])]
        bias = graph.array(layer.node.input[2]) if len(layer.node.input) > 2 else np.zeros(len(bits), np.float32)
        old = [graph.array(name), bias]
        real = []
        for o in range(len(layer.rows)):
            one = onnx.ModelProto()
            one.CopyFrom(whole)
            for tensor in one.graph.initializer:
                if tensor.name in (name, node.input[2]):
                    which = int(tensor.name != name)
                    mixed = old[which].copy()
                    mixed[o] = new[which][o]
                    tensor.CopyFrom(numpy_helper.from_array(mixed, tensor.name))
            real.append(kl(base, outputs(one)))
        np.testing.assert_allclose(found[name][:, 6].sum(), np.sum(real), rtol=0.3, err_msg=name)
        assert np.corrcoef(found[name][:, 6], real)[0, 1] > 0.9


def test_only_idle_channels_fall_far_below_the_mean() -> None:
    model = copy.deepcopy(net())
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    with torch.no_grad():
        first.weight[2] = 0
    proto = export_float(model, SHAPE, 17)
    calibration = calibrate(proto, lambda: (x for x, _ in samples()))
    name = Graph(proto).weighted()[0].input[1]
    cheap = {n: np.geomspace(1, 1e-9, 9)[None].repeat(len(Graph(proto).array(n)), 0) for n in tables("fisher")}
    cheap[name][:] = 0  # nothing lost at any width, as far as these tables know
    for mean, least in ((2.0, 1), (3.0, 2), (4.0, 3), (6.0, 3)):
        bits = quantize(proto, calibration, mean_bits=mean, tables=cheap).weights[name].bits
        assert bits[2] == 0
        assert {int(b) for b in np.delete(bits, 2)} == {least}
