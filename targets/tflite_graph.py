"""ONNX to a small graph that TFLite can be written from: batch fixed, constants folded, Q/DQ pairs turned into grids.

After `read`, no QuantizeLinear or DequantizeLinear is left: an activation that passed through a pair has a `Grid` in
`Graph.grids`, and a quantised constant keeps its integers in `Graph.stored` next to its float value in `consts`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper, shape_inference
from onnx.reference import ReferenceEvaluator

from xedge.errors import UnsupportedGraph, UsageError

Array = NDArray[Any]

_DOMAINS = ("", "ai.onnx", "com.microsoft")  # the last one: ONNX Runtime's spelling of QuantizeLinear
_UNFOLDED = ("DequantizeLinear", "RandomNormal", "RandomUniform", "Bernoulli", "Multinomial")


@dataclass(frozen=True)
class Grid:
    """An int8 grid: real = scale * (q - zero_point), q in [-128, 127]."""

    scale: float
    zero_point: int

    def quantize(self, real: Array | float) -> NDArray[np.int8]:
        """Nearest point, ties to even, saturating (ONNX QuantizeLinear)."""
        with np.errstate(over="ignore"):  # a bound at the end of float32 saturates
            q = np.rint(np.asarray(real, np.float32) / np.float32(self.scale)) + self.zero_point
        saturated: NDArray[np.int8] = np.clip(q, -128, 127).astype(np.int8)
        return saturated

    def dequantize(self, q: NDArray[np.int8]) -> NDArray[np.float32]:
        return (q.astype(np.float32) - np.float32(self.zero_point)) * np.float32(self.scale)

    def within(self, low: float, high: float) -> bool:
        """True when no point of the grid lies further than half a step outside [low, high]."""
        return (-128 - self.zero_point + 0.5) * self.scale >= low and (127 - self.zero_point - 0.5) * self.scale <= high


@dataclass(frozen=True)
class Stored:
    """A quantised constant: integers (uint8 moved to int8), scale and zero_point of shape [] or [C] along `axis`."""

    values: Array
    scale: NDArray[np.float64]
    zero_point: NDArray[np.int64]
    axis: int


@dataclass
class Node:
    """One operator; `clip` is an activation fused into it: the output is clamped to [low, high]."""

    op: str
    name: str
    inputs: list[str]
    outputs: list[str]
    attrs: dict[str, Any] = field(default_factory=dict)
    clip: tuple[float, float] | None = None

    def __str__(self) -> str:
        return f"{self.op} node {self.name!r}"


@dataclass
class Graph:
    """Static shapes throughout. `inputs` and `outputs` map public names to tensor names."""

    nodes: list[Node]
    consts: dict[str, Array]
    stored: dict[str, Stored]
    shapes: dict[str, tuple[int, ...]]
    grids: dict[str, Grid]
    inputs: dict[str, str]
    outputs: dict[str, str]

    def consumers(self) -> Counter[str]:
        """How often each tensor is read; a graph output counts as a read."""
        return Counter([*(name for node in self.nodes for name in node.inputs if name), *self.outputs.values()])

    def producers(self) -> dict[str, Node]:
        return {name: node for node in self.nodes for name in node.outputs}


def read(model: onnx.ModelProto, batch: int | None = 1) -> Graph:
    """The graph of `model` with its batch axis set to `batch` (None: as the file has it).

    Raises:
        UnsupportedGraph: an opset below 13, a foreign domain, an input that is not float32, an unknown dimension, a
            quantisation that is not 8-bit.
    """
    model = onnx.ModelProto.FromString(model.SerializeToString())
    opset = max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0)
    if opset < 13:
        raise UnsupportedGraph(f"opset {opset} is older than 13", fix="export again with opset 17")
    for proto in model.graph.node:
        if proto.domain not in _DOMAINS:
            raise UnsupportedGraph(
                f"{proto.op_type} is of the domain {proto.domain!r}",
                where=proto.name or proto.output[0],
                fix="export with standard ONNX operators only",
            )
        proto.domain = ""
    consts = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    for value in model.graph.input:
        kind = value.type.tensor_type.elem_type
        if value.name not in consts and kind != onnx.TensorProto.FLOAT:
            raise UnsupportedGraph(
                f"its type is {onnx.TensorProto.DataType.Name(kind).lower()}, and the file would take float32",
                where=f"input {value.name!r}",
                fix="give the model a float32 input; cast in front of it",
            )
    _fix_batch(model, consts, batch)
    stored: dict[str, Stored] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    while _fold(model, consts, stored, shapes, opset):
        pass
    nodes, grids, alias = _collapse(model, consts, stored, shapes)
    graph = Graph(
        nodes,
        consts,
        stored,
        shapes,
        grids,
        {v.name: v.name for v in model.graph.input if v.name not in consts},
        {v.name: alias(v.name) for v in model.graph.output},
    )
    for node in nodes:
        for name in (*node.inputs, *node.outputs):
            if name and name not in consts and name not in shapes:
                raise UnsupportedGraph(
                    f"the shape of {name!r} is not known before it runs", where=str(node), fix="export with fixed sizes"
                )
    return graph


def _fix_batch(model: onnx.ModelProto, consts: dict[str, Array], batch: int | None) -> None:
    """Set axis 0 of every input, forget all inferred shapes, and correct Reshape targets that spell the old batch."""
    old = 0
    for value in model.graph.input:
        if value.name in consts:
            continue
        dims = value.type.tensor_type.shape.dim
        for position, dim in enumerate(dims):
            if position == 0 and batch is not None:
                old = max(old, dim.dim_value)
                dim.Clear()
                dim.dim_value = batch
            elif dim.dim_value <= 0:
                raise UsageError(
                    f"axis {position} has no fixed size", where=f"input {value.name!r}", fix="export with a fixed size"
                )
    del model.graph.value_info[:]
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    if batch is None or old <= 1 or old == batch:
        return
    made = {n.output[0]: n for n in model.graph.node if n.op_type == "Constant"}
    for node in model.graph.node:
        if node.op_type != "Reshape":
            continue
        if node.input[1] in made:  # lift it among the constants, so that it can be edited
            consts[node.input[1]] = numpy_helper.to_array(made[node.input[1]].attribute[0].t)
        target = consts.get(node.input[1])
        if target is not None and target.size and target[0] == old:
            consts[f"{node.input[1]}/{batch}"] = np.concatenate([[batch], target[1:]]).astype(np.int64)
            node.input[1] = f"{node.input[1]}/{batch}"


def _fold(
    model: onnx.ModelProto,
    consts: dict[str, Array],
    stored: dict[str, Stored],
    shapes: dict[str, tuple[int, ...]],
    opset: int,
) -> bool:
    """Fold every constant node and infer shapes. True when new shapes may let more nodes fold (Shape of a tensor)."""
    left = []
    for node in model.graph.node:
        real = [name for name in node.input if name]
        if node.op_type == "Shape" and node.input[0] in shapes:
            bounds = {a.name: a.i for a in node.attribute}
            window = slice(bounds.get("start"), bounds.get("end"))
            consts[node.output[0]] = np.array(shapes[node.input[0]][window], np.int64)
        elif all(name in consts for name in real) and node.op_type == "DequantizeLinear":
            consts[node.output[0]], stored[node.output[0]] = _dequantize(node, consts)
        elif all(name in consts for name in real) and node.op_type not in _UNFOLDED:
            consts.update(zip(node.output, _evaluate(node, consts, opset), strict=True))
        else:
            left.append(node)
    del model.graph.node[:]
    model.graph.node.extend(left)
    used = {name for node in left for name in node.input} | {v.name for v in model.graph.output}
    del model.graph.initializer[:]
    slim = onnx.ModelProto.FromString(model.SerializeToString())
    for name in sorted(used & consts.keys()):
        # Only small integers (sizes, axes) decide shapes; of the rest inference needs no values.
        if consts[name].size <= 64:
            slim.graph.initializer.append(numpy_helper.from_array(np.asarray(consts[name]), name))
        elif name not in {v.name for v in slim.graph.input}:
            kind = helper.np_dtype_to_tensor_dtype(consts[name].dtype)
            slim.graph.input.append(helper.make_tensor_value_info(name, kind, consts[name].shape))
    try:
        inferred = shape_inference.infer_shapes(slim, strict_mode=True, data_prop=True).graph
    except shape_inference.InferenceError as error:
        raise UnsupportedGraph(
            f"shapes do not fit together: {error}", fix="check the model with onnx.checker"
        ) from error
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        kind = value.type.tensor_type
        if kind.HasField("shape") and all(d.HasField("dim_value") for d in kind.shape.dim):
            shapes[value.name] = tuple(d.dim_value for d in kind.shape.dim)
    return any(node.op_type == "Shape" and node.input[0] in shapes for node in left)


def _evaluate(node: onnx.NodeProto, consts: dict[str, Array], opset: int) -> list[Array]:
    names = list(dict.fromkeys(name for name in node.input if name))
    graph = helper.make_graph(
        [node],
        "fold",
        [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(consts[n].dtype), consts[n].shape)
            for n in names
        ],
        [helper.make_empty_tensor_value_info(name) for name in node.output],
    )
    run = ReferenceEvaluator(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)]))
    return [np.asarray(out) for out in run.run(None, {n: consts[n] for n in names})]


def _dequantize(node: onnx.NodeProto, consts: dict[str, Array]) -> tuple[Array, Stored]:
    values, scale = consts[node.input[0]], consts[node.input[1]].astype(np.float64)
    zero = consts[node.input[2]] if len(node.input) > 2 and node.input[2] else np.zeros(scale.shape, values.dtype)
    wide, zero = values.astype(np.int64), zero.astype(np.int64)
    axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
    if scale.ndim > 1 or any(a.name == "block_size" and a.i for a in node.attribute):
        raise UnsupportedGraph(
            "blocked quantisation has no TFLite form", where=node.name, fix="quantise per tensor or per channel"
        )
    if scale.size == 1:
        scale, zero, axis = scale.reshape(()), zero.reshape(()), 0
    axis %= max(values.ndim, 1)
    spread = [-1 if d == axis else 1 for d in range(values.ndim)] if scale.ndim else []
    real = (wide - zero.reshape(spread)) * scale.reshape(spread)
    if values.dtype == np.uint8:
        wide, zero = wide - 128, zero - 128
    return real.astype(np.float32), Stored(wide, scale, zero, axis)


def _collapse(
    model: onnx.ModelProto, consts: dict[str, Array], stored: dict[str, Stored], shapes: dict[str, tuple[int, ...]]
) -> tuple[list[Node], dict[str, Grid], Callable[[str], str]]:
    """Replace Q -> DQ by a grid on the tensor they read; drop identities. A second, other grid becomes a Requantize."""
    moved: dict[str, str] = {}
    quantized: dict[str, tuple[str, Grid]] = {}
    grids: dict[str, Grid] = {}
    nodes: list[Node] = []

    def alias(name: str) -> str:
        return moved.get(name, name)

    for index, proto in enumerate(model.graph.node):
        name = proto.name or f"{proto.op_type}_{index}"
        inputs = [alias(i) for i in proto.input]
        if proto.op_type == "QuantizeLinear":
            quantized[proto.output[0]] = (inputs[0], _grid(name, inputs, consts))
            moved[proto.output[0]] = inputs[0]
            if proto.output[0] in {v.name for v in model.graph.output}:
                grids.setdefault(inputs[0], quantized[proto.output[0]][1])
        elif proto.op_type == "DequantizeLinear":
            if proto.input[0] not in quantized:
                raise UnsupportedGraph(
                    f"DequantizeLinear reads {proto.input[0]!r}, which no QuantizeLinear made",
                    where=name,
                    fix="give float inputs and Q/DQ pairs (QDQ format, not QOperator)",
                )
            source, grid = quantized[proto.input[0]]
            if _grid(name, inputs, consts) != grid:
                raise UnsupportedGraph("Q and DQ of a pair differ", where=name, fix="use one scale for both")
            if grids.setdefault(source, grid) == grid:
                moved[proto.output[0]] = source
            else:
                grids[proto.output[0]] = grid
                nodes.append(Node("Requantize", name, [source], [proto.output[0]]))
        elif _trains(proto, consts):
            raise UnsupportedGraph(f"{proto.op_type} is in training mode", where=name, fix="export in eval mode")
        elif _is_identity(proto):
            moved[proto.output[0]] = inputs[0]
        else:
            attrs = {a.name: helper.get_attribute_value(a) for a in proto.attribute}
            attrs = {k: v.decode() if isinstance(v, bytes) else v for k, v in attrs.items()}
            nodes.append(Node(proto.op_type, name, inputs, [o for o in proto.output if o], attrs))
    return nodes, grids, alias


def _trains(proto: onnx.NodeProto, consts: dict[str, Array]) -> bool:
    """Dropout that drops, BatchNormalization on the batch's own statistics."""
    if proto.op_type == "Dropout" and len(proto.input) > 2 and proto.input[2]:
        return bool(np.any(consts.get(proto.input[2], np.True_)))
    return proto.op_type == "BatchNormalization" and any(a.name == "training_mode" and a.i for a in proto.attribute)


def _is_identity(proto: onnx.NodeProto) -> bool:
    if proto.op_type == "Cast":
        return any(a.name == "to" and a.i == onnx.TensorProto.FLOAT for a in proto.attribute)
    return proto.op_type in ("Identity", "Dropout")


def _grid(name: str, inputs: list[str], consts: dict[str, Array]) -> Grid:
    scale = consts.get(inputs[1])
    zero = consts.get(inputs[2]) if len(inputs) > 2 and inputs[2] else np.zeros((), np.uint8)
    if scale is None or zero is None or scale.size != 1:
        raise UnsupportedGraph(
            "an activation needs one constant scale and zero point", where=name, fix="quantise activations per tensor"
        )
    if zero.dtype not in (np.int8, np.uint8):
        raise UnsupportedGraph(f"{zero.dtype} activations", where=name, fix="quantise activations to int8 or uint8")
    return Grid(float(np.float32(scale.reshape(()))), int(zero.reshape(())) - (128 if zero.dtype == np.uint8 else 0))


def spread_grids(graph: Graph, keep: Iterable[str], bounded: Iterable[str]) -> None:
    """Give tensors without a grid the grid of the tensor they are only a rearrangement of.

    Args:
        keep: operators whose output holds exactly the input's values (reshape, transpose, ...): both directions.
        bounded: operators whose output stays inside the input's range (pooling, slices, ...): forwards only.
    """
    both, forward = set(keep), set(keep) | set(bounded)
    if not graph.grids:
        return
    for node in reversed(graph.nodes):
        grid = graph.grids.get(node.outputs[0])
        if node.op in both and grid is not None:
            for name in node.inputs if node.op == "Concat" else node.inputs[:1]:
                if name not in graph.consts:
                    graph.grids.setdefault(name, grid)
    for node in graph.nodes:
        inputs = node.inputs if node.op == "Concat" else node.inputs[:1]
        found = {graph.grids.get(name) for name in inputs}
        if node.op in forward and len(found) == 1 and (grid := found.pop()) is not None:
            for name in node.outputs:
                graph.grids.setdefault(name, grid)
