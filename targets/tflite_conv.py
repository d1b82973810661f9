"""Writers of the operators with weights: convolutions and linear layers.

Integer forms follow TFLite's quantisation specification: weights int8 per output channel with zero point 0, bias int32
with scale s_in * s_w and zero point 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from numpy.typing import NDArray

from xedge.errors import UnsupportedGraph

from .tflite_emit import NHWC, Emitter, Value, activation
from .tflite_graph import Grid, Node

Array = NDArray[Any]


@dataclass(frozen=True)
class Weights:
    """Integer weights, output channel first: values int8 [O, ...], scale [O]."""

    values: Array
    scale: NDArray[np.float64]


def stored_weights(e: Emitter, node: Node, axis: int) -> Weights:
    """The integers of input 1, their output axis `axis` moved to the front."""
    held = e.graph.stored[node.inputs[1]]
    if np.any(held.zero_point != 0):
        raise UnsupportedGraph(
            "its weights have a zero point other than 0", where=str(node), fix="quantise weights symmetrically to int8"
        )
    if held.scale.size > 1 and held.axis != axis:
        raise UnsupportedGraph(
            f"its weights are quantised along axis {held.axis}", where=str(node), fix=f"quantise them along axis {axis}"
        )
    values = np.moveaxis(held.values, axis, 0)
    if values.min(initial=0) < -128 or values.max(initial=0) > 127:
        raise UnsupportedGraph("its weights are wider than 8 bits", where=str(node), fix="quantise weights to int8")
    scale = np.broadcast_to(held.scale, values.shape[0]).copy()
    scale[scale <= 0] = 1.0  # a channel of zeros, which some tools give scale 0
    return Weights(values, scale)


def integer_bias(weights: Weights, bias: Array, scale_in: float) -> tuple[Weights, Array]:
    """Bias as int32 on s_in * s_w. A channel whose bias would not fit gets coarser weights (they are all but zero)."""
    least = np.abs(bias.astype(np.float64)) / (scale_in * 2.0**30)
    scale = np.maximum(weights.scale, least)
    values = weights.values
    if np.any(scale > weights.scale):
        ratio = (weights.scale / scale).reshape(-1, *[1] * (values.ndim - 1))
        values = np.rint(values * ratio).astype(np.int64)
    return Weights(values, scale), np.rint(bias / (scale_in * scale)).astype(np.int32)


def four_bits(weights: Weights | None) -> bool:
    """Whether every weight fits in 4 bits, as those of a layer do whose channels are all planned at 4 bits or fewer."""
    return weights is not None and weights.values.min(initial=0) >= -8 and weights.values.max(initial=0) <= 7


def weight_tensors(
    e: Emitter,
    name: str,
    x: Value,
    real: Array,
    weights: Weights | None,
    bias: Array | None,
    order: Sequence[int],
    *,
    int4: bool = False,
) -> list[int]:
    """Weight and bias constants. `real` or `weights` is output channel first, and is stored transposed by `order`."""
    count = (real if weights is None else weights.values).shape[0]
    bias = np.zeros(count, np.float32) if bias is None else bias.reshape(-1)
    if weights is None or x.grid is None:
        return [e.float_weight(f"{name}/weight", real.transpose(order)), e.float_weight(f"{name}/bias", bias)]
    weights, steps = integer_bias(weights, bias, x.grid.scale)
    axis = list(order).index(0)
    values = weights.values.transpose(order).astype(np.int8)
    return [
        e.flat.constant(f"{name}/weight", values, weights.scale, axis=axis, int4=int4),
        e.flat.constant(f"{name}/bias", steps, weights.scale * x.grid.scale),
    ]


# windows


@dataclass(frozen=True)
class Window:
    """A sliding window over H and W: pads before and after what the input has."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    before: tuple[int, int]
    after: tuple[int, int]
    size: tuple[int, int]  # of the input
    out: tuple[int, int]

    @property
    def spans(self) -> tuple[int, int]:
        """Kernel extents with dilation."""
        return (_span(self.kernel[0], self.dilation[0]), _span(self.kernel[1], self.dilation[1]))

    @property
    def style(self) -> str | None:
        """VALID or SAME when TFLite's own padding is this one; None when the input must be padded first."""
        if self.before == (0, 0) and self.needed_after == (0, 0):
            return "VALID"
        for d in range(2):
            total = max((self.out[d] - 1) * self.stride[d] + self.spans[d] - self.size[d], 0)
            if self.out[d] != math.ceil(self.size[d] / self.stride[d]) or self.before[d] != total // 2:
                return None
        return "SAME"

    @property
    def needed_after(self) -> tuple[int, int]:
        """Padding at the end that the last window really reaches."""
        reach = [(self.out[d] - 1) * self.stride[d] + self.spans[d] - self.before[d] - self.size[d] for d in range(2)]
        return (max(reach[0], 0), max(reach[1], 0))

    def taps(self, *, padded: bool) -> Array:
        """How many kernel positions lie inside the input (or the declared padding too), per output [H, W]."""
        counts = []
        for d in range(2):
            starts = np.arange(self.out[d]) * self.stride[d] - self.before[d]
            places = starts[:, None] + np.arange(self.kernel[d]) * self.dilation[d]
            low, high = (-self.before[d], self.size[d] + self.after[d]) if padded else (0, self.size[d])
            counts.append(((places >= low) & (places < high)).sum(1))
        return np.outer(counts[0], counts[1])


def _span(kernel: int, dilation: int) -> int:
    return (kernel - 1) * dilation + 1


def window(e: Emitter, node: Node, kernel: Sequence[int]) -> Window:
    """The window of a convolution or pooling node on [N, C, H, W]."""
    size, out = e.graph.shapes[node.inputs[0]][2:], e.graph.shapes[node.outputs[0]][2:]
    if len(size) != 2:
        raise UnsupportedGraph(
            f"the input has {len(size)} spatial axes", where=str(node), fix="use the 2-D form on [N, C, H, W]"
        )
    stride, dilation = (tuple(node.attrs.get(key) or (1, 1)) for key in ("strides", "dilations"))
    pads = list(node.attrs.get("pads") or (0, 0, 0, 0))
    auto = node.attrs.get("auto_pad", "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        for d in range(2):
            total = max((out[d] - 1) * stride[d] + _span(kernel[d], dilation[d]) - size[d], 0)
            pads[d] = total // 2 if auto == "SAME_UPPER" else total - total // 2
            pads[d + 2] = total - pads[d]
    elif auto == "VALID":
        pads = [0, 0, 0, 0]
    return Window(
        (kernel[0], kernel[1]),
        (stride[0], stride[1]),
        (dilation[0], dilation[1]),
        (pads[0], pads[1]),
        (pads[2], pads[3]),
        (size[0], size[1]),
        (out[0], out[1]),
    )


def pad(e: Emitter, x: Value, before: Sequence[int] | Array, after: Sequence[int] | Array, value: float = 0.0) -> Value:
    """Constant padding of the spatial axes of an NHWC value; the fill is rounded to the value's grid."""
    if not (any(before) or any(after)):
        return x
    amounts = np.array([[0, 0], [before[0], after[0]], [before[1], after[1]], [0, 0]])
    shape = [
        x.shape[0],
        x.shape[1],
        x.shape[2] + int(before[0] + after[0]),
        x.shape[3] + int(before[1] + after[1]),
    ]
    inputs = [x.index, e.ints("pads", amounts)]
    if value == 0.0:  # PAD fills with 0, on a grid with its zero point
        return e.emit("PAD", inputs, x, "padded", shape=shape, grid=x.grid, options=schema.PadOptionsT())
    inputs.append(e.on_grid("fill", np.array([max(value, float(np.finfo(np.float32).min))]), x.grid))
    return e.emit("PADV2", inputs, x, "padded", shape=shape, grid=x.grid, options=schema.PadV2OptionsT())


def padded(e: Emitter, x: Value, frame: Window, fill: float = 0.0) -> tuple[Value, int]:
    """The input with explicit padding where TFLite has no name for it, and the Padding option to use."""
    if frame.style is not None:
        return x, int(getattr(schema.Padding, frame.style))
    return pad(e, x, frame.before, frame.needed_after, fill), int(schema.Padding.VALID)


# convolutions


def conv(e: Emitter, node: Node) -> None:
    """Conv: CONV_2D (grouped: fewer channels in the filter than in the input) or DEPTHWISE_CONV_2D."""
    if node.inputs[1] not in e.graph.consts:
        e.const(node, 1, "weight")
    x = e.nhwc(e.read(node), node)
    real = e.graph.consts[node.inputs[1]]
    weights = stored_weights(e, node, 0) if x.grid is not None else None
    frame = window(e, node, real.shape[2:])
    x, style = padded(e, x, frame)
    bias = e.const(node, 2, "bias")
    shape = e.graph.shapes[node.outputs[0]]
    made = convolve(e, node.outputs[0], x, real, weights, bias, frame, style, shape, e.grid(node), node)
    e.finish(node, made)


def convolve(
    e: Emitter,
    name: str,
    x: Value,
    real: Array,
    weights: Weights | None,
    bias: Array | None,
    frame: Window,
    style: int,
    shape: Sequence[int],
    grid: Grid | None,
    node: Node,
) -> Value:
    """One convolution of an NHWC value; weights [O, I / group, kh, kw] as in ONNX."""
    channels, groups = x.shape[1], x.shape[1] // real.shape[1]
    depthwise = groups == channels and (groups > 1 or real.shape[0] == 1)
    shared: dict[str, Any] = {
        "padding": style,
        "strideH": frame.stride[0],
        "strideW": frame.stride[1],
        "dilationHFactor": frame.dilation[0],
        "dilationWFactor": frame.dilation[1],
        "fusedActivationFunction": activation(node.clip),
    }
    if depthwise:
        options: Any = schema.DepthwiseConv2DOptionsT(**shared, depthMultiplier=real.shape[0] // channels)
        code, order = "DEPTHWISE_CONV_2D", (1, 2, 3, 0)
        version = 2 if x.grid is None and frame.dilation != (1, 1) else None
    else:
        options, code, order = schema.Conv2DOptionsT(**shared), "CONV_2D", (0, 2, 3, 1)
        version = 6 if groups > 1 else None
    # XNNPACK refuses them and LiteRT's own kernels, which run them, are slower: only where they were asked for. Its
    # reference kernels have no depthwise one.
    int4 = e.weights == "int4" and x.grid is not None and not depthwise and four_bits(weights)
    constants = weight_tensors(e, name, x, real, weights, bias, order, int4=int4)
    return e.emit(
        code,
        [x.index, *constants],
        x,
        name,
        shape=shape,
        perm=NHWC,
        grid=grid,
        options=options,
        version=7 if int4 else version,
    )


def conv_transpose(e: Emitter, node: Node) -> None:
    """ConvTranspose: TRANSPOSE_CONV of the full extent, cut to ONNX's pads; groups one by one."""
    e.const(node, 1, "weight")
    x = e.nhwc(e.read(node), node)
    real, bias = e.graph.consts[node.inputs[1]], e.const(node, 2, "bias")
    groups = int(node.attrs.get("group", 1))
    per_in, per_out = x.shape[1] // groups, real.shape[1]
    kernel = real.shape[2:]
    stride, dilation = (tuple(node.attrs.get(key) or (1, 1)) for key in ("strides", "dilations"))
    out, size = e.graph.shapes[node.outputs[0]], x.shape[2:]
    spans = [_span(kernel[d], dilation[d]) for d in range(2)]
    full = [(size[d] - 1) * stride[d] + spans[d] for d in range(2)]
    extra = list(node.attrs.get("output_padding") or (0, 0))
    auto = node.attrs.get("auto_pad", "NOTSET")
    pads = list(node.attrs.get("pads") or (0, 0, 0, 0))
    for d in range(2):
        total = max(full[d] + extra[d] - out[2 + d], 0)
        if auto in ("SAME_UPPER", "SAME_LOWER") or node.attrs.get("output_shape"):
            pads[d] = total // 2 if auto == "SAME_UPPER" else total - total // 2
        elif auto == "VALID":
            pads[d] = 0
    # Without a clamp before the cut: the activation acts on each element alone.
    parts = []
    for g in range(groups):
        part = x
        if groups > 1:
            part = slice_nhwc(e, x, (0, 0, 0, g * per_in), (x.shape[0], *size, per_in))
        kernel_part = np.zeros((per_out, per_in, *spans), np.float32)
        chosen = slice(g * per_in, (g + 1) * per_in)
        kernel_part[:, :, :: dilation[0], :: dilation[1]] = real[chosen].transpose(1, 0, 2, 3)
        weights = None
        if x.grid is not None:
            held = e.graph.stored[node.inputs[1]]
            values = np.zeros(kernel_part.shape, np.int64)
            values[:, :, :: dilation[0], :: dilation[1]] = held.values[chosen].transpose(1, 0, 2, 3)
            if np.any(held.zero_point != 0) or (held.scale.size > 1 and held.axis != 1):
                raise UnsupportedGraph(
                    "its weights must be symmetric, per tensor or along axis 1",
                    where=str(node),
                    fix="quantise them so",
                )
            weights = Weights(values, np.broadcast_to(held.scale, per_out).copy())
        bias_part = None if bias is None else bias[g * per_out : (g + 1) * per_out]
        weight, steps = weight_tensors(e, f"{node.outputs[0]}/{g}", part, kernel_part, weights, bias_part, (0, 2, 3, 1))
        sizes = e.ints("shape", [x.shape[0], *full, per_out])
        e.free_batch = False  # TRANSPOSE_CONV spells its output shape, batch included
        options = schema.TransposeConvOptionsT(
            padding=schema.Padding.VALID, strideH=stride[0], strideW=stride[1], fusedActivationFunction=0
        )
        inputs = [sizes, weight, part.index, steps]
        shape = (x.shape[0], per_out, *full)
        parts.append(e.emit("TRANSPOSE_CONV", inputs, x, "upsampled", shape=shape, grid=e.grid(node), options=options))
    made = parts[0]
    if groups > 1:
        options = schema.ConcatenationOptionsT(axis=3, fusedActivationFunction=0)
        shape = (x.shape[0], per_out * groups, *full)
        made = e.emit(
            "CONCATENATION", [p.index for p in parts], x, "joined", shape=shape, grid=e.grid(node), options=options
        )
    # Output beyond the full extent (output_padding) holds the bias alone: widen with zero input instead of guessing.
    short = [max(pads[d] + out[2 + d] - full[d], 0) for d in range(2)]
    if any(short):
        made = _beyond(e, node, made, bias, short)
    if made.shape != out:
        begin = (0, pads[0], pads[1], 0)
        made = slice_nhwc(e, made, begin, (out[0], out[2], out[3], out[1]))
    e.finish(node, e.clamp(made, node.clip))


def _beyond(e: Emitter, node: Node, made: Value, bias: Array | None, short: Sequence[int]) -> Value:
    """Rows and columns after the full extent: no input reaches them, they are the bias."""
    if bias is None or not np.any(bias):
        return pad(e, made, (0, 0), short)
    for d in range(2):
        if not short[d]:
            continue
        shape = list(made.shape)
        shape[2 + d] = short[d]
        fill = np.broadcast_to(bias.reshape(1, 1, 1, -1), [shape[a] for a in NHWC])
        piece = e.on_grid("bias_only", np.ascontiguousarray(fill), made.grid)
        shape[2 + d] = made.shape[2 + d] + short[d]
        options = schema.ConcatenationOptionsT(axis=1 + d, fusedActivationFunction=0)
        made = e.emit(
            "CONCATENATION", [made.index, piece], made, "widened", shape=shape, grid=made.grid, options=options
        )
    return made


def slice_nhwc(e: Emitter, x: Value, begin: Sequence[int], size: Sequence[int]) -> Value:
    """A box of an NHWC value; begin and size in stored order."""
    sizes = [
        -1 if i == 0 and b == 0 and n == x.shape[0] else n for i, (b, n) in enumerate(zip(begin, size, strict=True))
    ]
    shape = (size[0], size[3], size[1], size[2])
    inputs = [x.index, e.ints("begin", list(begin)), e.ints("size", sizes)]
    return e.emit("SLICE", inputs, x, "sliced", shape=shape, grid=x.grid, options=schema.SliceOptionsT())


# linear layers


def linear(e: Emitter, node: Node) -> None:
    """Gemm and MatMul with constant weights: FULLY_CONNECTED; MatMul of two activations: BATCH_MATMUL."""
    plain = node.inputs[1] in e.graph.consts and e.graph.consts[node.inputs[1]].ndim == 2
    if node.op == "MatMul" and not plain:
        _matmul(e, node)
        return
    e.const(node, 1, "weight")
    real = e.graph.consts[node.inputs[1]]
    alpha, beta = float(node.attrs.get("alpha", 1.0)), float(node.attrs.get("beta", 1.0))
    x = e.read(node)
    if real.ndim != 2:
        raise UnsupportedGraph(f"its weights have {real.ndim} axes", where=str(node), fix="use a 2-D weight")
    if node.attrs.get("transA"):
        x = e.plain(x)
        x = replace(x, shape=x.shape[::-1], perm=(1, 0))
    axis = 0 if node.attrs.get("transB") else 1
    real = np.moveaxis(real, axis, 0) * np.float32(alpha)
    weights = stored_weights(e, node, axis) if x.grid is not None else None
    if weights is not None and alpha != 1.0:
        weights = Weights(weights.values, weights.scale * alpha)
    bias = e.const(node, 2, "bias")
    shape = e.graph.shapes[node.outputs[0]]
    rest: Array | None = None
    if bias is not None:
        bias = bias * np.float32(beta)
        if bias.size == 1:
            bias = np.full(shape[-1], bias.reshape(()), np.float32)
        elif bias.size != shape[-1] or bias.shape[-1] != shape[-1]:
            bias, rest = None, bias  # a bias that differs between rows is an addition of its own
    if rest is not None and x.grid is not None:
        raise UnsupportedGraph("its bias differs between rows", where=str(node), fix="use one bias per output")
    if x.columns is not None:
        real = real[:, x.columns]
        weights = None if weights is None else Weights(weights.values[:, x.columns], weights.scale)
        x = replace(x, columns=None)
    if x.perm[-1] != len(x.shape) - 1:
        x = e.plain(x)
    clip = node.clip if rest is None else None
    by_channel = weights is not None and len(set(weights.scale.tolist())) > 1
    int4 = four_bits(weights) and x.shape[-1] % 2 == 0  # XNNPACK and LiteRT's own kernels run these; of odd rows, none
    if weights is not None and by_channel and not int4:
        made = _pointwise(e, node, x, weights, bias, shape)
    else:
        options = schema.FullyConnectedOptionsT(fusedActivationFunction=activation(clip), keepNumDims=len(shape) != 2)
        constants = weight_tensors(e, node.outputs[0], x, real, weights, bias, (0, 1), int4=int4)
        version = (12 if by_channel else 10) if int4 else 5 if len(shape) != 2 else None
        made = e.emit(
            "FULLY_CONNECTED", [x.index, *constants], x, node.outputs[0],
            shape=shape, perm=x.perm, grid=e.grid(node), options=options, version=version,
        )  # fmt: skip
    if rest is not None:
        added = schema.AddOptionsT(fusedActivationFunction=activation(node.clip))
        made = e.emit("ADD", [made.index, e.floats("bias", rest)], made, node.outputs[0], options=added)
    e.finish(node, made)


def _pointwise(e: Emitter, node: Node, x: Value, weights: Weights, bias: Array | None, shape: Sequence[int]) -> Value:
    """An integer linear layer with per-channel scales as a 1x1 CONV_2D: the same sum, on every runtime.

    FULLY_CONNECTED learned per-channel weights in version 12 (2023); tflite-runtime 2.14 and older phones refuse it.
    """
    rows, width = math.prod(x.shape[1:-1]), x.shape[-1]
    image = e.reshape(x, (x.shape[0], width, 1, rows), NHWC)
    one = Window((1, 1), (1, 1), (1, 1), (0, 0), (0, 0), (1, rows), (1, rows))
    values = weights.values.reshape(*weights.values.shape, 1, 1)
    made = convolve(
        e, node.outputs[0], image, values, Weights(values, weights.scale), bias, one, int(schema.Padding.VALID),
        (x.shape[0], shape[-1], 1, rows), e.grid(node), node,
    )  # fmt: skip
    return e.reshape(made, shape, x.perm)


def _matmul(e: Emitter, node: Node) -> None:
    sides, vectors = [], []
    for position, name in enumerate(node.inputs[:2]):
        if e.is_activation(name):
            value = e.plain(e.read(node, position))
            vectors.append(len(value.shape) == 1)
            if vectors[-1]:
                value = e.reshape(value, (1, *value.shape) if position == 0 else (*value.shape, 1), (0, 1))
            index = value.index
        else:
            held = e.graph.stored.get(name)
            if e.grid(node) is not None and (held is None or held.scale.size > 1):
                raise UnsupportedGraph("its constant has no int8 scale", where=str(node), fix="quantise it per tensor")
            grid = None
            if e.grid(node) is not None and held is not None:
                grid = Grid(float(held.scale.reshape(())), int(held.zero_point.reshape(())))
            real = e.graph.consts[name]
            vectors.append(real.ndim == 1)
            if vectors[-1]:
                real = real[None] if position == 0 else real[:, None]
            index = e.on_grid(name, real, grid)
        sides.append(index)
    like = e.raw(next(name for name in node.inputs if e.is_activation(name)))
    shape = e.graph.shapes[node.outputs[0]]
    whole = list(shape)  # a vector on the left is a row, on the right a column, and the result has neither's axis
    if vectors[1]:
        whole.append(1)
    if vectors[0]:
        whole.insert(len(whole) - 1, 1)
    options = schema.BatchMatMulOptionsT()
    made = e.emit(
        "BATCH_MATMUL", sides, like, node.outputs[0],
        shape=whole, perm=range(len(whole)), grid=e.grid(node), options=options,
    )  # fmt: skip
    made = e.reshape(made, shape, range(len(shape))) if any(vectors) else made
    e.finish(node, e.clamp(made, node.clip))


CONV_WRITERS: Final[Mapping[str, Any]] = {
    "Conv": conv,
    "ConvTranspose": conv_transpose,
    "Gemm": linear,
    "MatMul": linear,
}
