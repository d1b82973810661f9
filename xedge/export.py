"""From the float graph and the ScaleTable to a target's QDQ flavour. One table, one writer, three dialects.

| | tensorrt | litert | onnxruntime |
|---|---|---|---|
| activations | int8, zero-point 0 | int8, asymmetric | uint8, asymmetric |
| which | inputs of convolutions and linears, the residual input of an addition | every tensor a kernel writes | same |
| weights | int8 per channel | int8 per channel | int8 per channel |
| bias | float | int32, scale s_in * s_w | int32, scale s_in * s_w |

TensorRT fuses a convolution with the addition behind it when only the other, residual input of the addition is
quantised (NVIDIA, "Q/DQ layer-placement recommendations"), and with its activation when nothing stands between.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

from xedge import gather
from xedge.errors import InternalError, UnsupportedGraph
from xedge.onnx_graph import WEIGHTED, Graph, drop_unused
from xedge.quantize import ScaleTable, asymmetric, symmetric
from xedge.target import Flavour

ELEMENTWISE = ("Add", "Sub", "Mul", "Div", "Max", "Min", "PRelu")


@dataclass(frozen=True)
class Grid:
    """Where a tensor is rounded to: q = clip(round(x / scale) + zero_point, low, high)."""

    scale: np.float32
    zero_point: int
    low: int
    high: int


def grids(graph: Graph, table: ScaleTable, flavour: Flavour) -> dict[str, Grid]:
    """The tensors that a flavour rounds, and how."""
    if flavour == "float":
        return {}
    if flavour != "tensorrt":
        offset = 128 if flavour == "litert" else 0
        out = {}
        for name, (low, high) in table.activations.items():
            scale, zero = asymmetric(low, high)
            out[name] = Grid(scale, zero - offset, -offset, 255 - offset)
        return out
    wanted: set[str] = set()
    for node in graph.nodes:
        if node.op_type in WEIGHTED and node.input[1] in table.weights:
            wanted.add(node.input[0])
        if node.op_type == "Add" and not any(graph.is_constant(n) for n in node.input):
            # The convolution's own branch stays open, so that convolution and addition fuse; the other is rounded.
            direct = [
                n
                for n in node.input
                if n in graph.producer and graph.producer[n].op_type == "Conv" and len(graph.consumers[n]) == 1
            ]
            wanted.update(n for n in node.input if n != (direct[-1] if direct else None))
    return {
        name: Grid(symmetric(*table.activations[name]), 0, -127, 127) for name in table.activations if name in wanted
    }


def integer_bias(
    bias: NDArray[np.float32], source: Grid, scale: NDArray[np.float32] | np.float32
) -> tuple[NDArray[np.int32], NDArray[np.float32] | np.float32]:
    """A bias [C] on the grid of the accumulator, s_in * s_w: its integers [C] and its steps, of the shape of s_w."""
    step = (np.float64(source.scale) * scale.astype(np.float64)).astype(np.float32)
    value = np.round(bias.astype(np.float64) / step)
    return np.clip(value, -(2**31) + 1, 2**31 - 1).astype(np.int32), step


def write_flavour(float_model: ModelProto, table: ScaleTable, flavour: Flavour) -> ModelProto:
    """The float graph with Q/DQ in a flavour's places, weights as int8; for ``float`` the graph as it is. ONNX Runtime
    gets codebooks as such, all others get them decoded.

    Raises:
        InternalError: the table does not belong to this graph.
    """
    model = ModelProto()
    model.CopyFrom(float_model)
    if flavour == "float":
        return model
    graph = Graph(model)
    for name in table.weights:
        if name not in graph.initializers:
            raise InternalError(f"the scale table names {name}, which the graph does not have")
    rounded = grids(graph, table, flavour)
    kind = TensorProto.UINT8 if flavour == "onnxruntime" else TensorProto.INT8
    new: list[TensorProto] = []
    before: list[onnx.NodeProto] = []
    after: dict[str, list[onnx.NodeProto]] = {}
    renamed: dict[str, str] = {}

    def constant(name: str, value: NDArray[np.generic] | np.generic, data_type: int | None = None) -> str:
        tensor = numpy_helper.from_array(np.asarray(value), name)
        if data_type is not None and tensor.data_type != data_type:
            raise InternalError(f"{name} has type {tensor.data_type}, not {data_type}")
        new.append(tensor)
        return name

    zero_type = np.uint8 if kind == TensorProto.UINT8 else np.int8
    for name, grid in rounded.items():
        s = constant(f"{name}_scale", grid.scale)
        z = constant(f"{name}_zero_point", zero_type(grid.zero_point), kind)
        q = helper.make_node("QuantizeLinear", [name, s, z], [f"{name}_q"], name=f"{name}_Q")
        dq = helper.make_node("DequantizeLinear", [f"{name}_q", s, z], [f"{name}_dq"], name=f"{name}_DQ")
        after[name] = [q, dq]
        renamed[name] = f"{name}_dq"
    whole_bias = flavour != "tensorrt"
    for node in graph.nodes:
        source = node.input[0] if node.input else ""
        if node.op_type in WEIGHTED and node.input[1] in table.weights:
            w = table.weights[node.input[1]]
            name = node.input[1]
            scale = w.scale[0] if table.bits_per == "tensor" else w.scale
            if f"{name}_scale" not in {t.name for t in new}:
                s = constant(f"{name}_scale", scale)
                z = constant(f"{name}_zero_point", np.zeros(scale.shape, np.int8))
                bits = gather.width(w.values) if table.codebooks and flavour == "onnxruntime" else None
                if bits is None:
                    v = constant(f"{name}_q", w.values)
                else:
                    v = f"{name}_q"
                    tensors, decoding = gather.decoding(name, w.values, bits)
                    new.extend(tensors)
                    before.extend(decoding)
                before.append(
                    helper.make_node("DequantizeLinear", [v, s, z], [f"{name}_dq"], name=f"{name}_DQ", axis=w.axis)
                )
            node.input[1] = f"{name}_dq"
            if w.bias is not None:
                # Two nodes may share a weight; each has its own input, hence its own bias scale.
                label = f"{node.output[0]}_bias"
                if whole_bias and source in rounded:
                    value, step = integer_bias(w.bias, rounded[source], scale)
                    v = constant(f"{label}_q", value)
                    s = constant(f"{label}_scale", step)
                    z = constant(f"{label}_zero_point", np.zeros(step.shape, np.int32))
                    before.append(
                        helper.make_node("DequantizeLinear", [v, s, z], [f"{label}_dq"], name=f"{label}_DQ", axis=0)
                    )
                    bias = f"{label}_dq"
                else:
                    bias = constant(f"{label}_float", w.bias)
                if len(node.input) > 2:
                    node.input[2] = bias
                else:
                    node.input.append(bias)
        elif whole_bias and node.op_type in ELEMENTWISE:
            for i, name in enumerate(node.input):
                if graph.is_constant(name) and graph.initializers[name].data_type == TensorProto.FLOAT:
                    node.input[i] = _constant_operand(graph, name, f"{node.output[0]}_{i}", zero_type, constant, before)
        for i, name in enumerate(node.input):
            if name in renamed:
                node.input[i] = renamed[name]
    # The graph keeps its input and output names; what leaves it leaves through Q/DQ as well.
    nodes: list[onnx.NodeProto] = [n for i in graph.inputs for n in after.get(i, [])] + before
    for node in graph.nodes:
        nodes.append(node)
        for out in node.output:
            nodes.extend(after.get(out, []))
    outputs = set(graph.outputs) & set(renamed)
    for node in nodes:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                if name in outputs:
                    names[i] = f"{name}_float"
                elif name in {f"{o}_dq" for o in outputs}:
                    names[i] = name.removesuffix("_dq")
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(new)
    del model.graph.value_info[:]
    drop_unused(model)
    onnx.checker.check_model(model, full_check=True)
    return model


def halved(float_model: ModelProto) -> ModelProto:
    """A float graph in float16, weights and arithmetic; what goes in and comes out stays float32.

    Raises:
        UnsupportedGraph: a weight lies beyond float16, at 65504.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    for tensor in float_model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            top = float(np.abs(numpy_helper.to_array(tensor)).max(initial=0.0))
            if top > float(np.finfo(np.float16).max):
                raise UnsupportedGraph(f"its largest value, {top:g}, exceeds float16", where=tensor.name)
    model, half = ModelProto(), ModelProto()
    model.CopyFrom(float_model)
    half.CopyFrom(convert_float_to_float16(model, keep_io_types=True))
    OnnxModel.graph_topological_sort(half.graph, is_deterministic=True)  # the casts come last otherwise
    onnx.checker.check_model(half, full_check=True)
    return half


def _constant_operand(
    graph: Graph,
    name: str,
    label: str,
    zero_type: type[np.int8] | type[np.uint8],
    constant: Callable[..., str],
    before: list[onnx.NodeProto],
) -> str:
    """A constant that is added or multiplied, on an 8-bit grid of its own."""
    value = np.asarray(graph.array(name), dtype=np.float32)
    scale, zero = asymmetric(min(float(value.min()), 0.0), max(float(value.max()), 0.0))
    offset = 128 if zero_type is np.int8 else 0
    q = np.clip(np.round(value / scale) + zero, 0, 255) - offset
    v = constant(f"{label}_constant_q", q.astype(zero_type))
    s = constant(f"{label}_constant_scale", scale)
    z = constant(f"{label}_constant_zero_point", zero_type(zero - offset))
    before.append(
        helper.make_node("DequantizeLinear", [v, s, z], [f"{label}_constant_dq"], name=f"{label}_constant_DQ")
    )
    return f"{label}_constant_dq"
