"""Flavours: each keeps its runtime's rules, all hold one table, and ONNX Runtime runs them all."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from flavours import FLAVOURS, constants, images, quantised, run
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from xedge.errors import InternalError
from xedge.export import Grid, integer_bias, write_flavour
from xedge.metrics import snr_db
from xedge.onnx_graph import ACTIVATIONS, MOVES, WEIGHTED, Graph, export_float
from xedge.quantize import asymmetric, quantize
from xedge.ranges import calibrate
from xedge.target import Flavour

NETS = ("residual", "mobile", "dense")


def unwrapped(graph: Graph, name: str) -> str:
    """What a DequantizeLinear's output was before Q/DQ, else the name itself."""
    node = graph.producer.get(name)
    if node is None or node.op_type != "DequantizeLinear":
        return name
    q = graph.producer.get(node.input[0])
    return q.input[0] if q is not None else name


def is_rounded(graph: Graph, name: str) -> bool:
    return unwrapped(graph, name) != name


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("name", NETS)
def test_types_zero_points_and_biases(name: str, flavour: Flavour) -> None:
    q = quantised(name)
    proto = q.flavour[flavour]
    onnx.checker.check_model(proto, full_check=True)
    graph, values = Graph(proto), constants(proto)
    activations = [n for n in graph.nodes if n.op_type == "QuantizeLinear"]
    assert activations
    for n in activations:
        zero, scale = values[n.input[2]], values[n.input[1]]
        assert scale.shape == zero.shape == ()
        assert zero.dtype == (np.uint8 if flavour == "onnxruntime" else np.int8)
        (back,) = graph.consumers[n.output[0]]
        assert back.op_type == "DequantizeLinear"
        assert list(back.input[1:]) == list(n.input[1:]), "both ways on one grid"
        low, high = q.table.activations[n.input[0].removesuffix("_float")]
        if flavour == "tensorrt":
            assert zero == 0
            assert 127 * float(scale) == pytest.approx(max(-low, high), rel=1e-5)
        else:
            want, z = asymmetric(low, high)
            assert (scale, int(zero)) == (want, z - (128 if flavour == "litert" else 0))
    weighted = [n for n in graph.nodes if n.op_type in WEIGHTED]
    assert len(weighted) == len(q.table.weights)
    for n in weighted:
        assert is_rounded(graph, n.input[0]), n.name
        w = graph.producer[n.input[1]]
        assert w.op_type == "DequantizeLinear"
        assert values[w.input[0]].dtype == np.int8
        assert not values[w.input[2]].any()
        axis = next(a.i for a in w.attribute if a.name == "axis")
        assert len(values[w.input[1]]) == values[w.input[0]].shape[axis]
        if flavour == "tensorrt":
            assert values[n.input[2]].dtype == np.float32
            assert axis == 0
        else:
            b = graph.producer[n.input[2]]
            source = graph.producer[n.input[0]]
            assert values[b.input[0]].dtype == np.int32
            assert not values[b.input[2]].any()
            np.testing.assert_allclose(
                values[b.input[1]], values[source.input[1]] * values[w.input[1]].astype(np.float64), rtol=1e-6
            )
            table = q.table.weights[w.input[0].removesuffix("_q")]
            assert table.bias is not None
            error = values[b.input[0]] * values[b.input[1]].astype(np.float64) - table.bias
            assert (np.abs(error) <= 0.5001 * values[b.input[1]]).all()


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("name", [*NETS, "shuffle", "plain"])
def test_nothing_stands_between_a_convolution_and_its_activation(name: str, flavour: Flavour) -> None:
    """Kernels fuse only what is adjacent; and the float graph is what remains when Q/DQ is taken out."""
    q = quantised(name)
    graph, plain = Graph(q.flavour[flavour]), Graph(q.proto)
    for node in plain.nodes:
        if node.op_type in ACTIVATIONS and plain.producer[node.input[0]].op_type in (*WEIGHTED, "Add"):
            now = next(n for n in graph.nodes if n.name == node.name)
            assert graph.producer[now.input[0]].op_type in (*WEIGHTED, "Add"), node.name
    left = [n for n in graph.nodes if n.op_type not in ("QuantizeLinear", "DequantizeLinear")]
    assert [(n.op_type, n.name) for n in left] == [(n.op_type, n.name) for n in plain.nodes]
    assert graph.inputs == plain.inputs
    assert graph.outputs == plain.outputs


@pytest.mark.parametrize("name", ["residual", "mobile"])
def test_tensorrt_rounds_the_residual_input_and_leaves_the_convolution_open(name: str) -> None:
    graph = Graph(quantised(name).flavour["tensorrt"])
    adds = [n for n in graph.nodes if n.op_type == "Add"]
    assert adds
    for add in adds:
        rounded = [is_rounded(graph, n) for n in add.input]
        assert sorted(rounded) == [False, True], add.name
        open_input = add.input[rounded.index(False)]
        assert graph.producer[open_input].op_type == "Conv"
    for n in graph.outputs:
        assert graph.producer[n].op_type != "DequantizeLinear", "logits stay float"


@pytest.mark.parametrize("flavour", ["litert", "onnxruntime"])
@pytest.mark.parametrize("name", [*NETS, "shuffle"])
def test_integer_flavours_round_every_tensor_and_moves_keep_the_grid(name: str, flavour: Flavour) -> None:
    q = quantised(name)
    graph, values, plain = Graph(q.flavour[flavour]), constants(q.flavour[flavour]), Graph(q.proto)
    have = {n.input[0].removesuffix("_float") for n in graph.nodes if n.op_type == "QuantizeLinear"}
    assert have == set(plain.activations())
    grid = {
        n.input[0].removesuffix("_float"): (float(values[n.input[1]]), int(values[n.input[2]]))
        for n in graph.nodes
        if n.op_type == "QuantizeLinear"
    }
    for node in plain.nodes:
        if node.op_type in MOVES:
            assert {grid[o] for o in node.output} == {grid[node.input[0]]}, node.name
        if node.op_type == "Concat":
            assert len({grid[n] for n in [*node.input, *node.output]}) == 1, node.name
    for out in graph.outputs:
        assert graph.producer[out].op_type == "DequantizeLinear"


@pytest.mark.parametrize("name", [*NETS, "shuffle"])
def test_onnx_runtime_runs_each_and_all_are_near_the_float_model(name: str) -> None:
    q = quantised(name, 8.0)
    x = images(8, 1)
    with torch.no_grad():
        want = q.model(torch.from_numpy(x))
    for flavour in FLAVOURS:
        assert snr_db(want, run(q.flavour[flavour], x)) > 20, flavour


def test_the_same_table_is_in_all_flavours() -> None:
    q = quantised("residual")
    stored = [constants(q.flavour[f]) for f in FLAVOURS]
    for name, w in q.table.weights.items():
        for values in stored:
            assert np.array_equal(values[f"{name}_q"], w.values)
            assert np.array_equal(values[f"{name}_scale"], w.scale)
    litert, runtime = stored[1], stored[2]
    for name in q.table.activations:
        assert litert[f"{name}_scale"] == runtime[f"{name}_scale"]
        assert int(runtime[f"{name}_zero_point"]) - int(litert[f"{name}_zero_point"]) == 128


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_same_table_gives_the_same_bytes_and_the_float_graph_stays(flavour: Flavour) -> None:
    q = quantised("plain")
    before = q.proto.SerializeToString(deterministic=True)
    again = write_flavour(q.proto, q.table, flavour)
    assert again.SerializeToString(deterministic=True) == q.flavour[flavour].SerializeToString(deterministic=True)
    assert q.proto.SerializeToString(deterministic=True) == before
    kept = {t.name for t in again.graph.initializer}
    assert not kept & set(q.table.weights), "no float weight stays behind"


def test_a_table_of_another_graph_is_refused() -> None:
    q = quantised("plain")
    first = next(iter(q.table.weights.values()))
    with pytest.raises(InternalError, match="names stranger, which the graph does not have"):
        write_flavour(q.proto, replace(q.table, weights={"stranger": first}), "litert")


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.register_buffer("factor", torch.tensor([0.5, 1.5, -1.0, 2.0]).reshape(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * self.factor + 0.25


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_constant_operands_of_integer_flavours_lie_on_a_grid_too(flavour: Flavour) -> None:
    net = Scaled().eval()
    proto = export_float(net, (3, 6, 6), 17)
    x = images(8, 0, (3, 6, 6))
    model = write_flavour(proto, quantize(proto, calibrate(proto, lambda: x[:, None]), mean_bits=8), flavour)
    graph = Graph(model)
    for node in graph.nodes:
        if node.op_type in ("Mul", "Add") and flavour != "tensorrt":
            assert all(graph.producer[n].op_type == "DequantizeLinear" for n in node.input)
    with torch.no_grad():
        assert snr_db(net(torch.from_numpy(x)), run(model, x)) > 30


def test_an_output_that_is_also_read_inside_keeps_its_name() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.a(x)
            return y, self.b(y)

    proto = export_float(Two().eval(), (3, 6, 6), 17)
    x = images(4, 0, (3, 6, 6))
    table = quantize(proto, calibrate(proto, lambda: x[:, None]), mean_bits=8)
    for flavour in FLAVOURS:
        model = write_flavour(proto, table, flavour)
        assert [o.name for o in model.graph.output] == [o.name for o in proto.graph.output]
        onnx.checker.check_model(model, full_check=True)
        with torch.no_grad():
            want = Two.forward.__name__ and run(proto, x)
        assert snr_db(want, run(model, x)) > 25


def test_two_nodes_that_share_a_weight_each_get_a_bias_on_their_own_scale() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.conv(x) * 3)

    net = Shared().eval()
    proto = export_float(net, (3, 8, 8), 17)
    x = images(8, 0, (3, 8, 8))
    table = quantize(proto, calibrate(proto, lambda: x[:, None]), mean_bits=8)
    model = write_flavour(proto, table, "litert")
    biases = [t for t in model.graph.initializer if t.data_type == TensorProto.INT32 and t.name.endswith("_bias_q")]
    assert len(biases) == 2
    first, second = (numpy_helper.to_array(t).astype(float) for t in biases)
    assert not np.allclose(first, second)
    with torch.no_grad():
        assert snr_db(net(torch.from_numpy(x)), run(model, x)) > 25


def test_integer_biases_saturate_instead_of_wrapping() -> None:
    value, step = integer_bias(
        np.array([1.0, 1e9, -1e9], np.float32), Grid(np.float32(1e-3), 0, -128, 127), np.full(3, 1e-3, np.float32)
    )
    assert value.dtype == np.int32
    assert value.tolist() == [1_000_000, 2**31 - 1, -(2**31) + 1]
    np.testing.assert_allclose(step, 1e-6, rtol=1e-6)


def test_x64quantprecision_makes_the_default_session_exact_enough() -> None:
    """Without it uint8 x int8 products saturate in 16 bits on x86 without VNNI."""
    q = quantised("plain", 8.0)
    x = images(16, 3)
    exact, default = (run(q.flavour["onnxruntime"], x, exact=e) for e in (True, False))
    step = float(constants(q.flavour["onnxruntime"])[f"{q.proto.graph.output[0].name}_scale"])
    steps = ((exact - default).abs() / step).round()
    assert float(steps.max()) <= 1
    assert float((steps > 0).double().mean()) < 0.1
    # Two products of 255 * 127 each overflow 16 bits: the worst case, which only that option gets right.
    w = np.full((1, 64), 127, np.int8)
    x8 = np.full((1, 64), 255, np.uint8)
    parts = [numpy_helper.from_array(v, n) for n, v in (("w", w), ("one", np.float32(1)), ("z", np.uint8(0)))]
    wide = [numpy_helper.from_array(np.ones(1, np.float32), "s"), numpy_helper.from_array(np.zeros(1, np.int8), "wz")]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "one", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "one", "z"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "s", "wz"], ["wd"], axis=0),
        helper.make_node("Gemm", ["d", "wd"], ["y"], transB=1),
    ]
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, k]) for n, k in (("x", 64), ("y", 1))]
    model = helper.make_model(
        helper.make_graph(nodes, "g", value[:1], value[1:], [*parts, *wide]),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    assert float(run(model, x8.astype(np.float32), exact=False)) == 255 * 127 * 64
