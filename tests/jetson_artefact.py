"""The artefact folder of a small graph in int8 or float16, and the facts that its engine is bound to."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
from flavours import quantised
from onnx import TensorProto, helper, numpy_helper

from xedge.targets import tensorrt
from xedge.targets.tensorrt_engine import BOUND, Facts


def convolution(
    *,
    opset: int = 17,
    activation: int = TensorProto.INT8,
    zero: int = 0,
    weight: int = TensorProto.INT8,
    weight_zero: int = 0,
    bias: str = "float",
) -> onnx.ModelProto:
    """Q/DQ, one convolution of 16 channels, ReLU. The defaults are what TensorRT takes."""
    channels = 16
    draw = np.random.default_rng(0)
    high = {TensorProto.INT8: 127, TensorProto.UINT8: 255, TensorProto.INT4: 7, TensorProto.INT2: 1}[weight]
    w = draw.integers(0 if weight == TensorProto.UINT8 else -high, high + 1, (channels, channels, 3, 3))
    constants = [
        numpy_helper.from_array(np.float32(0.05), "s"),
        helper.make_tensor("z", activation, (), [zero]),
        helper.make_tensor("w_q", weight, w.shape, w.ravel().tolist()),
        numpy_helper.from_array(np.full(channels, 0.01, np.float32), "w_s"),
        helper.make_tensor("w_z", weight, (channels,), [weight_zero] * channels),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["x_q"], name="x_Q"),
        helper.make_node("DequantizeLinear", ["x_q", "s", "z"], ["x_d"], name="x_DQ"),
        helper.make_node("DequantizeLinear", ["w_q", "w_s", "w_z"], ["w"], name="w_DQ", axis=0),
    ]
    if bias == "int32":
        constants += [
            numpy_helper.from_array(np.arange(channels, dtype=np.int32), "b_q"),
            numpy_helper.from_array(np.full(channels, 0.0005, np.float32), "b_s"),
        ]
        nodes.append(helper.make_node("DequantizeLinear", ["b_q", "b_s"], ["b"], name="b_DQ", axis=0))
    else:
        constants.append(numpy_helper.from_array(np.zeros(channels, np.float32), "b"))
    nodes += [
        helper.make_node("Conv", ["x_d", "w", "b"], ["c"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["y"], name="relu"),
    ]
    return model_of(nodes, constants, (1, channels, 8, 8), opset)


def model_of(
    nodes: list[onnx.NodeProto], constants: list[onnx.TensorProto], shape: tuple[int, ...], opset: int
) -> onnx.ModelProto:
    ends = [[helper.make_tensor_value_info(n, TensorProto.FLOAT, shape)] for n in ("x", "y")]
    graph = helper.make_graph(nodes, "g", *ends, initializer=constants)
    ir = {17: 8, 21: 10}.get(opset, 13)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir)


def artefact(folder: Path, model: onnx.ModelProto | None = None) -> Path:
    source = folder.with_suffix(".source.onnx")
    folder.mkdir()
    onnx.save(model or convolution(), source)
    assert tensorrt.compile_onnx(source, folder, "net") == folder / "model.onnx"
    assert (folder / "model.onnx").read_bytes() == source.read_bytes()
    return folder


def facts_of(engine: Path) -> Facts:
    return Facts(**{k: v for k, v in json.loads(engine.read_text()).items() if k in BOUND})


def half_net(folder: Path, name: str) -> Path:
    """A float net's artefact in float16; the net itself is folder/net.onnx."""
    assert tensorrt.TARGET.half is not None
    onnx.save(quantised("plain").proto, folder / "net.onnx")
    (folder / name).mkdir()
    return tensorrt.TARGET.half(folder / "net.onnx", folder / name, "net")


NANO = Facts("10.3.0", "8.7", "Orin", "NVIDIA Jetson Orin Nano Developer Kit", "36.4.3")
