"""Writers of the elementwise operators: arithmetic with broadcasting, activations, affine maps, softmax."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from numpy.typing import NDArray

from xedge.errors import UnsupportedGraph

from .tflite_conv import Weights, Window, convolve
from .tflite_emit import NHWC, Emitter, Value, activation
from .tflite_fuse import FIXED
from .tflite_graph import Grid, Node

Array = NDArray[Any]


def binary(e: Emitter, node: Node) -> None:
    """Add, Sub, Mul, and Div by a constant, with ONNX (NumPy) broadcasting."""
    shape = e.graph.shapes[node.outputs[0]]
    rank, op, names = len(shape), node.op, node.inputs[:2]
    live = [e.is_activation(name) for name in names]
    if op == "Div" and not live[1]:
        op, factor = "Mul", 1.0 / e.graph.consts[names[1]].astype(np.float64)
    else:
        factor = e.graph.consts[names[live.index(False)]] if not all(live) else np.zeros(0)
    if op == "Div" and e.integer(node):
        raise UnsupportedGraph("TFLite has no int8 division", where=str(node), fix="divide by a constant, or multiply")
    read = {i: _widened(e, e.read(node, i), rank) for i in range(2) if live[i]}
    first = max(read.values(), key=lambda v: math.prod(v.shape))
    grid = e.grid(node)
    if not all(live) and grid is not None:
        side = live.index(False)
        made = _with_constant(e, node, op, read[1 - side], factor, side, grid, shape)
        if made is not None:
            e.finish(node, made)
            return
    perm = first.perm
    operands = []
    for i in range(2):
        if live[i]:
            operands.append(e.layout(read[i], perm).index)
        else:
            wide = np.asarray(factor).reshape([1] * (rank - np.ndim(factor)) + list(np.shape(factor)))
            operands.append(
                e.on_grid(names[i], wide.transpose(perm), None if grid is None else _operand(e, names[i], factor))
            )
    options = getattr(schema, f"{op.capitalize()}OptionsT")(fusedActivationFunction=activation(node.clip))
    made = e.emit(op.upper(), operands, first, node.outputs[0], shape=shape, perm=perm, grid=grid, options=options)
    e.finish(node, made)


def _widened(e: Emitter, x: Value, rank: int) -> Value:
    """Leading axes of size 1 added, as broadcasting does."""
    if len(x.shape) == rank:
        return e.in_order(x)
    x = e.plain(x)
    shape = [1] * (rank - len(x.shape)) + list(x.shape)
    return e.reshape(x, shape, range(rank))


def _operand(e: Emitter, name: str, values: Array) -> Grid:
    """The grid of a constant operand: the model's own where it has one, else the tightest."""
    held = e.graph.stored.get(name)
    if held is not None and held.scale.size == 1 and np.array_equal(values, e.graph.consts[name]):
        return Grid(float(held.scale.reshape(())), int(held.zero_point.reshape(())))
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    if low == high:
        return Grid(1.0, 0)
    if float(values.min()) == float(values.max()):
        return Grid((high - low) / 127, 0)  # one value, met exactly
    scale = (high - low) / 255
    return Grid(float(np.float32(scale)), int(np.clip(round(-128 - low / scale), -128, 127)))


def _with_constant(
    e: Emitter, node: Node, op: str, x: Value, values: Array, side: int, grid: Grid, shape: Sequence[int]
) -> Value | None:
    """x op constant per channel in integers, as a depthwise 1x1 convolution: the constant is not rounded to 8 bits."""
    values = np.asarray(values, np.float64)
    if len(shape) != 4 or tuple(shape) != x.shape or values.size not in (1, shape[1]):
        return None
    if values.size > 1 and (values.ndim < 3 or values.shape[-3] != shape[1]):
        return None  # a row or column, not a channel
    vector = np.broadcast_to(values.reshape(-1), shape[1])
    ones, zeros = np.ones(shape[1]), np.zeros(shape[1])
    if op == "Mul":
        scale, shift = vector, zeros
    elif op == "Add":
        scale, shift = ones, vector
    else:
        scale, shift = (ones, -vector) if side == 1 else (-ones, vector)
    return affine_map(e, node, x, scale, shift, grid)


def affine_map(e: Emitter, node: Node, x: Value, scale: Array, shift: Array, grid: Grid | None) -> Value:
    """x * scale + shift per channel of an image: a depthwise 1x1 convolution, its bias in 32 bits."""
    x = e.nhwc(x, node)
    count, size = x.shape[1], (x.shape[2], x.shape[3])
    one = Window((1, 1), (1, 1), (1, 1), (0, 0), (0, 0), size, size)
    weights = None
    if grid is not None:
        values = np.where(scale < 0, -127, 127).reshape(count, 1, 1, 1)
        least = 1e-6 * max(float(np.abs(scale).max()), 1e-30)  # a factor of 0 still needs a positive scale
        values = np.where(np.abs(scale).reshape(values.shape) < least, 0, values)
        weights = Weights(values, np.maximum(np.abs(scale), least) / 127)
    real = scale.reshape(count, 1, 1, 1).astype(np.float32)
    valid = int(schema.Padding.VALID)
    return convolve(e, node.outputs[0], x, real, weights, shift.astype(np.float32), one, valid, x.shape, grid, node)


def affine(e: Emitter, node: Node) -> None:
    """BatchNormalization that nothing before it could take in."""
    x, scale, shift = e.read(node), node.attrs["scale"], node.attrs["shift"]
    if len(x.shape) == 4:
        e.finish(node, affine_map(e, node, x, scale, shift, e.grid(node)))
        return
    x = e.on(e.in_order(x), None)
    spread = [-1 if axis == 1 else 1 for axis in range(len(x.shape))]
    for code, vector in (("MUL", scale), ("ADD", shift)):
        other = e.floats(node.name, vector.reshape(spread).transpose(x.perm))
        options = getattr(schema, f"{code.capitalize()}OptionsT")(fusedActivationFunction=0)
        x = e.emit(code, [x.index, other], x, node.outputs[0], options=options)
    e.finish(node, x)


def _clamped(e: Emitter, x: Value, clip: tuple[float, float], grid: Grid, name: str) -> Value:
    """A ReLU of integers, which may change the grid, fused into an addition of 0: XNNPACK has none by itself."""
    assert x.grid is not None
    zero = e.on_grid(f"{name}/zero", np.zeros(1), Grid(x.grid.scale, 0))
    return e.emit(
        "ADD", [x.index, zero], x, name, grid=grid, options=schema.AddOptionsT(fusedActivationFunction=activation(clip))
    )


def clip(e: Emitter, node: Node) -> None:
    """Relu and Clip that no operator before them could take in."""
    if node.clip is None:
        raise UnsupportedGraph("its bounds are computed while it runs", where=str(node), fix="make them constants")
    x, grid = e.read(node), e.grid(node)
    if node.clip in ((0.0, math.inf), (0.0, 6.0)):
        if x.grid is not None and grid is not None:
            made = _clamped(e, x, node.clip, grid, node.outputs[0])
        else:
            made = e.emit("RELU" if math.isinf(node.clip[1]) else "RELU6", [x.index], x, node.outputs[0])
        e.finish(node, replace(made, columns=x.columns))
        return
    x = e.on(e.in_order(x), grid) if grid is not None else e.in_order(x)
    e.finish(node, e.clamp(x, node.clip))


def unary(e: Emitter, node: Node) -> None:
    """Sigmoid, Tanh, HardSwish, LeakyRelu."""
    code = {"Sigmoid": "LOGISTIC", "Tanh": "TANH", "HardSwish": "HARD_SWISH", "LeakyRelu": "LEAKY_RELU"}[node.op]
    x, grid = e.read(node), e.grid(node)
    options = {
        "HARD_SWISH": schema.HardSwishOptionsT,
        "LEAKY_RELU": lambda: schema.LeakyReluOptionsT(alpha=float(node.attrs.get("alpha", 0.01))),
    }.get(code, lambda: None)()
    if grid is not None:
        grid = FIXED.get(node.op, grid)
    made = e.emit(code, [x.index], x, node.outputs[0], grid=grid, options=options)
    e.finish(node, replace(made, columns=x.columns))


def hard_sigmoid(e: Emitter, node: Node) -> None:
    """clip(alpha x + beta, 0, 1): integer as a depthwise 1x1 convolution, float as multiply, add, clamp."""
    alpha, beta = float(node.attrs.get("alpha", 0.2)), float(node.attrs.get("beta", 0.5))
    x, grid = e.in_order(e.read(node)), e.grid(node)
    if grid is not None and len(x.shape) == 4:
        count = x.shape[1]
        made = affine_map(e, node, x, np.full(count, alpha), np.full(count, beta), grid)
    else:
        made = e.on(x, None)
        for code, number in (("MUL", alpha), ("ADD", beta)):
            other = e.floats(code.lower(), np.full([1] * len(x.shape), number))
            options = getattr(schema, f"{code.capitalize()}OptionsT")(fusedActivationFunction=0)
            made = e.emit(code, [made.index, other], made, node.outputs[0], options=options)
    e.finish(node, e.clamp(made, (0.0, 1.0)))


def prelu(e: Emitter, node: Node) -> None:
    """PRelu with a constant slope that broadcasts over the batch.

    In integers max(x, 0) + slope min(x, 0): PRELU's own int8 kernel computes one number at a time, and XNNPACK has
    additions and multiplications. The result is rounded once, as there: one of the two terms is 0, exactly.
    """
    slope = e.const(node, 1, "slope")
    assert slope is not None
    x = e.in_order(e.read(node))
    rank = len(x.shape)
    if len(x.shape) == 4:
        x = e.layout(x, NHWC)
    wide = slope.reshape([1] * (rank - slope.ndim) + list(slope.shape)).transpose(x.perm)
    if rank < 2 or wide.shape[0] != 1:
        raise UnsupportedGraph("its slope differs between images", where=str(node), fix="use one slope per channel")
    grid = None if x.grid is None else _operand(e, node.inputs[1], slope)
    alpha, out, name = e.on_grid(node.inputs[1], wide[0], grid), e.grid(node), node.outputs[0]
    if out is None:
        e.finish(node, e.emit("PRELU", [x.index, alpha], x, name))
        return
    assert x.grid is not None
    add, sub, mul = schema.AddOptionsT, schema.SubOptionsT, schema.MulOptionsT
    plus = _clamped(e, x, (0.0, math.inf), x.grid, f"{name}/positive")
    minus = e.emit("SUB", [x.index, plus.index], x, f"{name}/negative", grid=x.grid, options=sub())
    minus = e.emit("MUL", [minus.index, alpha], x, f"{name}/sloped", grid=out, options=mul())
    e.finish(node, e.emit("ADD", [plus.index, minus.index], x, name, grid=out, options=add()))


def softmax(e: Emitter, node: Node) -> None:
    """Softmax over one axis, which TFLite wants last."""
    x = e.in_order(e.read(node))
    axis = node.attrs.get("axis", -1) % len(x.shape)
    if x.perm[-1] != axis:
        x = e.layout(x, [*(a for a in x.perm if a != axis), axis])
    grid = None if e.grid(node) is None else FIXED["Softmax"]
    options = schema.SoftmaxOptionsT(beta=1.0)
    e.finish(node, e.emit("SOFTMAX", [x.index], x, node.outputs[0], grid=grid, options=options))


def requantize(e: Emitter, node: Node) -> None:
    """The same tensor on a second grid."""
    e.finish(node, e.raw(node.inputs[0]))


ELEMENTWISE_WRITERS: Final[Mapping[str, Any]] = {
    "Add": binary,
    "Sub": binary,
    "Mul": binary,
    "Div": binary,
    "Affine": affine,
    "Clip": clip,
    "Relu": clip,
    "Sigmoid": unary,
    "Tanh": unary,
    "HardSwish": unary,
    "LeakyRelu": unary,
    "HardSigmoid": hard_sigmoid,
    "PRelu": prelu,
    "Softmax": softmax,
    "Requantize": requantize,
}
