"""What a runtime runs as one: the units of a float ONNX graph, and each by itself as an artefact of any width.

A unit is a convolution, linear layer, addition, pooling or other operator with the activation that is fused into it.
Its key says everything that decides its time but the numbers of channels, a bias and a fused clamp, which cost nothing,
so that layers of one kind and size share their measurements.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from xedge.errors import UnsupportedGraph
from xedge.export import write_flavour
from xedge.onnx_graph import WEIGHTED, Graph
from xedge.quantize import ScaleTable, WeightScale
from xedge.ranges import attributes, groups_of, transposed
from xedge.rounding import channel_axis
from xedge.target import Target

Positions = Mapping[str, Mapping[int, int]]
"""layer -> {axis of its weight: positions left}, as `plan.Costs.left` gives them."""

FREE = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Dropout", "Cast", "Shape", "Constant", "Transpose")
"""Operators that move nothing in the artefact, or that it does not have."""
SHUFFLES = ("DepthToSpace", "SpaceToDepth")
"""They read so many times as many channels as they write; what they write says it all."""
RANGE = (-4.0, 4.0)
"""Of every activation of a unit: times do not depend on it."""


@dataclass(frozen=True)
class Width:
    """How many channels a tensor has: `fixed`, and the positions of some axes of some weights: (layer, axis, positions
    now), which stay where `left` does not know the layer (a constant that no module holds)."""

    axes: tuple[tuple[str, int, int], ...] = ()
    fixed: int = 0

    def at(self, left: Positions) -> int:
        """With the positions that are left."""
        return self.fixed + sum(left[layer][axis] if layer in left else now for layer, axis, now in self.axes)


@dataclass(frozen=True)
class Unit:
    """One unit.

    Attributes:
        key: kind, attributes and sizes.
        kind: ``dense``, ``pointwise``, ``depthwise``, ``grouped``, ``linear``, or the operator's name.
        layer: whose weight it has, or "".
        inside, outside: channels read and written; equal, and one number, where the kernel is channel by channel.
            Without axes where they do not follow a cut (splitting).
        nodes: the ONNX nodes, the activation last.
        sizes: of its tensors with the original's channels; constants are not among them.
        constants: the values of the constants that it reads, weight and bias excepted.
        bias: whether the weighted node has one.
        real: whether it stays float in an integer model.
    """

    key: str
    kind: str
    layer: str
    inside: Width
    outside: Width
    nodes: tuple[NodeProto, ...]
    sizes: Mapping[str, tuple[int, ...]]
    constants: Mapping[str, NDArray[Any]]
    bias: bool = False
    real: bool = False

    @property
    def channelwise(self) -> bool:
        """Whether `inside` says it all."""
        return self.inside == self.outside

    @property
    def layers(self) -> set[str]:
        """Those whose widths its time depends on."""
        return {layer for layer, _, _ in (*self.inside.axes, *self.outside.axes)}

    def widths(self, left: Positions) -> tuple[int, int]:
        """(inside, outside) with the positions that are left."""
        return self.inside.at(left), self.outside.at(left)


def units_of(proto: ModelProto, keep_float: str | None = None) -> list[Unit]:
    """The units of a float graph, in order. Layers that `keep_float`, a regular expression, finds stay float."""
    graph = Graph(proto)
    found, done = [], set[str]()
    for node in graph.nodes:
        out = node.output[0]
        inputs = [n for n in node.input if n and not graph.is_constant(n)]
        if out in done or node.op_type in FREE or not inputs:
            continue
        nodes = [_reordered(graph, node)]
        if node.op_type == "MatMul" and graph.is_constant(node.input[1]):
            nodes += _bias_of(graph, out)
        if graph.fused_activation(nodes[-1].output[0]):
            nodes.append(graph.consumers[nodes[-1].output[0]][0])
        done.update(n.output[0] for n in nodes)
        unit = _unit(graph, nodes)
        stays = keep_float is not None and unit.layer and re.search(keep_float, unit.layer)
        found.append(replace(unit, key=f"float {unit.key}", real=True) if stays else unit)
    return found


def _reordered(graph: Graph, node: NodeProto) -> NodeProto:
    """A pixel shuffle behind a convolution in LiteRT's order of channels, for which its writer reorders that
    convolution; by itself it would be reordered at a price. To other runtimes both are the same work."""
    before = graph.producer.get(node.input[0])
    if node.op_type != "DepthToSpace" or before is None or before.op_type != "Conv" or groups_of(before) > 1:
        return node
    if len(graph.consumers[node.input[0]]) > 1 or node.input[0] in graph.outputs:
        return node
    new = NodeProto()
    new.CopyFrom(node)
    _set(new, "mode", "DCR")
    return new


def _bias_of(graph: Graph, name: str) -> list[NodeProto]:
    """The addition of a constant behind a matrix product."""
    after = graph.consumers.get(name, [])
    adds = len(after) == 1 and after[0].op_type == "Add" and any(map(graph.is_constant, after[0].input))
    return after if adds else []


def _unit(graph: Graph, nodes: list[NodeProto]) -> Unit:
    node = nodes[0]
    produced = {n.output[0] for n in nodes}
    read = dict.fromkeys(n for m in nodes for n in m.input if n and n not in produced)
    inputs = [n for n in read if not graph.is_constant(n)]
    sizes = {n: graph.shapes[n] for n in (*inputs, nodes[-1].output[0])}
    weighted = node.op_type in WEIGHTED and graph.is_constant(node.input[1])
    kept = [n for n in read if graph.is_constant(n) and not (weighted and n in node.input[1:3])]
    constants = {n: np.asarray(graph.array(n)) for n in kept}
    layer, kind = "", node.op_type
    inside = outside = _width(graph, nodes[-1].output[0])
    if weighted:
        layer = node.input[1].removesuffix(".weight")
        kind = _kind(graph, node)
        if kind != "depthwise":
            axis = 1 if node.op_type != "ConvTranspose" else 0
            groups = groups_of(node) if node.op_type in ("Conv", "ConvTranspose") else 1
            inside = _axis(graph, node, axis) if groups == 1 else _width(graph, node.input[0])
            if groups == 1 or node.op_type == "Conv":
                outside = _axis(graph, node, 1 - axis)
    elif node.op_type not in (*SHUFFLES, "Concat") and _regroups(graph, node):
        inside = outside = Width(fixed=graph.shapes[node.output[0]][1])  # it does not follow a cut; few and cheap
    return Unit(
        _key(graph, nodes, inputs, kept, kind), kind, layer, inside, outside, tuple(nodes), sizes, constants,
        weighted and len(node.input) > 2,
    )  # fmt: skip


def _regroups(graph: Graph, node: NodeProto) -> bool:
    """Whether an operator without weights gives another number of channels than it takes."""
    shapes = [graph.shapes.get(n, ()) for n in (node.input[0], node.output[0])]
    return all(len(s) > 1 for s in shapes) and shapes[0][1] != shapes[1][1] != 1 != shapes[0][1]


def _kind(graph: Graph, node: NodeProto) -> str:
    if node.op_type in ("Gemm", "MatMul"):
        return "linear"
    w = graph.array(node.input[1]).shape
    groups = groups_of(node)
    if groups > 1:
        return "depthwise" if node.op_type == "Conv" and groups == w[0] and w[1] == 1 else "grouped"
    return "pointwise" if all(n == 1 for n in w[2:]) else "dense"


def _key(graph: Graph, nodes: list[NodeProto], inputs: list[str], kept: list[str], kind: str) -> str:
    """Everything but names and numbers of channels."""
    words = [kind]
    fused = graph.fused_activation(nodes[-2].output[0]) if len(nodes) > 1 else False
    for n in nodes[:-1] if fused else nodes:
        given = {a.name: helper.get_attribute_value(a) for a in n.attribute if a.name != "group" or kind == "grouped"}
        words.append(f"{n.op_type}({','.join(f'{k}={given[k]}' for k in sorted(given))})")
    for name in inputs:
        shape = graph.shapes[name]
        words.append("x".join(map(str, (*shape[:1], "C", *shape[2:]))))
    for name in kept:
        value = graph.array(name)
        if fused and name in nodes[-1].input:
            continue
        words.append(str(value.tolist()) if value.size <= 8 else str(value.shape))
    return " ".join(words)


_WEIGHTED_KINDS = ("dense", "pointwise", "depthwise", "grouped", "linear")


def _width(graph: Graph, name: str) -> Width:
    """The channels (axis 1) of a tensor: those that the layers before it write. Behind what makes another number of
    channels of them, a pixel shuffle or a split, those that a layer behind it reads; where there is none they stay."""
    shape = graph.shapes.get(name, ())
    known = _written(graph, name, set()) or _read(graph, name, set())
    return known or Width(fixed=shape[1] if len(shape) > 1 else 1)


def weight_shape(graph: Graph, node: NodeProto) -> tuple[int, ...]:
    """The shape of a node's weight as torch has it: axis 0 of a linear layer is what it writes."""
    shape = tuple(graph.array(node.input[1]).shape)
    return shape[::-1] if node.op_type in ("Gemm", "MatMul") and channel_axis(node) == 1 else shape


def _axis(graph: Graph, node: NodeProto, axis: int) -> Width:
    """The positions of an axis of a node's weight, as torch has it."""
    return Width(((node.input[1].removesuffix(".weight"), axis, weight_shape(graph, node)[axis]),))


def _written(graph: Graph, name: str, seen: set[str]) -> Width | None:
    node, channels = graph.producer.get(name), graph.shapes.get(name, ())[1:2]
    if node is None or name in seen:
        return None
    seen.add(name)
    if node.op_type in WEIGHTED and graph.is_constant(node.input[1]):
        if _kind(graph, node) == "depthwise" and (before := _written(graph, node.input[0], seen)):
            return before
        if node.op_type == "ConvTranspose" and groups_of(node) > 1:
            return None
        return _axis(graph, node, 0 if node.op_type != "ConvTranspose" else 1)
    inputs = [n for n in node.input if n and not graph.is_constant(n)]
    if node.op_type == "Concat" and attributes(node)["axis"] in (1, 1 - len(graph.shapes.get(name, ()))):
        parts = [_width(graph, n) for n in inputs]
        return Width(tuple(a for p in parts for a in p.axes), sum(p.fixed for p in parts))
    alike = (n for n in inputs if channels and graph.shapes.get(n, ())[1:2] == channels)
    return next(filter(None, (_written(graph, n, seen) for n in alike)), None)


def _read(graph: Graph, name: str, seen: set[str]) -> Width | None:
    shape = graph.shapes.get(name, ())
    if name in seen or len(shape) != 4:
        return None
    seen.add(name)
    readers = graph.consumers.get(name, [])
    for node in readers:
        if node.op_type in ("Conv", "ConvTranspose") and node.input[0] == name and graph.is_constant(node.input[1]):
            kind = _kind(graph, node)
            if kind == "depthwise" or groups_of(node) == 1:
                return _axis(graph, node, 0 if kind == "depthwise" or node.op_type == "ConvTranspose" else 1)
    alike = (n.output[0] for n in readers if graph.shapes.get(n.output[0], ())[:2] == shape[:2])
    return next(filter(None, (_read(graph, n, seen) for n in alike)), None)


# -- a unit by itself ------------------------------------------------------------------------------------------------


def alone(unit: Unit, inside: int, outside: int, opset: int) -> ModelProto:
    """A float model of one unit with these channels, its weights drawn at random."""
    rng = np.random.default_rng(0)
    node, weighted = unit.nodes[0], unit.kind in _WEIGHTED_KINDS
    out = unit.nodes[-1].output[0]
    channels = unit.sizes[out][1] if len(unit.sizes[out]) > 1 else 1
    initializers, inputs, nodes = [], [], [onnx.NodeProto.FromString(n.SerializeToString()) for n in unit.nodes]
    for name, shape in unit.sizes.items():
        if name != out:
            shape = (*shape[:1], _share(shape, channels, inside, weighted=weighted), *shape[2:])
            inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    for name, value in unit.constants.items():
        axes = [a for a, size in enumerate(value.shape) if size == channels > 1 and value.dtype == np.float32]
        cut = value.take(np.arange(outside) % channels, axes[0]) if axes else value
        initializers.append(numpy_helper.from_array(np.ascontiguousarray(cut), name))
    if weighted:
        shape = _weight_shape(unit, node, inside, outside)
        w = rng.standard_normal(shape).astype(np.float32) / max(1.0, float(np.sqrt(np.prod(shape[1:]))))
        initializers.append(numpy_helper.from_array(w, node.input[1]))
        if unit.bias:
            initializers.append(numpy_helper.from_array(np.zeros(outside, np.float32), node.input[2]))
        if unit.kind == "depthwise":
            _set(nodes[0], "group", outside)
    graph = helper.make_graph(nodes, "unit", inputs, [onnx.ValueInfoProto(name=out)], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    shapes = Graph(model)
    if out not in shapes.shapes or 0 in shapes.shapes[out]:
        raise UnsupportedGraph("its shape is not known before it runs", where=unit.key)
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info(out, TensorProto.FLOAT, shapes.shapes[out]))
    return model


def _share(shape: tuple[int, ...], channels: int, width: int, *, weighted: bool) -> int:
    """An input's channels when the unit has `width`; a part of them where the unit joins several."""
    if weighted or len(shape) < 2 or shape[1] == channels:
        return width if len(shape) > 1 else 1
    return shape[1] if shape[1] == 1 else max(1, round(shape[1] * width / channels))


def _weight_shape(unit: Unit, node: NodeProto, inside: int, outside: int) -> tuple[int, ...]:
    if node.op_type in ("Gemm", "MatMul"):
        return (outside, inside) if node.op_type == "Gemm" and transposed(node) else (inside, outside)
    kernel = next(tuple(a.ints) for a in node.attribute if a.name == "kernel_shape")
    if unit.kind == "depthwise":
        return (outside, 1, *kernel)
    groups = groups_of(node)
    if node.op_type == "ConvTranspose":
        return (inside, outside // groups, *kernel)
    return (outside, max(1, inside // groups), *kernel)


def _set(node: NodeProto, name: str, value: int | str) -> None:
    kept = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])


def plain_table(proto: ModelProto, keep_float: str | None = None) -> ScaleTable:
    """Scales that make the graph integer where a real quantisation would: good for its time, not for its answers."""
    graph = Graph(proto)
    weights, floats = {}, set[str]()
    for node in graph.weighted():
        name = node.input[1]
        if keep_float is not None and re.search(keep_float, name.removesuffix(".weight")):
            floats.add(graph.written(node))
            continue
        if node.op_type == "ConvTranspose" and groups_of(node) > 1:  # its scales run along no axis of the weight
            floats.add(graph.written(node))
            continue
        w = np.asarray(graph.array(name), np.float32)
        axis = channel_axis(node)
        top = np.abs(w).max(axis=tuple(a for a in range(w.ndim) if a != axis))
        scale = (np.where(top > 0, top, 1) / 127).astype(np.float32)
        lined = scale.reshape([-1 if a == axis else 1 for a in range(w.ndim)])
        bias = np.asarray(graph.array(node.input[2]), np.float32) if len(node.input) > 2 else None
        bits = np.full(len(scale), 8, np.uint8)
        layer = name.removesuffix(".weight")
        weights[name] = WeightScale(layer, scale, bits, axis, np.rint(w / lined).astype(np.int8), bias)
    return ScaleTable(weights, {n: RANGE for n in graph.activations() if n not in floats})


def artefact(proto: ModelProto, target: Target, keep_float: str | None = None) -> bytes:
    """The target's file for a float graph, with `plain_table`'s scales."""
    return _compiled(write_flavour(proto, plain_table(proto, keep_float), target.flavour), target)


def unit_artefact(unit: Unit, inside: int, outside: int, target: Target) -> bytes:
    """The target's file for one unit with these channels."""
    return compiled_unit(alone(unit, inside, outside, target.opset), target, "" if unit.real else None)


def float_artefact(unit: Unit, inside: int, outside: int, target: Target) -> bytes:
    """As `unit_artefact`, but float throughout: it takes and gives floats."""
    return _compiled(alone(unit, inside, outside, target.opset), target)


def border_artefact(shape: tuple[int, ...], rounded: str, target: Target) -> bytes:
    """A float addition that takes (``x``) or gives (``y``) integers, or neither (empty): what it takes longer for that
    is one conversion of a tensor of this shape. (LiteRT's writer would let a ReLU pass integers on.)"""
    sides = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in "xy"]
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "border", sides[:1], sides[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", target.opset)], ir_version=8)
    flavoured = write_flavour(model, ScaleTable({}, dict.fromkeys(rounded, RANGE)), target.flavour)
    if target.flavour == "onnxruntime":
        _open_ends(flavoured)
    return _compiled(flavoured, target)


def compiled_unit(proto: ModelProto, target: Target, keep_float: str | None = None) -> bytes:
    """The target's file for a float graph that is to stand for a part of a model: it takes and gives integers."""
    flavoured = write_flavour(proto, plain_table(proto, keep_float), target.flavour)
    if target.flavour == "onnxruntime":
        _open_ends(flavoured)
    return _compiled(flavoured, target)


def _compiled(flavoured: ModelProto, target: Target) -> bytes:
    with tempfile.TemporaryDirectory(prefix="xedge-") as folder:
        source = Path(folder) / "unit.onnx"
        onnx.save(flavoured, source)
        (Path(folder) / "made").mkdir()
        return target.compile(source, Path(folder) / "made", "unit").read_bytes()


def _open_ends(model: ModelProto) -> None:
    """Let a unit take and give integers: in the midst of a model nothing is converted at its ends. (LiteRT's writer
    leaves them out by itself, and TensorRT's graphs have them in the midst as well.)"""
    graph = Graph(model)
    gone = []
    for value in model.graph.input:
        after = graph.consumers.get(value.name, [])
        if len(after) == 1 and after[0].op_type == "QuantizeLinear":
            gone.append(after[0])
            shape = graph.shapes[value.name]
            value.CopyFrom(helper.make_tensor_value_info(after[0].output[0], graph.types[after[0].output[0]], shape))
    for value in model.graph.output:
        before = graph.producer.get(value.name)
        if before is not None and before.op_type == "DequantizeLinear" and before.input[0] in graph.producer:
            gone.append(before)
            shape = graph.shapes[value.name]
            value.CopyFrom(helper.make_tensor_value_info(before.input[0], graph.types[before.input[0]], shape))
    for node in gone:
        model.graph.node.remove(node)
