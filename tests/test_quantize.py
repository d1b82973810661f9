"""X-Quantization: bits keep to the budget, integers to their bits, errors fall and means vanish."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from flavours import FLAVOURS, SHAPE, constants, fits, images, quantised, run
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper
from torch import nn

from xedge.errors import UnsupportedGraph, UsageError
from xedge.onnx_graph import Graph, export_float
from xedge.quantize import ScaleTable, asymmetric, quantize, symmetric
from xedge.ranges import Patches, calibrate
from xedge.rounding import (
    Grid,
    Layer,
    channel_axis,
    from_rows,
    make_layer,
    round_nearest,
    round_with_feedback,
    to_rows,
)


def table_of(net: nn.Module, shape: tuple[int, ...], bits: float, *, feedback: bool = True, n: int = 6) -> ScaleTable:
    proto = export_float(net.eval(), shape, 17)
    return quantize(proto, calibrate(proto, lambda: images(n, 0, shape)[:, None]), mean_bits=bits, feedback=feedback)


def layer(gram: np.ndarray, rows: np.ndarray) -> Layer:
    """A plain layer [O, K] with a given covariance."""
    node = helper.make_node("Conv", ["x", "w"], ["y"])
    return Layer(node, "w", rows[:, None, :], gram[None], np.zeros((1, len(gram))), 1, False)


@pytest.mark.parametrize(
    ("node", "shape"),
    [
        (helper.make_node("Conv", "xw", "y"), (6, 4, 3, 3)),
        (helper.make_node("Conv", "xw", "y", group=2), (6, 2, 3, 3)),
        (helper.make_node("Conv", "xw", "y", group=6), (6, 1, 3, 3)),
        (helper.make_node("ConvTranspose", "xw", "y"), (4, 6, 2, 3)),
        (helper.make_node("ConvTranspose", "xw", "y", group=2), (4, 6, 2, 2)),
        (helper.make_node("Gemm", "xw", "y", transB=1), (6, 5)),
        (helper.make_node("Gemm", "xw", "y"), (5, 6)),
        (helper.make_node("MatMul", "xw", "y"), (5, 6)),
    ],
)
def test_rows_and_back(node: onnx.NodeProto, shape: tuple[int, ...]) -> None:
    w = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    rows = to_rows(node, w)
    assert np.array_equal(from_rows(node, rows, shape).astype(np.float32), w)
    groups = next((a.i for a in node.attribute if a.name == "group"), 1)
    transposed = node.op_type == "ConvTranspose"
    assert len(rows) == shape[channel_axis(node)] * (groups if transposed else 1)
    if groups == 1:  # row o holds exactly the weights of output channel o
        for o, row in enumerate(rows):
            assert np.array_equal(np.sort(row.ravel()), np.sort(w.take(o, channel_axis(node)).ravel().astype(float)))


def test_a_grouped_transposed_convolution_has_a_scale_for_each_output(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(4, 6, 2, stride=2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.up(x)

    table = table_of(Net(), (4, 5, 5), 8)
    w = table.weights["up.weight"]
    assert w.values.shape == (4, 6, 2, 2)
    assert w.scale.shape == (6,)
    assert w.axis == 1


@pytest.mark.parametrize("feedback", [False, True])
def test_eight_bits_are_within_half_a_step_of_each_weight(feedback: bool) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    table = table_of(net, (3, 8, 8), 8, feedback=feedback)
    for name, layer_ in (("0.weight", net[0]), ("3.weight", net[3])):
        w = table.weights[name]
        assert set(w.bits) == {8}
        steps = layer_.weight.detach().numpy() / w.scale.reshape(-1, *[1] * (w.values.ndim - 1))
        error = np.abs(steps - w.values)
        if feedback:  # an error may travel: no bound for each, but none far off
            assert error.max() < 20
            assert np.median(error) < 0.6
        else:  # a clipped weight is further off than half a step
            assert (error <= 0.5 + 1e-3)[np.abs(w.values) < 127].all()
            assert ((np.abs(steps) >= 126.5) == (np.abs(w.values) == 127)).all()


@pytest.mark.parametrize("bits", [2.0, 3.3, 4.5, 8.0])
def test_integers_keep_to_their_bits_and_bits_to_the_budget_in_every_file(bits: float) -> None:
    q = quantised("plain", bits)
    assert q.table.mean_bits() <= bits + 1e-9
    assert q.table.mean_bits() > bits - 0.1, "the budget is spent"
    total = sum(w.values.size for w in q.table.weights.values())
    assert sum(float(w.bits.mean()) * w.values.size for w in q.table.weights.values()) <= bits * total + 1e-6
    for flavour in FLAVOURS:
        stored = constants(q.flavour[flavour])
        for name, w in q.table.weights.items():
            values = stored[f"{name}_q"]
            assert values.dtype == np.int8
            assert np.array_equal(values, w.values)
            assert fits(values, w.bits, w.axis)
            assert np.array_equal(stored[f"{name}_scale"], w.scale)


def test_the_planned_bits_are_those_of_the_integers_in_the_tflite_file(tmp_path: Path) -> None:
    from ai_edge_litert import schema_py_generated as schema

    from xedge.targets import tflite

    q = quantised("plain", 4.5)
    onnx.save(q.flavour["litert"], tmp_path / "m.onnx")
    content = tflite.compile(tmp_path / "m.onnx", tmp_path, "m").read_bytes()
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAsModel(content, 0))
    found = []
    for tensor in model.subgraphs[0].tensors:
        data = model.buffers[tensor.buffer].data
        if data is None or tensor.type != schema.TensorType.INT8 or tensor.quantization is None:
            continue
        values = np.asarray(data, np.uint8).view(np.int8).reshape(tensor.shape).astype(int)
        axis = tensor.quantization.quantizedDimension
        found.append((np.asarray(tensor.quantization.scale, np.float32), np.moveaxis(values, axis, 0)))
    for name, w in q.table.weights.items():
        match = [v for s, v in found if len(s) == len(w.scale) and np.allclose(s, w.scale, rtol=1e-6)]
        assert len(match) == 1, name
        assert fits(match[0], w.bits, 0)
        assert np.array_equal(np.sort(match[0].ravel()), np.sort(w.values.ravel().astype(int)))


def test_floors_hold_and_other_budgets_are_refused() -> None:
    q = quantised("plain")
    table = quantize(q.proto, q.calibration, mean_bits=4, least={"11": 7})
    assert min(table.bits_of()["11"]) >= 7
    assert table.mean_bits() <= 4
    for bits in (1.5, 8.5):
        with pytest.raises(UsageError, match="outside 2 to 8"):
            quantize(q.proto, q.calibration, mean_bits=bits)
    empty = export_float(nn.ReLU(), (3, 4, 4), 17)
    with pytest.raises(UnsupportedGraph, match="no convolution or linear layer"):
        quantize(empty, q.calibration, mean_bits=4)


def test_feedback_lowers_the_weighted_error_on_average() -> None:
    draw = np.random.default_rng(0)
    gains = []
    for bits in (2, 3, 4, 6):
        for _ in range(5):
            mix = draw.standard_normal((24, 24)) * draw.uniform(0.1, 2, 24)
            one = layer(mix @ mix.T / 24, draw.standard_normal((6, 24)))
            wide = np.full(6, bits)
            grid = one.grid(wide)
            near, fed = (
                one.distortion(one.rows - f(one, grid) * grid.scale[:, None, None]).sum()
                for f in (round_nearest, round_with_feedback)
            )
            gains.append(near / fed)
    assert np.exp(np.mean(np.log(gains))) > 1.5
    assert np.mean(np.array(gains) > 1) > 0.9


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=8), st.floats(0.01, 9), st.integers(2, 8))
@settings(max_examples=40)
def test_one_weight_or_independent_weights_are_rounded_to_nearest(w: list[float], power: float, bits: int) -> None:
    one = layer(np.array([[power]]), np.array(w)[:, None])
    many = layer(np.diag(np.linspace(0.5, 2, len(w))), np.array([w]))
    for each in (one, many):
        grid = each.grid(np.full(len(each.rows), bits))
        assert np.array_equal(round_with_feedback(each, grid), round_nearest(each, grid))


@given(st.integers(1, 70), st.integers(0, 99))
@settings(max_examples=10)
def test_blocks_of_columns_change_nothing(block: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    mix = draw.standard_normal((20, 20))
    one = layer(mix @ mix.T, draw.standard_normal((4, 20)))
    grid = one.grid(np.full(4, 4))
    a, b = round_with_feedback(one, grid, block), round_with_feedback(one, grid, 1)
    assert (a != b).mean() <= 0.03, "ties in another order of sums"


@pytest.mark.parametrize("odd", [False, True])
def test_a_width_of_b_bits_has_two_to_the_b_integers(odd: bool) -> None:
    for b in range(9):
        if odd and b in (0, 4, 8):
            continue
        one = Grid.of(np.array([b]), np.ones(1), np.array([odd]))
        found = one.nearest(torch.linspace(-300, 300, 4801, dtype=torch.float64)[None], np.zeros((1, 1), np.intp))
        assert len(found.unique()) == (255 if b == 8 else 2 if odd and b == 1 else 2**b), b
        assert float(found.abs().max()) <= (128 if b == 8 else 2**b)
        assert fits(found.numpy(), np.array([b]), 0)


@pytest.mark.parametrize(("bits", "error"), [(1, 0.3634), (2, 0.1188), (3, 0.03744), (5, 0.003495)])
def test_gaussian_weights_are_rounded_as_well_as_uniform_steps_can(bits: int, error: float) -> None:
    """J. Max, Quantizing for minimum distortion, IRE Trans. Information Theory, 1960, table II."""
    rows = np.random.default_rng(0).standard_normal((1, 500, 40))
    one = replace(layer(np.eye(40), np.zeros((1, 40))), rows=rows)
    grid = one.grid(np.array([bits]))
    left = np.mean((one.rows - round_nearest(one, grid) * grid.scale) ** 2)
    assert left == pytest.approx(error, rel=0.04)


def test_distortion_is_the_noise_at_the_output() -> None:
    draw = np.random.default_rng(0)
    x = draw.standard_normal((5000, 6)) @ draw.standard_normal((6, 6))
    x -= x.mean(0)
    error = draw.standard_normal((3, 1, 6))
    one = layer(x.T @ x / len(x), draw.standard_normal((3, 6)))
    np.testing.assert_allclose(one.distortion(error), ((x @ error[:, 0].T) ** 2).mean(0), rtol=1e-9)


def test_channels_that_never_vary_can_be_rounded() -> None:
    """ReLU outputs that are always 0, and constants: their covariance is 0 or rounding noise below 0."""
    gram = np.zeros((4, 4))
    gram[0, 0], gram[1, 1] = 1.0, -1e-13
    one = layer(gram, np.random.default_rng(0).standard_normal((3, 4)))
    q = round_with_feedback(one, one.grid(np.full(3, 4)))
    assert np.isfinite(q).all()
    assert fits(q, np.full(3, 4), 0)
    dead = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        dead[0].bias[:2] = -1000
        dead[0].weight[2] *= 1e-7  # a constant
        dead[0].bias[2] = 1000
    table = table_of(dead, (3, 9, 9), 3)
    assert all(np.isfinite(w.scale).all() and (w.scale > 0).all() for w in table.weights.values())


@pytest.mark.parametrize("bits", [2.0, 4.0])
def test_the_mean_error_of_a_layer_goes_into_its_bias(bits: float) -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 3, stride=1), nn.Flatten(), nn.Linear(6 * 25, 4)).eval()
    shape, data = (3, 7, 7), images(30, 0, (3, 7, 7)) + 2  # 25 positions: all of them are observed
    proto = export_float(net, shape, 17)
    table = quantize(proto, calibrate(proto, lambda: data[:, None]), mean_bits=bits)
    w = table.weights["0.weight"]
    assert w.bias is not None
    x = torch.from_numpy(data).double()
    rounded = torch.from_numpy(w.values * w.scale.reshape(-1, 1, 1, 1).astype(np.float64))
    bare = nn.functional.conv2d(x, rounded, net[0].bias.detach().double()).mean((0, 2, 3))
    corrected = nn.functional.conv2d(x, rounded, torch.from_numpy(w.bias).double()).mean((0, 2, 3))
    with torch.no_grad():
        want = net.double()[0](x).mean((0, 2, 3))
    assert float((corrected - want).abs().max()) < 1e-6
    assert float((bare - want).abs().max()) > 1e-3, "there was something to correct"


def test_a_switched_off_channel_keeps_its_bias_in_int32() -> None:
    """Weights of 1e-9 and a bias of 0.7, as batch norms leave them: the bias in steps of s_in * s_w would overflow."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    with torch.no_grad():
        net[0].weight[1] *= 1e-9
        net[0].bias[1] = 0.7
    proto = export_float(net, (3, 8, 8), 17)
    data = images(4, 0, (3, 8, 8))
    table = quantize(proto, calibrate(proto, lambda: data[:, None]), mean_bits=8)
    from xedge.export import write_flavour

    with torch.no_grad():
        want = net(torch.from_numpy(data))
    for flavour in FLAVOURS:
        got = run(write_flavour(proto, table, flavour), data)
        assert float((got - want).abs().max()) < 0.03 * float(want.abs().max()), flavour
    biases = [v for k, v in constants(write_flavour(proto, table, "litert")).items() if k.endswith("_bias_q")]
    assert biases
    assert all(np.abs(b.astype(np.int64)).max() < 2**29 for b in biases)


def test_saved_and_loaded_the_table_is_bit_equal(tmp_path: Path) -> None:
    table = quantised("plain").table
    table.save(tmp_path / "a.safetensors")
    back = ScaleTable.load(tmp_path / "a.safetensors")
    back.save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert back.activations == table.activations
    assert back.bits_of() == table.bits_of()
    for name, w in table.weights.items():
        other = back.weights[name]
        assert (other.layer, other.axis, other.bias is None) == (w.layer, w.axis, w.bias is None)
        for key in ("scale", "bits", "values", "bias"):
            a, b = getattr(w, key), getattr(other, key)
            assert a.dtype == b.dtype
            assert np.array_equal(a, b)


def test_the_same_input_gives_the_same_table() -> None:
    q = quantised("plain")
    again = quantize(q.proto, calibrate(q.proto, lambda: images(8, 0, SHAPE)[:, None]), mean_bits=5)
    assert again.activations == q.table.activations
    for name, w in q.table.weights.items():
        assert np.array_equal(again.weights[name].values, w.values)
        assert np.array_equal(again.weights[name].scale, w.scale)


@given(st.floats(-1e4, 0), st.floats(0, 1e4))
def test_grids_hold_their_range_and_zero_exactly(low: float, high: float) -> None:
    scale, zero = asymmetric(low, high)
    assert 0 <= zero <= 255
    assert (0 - zero) * float(scale) <= low + 0.51 * float(scale)
    assert (255 - zero) * float(scale) >= high - 0.51 * float(scale)
    assert 127 * float(symmetric(low, high)) == pytest.approx(max(-low, high, 1e-8), rel=1e-6)


def test_a_matmul_without_bias_counts_its_mean_error() -> None:
    """Nothing corrects its mean, so its distortion takes moments about zero."""
    draw = np.random.default_rng(0)
    w, x = draw.standard_normal((6, 3)).astype(np.float32), draw.standard_normal((200, 6)) + 3
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="m")
    value = [helper.make_tensor_value_info(n, 1, [1, k]) for n, k in (("x", 6), ("y", 3))]
    proto = helper.make_model(
        helper.make_graph([node], "g", value[:1], value[1:], [onnx.numpy_helper.from_array(w, "w")]),
        opset_imports=[helper.make_opsetid("", 17)],
    )
    moments = Patches((x.T @ x / len(x))[None], x.mean(0)[None], False)
    one = make_layer(Graph(proto), proto.graph.node[0], moments)
    error = draw.standard_normal((3, 1, 6))
    np.testing.assert_allclose(one.distortion(error), ((x @ error[:, 0].T) ** 2).mean(0), rtol=1e-9)


@pytest.mark.parametrize("layer_", ["0", "4", "11"])
def test_a_layer_kept_float_is_float_in_every_flavour(layer_: str, tmp_path: Path) -> None:
    q = quantised("plain")
    table = quantize(q.proto, q.calibration, mean_bits=6, keep_float={layer_})
    assert layer_ not in table.bits_of()
    assert len(table.activations) == len(q.table.activations) - 1
    from xedge.export import write_flavour
    from xedge.simulate import Quantized
    from xedge.targets import tflite

    data = images(6, 1, SHAPE)
    for flavour in FLAVOURS:
        written = write_flavour(q.proto, table, flavour)
        assert f"{layer_}.weight_q" not in constants(written)
        with torch.no_grad():
            want = Quantized(q.model, q.proto, table, flavour, SHAPE)(torch.from_numpy(data))
        got = [run(written, data)]
        if flavour == "litert":
            onnx.save(written, tmp_path / "m.onnx")
            path = tflite.compile(tmp_path / "m.onnx", tmp_path, "m")
            got.append(torch.from_numpy(tflite.TARGET.load(path, 1)(data)))
        for one in got:
            assert float((one - want).abs().max()) < 0.02 * float(want.abs().max())
    with pytest.raises(UsageError, match="no layer is left"):
        quantize(q.proto, q.calibration, mean_bits=6, keep_float={n.removesuffix(".weight") for n in q.table.weights})
