"""4-bit weights in a .tflite: the nibbles, which layers get them, and which of LiteRT's kernels run them."""

from __future__ import annotations

import collections
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter
from flavours import quantised
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from one_node import images, one, w
from onnx import TensorProto, helper, numpy_helper
from qdq import expected, quantized
from tflite_file import floats, step

from xedge.assemble import _tflite_weights
from xedge.audit import audit_one
from xedge.errors import UnsupportedGraph
from xedge.export import write_flavour
from xedge.quantize import ScaleTable
from xedge.targets import tflite
from xedge.targets.tflite_write import nibbles

WEIGHTED = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "TRANSPOSE_CONV")


def unpacked(stored: NDArray[np.uint8], count: int) -> NDArray[np.int8]:
    """The inverse of the format: low nibble first, two's complement."""
    both = np.stack([stored & 15, stored >> 4], 1).reshape(-1)[:count].astype(np.int8)
    return np.where(both > 7, both - 16, both).astype(np.int8)


def weights(data: bytes) -> list[tuple[str, int, tuple[int, ...], NDArray[np.int8]]]:
    """Of each weighted operator: its code, its weight's type, shape and integers."""
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(data))
    graph = model.subgraphs[0]
    names = {v: k for k, v in vars(schema.BuiltinOperator).items() if isinstance(v, int)}
    found = []
    for op in graph.operators:
        code = names[model.operatorCodes[op.opcodeIndex].builtinCode]
        if code in WEIGHTED:
            tensor = graph.tensors[op.inputs[1]]
            held, shape = np.asarray(model.buffers[tensor.buffer].data, np.uint8), tuple(map(int, tensor.shape))
            four = tensor.type == schema.TensorType.INT4
            count = int(np.prod(shape))
            assert len(held) == ((count + 1) // 2 if four else count)
            values = unpacked(held, count) if four else held.view(np.int8)
            found.append((code, 4 if four else 8, shape, values.reshape(shape)))
    return found


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(-8, 7), max_size=33))
def test_nibbles_hold_every_value(values: list[int]) -> None:
    given_ = np.array(values, np.int8)
    stored = nibbles(given_)
    assert len(stored) == (len(values) + 1) // 2
    np.testing.assert_array_equal(unpacked(stored, len(values)), given_)


def planned(table: ScaleTable, most: dict[str, int]) -> ScaleTable:
    """The table with each layer's channels at `most` bits at most, their integers clipped to the grid of these."""
    changed = {}
    for name, held in table.weights.items():
        bits = np.minimum(held.bits, most[name]).astype(np.uint8)
        limit = 2 ** (bits.astype(np.int64) - 1) - 1
        limit = limit.reshape([-1 if a == held.axis else 1 for a in range(held.values.ndim)])
        changed[name] = replace(held, bits=bits, values=np.clip(held.values, -limit, limit).astype(np.int8))
    return ScaleTable(changed, table.activations)


@settings(max_examples=8, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_the_file_holds_what_the_plan_says(data: st.DataObject) -> None:
    """Linear layers planned at 4 bits or fewer lie in 4 bits, convolutions where they were asked to; always the same
    integers, and the same results as in 8 bits."""
    q = quantised("plain", 8.0)
    most = {name: data.draw(st.sampled_from([2, 3, 4, 5, 8]), label=name) for name in q.table.weights}
    table = planned(q.table, most)
    model = write_flavour(q.proto, table, "litert")
    integers = [t.values for t in table.weights.values()]
    for form in (None, "int4"):
        flat = tflite.convert(model, weights=form)  # type: ignore[arg-type]
        for (code, bits, _, found), wanted, name in zip(weights(flat), integers, table.weights, strict=True):
            linear = wanted.ndim == 2
            four = np.abs(wanted).max() <= 7 and (linear or (form == "int4" and code == "CONV_2D"))
            assert bits == (4 if four else 8), name
            if most[name] <= 4 and linear:
                assert (code, bits) == ("FULLY_CONNECTED", 4)
            # Only the order of the axes may differ.
            assert collections.Counter(found.ravel().tolist()) == collections.Counter(wanted.ravel().tolist())
        x = images(4, 3, 32, 32, seed=7)
        want = expected(model, x)
        assert np.abs(tflite.runner(flat, reference=True)(x) - want).max() <= 1.01 * step(flat)


def four_bit(op: str, inputs: int = 8) -> tuple[onnx.ModelProto, NDArray[np.float32]]:
    """One int8 operator whose integers, channel by channel, are -8 to 7."""
    shape = (1, inputs, 6, 6)
    model = {
        "Conv": lambda: one("Conv", shape, (w(5, inputs, 3, 3), w(5))),
        "depthwise": lambda: one("Conv", shape, (w(inputs, 1, 3, 3), w(inputs)), group=inputs),
        "ConvTranspose": lambda: one("ConvTranspose", shape, (w(inputs, 5, 3, 3), w(5))),
        "Gemm": lambda: one("Gemm", (1, inputs), (w(5, inputs), w(5)), transB=1),
    }[op]()
    x = images(6, *(d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim[1:]))
    int8 = quantized(model, x)
    for t in int8.graph.initializer:
        if t.name.endswith("c0_q"):
            coarse = np.clip(np.rint(numpy_helper.to_array(t) / 16), -8, 7).astype(np.int8)
            coarse.reshape(-1)[0] = -8
            t.CopyFrom(numpy_helper.from_array(coarse, t.name))
    return int8, x


@pytest.mark.parametrize(
    ("op", "inputs", "form", "bits", "taken"),
    [
        ("Gemm", 8, None, 4, True),
        ("Gemm", 7, None, 8, True),  # odd rows end inside a byte, where XNNPACK refuses
        ("Conv", 8, None, 8, True),
        ("Conv", 8, "int4", 4, False),
        ("Conv", 7, "int4", 4, False),
        ("depthwise", 8, "int4", 8, True),
        ("ConvTranspose", 8, "int4", 8, True),
    ],
)
def test_which_kernels_run_them(op: str, inputs: int, form: Any, bits: int, taken: bool) -> None:
    """Right on LiteRT's reference kernels and by default, where XNNPACK takes the layer or leaves it."""
    model, x = four_bit(op, inputs)
    data = tflite.convert(model, weights=form)
    assert floats(data) == []
    assert [found[1] for found in weights(data)] == [bits]
    want = expected(model, x)
    for reference in (True, False):
        assert np.abs(tflite.runner(data, reference=reference)(x) - want).max() <= 1.01 * step(data)
    run = Interpreter(model_content=data, num_threads=1)
    run.allocate_tensors()
    delegates = [d for d in run._get_ops_details() if d["op_name"] == "DELEGATE"]
    assert bool(delegates) is taken


def test_int4_of_another_tool_is_kept_where_a_kernel_is(tmp_path: Path) -> None:
    """INT4 in ONNX (opset 21), as other quantisers write it."""
    draw = np.random.default_rng(0).integers(-8, 8, (6, 8))
    held = [
        helper.make_tensor("w_q", TensorProto.INT4, draw.shape, draw.reshape(-1)),
        helper.make_tensor("wz", TensorProto.INT4, [6], np.zeros(6, np.int8)),
        numpy_helper.from_array(np.linspace(0.05, 0.1, 6, dtype=np.float32), "ws"),
        numpy_helper.from_array(np.float32(0.05), "s"),
        numpy_helper.from_array(np.int8(0), "z"),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w_q", "ws", "wz"], ["wd"], axis=0),
        helper.make_node("Gemm", ["xd", "wd"], ["c"], transB=1),
        helper.make_node("QuantizeLinear", ["c", "s", "z"], ["cq"]),
        helper.make_node("DequantizeLinear", ["cq", "s", "z"], ["y"]),
    ]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, s]) for n, s in (("x", 8), ("y", 6))]
    made = helper.make_graph(nodes, "g", values[:1], values[1:], held)
    data = tflite.convert(helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))
    ((code, bits, shape, found),) = weights(data)
    assert (code, bits, shape) == ("FULLY_CONNECTED", 4, (6, 8))
    (tmp_path / "m.tflite").write_bytes(data)
    (counted,) = _tflite_weights(tmp_path / "m.tflite")  # the report's entropy is of these
    np.testing.assert_array_equal(counted, draw.reshape(-1))
    np.testing.assert_array_equal(found, draw)


def test_the_audit_tells_4_bits_from_8(tmp_path: Path) -> None:
    for op, asked in (("Gemm", "int4"), ("Conv", "int8")):
        (tmp_path / "m.tflite").write_bytes(tflite.convert(four_bit(op)[0]))
        found = audit_one(tmp_path / "m.tflite")
        assert [layer.asked for layer in found.layers] == [asked]
        assert found.integer_share == 1.0


def test_float16_weights(tmp_path: Path) -> None:
    """Half the bytes, results to float16's precision, and the mark by which XNNPACK computes in float16."""
    model = one("Conv", (1, 32, 8, 8), (w(64, 32, 3, 3), w(64)))
    x = images(4, 32, 8, 8)
    whole, half = tflite.convert(model), tflite.convert(model, weights="float16")
    assert len(half) < 0.55 * len(whole)
    want = expected(model, x)
    for reference in (True, False):
        np.testing.assert_allclose(tflite.runner(half, reference=reference)(x), want, atol=2e-3 * np.abs(want).max())
    marks = schema.ModelT.InitFromObj(schema.Model.GetRootAs(half))
    assert [m.name for m in marks.metadata] == [b"reduced_precision_support"]
    assert bytes(np.asarray(marks.buffers[marks.metadata[0].buffer].data)) == b"fp16accfp16"
    (tmp_path / "half.tflite").write_bytes(half)
    assert [layer.asked for layer in audit_one(tmp_path / "half.tflite").layers] == ["float16 weights, float32"]


def test_weights_beyond_float16_are_refused() -> None:
    with pytest.raises(UnsupportedGraph, match="exceed float16"):
        tflite.convert(one("Conv", (1, 8, 6, 6), (w(8, 8, 3, 3) * 1e6,)), weights="float16")
