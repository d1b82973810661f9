"""The flatbuffer: tensors, buffers and operators in, the bytes of a .tflite file out.

Written with the schema classes that ship in ai-edge-litert (`schema_py_generated`, object API). Nothing here knows
about ONNX. Operator versions follow TFLite's op_version.cc: a runtime refuses a version it does not know, so each
operator carries the lowest one that its types need.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import flatbuffers  # type: ignore[import-untyped]
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from numpy.typing import NDArray

Array = NDArray[Any]

# (float, int8) versions where they are not (1, 1).
_VERSIONS: Final[Mapping[str, tuple[int, int]]] = {
    "ADD": (1, 2),
    "AVERAGE_POOL_2D": (1, 2),
    "BATCH_MATMUL": (1, 2),
    "CONCATENATION": (1, 2),
    "CONV_2D": (1, 3),
    "DEPTH_TO_SPACE": (1, 1),
    "DEPTHWISE_CONV_2D": (1, 3),
    "DEQUANTIZE": (1, 2),
    "FULLY_CONNECTED": (1, 5),
    "GATHER": (1, 2),
    "LEAKY_RELU": (1, 2),
    "LOGISTIC": (1, 2),
    "MAXIMUM": (1, 2),
    "MAX_POOL_2D": (1, 2),
    "MEAN": (1, 2),
    "MINIMUM": (1, 2),
    "MIRROR_PAD": (1, 2),
    "MUL": (1, 2),
    "PAD": (1, 2),
    "PADV2": (1, 2),
    "QUANTIZE": (1, 2),
    "REDUCE_MAX": (1, 2),
    "RELU": (1, 2),
    "RELU6": (1, 2),
    "RESIZE_BILINEAR": (1, 2),
    "RESIZE_NEAREST_NEIGHBOR": (1, 2),
    "SLICE": (1, 2),
    "SOFTMAX": (1, 2),
    "SPACE_TO_DEPTH": (1, 2),
    "STRIDED_SLICE": (1, 2),
    "SUB": (1, 2),
    "TANH": (1, 2),
    "TRANSPOSE": (1, 2),
    "TRANSPOSE_CONV": (3, 3),
}

_TYPES: Final[Mapping[str, int]] = {
    "float32": schema.TensorType.FLOAT32,
    "float16": schema.TensorType.FLOAT16,
    "int4": schema.TensorType.INT4,
    "int8": schema.TensorType.INT8,
    "int32": schema.TensorType.INT32,
}


class _AlignedBuffer(schema.BufferT):  # type: ignore[misc]
    """Data on 16 bytes, as the schema's `force_align: 16` asks and the generated packer does not do."""

    def Pack(self, builder: Any) -> int:  # noqa: N802  the generated name
        if self.data is not None:
            builder.Prep(16, len(self.data))
        return int(super().Pack(builder))


class FlatModel:
    """One subgraph under construction. Tensors are referred to by index."""

    def __init__(self) -> None:
        self._tensors: list[Any] = []
        self._buffers: list[Any] = [schema.BufferT()]  # buffer 0 means "no data"
        self._operators: list[Any] = []
        self._codes: dict[tuple[str, int], int] = {}
        self._constants: dict[tuple[object, ...], int] = {}
        self.half = False  # whether float kernels may compute in float16

    def tensor(self, name: str, shape: Sequence[int], scale: float | None = None, zero_point: int = 0) -> int:
        """An activation: float32, or int8 on the grid scale * (q - zero_point)."""
        made = schema.TensorT()
        made.name, made.shape = name, [int(n) for n in shape]
        made.type = _TYPES["float32" if scale is None else "int8"]
        if scale is not None:
            made.quantization = _quantization(np.array([scale]), np.array([zero_point]), 0)
        self._tensors.append(made)
        return len(self._tensors) - 1

    def constant(
        self,
        name: str,
        data: Array,
        scale: Array | None = None,
        zero_point: Array | None = None,
        axis: int = 0,
        *,
        int4: bool = False,
    ) -> int:
        """A constant of float32, float16, int32, int8, or int8 values in -8..7 stored as int4; equal ones (data, type
        and scales) are stored once."""
        data = np.ascontiguousarray(data)
        kind = "int4" if int4 else data.dtype.name
        grid = tuple(None if a is None else a.tobytes() for a in (scale, zero_point))
        key = (data.tobytes(), data.shape, kind, axis, grid)
        if key in self._constants:
            return self._constants[key]
        made = schema.TensorT()
        made.name, made.shape, made.type = name, [int(n) for n in data.shape], _TYPES[kind]
        if scale is not None:
            points = np.zeros(scale.size, np.int64) if zero_point is None else zero_point
            made.quantization = _quantization(scale, points, axis)
        buffer = _AlignedBuffer()
        stored = nibbles(data) if int4 else data.astype(data.dtype.newbyteorder("<"))
        buffer.data = np.frombuffer(stored.tobytes(), np.uint8)
        self._buffers.append(buffer)
        made.buffer = len(self._buffers) - 1
        self._tensors.append(made)
        self._constants[key] = len(self._tensors) - 1
        return len(self._tensors) - 1

    def operator(
        self, code: str, inputs: Sequence[int], outputs: Sequence[int], options: Any = None, version: int | None = None
    ) -> None:
        """Append one builtin operator; `options` is an object-API options class, e.g. Conv2DOptionsT."""
        if version is None:
            int8 = any(i >= 0 and self._tensors[i].type == _TYPES["int8"] for i in (*inputs, *outputs))
            version = _VERSIONS.get(code, (1, 1))[int8]
        made = schema.OperatorT()
        made.opcodeIndex = self._codes.setdefault((code, version), len(self._codes))
        made.inputs, made.outputs = list(inputs), list(outputs)
        if options is not None:
            made.builtinOptions = options
            made.builtinOptionsType = getattr(schema.BuiltinOptions, type(options).__name__.removesuffix("T"))
        self._operators.append(made)

    def pack(
        self, inputs: Mapping[str, int], outputs: Mapping[str, int], name: str, *, free_batch: bool = True
    ) -> bytes:
        """The file. `inputs` and `outputs` map signature names to tensors; `free_batch` marks axis 0 as resizable."""
        moved = self._sweep({*inputs.values(), *outputs.values()})
        inputs = {key: moved[index] for key, index in inputs.items()}
        outputs = {key: moved[index] for key, index in outputs.items()}
        graph = schema.SubGraphT()
        graph.name, graph.tensors, graph.operators = name, self._tensors, self._operators
        graph.inputs, graph.outputs = list(inputs.values()), list(outputs.values())
        if free_batch:
            for index in inputs.values():
                self._tensors[index].shapeSignature = [-1, *self._tensors[index].shape[1:]]
        signature = schema.SignatureDefT()
        signature.signatureKey = "serving_default"
        signature.inputs, signature.outputs = _maps(inputs), _maps(outputs)
        model = schema.ModelT()
        model.version, model.description = 3, "xedge"
        model.operatorCodes = [_code(code, version) for code, version in self._codes]
        model.subgraphs, model.buffers, model.signatureDefs = [graph], self._buffers, [signature]
        if self.half:
            model.metadata = [self._half()]
        builder = flatbuffers.Builder(1 << 20)
        builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
        return bytes(builder.Output())

    def _half(self) -> Any:
        """The mark by which XNNPACK computes in float16 where the processor does (reduced_precision_metadata.h)."""
        buffer, made = _AlignedBuffer(), schema.MetadataT()
        buffer.data = np.frombuffer(b"fp16accfp16", np.uint8)
        self._buffers.append(buffer)
        made.name, made.buffer = "reduced_precision_support", len(self._buffers) - 1
        return made

    def _sweep(self, roots: set[int]) -> dict[int, int]:
        """Drop operators that nothing reads, and what only they used. Returns old tensor indices -> new ones."""
        live, kept = set(roots), []
        for made in reversed(self._operators):
            if live.intersection(made.outputs):
                live.update(i for i in made.inputs if i >= 0)
                kept.append(made)
        self._operators = kept[::-1]
        moved = {old: new for new, old in enumerate(sorted(live))}
        self._tensors = [self._tensors[old] for old in sorted(live)]
        buffers, codes = [self._buffers[0]], dict[tuple[str, int], int]()
        for tensor in self._tensors:
            if tensor.buffer:
                buffers.append(self._buffers[tensor.buffer])
                tensor.buffer = len(buffers) - 1
        names = list(self._codes)
        for made in self._operators:
            made.opcodeIndex = codes.setdefault(names[made.opcodeIndex], len(codes))
            made.inputs = [moved.get(i, -1) for i in made.inputs]
            made.outputs = [moved[i] for i in made.outputs]
        self._buffers, self._codes = buffers, codes
        return moved


def nibbles(values: Array) -> NDArray[np.uint8]:
    """Integers in -8..7 as two's complement in 4 bits, two a byte: the first low, the second high; the last padded."""
    flat = values.reshape(-1).astype(np.int8).view(np.uint8) & 15
    flat = np.append(flat, np.zeros(flat.size % 2, np.uint8))
    packed: NDArray[np.uint8] = (flat[::2] | (flat[1::2] << np.uint8(4))).astype(np.uint8)
    return packed


def _quantization(scale: Array, zero_point: Array, axis: int) -> Any:
    made = schema.QuantizationParametersT()
    made.scale = np.asarray(scale, np.float32).reshape(-1)
    made.zeroPoint = np.asarray(zero_point, np.int64).reshape(-1)
    made.quantizedDimension = axis
    return made


def _code(code: str, version: int) -> Any:
    made = schema.OperatorCodeT()
    made.builtinCode = getattr(schema.BuiltinOperator, code)
    # Readers older than the 32-bit field look at the 8-bit one, where 127 means "look at the other".
    made.deprecatedBuiltinCode = min(made.builtinCode, schema.BuiltinOperator.PLACEHOLDER_FOR_GREATER_OP_CODES)
    made.version = version
    return made


def _maps(names: Mapping[str, int]) -> list[Any]:
    made = []
    for name, index in names.items():
        entry = schema.TensorMapT()
        entry.name, entry.tensorIndex = name, index
        made.append(entry)
    return made
