"""The float graph and its rounded twin: in step, and each layer nearer to the float net's than without the fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flavours import images
from onnx import ModelProto
from torch import nn

from xedge import twins
from xedge.onnx_graph import Graph, export_float, exposing, session
from xedge.quantize import dequantised, quantize
from xedge.ranges import Calibration, calibrate
from xedge.rounding import layers_of
from xedge.twins import Twins

SHAPE = (3, 12, 12)


class Block(nn.Module):
    """A skip, a depthwise layer, and a bias that the graph lacks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1, bias=False)
        self.deep = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.mix = nn.Conv2d(12, 12, 1)
        self.head = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = x + self.mix(torch.relu(self.deep(x)))
        return self.head(torch.relu(x).mean((2, 3)))


def rows(n: int, seed: int) -> list[np.ndarray]:
    """Smooth images, as pictures are."""
    x = torch.from_numpy(images(n, seed, SHAPE))
    return list(nn.functional.avg_pool2d(x, 3, 1, 1).mul(2).numpy()[:, None])


@pytest.fixture(scope="module")
def exported() -> tuple[ModelProto, Calibration]:
    torch.manual_seed(0)
    proto = export_float(Block().eval(), SHAPE, 17)
    return proto, calibrate(proto, lambda: rows(96, 0))


def answers(proto: ModelProto, tensors: list[str], data: list[np.ndarray]) -> list[list[np.ndarray]]:
    run = session(exposing(proto, tensors))
    return [run.run(tensors, {Graph(proto).inputs[0]: x}) for x in data]


def test_the_twins_hold_what_the_two_whole_graphs_compute(exported: tuple[ModelProto, Calibration]) -> None:
    proto, calibration = exported
    table, data = quantize(proto, calibration, mean_bits=3), rows(6, 1)
    pair = Twins(proto, data, [])
    for name, layer in layers_of(proto, calibration.patches).items():
        pair.reach(layer.node)
        read = layer.node.input[0]
        for side, whole in zip(pair.pairs, (proto, dequantised(proto, table.weights)), strict=True):
            for row, want in zip(side, answers(whole, [read], data), strict=True):
                np.testing.assert_allclose(row[read], want[0], rtol=1e-4, atol=1e-5)
        w = table.weights[name]
        pair.put(layer, w.rounded(), w.bias)


@pytest.mark.parametrize("bits", [2.0, 3.0])
def test_the_fit_brings_unseen_images_nearer_to_the_float_net(
    exported: tuple[ModelProto, Calibration], bits: float
) -> None:
    proto, calibration = exported
    unseen, out = rows(200, 2), Graph(proto).outputs
    want = np.concatenate([a[0] for a in answers(proto, out, unseen)])
    noise, spent = [], []
    for given in (None, (rows(96, 0), rows(48, 3))):
        table = quantize(proto, calibration, mean_bits=bits, images=given)
        got = np.concatenate([a[0] for a in answers(dequantised(proto, table.weights), out, unseen)])
        noise.append(np.square(got - want).mean())
        spent.append({n: w.bits.tolist() for n, w in table.weights.items()})
    assert spent[0] == spent[1], "the fit spends no bits"
    assert noise[1] < 0.8 * noise[0]


def test_nothing_is_fitted_where_nothing_was_rounded_or_images_are_few(
    exported: tuple[ModelProto, Calibration], monkeypatch: pytest.MonkeyPatch
) -> None:
    proto, calibration = exported
    exact = Twins(proto, rows(64, 0), rows(32, 3))
    few = Twins(proto, rows(4, 0), rows(2, 3))
    table = quantize(proto, calibration, mean_bits=2)
    for name, layer in layers_of(proto, calibration.patches).items():
        moved, shift = exact.fit(layer)
        assert np.allclose(moved.rows, layer.rows, atol=1e-6)
        assert np.allclose(shift, 0, atol=1e-6)
        assert few.fit(layer)[0] is layer
        w = table.weights[name]
        bias = Graph(proto).array(layer.node.input[2]).astype(np.float32) if len(layer.node.input) > 2 else None
        exact.put(layer, Graph(proto).array(name).astype(np.float32), bias)
        few.put(layer, w.rounded(), w.bias)
    monkeypatch.setattr(twins, "MOST_BYTES", 1 << 16)  # 12 channels of 12 x 12, twice, for two graphs: 4 images
    assert len(Twins(proto, rows(64, 0), rows(32, 3)).pairs[0]) < 8


def test_a_weight_used_twice_is_left_alone() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.twice, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 2, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.relu(self.twice(torch.relu(self.twice(torch.relu(self.stem(x)))))))

    torch.manual_seed(1)
    proto = export_float(Shared().eval(), SHAPE, 17)
    calibration = calibrate(proto, lambda: rows(32, 0))
    plain, fitted = (
        quantize(proto, calibration, mean_bits=4, images=given) for given in (None, (rows(32, 0), rows(16, 3)))
    )
    name = next(n for n in plain.weights if "twice" in n)
    assert np.array_equal(plain.weights[name].values, fitted.weights[name].values)
