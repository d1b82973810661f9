"""Writers of pooling and reductions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from xedge.errors import UnsupportedGraph

from .tflite_conv import Weights, Window, convolve, pad, padded, slice_nhwc, window
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
    """AveragePool: AVERAGE_POOL_2D where TFLite counts as ONNX does, else region by region of equal window sizes."""
    frame = window(e, node, node.attrs["kernel_shape"])
    x, grid = e.nhwc(e.read(node), node), e.grid(node)
    shape = e.graph.shapes[node.outputs[0]]
    inside = frame.taps(padded=False)
    divisor = frame.taps(padded=True) if node.attrs.get("count_include_pad") else inside
    own = frame.style is not None and np.array_equal(divisor, inside) and frame.dilation == (1, 1)
    if frame.out == (1, 1) and inside.item() == divisor.item() == x.shape[2] * x.shape[3]:
        made = mean(e, x, (2, 3), grid, keep=True)
    elif own and grid == x.grid:
        made = _pool(e, "AVERAGE_POOL_2D", x, frame, int(getattr(schema.Padding, str(frame.style))), shape)
    else:
        if node.attrs.get("count_include_pad"):
            x = pad(e, x, frame.before, np.minimum(frame.after, frame.needed_after))
            frame = replace(frame, size=(x.shape[2], x.shape[3]), before=(0, 0), after=(0, 0))
        made = _by_region(e, node, x, frame, grid)
    e.finish(node, made)


def _by_region(e: Emitter, node: Node, x: Value, frame: Window, grid: Grid | None) -> Value:
    """Averages over windows cut at the border: one unpadded pooling for each run of equally cut windows, joined."""
    rows = []
    for top, bottom, first, last in _runs(frame, 0):
        row = []
        for left, right, start, stop in _runs(frame, 1):
            begin = (
                top * frame.stride[0] - frame.before[0] + first * frame.dilation[0],
                left * frame.stride[1] - frame.before[1] + start * frame.dilation[1],
            )
            kernel, out = (last - first, stop - start), (bottom - top, right - left)
            part = replace(frame, kernel=kernel, out=out, before=(0, 0), after=(0, 0), size=(0, 0))
            size = tuple((out[d] - 1) * frame.stride[d] + part.spans[d] for d in range(2))
            piece = x
            if (*begin, *size) != (0, 0, *x.shape[2:]):
                piece = slice_nhwc(e, x, (0, *begin, 0), (x.shape[0], *size, x.shape[1]))
            row.append(_average(e, node, piece, replace(part, size=(size[0], size[1])), grid))
        rows.append(_join(e, row, 3))
    return _join(e, rows, 2)


def _runs(frame: Window, d: int) -> list[tuple[int, int, int, int]]:
    """Consecutive outputs [from, to) along H or W whose windows keep the same kernel positions [first, last)."""
    runs: list[tuple[int, int, int, int]] = []
    for i in range(frame.out[d]):
        places = i * frame.stride[d] - frame.before[d] + np.arange(frame.kernel[d]) * frame.dilation[d]
        kept = np.flatnonzero((places >= 0) & (places < frame.size[d]))
        first, last = int(kept[0]), int(kept[-1]) + 1
        if runs and runs[-1][2:] == (first, last):
            runs[-1] = (runs[-1][0], i + 1, first, last)
        else:
            runs.append((i, i + 1, first, last))
    return runs


def _average(e: Emitter, node: Node, x: Value, frame: Window, grid: Grid | None) -> Value:
    """Unpadded averages. AVERAGE_POOL_2D cannot change the grid; a depthwise convolution by ones can."""
    shape, valid = (*x.shape[:2], *frame.out), int(schema.Padding.VALID)
    if grid == x.grid and frame.dilation == (1, 1):
        return _pool(e, "AVERAGE_POOL_2D", x, frame, valid, shape)
    area = frame.kernel[0] * frame.kernel[1]
    ones = np.ones((x.shape[1], 1, *frame.kernel))
    weights = Weights(ones * 127, np.full(x.shape[1], 1 / (area * 127.0))) if grid is not None else None
    real = (ones / area).astype(np.float32)
    return convolve(e, node.outputs[0], x, real, weights, None, frame, valid, shape, grid, node)


def _join(e: Emitter, parts: Sequence[Value], axis: int) -> Value:
    """Concatenation along an ONNX axis."""
    if len(parts) == 1:
        return parts[0]
    shape = list(parts[0].shape)
    shape[axis] = sum(p.shape[axis] for p in parts)
    options = schema.ConcatenationOptionsT(axis=parts[0].axis(axis), fusedActivationFunction=0)
    inputs, grid = [p.index for p in parts], parts[0].grid
    return e.emit("CONCATENATION", inputs, parts[0], "joined", shape=shape, grid=grid, options=options)


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
