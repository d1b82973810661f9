"""Writers of pooling and reductions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from xedge.errors import UnsupportedGraph

from .tflite_conv import Weights, Window, convolve, pad, padded, window
from .tflite_emit import Emitter, Value
from .tflite_graph import Grid, Node


def max_pool(e: Emitter, node: Node) -> None:
    """MaxPool: MAX_POOL_2D, padded with the lowest value; a dilated window is a maximum of strided slices."""
    frame = window(e, node, node.attrs["kernel_shape"])
    if len(node.outputs) > 1:
        raise UnsupportedGraph("its indices are used", where=str(node), fix="use the pooled values alone")
    x = e.nhwc(e.read(node), node)
    shape = e.graph.shapes[node.outputs[0]]
    if frame.dilation != (1, 1):
        x = pad(e, x, frame.before, frame.needed_after, -math.inf)
        made = _dilated_max(e, x, frame, shape)
    else:
        x, style = padded(e, x, frame, -math.inf)
        made = _pool(e, "MAX_POOL_2D", x, frame, style, shape)
    e.finish(node, made)


def _pool(e: Emitter, code: str, x: Value, frame: Window, style: int, shape: Sequence[int]) -> Value:
    options = schema.Pool2DOptionsT(
        padding=style,
        strideH=frame.stride[0],
        strideW=frame.stride[1],
        filterHeight=frame.kernel[0],
        filterWidth=frame.kernel[1],
        fusedActivationFunction=0,
    )
    return e.emit(code, [x.index], x, "pooled", shape=shape, grid=x.grid, options=options)


def _dilated_max(e: Emitter, x: Value, frame: Window, shape: Sequence[int]) -> Value:
    made: Value | None = None
    for row in range(frame.kernel[0]):
        for column in range(frame.kernel[1]):
            begin = (row * frame.dilation[0], column * frame.dilation[1])
            end = [begin[d] + (frame.out[d] - 1) * frame.stride[d] + 1 for d in range(2)]
            inputs = [
                x.index,
                e.ints("begin", [0, *begin, 0]),
                e.ints("end", [0, *end, 0]),
                e.ints("strides", [1, *frame.stride, 1]),
            ]
            options = schema.StridedSliceOptionsT(beginMask=0b1001, endMask=0b1001)
            tap = e.emit("STRIDED_SLICE", inputs, x, "tap", shape=shape, grid=x.grid, options=options)
            if made is not None:
                options = schema.MaximumMinimumOptionsT()
                tap = e.emit("MAXIMUM", [made.index, tap.index], tap, "pooled", grid=x.grid, options=options)
            made = tap
    assert made is not None
    return made


def average_pool(e: Emitter, node: Node) -> None:
    """AveragePool: AVERAGE_POOL_2D where TFLite counts as ONNX does; else a depthwise convolution or a correction."""
    frame = window(e, node, node.attrs["kernel_shape"])
    x, grid = e.nhwc(e.read(node), node), e.grid(node)
    shape = e.graph.shapes[node.outputs[0]]
    area = frame.kernel[0] * frame.kernel[1]
    inside = frame.taps(padded=False)
    divisor = frame.taps(padded=True) if node.attrs.get("count_include_pad") else inside
    if frame.out == (1, 1) and inside.item() == divisor.item() == x.shape[2] * x.shape[3]:
        e.finish(node, mean(e, x, (2, 3), grid, keep=True))
        return
    own = frame.style is not None and np.array_equal(divisor, inside) and frame.dilation == (1, 1)
    if own and grid == x.grid:
        made = _pool(e, "AVERAGE_POOL_2D", x, frame, int(getattr(schema.Padding, str(frame.style))), shape)
    elif np.all(divisor == area) and (grid is not None or frame.dilation != (1, 1)):
        # AVERAGE_POOL_2D cannot change the grid; a depthwise convolution by ones can, and pads as ONNX counts.
        x, style = padded(e, x, frame)
        ones = np.ones((x.shape[1], 1, *frame.kernel))
        weights = Weights(ones * 127, np.full(x.shape[1], 1 / (area * 127.0))) if grid is not None else None
        made = convolve(
            e, node.outputs[0], x, (ones / area).astype(np.float32), weights, None, frame, style, shape, grid, node
        )
    elif frame.dilation != (1, 1):
        raise UnsupportedGraph("a dilated window over padding", where=str(node), fix="count the padding or drop it")
    elif own:
        made = _pool(e, "AVERAGE_POOL_2D", x, frame, int(getattr(schema.Padding, str(frame.style))), shape)
    else:
        x = pad(e, x, frame.before, frame.needed_after)
        made = _pool(e, "AVERAGE_POOL_2D", x, frame, int(schema.Padding.VALID), shape)
        if np.any(divisor != area):
            ratio = (area / divisor).reshape(1, *divisor.shape, 1)
            factor = e.on_grid("ratio", ratio, None if grid is None else Grid(float(ratio.max()) / 255, -128))
            options = schema.MulOptionsT(fusedActivationFunction=0)
            made = e.emit("MUL", [made.index, factor], made, "corrected", grid=grid, options=options)
    e.finish(node, made)


def reduce(e: Emitter, node: Node) -> None:
    """ReduceMean and ReduceMax over any axes (global pooling is over H and W)."""
    x, axes = e.in_order(e.read(node)), node.attrs["axes"]
    if not axes:
        e.finish(node, x)
        return
    keep = bool(node.attrs.get("keepdims", 1))
    if node.op == "ReduceMean":
        made = mean(e, x, axes, e.grid(node), keep=keep)
    else:
        made = mean(e, x, axes, x.grid, keep=keep, code="REDUCE_MAX")
    e.finish(node, made)


def mean(e: Emitter, x: Value, axes: Sequence[int], grid: Grid | None, *, keep: bool, code: str = "MEAN") -> Value:
    """Reduce ONNX axes; the order of the axes that stay is kept."""
    where = e.ints("axes", sorted(x.axis(a) for a in axes))
    shape = [1 if a in axes else n for a, n in enumerate(x.shape)]
    perm: Sequence[int] = x.perm
    if not keep:
        stay = [a for a in range(len(shape)) if a not in axes]
        shape, perm = [shape[a] for a in stay], [stay.index(a) for a in x.perm if a in stay]
    options = schema.ReducerOptionsT(keepDims=keep)
    return e.emit(code, [x.index, where], x, "reduced", shape=shape, perm=perm, grid=grid, options=options)


POOL_WRITERS: Final[Mapping[str, Any]] = {
    "MaxPool": max_pool,
    "AveragePool": average_pool,
    "ReduceMean": reduce,
    "ReduceMax": reduce,
}
