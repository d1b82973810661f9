"""Codebooks in ONNX: the weights of a layer as indices of a few bits and the values that they stand for.

    values[(packed << left) >> right]:    BitShift, BitShift, Cast, Gather, Reshape

Indices of 1, 2 or 4 bits lie in bytes, the first one lowest. The operators are older than opset 17, and all that they
read is constant, so ONNX Runtime decodes once, when it loads the file, and runs its integer kernels on the result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from xedge.onnx_graph import Graph

WIDTHS = (1, 2, 4)
"""Bits of an index that fill bytes. A codebook of more than 16 values gains nothing, and its layer stays as it is."""
PACKED, BOOK, RIGHT, SHAPE = "_packed", "_codebook", "_right", "_shape"


def width(values: NDArray[np.int8]) -> int | None:
    """Bits of an index into the values that occur; None where they are more than 16."""
    return next((b for b in WIDTHS if len(np.unique(values)) <= 2**b), None)


def packed(values: NDArray[np.int8], bits: int) -> tuple[NDArray[np.uint8], NDArray[np.int8]]:
    """Indices in bytes, [ceil(n bits / 8), 1], and the values that occur, rising."""
    book, index = np.unique(values, return_inverse=True)
    each = 8 // bits
    rows = np.zeros((-(-index.size // each), each), np.uint8)
    rows.reshape(-1)[: index.size] = index.reshape(-1)
    return (rows << _places(bits)).sum(1, dtype=np.uint8)[:, None], book


def indices(graph: Graph, name: str) -> NDArray[np.uint8]:
    """A weight's indices as the file holds them."""
    bits = 8 - int(graph.array(f"{name}{RIGHT}")[0])
    stored = graph.array(f"{name}{PACKED}").astype(np.uint8)
    index = np.asarray(stored >> _places(bits) & (2**bits - 1), np.uint8)
    return index.reshape(-1)[: math.prod(graph.array(f"{name}{SHAPE}").tolist())]


def _places(bits: int) -> NDArray[np.uint8]:
    return np.arange(0, 8, bits, dtype=np.uint8)


def decoding(name: str, values: NDArray[np.int8], bits: int) -> tuple[list[TensorProto], list[NodeProto]]:
    """Constants and nodes that give a weight's integers as ``NAME_q``."""
    stored, book = packed(values, bits)
    tensors: list[TensorProto] = []
    nodes: list[NodeProto] = []

    def constant(part: str, value: NDArray[Any]) -> str:
        tensors.append(numpy_helper.from_array(value, f"{name}{part}"))
        return f"{name}{part}"

    def node(op: str, inputs: Sequence[str], part: str, **attributes: Any) -> str:
        out = f"{name}{part}"
        nodes.append(helper.make_node(op, inputs, [out], name=f"{out}_{op}", **attributes))
        return out

    left = constant("_left", (8 - bits - _places(bits)).astype(np.uint8))
    right = constant(RIGHT, np.array([8 - bits], np.uint8))
    high = node("BitShift", [constant(PACKED, stored), left], "_high", direction="LEFT")
    low = node("BitShift", [high, right], "_low", direction="RIGHT")
    index = node("Cast", [low], "_index", to=TensorProto.INT32)
    found = node("Gather", [constant(BOOK, book), index], "_values")
    if stored.size * 8 // bits != values.size:
        found = node("Reshape", [found, constant("_flat", np.array([-1]))], "_padded")
        ends = [constant(part, np.array([at])) for part, at in (("_from", 0), ("_to", values.size))]
        found = node("Slice", [found, *ends], "_cut")
    node("Reshape", [found, constant(SHAPE, np.array(values.shape))], "_q")
    return tensors, nodes
