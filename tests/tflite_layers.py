"""Every layer of a QDQ graph alone: how far ONNX Runtime and LiteRT's kernels are from its exact result."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx
import onnx.utils
import torch
from ai_edge_litert import schema_py_generated as schema
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from qdq import activations
from tflite_file import floats, step, unpacked
from torch import nn

from xedge.targets import tflite


def pieces(model: onnx.ModelProto) -> list[onnx.ModelProto]:
    """A QDQ graph cut at its Q/DQ pairs: one small QDQ model per layer."""
    cutter = onnx.utils.Extractor(onnx.shape_inference.infer_shapes(model))
    made = {o: n for n in model.graph.node for o in n.output}
    constants = {t.name for t in model.graph.initializer}
    cut = []
    for node in model.graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] not in made or made[node.input[0]].input[0] not in made:
            continue
        sources: list[str] = []
        todo = [made[node.input[0]].input[0]]
        while todo:
            for name in made[todo.pop()].input:
                if name in made and made[name].op_type == "DequantizeLinear" and made[name].input[0] in made:
                    sources.append(made[made[name].input[0]].input[0])
                elif name in made:
                    todo.append(name)
                else:
                    assert not name or name in constants
        cut.append(cutter.extract_model(list(dict.fromkeys(sources)), [node.output[0]]))
    return cut


def invoke(data: bytes, feeds: list[np.ndarray], reference: bool = True) -> np.ndarray:
    """Several inputs, one output, ONNX layout and float32 outside."""
    run = tflite.runner(data, reference=reference).interpreter
    for detail, value in zip(run.get_input_details(), feeds, strict=True):
        stored = value.transpose(0, 2, 3, 1) if value.ndim == 4 else value
        if detail["dtype"] == np.int8:
            scale, zero = detail["quantization"]
            stored = np.clip(np.rint(stored / np.float32(scale)) + zero, -128, 127).astype(np.int8)
        run.set_tensor(detail["index"], np.ascontiguousarray(stored))
    run.invoke()
    sink = run.get_output_details()[0]
    value = run.get_tensor(sink["index"])
    if sink["dtype"] == np.int8:
        value = (value.astype(np.float32) - sink["quantization"][1]) * np.float32(sink["quantization"][0])
    return value.transpose(0, 3, 1, 2) if value.ndim == 4 else value


class Conv(OpRun):  # type: ignore[misc]
    """onnx.reference has one, which takes minutes for a net."""

    def _run(
        self, x: np.ndarray, w: np.ndarray, b: np.ndarray | None = None, auto_pad: str = "", dilations: object = None,
        group: int = 1, kernel_shape: object = None, pads: object = None, strides: object = None,
    ) -> tuple[np.ndarray]:  # fmt: skip
        top, left, bottom, right = pads or [0] * 4
        x, w, b = (None if a is None else torch.from_numpy(np.ascontiguousarray(a)) for a in (x, w, b))
        x = nn.functional.pad(x, (left, right, top, bottom))
        return (nn.functional.conv2d(x, w, b, strides or 1, 0, dilations or 1, group or 1).numpy(),)


def exact(model: onnx.ModelProto, feeds: list[np.ndarray]) -> np.ndarray:
    """The QDQ graph in float64 by ONNX's reference evaluator: sums of integers times scales, without their rounding."""
    wide = onnx.ModelProto.FromString(model.SerializeToString())
    wide.opset_import[0].version = 21  # the evaluator has no older DequantizeLinear
    for tensor in wide.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))
    names = [value.name for value in wide.graph.input]
    run = ReferenceEvaluator(wide, new_ops=[Conv])
    return run.run(None, {n: f.astype(np.float64) for n, f in zip(names, feeds, strict=True)})[0]


@dataclass(frozen=True)
class Layer:
    """What a layer's kernels do with the inputs that ONNX Runtime gives it, in steps of its output.

    Attributes:
        operators: of the layer in ONNX.
        apart: furthest that LiteRT's reference kernel is from ONNX Runtime.
        ort, reference, fast: furthest that each is from the exact result before it is rounded, at best 1/2.
        unit: of the 32-bit sum: the factor that the kernel multiplies it with.
    """

    operators: frozenset[str]
    apart: float
    ort: float
    reference: float
    fast: float
    unit: float


def layers(model: onnx.ModelProto, image: np.ndarray) -> list[Layer]:
    """Every layer of a graph made by `quantized`, alone."""
    values = {k: v[0] for k, v in activations(model, image).items() if k != model.graph.input[0].name}
    values[model.graph.input[0].name] = image
    found = []
    for piece in pieces(model):
        feeds = [values.get(f"{v.name}_dq", values[v.name]) for v in piece.graph.input]
        data, last = tflite.convert(piece, batch=None), piece.graph.output[0].name
        assert floats(data) == []
        ort, reference, fast = values[last], invoke(data, feeds), invoke(data, feeds, reference=False)
        zero = next(t for t in piece.graph.initializer if t.name == f"{last.removesuffix('_dq')}_z")
        bounds = np.array([-128, 127]) - numpy_helper.to_array(zero).astype(int)
        piece.graph.output[0].name = last.removesuffix("_dq")
        real = np.clip(exact(piece, feeds) / step(data), *bounds)
        off = [float(np.abs(y / step(data) - real).max()) for y in (ort, reference, fast)]
        kinds = frozenset(n.op_type for n in piece.graph.node if not n.op_type.endswith("eLinear"))
        found.append(Layer(kinds, float(np.abs(reference - ort).max() / step(data)), *off, unit(data)))
    return found


def unit(data: bytes) -> float:
    """The largest factor from a 32-bit sum to the output's grid, of convolutions, linear layers and means."""
    model = unpacked(data)
    tensors, codes = model.subgraphs[0].tensors, schema.BuiltinOperator
    largest = 0.0
    for o in model.subgraphs[0].operators:
        code, out = model.operatorCodes[o.opcodeIndex].builtinCode, tensors[o.outputs[0]]
        x, *others = (tensors[i] for i in o.inputs)
        if code in (codes.CONV_2D, codes.DEPTHWISE_CONV_2D, codes.FULLY_CONNECTED):
            part = max(others[0].quantization.scale)
        elif code == codes.MEAN:
            part = math.prod(out.shape) / math.prod(x.shape)
        else:
            continue
        largest = max(largest, part * x.quantization.scale[0] / out.quantization.scale[0])
    return largest
