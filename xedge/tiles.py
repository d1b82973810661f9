"""Whole pictures through an engine of one size: tiles that overlap, and no seams.

A pixel of a convolutional net's output depends on the inputs within its receptive field only. Tiles that overlap by
that radius on each side give every output pixel at least once exactly as the whole picture would, and that one is kept.
Tiles at the picture's border lie on it, so that padding is where it is for the whole picture. What is smaller than a
tile is continued by its mirror image.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto

from xedge.onnx_graph import Graph
from xedge.ranges import attributes
from xedge.target import Runner

Pictures = NDArray[np.float32]
POINTWISE = (
    "Relu", "PRelu", "LeakyRelu", "Clip", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish", "Elu", "Gelu", "Erf", "Abs",
    "Neg", "Exp", "Sqrt", "Pow", "Add", "Sub", "Mul", "Div", "Max", "Min", "Cast", "Identity", "Dropout",
    "QuantizeLinear", "DequantizeLinear", "BatchNormalization",
)  # fmt: skip
THIN = 8
"""Rows of the borders that a net takes out to pad with."""


@dataclass(frozen=True)
class Reach:
    """How far a graph's output looks.

    Attributes:
        radius: input pixels on each side of its own place that an output pixel may depend on.
        step: tiles may begin at multiples of it.
    """

    radius: int
    step: int


@dataclass(frozen=True)
class _Field:
    """Of a tensor: input pixels between two of its pixels, and the radius of one in input pixels."""

    pitch: Fraction
    radius: Fraction


def reach(proto: ModelProto) -> Reach | None:
    """The receptive field of a float or quantised graph, at least as large as it is; None where it is the picture."""
    graph = Graph(proto)
    fields = {graph.inputs[0]: _Field(Fraction(1), Fraction(0))}
    step = 1
    for node in graph.nodes:
        inputs = [fields[n] for n in node.input if n in fields]
        if not inputs:
            continue
        field = _through(graph, node, inputs)
        if field is None:
            return None
        for name in node.output:
            fields[name] = field
        if field.pitch > 1:
            step = math.lcm(step, math.ceil(field.pitch))
    return Reach(math.ceil(fields[graph.outputs[0]].radius), step)


def _through(graph: Graph, node: NodeProto, inputs: list[_Field]) -> _Field | None:
    pitch, radius = max(f.pitch for f in inputs), max(f.radius for f in inputs)
    a = attributes(node)
    shape = graph.shapes.get(node.input[0], ())
    if node.op_type in ("Conv", "MaxPool", "AveragePool", "ConvTranspose"):
        kernel = a.get("kernel_shape") or [*_weight(graph, node)[2:]]
        spans = [(k - 1) * d + 1 for k, d in zip(_ints(kernel), _ints(a.get("dilations", [1, 1])), strict=True)]
        stride = max(_ints(a.get("strides", [1, 1])))
        if node.op_type == "ConvTranspose":
            return _Field(pitch / stride, radius + pitch * math.ceil(Fraction(max(spans), stride)))
        return _Field(pitch * stride, radius + pitch * (max(spans) - 1 if stride > 1 else max(_sides(a, spans))))
    if node.op_type in ("DepthToSpace", "SpaceToDepth"):
        block = int(str(a["blocksize"]))
        return _shuffled(pitch, radius, Fraction(1, block) if node.op_type == "DepthToSpace" else Fraction(block))
    if node.op_type == "Resize":
        out = graph.shapes[node.output[0]]
        factor = Fraction(shape[2], out[2])
        taps = {b"nearest": 1, b"linear": 1, b"cubic": 2}[a.get("mode", b"nearest")]  # type: ignore[index]
        return _Field(pitch * factor, radius + pitch * taps * max(factor, Fraction(1)))
    if node.op_type in ("Concat", "Slice", "Split"):
        return _joined(graph, node, a, pitch, radius)
    if node.op_type in ("Reshape", "Transpose"):
        return _rearranged(graph, node, pitch, radius)
    if node.op_type == "Pad":
        pads = graph.array(node.input[1]) if graph.is_constant(node.input[1]) else np.array([THIN])
        return _Field(pitch, radius + pitch * int(np.abs(pads).max()))
    return _Field(pitch, radius) if node.op_type in POINTWISE else None


def _sides(a: dict[str, object], spans: list[int]) -> list[int]:
    """Reach of a convolution of stride 1 to its farther side."""
    pads = _ints(a.get("pads", [0, 0, 0, 0]))
    return [max(p, s - 1 - p) for p, s in zip(pads[: len(spans)], spans, strict=True)]


def _shuffled(pitch: Fraction, radius: Fraction, factor: Fraction) -> _Field:
    return _Field(pitch * factor, radius + pitch * max(factor, Fraction(1)))


def _joined(graph: Graph, node: NodeProto, a: dict[str, object], pitch: Fraction, radius: Fraction) -> _Field | None:
    """Along the channels nothing moves. Along rows and columns nets take border rows and put them back as padding."""
    whole, out = graph.shapes[node.input[0]], graph.shapes[node.output[0]]
    if len(out) != 4:
        return None
    if node.op_type == "Concat":
        rows = [graph.shapes[n][2:] for n in node.input]
        longest = [max(r[i] for r in rows) for i in (0, 1)]
        added = sum(out[2 + i] - longest[i] for i in (0, 1) if out[2 + i] != longest[i])
        return _Field(pitch, radius + pitch * added) if added <= 4 * THIN else None
    lost = max(whole[2] - out[2], whole[3] - out[3])
    thin = min(out[2], out[3]) <= THIN < min(whole[2], whole[3])
    return _Field(pitch, radius if thin else radius + pitch * lost)


def _rearranged(graph: Graph, node: NodeProto, pitch: Fraction, radius: Fraction) -> _Field | None:
    """The three nodes of a pixel shuffle or its inverse: the last one has the new size."""
    x, out = graph.shapes[node.input[0]], graph.shapes[node.output[0]]
    if {len(x), len(out)} == {4, 6} and node.op_type == "Reshape":
        if len(out) == 6:
            return _Field(pitch, radius)
        name = node.input[0]
        while len(graph.shapes[name]) != 4:
            name = graph.producer[name].input[0]
        return _shuffled(pitch, radius, Fraction(graph.shapes[name][2], out[2]))
    return _Field(pitch, radius) if len(x) == len(out) == 6 else None


def _weight(graph: Graph, node: NodeProto) -> tuple[int, ...]:
    name = node.input[1]
    return tuple(graph.initializers[name].dims) if graph.is_constant(name) else graph.shapes[name]


def _ints(value: object) -> list[int]:
    assert isinstance(value, list | tuple)
    return [int(v) for v in value]


# -- tiles -----------------------------------------------------------------------------------------------------------


def starts(length: int, tile: int, reach: Reach) -> list[tuple[int, int, int]]:
    """(where a tile begins, and from where to where its output is kept) along an axis, in input pixels."""
    if tile >= length:
        return [(0, 0, length)]
    found, at, kept = [], 0, 0
    while at + tile < length:
        end = at + tile - reach.radius
        found.append((at, kept, end))
        kept = end
        at = (kept - reach.radius) // reach.step * reach.step
    last = length - tile
    return [*found, (last, kept, length)]


def shortest_tile(reach: Reach) -> int:
    """The shortest tile that brings a row of tiles forward at all."""
    return (-(-2 * reach.radius // reach.step) + 1) * reach.step


def least_tile(reach: Reach) -> int:
    """The shortest tile that brings a row of tiles forward by a half of its length."""
    return -(-max(4 * reach.radius, 1) // reach.step) * reach.step


def cut(size: tuple[int, int], tile: tuple[int, int], reach: Reach) -> Iterator[tuple[tuple[int, int, int], ...]]:
    """The tiles of a picture, row by row: `starts` along the rows and along the columns."""
    for down in starts(size[0], tile[0], reach):
        for across in starts(size[1], tile[1], reach):
            yield down, across


def stitch(run: Runner, picture: Pictures, tile: tuple[int, int], reach: Reach, scale: int) -> Pictures:
    """A whole picture [C, H, W] -> [C', scale H, scale W] by a runner of [1, C, *tile].

    Args:
        tile: (height, width), multiples of the step, longer than twice the radius where the picture is longer than it.
    """
    _, height, width = picture.shape
    rest = [max(-n % reach.step, t - n) for n, t in zip((height, width), tile, strict=True)]
    whole = np.pad(picture, ((0, 0), (0, rest[0]), (0, rest[1])), mode="symmetric")
    out: Pictures | None = None
    for (top, y0, y1), (left, x0, x1) in cut((whole.shape[1], whole.shape[2]), tile, reach):
        part = np.ascontiguousarray(whole[None, :, top : top + tile[0], left : left + tile[1]])
        got = run(part)[0]
        if out is None:
            out = np.zeros((len(got), scale * whole.shape[1], scale * whole.shape[2]), np.float32)
        ys, xs = slice(scale * (y0 - top), scale * (y1 - top)), slice(scale * (x0 - left), scale * (x1 - left))
        out[:, scale * y0 : scale * y1, scale * x0 : scale * x1] = got[:, ys, xs]
    assert out is not None
    return out[:, : scale * height, : scale * width]
