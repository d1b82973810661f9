"""Nets as ONNX, their activations in ONNX Runtime, and their QDQ graphs in the litert flavour, spelled out."""

from __future__ import annotations

import collections
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import helper, numpy_helper
from torch import nn

FINEST = {
    "Sigmoid": (np.float32(1 / 256), np.int8(-128)),
    "Softmax": (np.float32(1 / 256), np.int8(-128)),
    "Tanh": (np.float32(1 / 128), np.int8(0)),
}
SAME_GRID = ("MaxPool", "Reshape", "Flatten", "Transpose", "Pad", "Slice", "Split", "DepthToSpace", "Resize", "Squeeze")


def export(net: nn.Module, x: torch.Tensor, path: Path, **more: object) -> onnx.ModelProto:
    torch.onnx.export(net.eval(), (x,), path, dynamo=True, opset_version=18, external_data=False, verbose=False, **more)
    return onnx.load(path)


def activations(model: onnx.ModelProto, batch: np.ndarray) -> dict[str, np.ndarray]:
    """Every float tensor that ONNX Runtime computes on the way."""
    wide = onnx.ModelProto.FromString(model.SerializeToString())
    del wide.graph.output[:]
    names = [o for n in model.graph.node for o in n.output]
    wide.graph.output.extend(helper.make_empty_tensor_value_info(n) for n in names)
    run, source = session(wide), wide.graph.input[0].name
    rows = [run.run(None, {source: batch[i : i + 1]}) for i in range(len(batch))]
    found = {name: np.stack(values) for name, values in zip(names, zip(*rows, strict=True), strict=True)}
    found[source] = batch
    return {k: v for k, v in found.items() if v.dtype == np.float32}


def session(model: onnx.ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return ort.InferenceSession(model.SerializeToString(), options)


def quantized(model: onnx.ModelProto, sample: np.ndarray, bias: str = "int32") -> onnx.ModelProto:
    """`model` with Q/DQ around every activation and int8 weights per channel: the litert flavour, spelled out."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    ranges = activations(model, sample)
    readers = collections.Counter(i for n in model.graph.node for i in n.input)
    by_input = {n.input[0]: n for n in model.graph.node if n.input}
    made = {o: n for n in model.graph.node for o in n.output}
    weights = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    grids: dict[str, tuple[np.float32, np.int8]] = {}
    for name, values in ranges.items():
        low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
        scale = np.float32(max(high - low, 1e-6) / 255)
        if name in made and (least := FINEST.get(made[name].op_type)) and scale < least[0]:
            grids[name] = least  # TFLite computes no finer than this
            continue
        grids[name] = scale, np.int8(np.clip(round(-128 - low / float(scale)), -128, 127))
    for node in model.graph.node:
        if node.op_type in SAME_GRID:
            for out in node.output:
                grids[out] = grids[node.input[0]]
    nodes: list[onnx.NodeProto] = []
    moved: dict[str, str] = {}

    def constant(name: str, values: np.ndarray) -> str:
        if not any(t.name == name for t in model.graph.initializer):
            model.graph.initializer.append(numpy_helper.from_array(values, name))
        return name

    def pair(name: str) -> None:
        scale, zero = grids[name]
        extra = [constant(f"{name}_s", np.asarray(scale)), constant(f"{name}_z", np.asarray(zero))]
        nodes.append(helper.make_node("QuantizeLinear", [name, *extra], [f"{name}_q"], name=f"{name}_Q"))
        nodes.append(helper.make_node("DequantizeLinear", [f"{name}_q", *extra], [f"{name}_dq"], name=f"{name}_DQ"))
        moved[name] = f"{name}_dq"

    for value in model.graph.input:
        pair(value.name)
    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm", "ConvTranspose") and node.input[1] in weights:
            axis = 1 if node.op_type == "ConvTranspose" else 0
            w = weights[node.input[1]]
            others = tuple(a for a in range(w.ndim) if a != axis)
            if node.op_type == "ConvTranspose":
                groups = next((a.i for a in node.attribute if a.name == "group"), 1)
                scale = np.full(w.shape[1], np.abs(w).max() / 127, np.float32)
            else:
                groups, scale = 1, np.maximum(np.abs(w).max(others), 1e-8).astype(np.float32) / np.float32(127)
            spread = scale.reshape([-1 if a == axis else 1 for a in range(w.ndim)])
            q = constant(f"{node.input[1]}_q", np.rint(w / spread).astype(np.int8))
            extra = [constant(f"{q}_s", scale), constant(f"{q}_z", np.zeros(len(scale), np.int8))]
            nodes.append(helper.make_node("DequantizeLinear", [q, *extra], [f"{q}_dq"], axis=axis))
            old = node.input[0]
            if len(node.input) > 2 and node.input[2] and bias == "int32" and groups == 1:
                steps = np.float32(grids[old][0]) * scale
                b = constant(f"{node.output[0]}_b", np.rint(weights[node.input[2]] / steps).astype(np.int32))
                more = [constant(f"{b}_s", steps), constant(f"{b}_z", np.zeros(len(steps), np.int32))]
                nodes.append(helper.make_node("DequantizeLinear", [b, *more], [f"{b}_dq"], axis=0))
                node.input[2] = f"{b}_dq"
            node.input[1] = f"{q}_dq"
        for position, name in enumerate(node.input):
            node.input[position] = moved.get(name, name)
        nodes.append(node)
        for name in node.output:
            after = by_input.get(name)
            fused = after is not None and after.op_type in ("Relu", "Clip") and readers[name] == 1
            if name in ranges and not (fused and made[name].op_type in ("Conv", "Gemm", "Add")):
                pair(name)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    for value in model.graph.output:
        value.name = moved[value.name]
    onnx.checker.check_model(model)
    return model


def expected(model: onnx.ModelProto, batch: np.ndarray) -> np.ndarray:
    run, name = session(model), model.graph.input[0].name
    return np.concatenate([run.run(None, {name: batch[i : i + 1]})[0] for i in range(len(batch))])
