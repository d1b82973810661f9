"""What every operator's writer needs: values with their layout and grid, conversions between them, constants.

Layout is lazy. A `Value` remembers in which order its ONNX axes are stored, so an ONNX Transpose costs nothing until an
operator insists on another order; images stay NHWC from the input to the output. A flattened image remembers how its
columns are permuted, and the linear layer that reads it permutes its weights instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from numpy.typing import NDArray

from xedge.errors import UnsupportedGraph

from .tflite_fuse import FUSED
from .tflite_graph import Graph, Grid, Node
from .tflite_write import FlatModel

Array = NDArray[Any]

NHWC: Final = (0, 2, 3, 1)

WeightForm = Literal["float16", "int4"] | None
"""How weights lie in the file, where that is a choice. ``float16``: those of float layers. ``int4``: all that fit in 4
bits and that LiteRT has a kernel for; None: only those that its fast kernels (XNNPACK) take."""


@dataclass(frozen=True)
class Value:
    """An activation that has been written.

    Attributes:
        index: the tensor in the flatbuffer.
        shape: in ONNX order.
        perm: stored axis i is ONNX axis perm[i].
        grid: its int8 grid, None for float32.
        columns: of a flattened image [N, K]: stored column k is ONNX column columns[k].
    """

    index: int
    shape: tuple[int, ...]
    perm: tuple[int, ...]
    grid: Grid | None = None
    columns: Array | None = None

    @property
    def stored(self) -> tuple[int, ...]:
        """The shape in stored order."""
        return tuple(self.shape[axis] for axis in self.perm)

    def axis(self, axis: int) -> int:
        """The stored position of an ONNX axis."""
        return self.perm.index(axis % len(self.shape))


class Emitter:
    """Writes one graph into one FlatModel, node by node."""

    def __init__(self, graph: Graph, weights: WeightForm = None) -> None:
        self.graph = graph
        self.weights = weights
        self.flat = FlatModel()
        self.flat.half = weights == "float16"
        self.free_batch = True  # False once an operator's constants spell the batch
        self._values: dict[str, Value] = {}
        self._floats: dict[int, Value] = {}
        self._reshaped: dict[int, Value] = {}
        self._names: dict[str, int] = {}

    # values

    def start(self, name: str) -> Value:
        """A graph input: NHWC when it is an image, in ONNX order otherwise."""
        shape = self.graph.shapes[name]
        value = self.new(name, shape, preferred(shape), self.graph.grids.get(name))
        self._values[name] = value
        return value

    def new(self, name: str, shape: Sequence[int], perm: Sequence[int], grid: Grid | None) -> Value:
        """A fresh activation tensor; a name that is taken gets a number."""
        count = self._names[name] = self._names.get(name, 0) + 1
        unique = name if count == 1 else f"{name}/{count - 1}"
        stored = [shape[axis] for axis in perm]
        scale, zero = (None, 0) if grid is None else (grid.scale, grid.zero_point)
        return Value(self.flat.tensor(unique, stored, scale, zero), tuple(shape), tuple(perm), grid)

    def emit(
        self,
        code: str,
        inputs: Sequence[int],
        like: Value,
        name: str,
        *,
        shape: Sequence[int] | None = None,
        perm: Sequence[int] | None = None,
        grid: Grid | None = None,
        options: Any = None,
        version: int | None = None,
    ) -> Value:
        """Write an operator with one output, which has `like`'s shape and order unless given; `grid` None is float."""
        made = self.new(name, like.shape if shape is None else shape, like.perm if perm is None else perm, grid)
        self.flat.operator(code, inputs, [made.index], options, version)
        return made

    def is_activation(self, name: str) -> bool:
        return name in self._values

    def raw(self, name: str) -> Value:
        """The value as written, for operators that only look at it."""
        return self._values[name]

    def read(self, node: Node, position: int = 0) -> Value:
        """An input in the form `node` computes in: on its grid when the node is integer, float32 otherwise."""
        name = node.inputs[position]
        if name not in self._values:
            raise UnsupportedGraph(
                f"input {position} must be an activation", where=str(node), fix="fold constants before converting"
            )
        value = self._values[name]
        return value if self.integer(node) else self.on(value, None)

    def finish(self, node: Node, value: Value, position: int = 0) -> None:
        """Name the result of `node`, on the grid that the graph wants for it."""
        name = node.outputs[position]
        self._values[name] = self.on(value, self.graph.grids.get(name), name)

    def grid(self, node: Node, position: int = 0) -> Grid | None:
        """The grid of an output, or None when the node computes in float."""
        return self.graph.grids.get(node.outputs[position]) if self.integer(node) else None

    def integer(self, node: Node) -> bool:
        """True when every activation that the node reads or writes has a grid, and its weights are integers."""
        if any(name not in self.graph.grids for name in node.outputs):
            return False
        if node.op in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            weight = node.inputs[1]
            if weight in self.graph.consts and weight not in self.graph.stored:
                return False
        return all(self._values[name].grid is not None for name in node.inputs if name in self._values)

    # grids

    def on(self, value: Value, grid: Grid | None, name: str | None = None) -> Value:
        """`value` on another grid (QUANTIZE), or as float32 (DEQUANTIZE, written once per tensor)."""
        if value.grid == grid:
            return value
        if grid is not None:
            made = self.emit("QUANTIZE", [value.index], value, name or "requantized", grid=grid)
            return replace(made, columns=value.columns)
        if value.index not in self._floats:
            made = self.emit("DEQUANTIZE", [value.index], value, name or "dequantized")
            self._floats[value.index] = replace(made, columns=value.columns)
        return self._floats[value.index]

    # layout

    def layout(self, value: Value, perm: Sequence[int]) -> Value:
        """`value` stored in the order `perm`: nothing, a RESHAPE when only axes of size 1 move, or a TRANSPOSE."""
        value, perm = self.in_order(value), tuple(perm)
        if value.perm == perm:
            return value
        if [a for a in value.perm if value.shape[a] != 1] == [a for a in perm if value.shape[a] != 1]:
            return self.reshape(value, value.shape, perm)
        moves = self.ints("perm", [value.perm.index(axis) for axis in perm])
        version = {5: 4, 6: 6}.get(len(perm))
        return self.emit(
            "TRANSPOSE", [value.index, moves], value, "transposed", perm=perm, grid=value.grid, version=version
        )

    def nhwc(self, value: Value, node: Node) -> Value:
        if len(value.shape) != 4:
            raise UnsupportedGraph(
                f"the input has {len(value.shape)} axes", where=str(node), fix="use the 2-D form on [N, C, H, W]"
            )
        return self.layout(value, NHWC)

    def plain(self, value: Value) -> Value:
        """Stored in ONNX order."""
        return self.layout(value, range(len(value.shape)))

    def in_order(self, value: Value) -> Value:
        """Columns of a flattened image put into ONNX order (GATHER), for a reader that cannot permute weights."""
        if value.columns is None:
            return value
        return self.take(replace(value, columns=None), 1, np.argsort(value.columns))

    def take(self, value: Value, axis: int, index: Array) -> Value:
        """Positions `index` along an ONNX axis."""
        shape = list(value.shape)
        shape[axis] = len(index)
        options = schema.GatherOptionsT(axis=value.axis(axis))
        inputs = [value.index, self.ints("index", index)]
        return self.emit("GATHER", inputs, value, "gathered", shape=shape, grid=value.grid, options=options)

    def reshape(self, value: Value, shape: Sequence[int], perm: Sequence[int]) -> Value:
        """RESHAPE of the stored elements to ONNX `shape` in order `perm`. A chain of them becomes one, or none.

        The batch stays open (-1) where it is in front before and after.
        """
        source = self._reshaped.get(value.index, value)
        sizes = [shape[axis] for axis in perm]
        if list(source.stored) == sizes:
            return replace(source, shape=tuple(shape), perm=tuple(perm), columns=None)
        if source.perm[:1] == tuple(perm[:1]) == (0,) and source.shape[0] == shape[0] and 0 not in shape:
            sizes[0] = -1
        else:
            self.free_batch = False
        inputs, options = [source.index, self.ints("shape", sizes)], schema.ReshapeOptionsT(newShape=sizes)
        made = self.emit("RESHAPE", inputs, value, "reshaped", shape=shape, perm=perm, grid=value.grid, options=options)
        self._reshaped[made.index] = source
        return made

    # constants

    def ints(self, name: str, values: Sequence[int] | Array) -> int:
        return self.flat.constant(name, np.asarray(values, np.int32))

    def floats(self, name: str, values: Array) -> int:
        return self.flat.constant(name, np.asarray(values, np.float32))

    def float_weight(self, name: str, values: Array) -> int:
        """A weight or bias of a float layer: float32, or float16 behind a DEQUANTIZE, which XNNPACK folds."""
        if self.weights != "float16":
            return self.floats(name, values)
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if not np.isfinite(half).all():
            raise UnsupportedGraph("its values exceed float16", where=name, fix="write it without --weights float16")
        stored, whole = self.flat.constant(f"{name}/float16", half), self.flat.tensor(name, values.shape)
        self.flat.operator("DEQUANTIZE", [stored], [whole], version=3)
        return whole

    def on_grid(self, name: str, values: Array, grid: Grid | None) -> int:
        """A constant operand of an elementwise operator, rounded to `grid` (None: float32)."""
        if grid is None:
            return self.floats(name, values)
        return self.flat.constant(name, grid.quantize(values), np.array([grid.scale]), np.array([grid.zero_point]))

    def const(self, node: Node, position: int, what: str) -> Array | None:
        """The float value of a constant input; None when it is absent."""
        if len(node.inputs) <= position or not node.inputs[position]:
            return None
        if node.inputs[position] not in self.graph.consts:
            raise UnsupportedGraph(
                f"its {what} is computed while it runs", where=str(node), fix=f"make the {what} a constant"
            )
        return self.graph.consts[node.inputs[position]]

    # clamping

    def clamp(self, value: Value, clip: tuple[float, float] | None) -> Value:
        """Values limited to [low, high]: MAXIMUM and MINIMUM with constants, where the grid alone does not do it."""
        low, high = clip or (-math.inf, math.inf)
        if value.grid is not None and value.grid.within(low, high):
            return value
        if (low, high) in FUSED and FUSED[low, high] != "NONE":
            return self.emit(FUSED[low, high], [value.index], value, "clamped", grid=value.grid)
        for code, bound in (("MAXIMUM", low), ("MINIMUM", high)):
            if math.isfinite(bound):
                limit = self.on_grid("bound", np.full([1] * len(value.shape), bound), value.grid)
                options = schema.MaximumMinimumOptionsT()
                value = self.emit(code, [value.index, limit], value, "clamped", grid=value.grid, options=options)
        return value


def preferred(shape: Sequence[int]) -> tuple[int, ...]:
    """The order in which a graph input or output is stored: NHWC for images."""
    return NHWC if len(shape) == 4 else tuple(range(len(shape)))


def activation(clip: tuple[float, float] | None) -> int:
    """The ActivationFunctionType for a fused clamp; NONE for one that the output's grid does by saturating."""
    name = FUSED.get(clip, "NONE") if clip else "NONE"
    return int(getattr(schema.ActivationFunctionType, name))
