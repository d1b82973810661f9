"""What an artefact's own graph asks for: layers, MACs, why not integers, fusions that Q/DQ prevent."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from audit_nets import MACS, bypass, changed, files, table
from onnx import TensorProto, helper, numpy_helper

from xedge.audit import audit_one
from xedge.audit_flatbuffer import read_tflite
from xedge.audit_graphs import read_onnx
from xedge.targets import tflite

__all__ = ["files", "table"]


@pytest.mark.parametrize("name", ["float", "tensorrt", "litert", "onnxruntime"])
def test_onnx_layers_and_macs(files: dict[str, Path], name: str) -> None:
    reading = read_onnx(files[name])
    assert {layer.name: layer.macs for layer in reading.layers} == MACS
    assert reading.flavour == name
    assert reading.operators == 11
    assert {layer.asked for layer in reading.layers} == ({"float32"} if name == "float" else {"int8"})
    assert all(bool(layer.why) == (name == "float") for layer in reading.layers)


@pytest.mark.parametrize(("name", "asked"), [("tflite", "int8"), ("float-tflite", "float32")])
def test_tflite_layers_and_macs(files: dict[str, Path], name: str, asked: str) -> None:
    reading = read_tflite(files[name])
    assert [layer.macs for layer in reading.layers] == list(MACS.values())
    assert [layer.groups for layer in reading.layers] == [1, 1, 4, 1]
    assert {layer.asked for layer in reading.layers} == {asked}
    assert reading.islands == ()


def test_macs_agree_with_torchs_own_counter(tmp_path: Path) -> None:
    import torch
    from torch import nn
    from torch.utils.flop_counter import FlopCounterMode

    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8),
        nn.ConvTranspose2d(8, 6, 4, stride=2, padding=1), nn.Flatten(), nn.Linear(6 * 12 * 12, 5),
    ).eval()  # fmt: skip
    attributes: dict[str, dict[str, Any]] = {
        "0": {"strides": [2, 2], "pads": [1, 1, 1, 1]},
        "1": {"pads": [2, 2, 2, 2], "dilations": [2, 2], "group": 8},
        "2": {"strides": [2, 2], "pads": [1, 1, 1, 1]},
        "3": {},
        "4": {"transB": 1},
    }
    nodes, held, name = [], [], "x"
    for (index, layer), op in zip(
        net.named_children(), ("Conv", "Conv", "ConvTranspose", "Flatten", "Gemm"), strict=True
    ):
        weights = [(f"{index}.{n}", p.detach().numpy()) for n, p in layer.named_parameters()]
        held += [numpy_helper.from_array(v, n) for n, v in weights]
        out = "y" if index == "4" else f"out{index}"
        nodes.append(helper.make_node(op, [name, *(n for n, _ in weights)], [out], **attributes[index]))
        name = out
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, d) for n, d in (("x", [1, 3, 12, 12]), ("y", [1, 5]))]
    graph = helper.make_graph(nodes, "net", values[:1], values[1:], held)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, tmp_path / "net.onnx")
    (tmp_path / "net.tflite").write_bytes(tflite.convert(model))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.zeros(1, 3, 12, 12))
    for reading in (read_onnx(tmp_path / "net.onnx"), read_tflite(tmp_path / "net.tflite")):
        assert 2 * sum(layer.macs for layer in reading.layers) == counter.get_total_flops()


def test_int4_weights_are_no_integers_for_tensorrt(files: dict[str, Path], tmp_path: Path) -> None:
    def int4(model: onnx.ModelProto) -> None:
        for t in model.graph.initializer:
            if t.name in ("second.weight_q", "second.weight_zero_point"):
                values = np.clip(numpy_helper.to_array(t), -7, 7)
                t.CopyFrom(helper.make_tensor(t.name, TensorProto.INT4, t.dims, values.reshape(-1)))
        model.opset_import[0].version = 21
        model.ir_version = 10

    for flavour, asked in (("tensorrt", "int4 weights, float32"), ("litert", "int4")):
        layers = {x.name: x for x in read_onnx(changed(files[flavour], tmp_path, int4)).layers}
        assert layers["second"].asked == asked
        assert layers["second"].integer == (flavour == "litert")


def test_widths_that_lose_integers_are_named(files: dict[str, Path]) -> None:
    risks = {layer.name: "; ".join(layer.risks) for layer in read_onnx(files["tensorrt"]).layers}
    assert risks["first"] == "3 input channels, below 8"
    assert risks["second"] == ""
    assert risks["grouped"].startswith("grouped, 4 x 4 channels")
    assert risks["head"] == "4 output channels, below 8"


def test_why_not(files: dict[str, Path], tmp_path: Path) -> None:
    def of(path: Path, name: str) -> tuple[str, str]:
        (layer,) = (layer for layer in read_onnx(path).layers if layer.name == name)
        return layer.asked, "; ".join(layer.why)

    plain = changed(files["tensorrt"], tmp_path, bypass("add_relu_dq"))
    assert of(plain, "grouped") == ("int8 weights, float32", "its input is not quantised")
    assert of(plain, "second")[0] == "int8", "TensorRT runs int8 into float"

    def float_weight(model: onnx.ModelProto) -> None:
        model.graph.initializer.append(numpy_helper.from_array(np.ones((16, 16, 3, 3), np.float32), "second.weight"))
        (conv,) = (n for n in model.graph.node if n.name == "second")
        conv.input[1] = "second.weight"

    asked, why = of(changed(files["litert"], tmp_path, float_weight), "second")
    assert (asked, why) == ("float32", "its weight is not quantised (an island of float between quantised tensors)")

    open_end = changed(files["onnxruntime"], tmp_path, bypass("add_relu_dq", "grouped_relu_dq"))
    assert of(open_end, "grouped")[1] == "its input is not quantised"


def test_an_open_output_is_float_in_onnx_runtime_and_integer_in_tensorrt(
    files: dict[str, Path], tmp_path: Path
) -> None:
    def open_output(model: onnx.ModelProto) -> None:
        bypass("grouped_relu_dq")(model)
        kept = [n for n in model.graph.node if n.name not in ("grouped_relu_Q", "grouped_relu_DQ")]
        del model.graph.node[:]
        model.graph.node.extend(kept)

    layer = {x.name: x for x in read_onnx(changed(files["onnxruntime"], tmp_path, open_output)).layers}["grouped"]
    assert layer.asked == "int8 weights, float32"
    assert layer.why == ("its output is not quantised, so the runtime computes in float",)
    assert not layer.integer
    assert {x.name: x for x in read_onnx(files["tensorrt"]).layers}["grouped"].integer


def test_fusions_that_q_dq_prevent(files: dict[str, Path], tmp_path: Path) -> None:
    def split(model: onnx.ModelProto) -> None:
        """A Q/DQ between `first` and its Relu."""
        names = ["first", "x_scale", "x_zero_point"]
        q = helper.make_node("QuantizeLinear", names, ["first_q"], name="first_Q")
        dq = helper.make_node("DequantizeLinear", ["first_q", *names[1:]], ["first_dq"], name="first_DQ")
        at = next(i for i, n in enumerate(model.graph.node) if n.name == "first_relu")
        model.graph.node[at].input[0] = "first_dq"
        model.graph.node.insert(at, dq)
        model.graph.node.insert(at, q)

    risks = {x.name: x.risks for x in read_onnx(changed(files["tensorrt"], tmp_path, split)).layers}
    assert "Q/DQ stand between it and first_relu, so they do not fuse" in risks["first"]

    def bare_addition(model: onnx.ModelProto) -> None:
        (add,) = (n for n in model.graph.node if n.name == "add")
        (dq,) = (i for i in add.input if i.endswith("_dq"))
        bypass(dq)(model)
        (conv,) = (n for n in model.graph.node if n.name == "second")
        conv.input[0] = dq

    risks = {x.name: x.risks for x in read_onnx(changed(files["tensorrt"], tmp_path, bare_addition)).layers}
    assert "no input of add is quantised, so addition and convolution do not fuse" in risks["second"]


def test_an_island_of_float_in_a_flatbuffer(files: dict[str, Path], tmp_path: Path) -> None:
    def float_weight(model: onnx.ModelProto) -> None:
        model.graph.initializer.append(numpy_helper.from_array(np.ones((16, 16, 3, 3), np.float32), "second.weight"))
        (conv,) = (n for n in model.graph.node if n.name == "second")
        conv.input[1] = "second.weight"

    path = tmp_path / "island.tflite"
    path.write_bytes(tflite.convert(onnx.load(changed(files["litert"], tmp_path, float_weight))))
    reading = read_tflite(path)
    (island,) = reading.islands
    assert re.match(r"CONV_2D \(operator \d+\)", island)
    found = audit_one(path)
    assert [layer.asked for layer in found.layers] == ["int8", "float32", "int8", "int8"]
    assert found.integer_share == pytest.approx(1 - MACS["second"] / sum(MACS.values()))
