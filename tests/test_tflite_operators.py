"""targets/tflite: each operator in float and integer, any convolution window, any order of views."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from one_node import CASES, i64, images, one, w
from onnx import TensorProto, helper, numpy_helper
from qdq import expected, quantized
from tflite_file import floats, step

from xedge.targets import tflite


@pytest.mark.parametrize("name", CASES)
def test_operator_float_and_integer(name: str) -> None:
    model = CASES[name]
    x = 2 * images(6, *(d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim[1:]), seed=3)
    np.testing.assert_allclose(tflite.runner(tflite.convert(model))(x), expected(model, x), atol=1e-4, rtol=1e-5)
    int8 = quantized(model, x)
    wanted, data = expected(int8, x), tflite.convert(int8)
    assert floats(data) == []
    for reference in (True, False):  # TFLite's own kernels, then XNNPACK
        apart = np.abs(tflite.runner(data, reference=reference)(x) - wanted).max()
        assert apart <= 1.01 * step(data)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    size=st.tuples(st.integers(5, 11), st.integers(5, 11)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.integers(1, 2),
    pads=st.tuples(*[st.integers(0, 3)] * 4),
    groups=st.sampled_from([1, 2, 4]),
    multiple=st.integers(1, 2),
)
def test_any_convolution_window(
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: int,
    pads: tuple[int, int, int, int],
    groups: int,
    multiple: int,
) -> None:
    assume(all(size[d] + pads[d] + pads[d + 2] >= (kernel[d] - 1) * dilation + 1 for d in range(2)))
    weight = w(4 * multiple, 4 // groups, *kernel)
    geometry = {"strides": list(stride), "dilations": [dilation] * 2, "pads": list(pads), "group": groups}
    model = one("Conv", (1, 4, *size), (weight, w(4 * multiple)), **geometry)
    x = images(3, 4, *size)
    np.testing.assert_allclose(tflite.runner(tflite.convert(model))(x), expected(model, x), atol=1e-4)
    int8 = quantized(model, x)
    data = tflite.convert(int8)
    assert np.abs(tflite.runner(data, reference=True)(x) - expected(int8, x)).max() <= 1.01 * step(data)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_chain_of_reshapes_and_transposes(data: st.DataObject) -> None:
    """Layout is lazy; whatever the order of views, the elements end where ONNX says."""
    shape, nodes, held = (1, 4, 6, 2), [], []
    for i in range(data.draw(st.integers(1, 4))):
        if data.draw(st.booleans()):
            perm = [0, *data.draw(st.permutations(range(1, len(shape))))]
            nodes.append(helper.make_node("Transpose", [f"t{i}"], [f"t{i + 1}"], perm=perm))
            shape = tuple(shape[p] for p in perm)
        else:
            shape = data.draw(st.sampled_from([(1, 48), (1, 2, 24), (1, 8, 3, 2), (1, 1, 6, 8), (1, 2, 2, 6, 2)]))
            held.append(numpy_helper.from_array(i64(*shape), f"s{i}"))
            nodes.append(helper.make_node("Reshape", [f"t{i}", f"s{i}"], [f"t{i + 1}"]))
    last = f"t{len(nodes)}"
    nodes.append(helper.make_node("Sigmoid", [last], ["y"]))
    source = helper.make_tensor_value_info("t0", TensorProto.FLOAT, (1, 4, 6, 2))
    sink = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "views", [source], [sink], held)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    x = images(2, 4, 6, 2)
    np.testing.assert_allclose(tflite.runner(tflite.convert(model))(x), expected(model, x), atol=1e-6)


@pytest.mark.parametrize("left", [False, True])
def test_a_vector_is_multiplied_in_integers(left: bool) -> None:
    """MatMul of int8 with a constant of one axis, on either side: the result has neither's axis."""
    draw = np.random.default_rng(0)
    held = {
        "xs": np.float32(0.03), "xz": np.int8(3), "v": draw.integers(-127, 128, 4 if left else 8).astype(np.int8),
        "vs": np.float32(0.01), "vz": np.int8(0), "ys": np.float32(0.08), "yz": np.int8(-2),
    }  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"]),
        helper.make_node("DequantizeLinear", ["v", "vs", "vz"], ["vd"]),
        helper.make_node("MatMul", ["vd", "xd"] if left else ["xd", "vd"], ["m"]),
        helper.make_node("QuantizeLinear", ["m", "ys", "yz"], ["mq"]),
        helper.make_node("DequantizeLinear", ["mq", "ys", "yz"], ["y"]),
    ]
    source, sink = (helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", [1, 4, 8]), ("y", None)))
    constants = [numpy_helper.from_array(np.asarray(a), n) for n, a in held.items()]
    graph = helper.make_graph(nodes, "vector", [source], [sink], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    x = draw.standard_normal((1, 4, 8)).astype(np.float32)
    wanted = expected(model, x)
    assert wanted.shape == (1, 8 if left else 4)
    run = tflite.runner(tflite.convert(model))
    assert run.interpreter.get_output_details()[0]["dtype"] == np.int8
    assert np.abs(run(x) - wanted).max() <= 1.01 * 0.08
