"""targets/tflite: what it refuses, the bytes it writes, and layers that want care."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.compose
import pytest
import torch
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter
from one_node import CASES, IMAGE, ONES, F, images, one, w
from onnx import numpy_helper
from onnx_nets import Exported, exported
from qdq import expected, quantized
from tflite_file import operators, step
from torch import nn

from xedge.errors import UnsupportedGraph, UsageError
from xedge.load import load_target
from xedge.onnx_graph import export_float
from xedge.targets import tflite
from xedge.units import unit_artefact, units_of

__all__ = ["exported"]


def test_an_unknown_operator_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedGraph, match=r"node 'node'.*Erf.*replace it") as caught:
        tflite.convert(one("Erf", IMAGE))
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 6
    onnx.save(one("Erf", IMAGE), tmp_path / "m.onnx")
    with pytest.raises(UnsupportedGraph):
        tflite.compile(tmp_path / "m.onnx", tmp_path, "m")
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_bad_files_are_refused(tmp_path: Path) -> None:
    onnx.save(CASES["relu"], tmp_path / "good.onnx")
    with pytest.raises(UsageError, match="cannot be written"):
        tflite.compile(tmp_path / "good.onnx", tmp_path / "absent", "m")
    with pytest.raises(UsageError, match="no such file"):
        tflite.compile(tmp_path / "none.onnx", tmp_path, "m")
    (tmp_path / "bad.onnx").write_bytes(b"not a model at all")
    with pytest.raises(UsageError, match="not an ONNX model"):
        tflite.compile(tmp_path / "bad.onnx", tmp_path, "m")
    with pytest.raises(UsageError, match="no such file"):
        tflite.load(tmp_path / "none.tflite", 1)
    (tmp_path / "bad.tflite").write_bytes(b"not a model at all")
    with pytest.raises(UnsupportedGraph, match="refuses"):
        tflite.load(tmp_path / "bad.tflite", 1)


def test_asymmetric_weights_are_refused() -> None:
    model = quantized(CASES["conv"], images(4, 8, 12, 12))
    for tensor in model.graph.initializer:
        if tensor.name == "c0_q_z":
            tensor.CopyFrom(numpy_helper.from_array(np.full(16, 3, np.int8), "c0_q_z"))
    with pytest.raises(UnsupportedGraph, match="zero point other than 0"):
        tflite.convert(model)


def test_the_wrong_input_shape_is_refused() -> None:
    run = tflite.runner(tflite.convert(CASES["conv"]))
    with pytest.raises(UsageError, match="input of shape"):
        run(images(2, 8, 12, 13))


def test_same_model_same_bytes(exported: Exported, tmp_path: Path) -> None:
    model, x = exported("mixture")
    int8 = quantized(model, x)
    assert tflite.convert(int8) == tflite.convert(onnx.ModelProto.FromString(int8.SerializeToString()))
    onnx.save(int8, tmp_path / "m.onnx")
    first = tflite.compile(tmp_path / "m.onnx", tmp_path, "m").read_bytes()
    assert tflite.compile(tmp_path / "m.onnx", tmp_path, "m").read_bytes() == first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.tflite"]


def test_data_is_aligned(exported: Exported) -> None:
    """The schema asks for 16 bytes; kernels on ARM read int32 and float32 in place."""
    data = tflite.convert(exported("lenet")[0])
    model = schema.Model.GetRootAs(data, 0)
    places = []
    for i in range(model.BuffersLength()):
        buffer = model.Buffers(i)
        if not buffer.DataIsNone():
            places.append(buffer._tab.Vector(buffer._tab.Offset(4)))
    assert len(places) >= 10
    assert all(place % 16 == 0 for place in places)


def test_a_dead_channel_with_a_large_bias_keeps_its_bias() -> None:
    """All-zero weights give a tiny scale; bias / (s_in * s_w) would overflow int32."""
    weight = w(4, 8, 3, 3).copy()
    weight[1] = 0
    model = one("Conv", IMAGE, (weight, np.array([0.1, 5.0, -0.2, 0.3], F)), pads=ONES)
    x = images(4, *IMAGE[1:])
    int8 = quantized(model, x, bias="float")
    data = tflite.convert(int8)
    for reference in (True, False):
        got = tflite.runner(data, reference=reference)(x)
        assert np.abs(got - expected(int8, x)).max() <= 1.01 * step(data)


def test_a_layer_left_in_float_is_an_island_and_still_right() -> None:
    """Grids only around the second of two convolutions: the first stays float between QUANTIZE and DEQUANTIZE."""
    first, second = (one("Conv", IMAGE, (w(8, 8, 3, 3), w(8)), pads=ONES) for _ in range(2))
    x = images(4, *IMAGE[1:])
    middle = expected(first, x)
    model = onnx.compose.merge_models(
        onnx.compose.add_prefix(first, "a/"), onnx.compose.add_prefix(quantized(second, middle), "b/"), [("a/y", "b/x")]
    )
    data = tflite.convert(model)
    assert operators(data) == {"CONV_2D": 2, "QUANTIZE": 1}
    assert np.abs(tflite.runner(data, reference=True)(x) - expected(model, x)).max() <= 1.01 * step(data)


def test_the_target() -> None:
    assert (tflite.TARGET.name, tflite.TARGET.flavour, tflite.TARGET.suffix) == ("tflite", "litert", ".tflite")
    assert tflite.TARGET.compile is tflite.compile


def test_integer_prelu_is_what_xnnpack_has_and_rounds_once() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.PReLU(8)).eval()
    nn.init.uniform_(net[1].weight, -0.3, 1.3)
    (unit,) = [u for u in units_of(export_float(net, (3, 16, 16), 17)) if u.kind == "PRelu"]
    run = Interpreter(model_content=unit_artefact(unit, 8, 8, load_target("android")), num_threads=1)
    run.allocate_tensors()
    assert "PRELU" not in [d["op_name"] for d in run._get_ops_details()]
    given, made = run.get_input_details()[0], run.get_output_details()[0]
    q = np.random.default_rng(0).integers(-128, 128, given["shape"]).astype(np.int8)
    run.set_tensor(given["index"], q)
    run.invoke()
    (step, zero), (out_step, out_zero) = given["quantization"], made["quantization"]
    x, got = step * (q.astype(float) - zero), out_step * (run.get_tensor(made["index"]).astype(float) - out_zero)
    slope = net[1].weight.detach().numpy().astype(float)
    want = np.where(x > 0, x, slope * x)
    inside = np.abs(want) < 120 * out_step
    # half a step of rounding, and what half a step of a slope of eight bits makes of the largest input
    assert np.abs(got - want)[inside].max() <= 0.51 * out_step + 0.5 * 1.6 / 255 * np.abs(x).max()
    assert np.abs(got - x)[(x > 0) & inside].max() <= 1e-6
