"""Rewrites between reading the ONNX graph and writing TFLite: what several ONNX operators spell, TFLite has as one.

Every rewrite needs the tensor in between to be read once and to carry no grid: a grid there is a rounding step that
the quantised model asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from .tflite_graph import Graph, Grid, Node, spread_grids

Array = NDArray[Any]

FUSED: Final[Mapping[tuple[float, float], str]] = {
    (-math.inf, math.inf): "NONE",
    (0.0, math.inf): "RELU",
    (0.0, 6.0): "RELU6",
    (-1.0, 1.0): "RELU_N1_TO_1",
}
"""Clamps that TFLite operators can carry, and their names in ActivationFunctionType."""

FIXED: Final[Mapping[str, Grid]] = {
    "Sigmoid": Grid(1 / 256, -128),
    "Softmax": Grid(1 / 256, -128),
    "Tanh": Grid(1 / 128, 0),
}
"""Output grids that TFLite's kernels fix (quantisation specification). Another grid costs a QUANTIZE after it,
and a finer one than these gains nothing."""

_CARRIERS = ("Conv", "Gemm", "MatMul", "Add", "Sub", "Mul")
_REARRANGED = ("Reshape", "Transpose", "DepthToSpace", "SpaceToDepth", "Resize", "Concat")
_BOUNDED = ("MaxPool", "AveragePool", "ReduceMean", "ReduceMax", "Slice", "Split", "Pad", "Gather", "Relu", "Clip")


def fuse(graph: Graph) -> None:
    """Apply every rewrite in place, then spread grids over operators that only move data."""
    _normalise(graph)
    _pixel_shuffles(graph)
    _batch_norms(graph)
    _biases(graph)
    _hard_swishes(graph)
    _clips(graph)
    _shuffled_outputs(graph)
    spread_grids(graph, _REARRANGED, _BOUNDED)
    _known_ranges(graph)
    spread_grids(graph, _REARRANGED, _BOUNDED)


def _between(graph: Graph, reads: Mapping[str, int], name: str) -> bool:
    """True for a tensor that may disappear inside a fused operator."""
    return reads[name] == 1 and name not in graph.grids and name not in graph.outputs.values()


def _normalise(graph: Graph) -> None:
    """Give several spellings of one thing one name: the shapes are static, so a Flatten is a Reshape."""
    for node in graph.nodes:
        if node.op in ("Flatten", "Squeeze", "Unsqueeze"):
            node.op, node.inputs = "Reshape", node.inputs[:1]
        elif node.op in ("GlobalAveragePool", "GlobalMaxPool", "ReduceMean", "ReduceMax"):
            rank = len(graph.shapes[node.inputs[0]])
            axes = node.attrs.get("axes")
            if len(node.inputs) > 1 and node.inputs[1]:
                axes = [int(a) for a in graph.consts[node.inputs[1]]]
            if node.op.startswith("Global"):
                axes, node.attrs["keepdims"] = range(2, rank), 1
            elif not axes:
                axes = [] if node.attrs.get("noop_with_empty_axes") else range(rank)
            node.op = "ReduceMean" if node.op in ("GlobalAveragePool", "ReduceMean") else "ReduceMax"
            node.inputs, node.attrs["axes"] = node.inputs[:1], sorted(a % rank for a in axes)
        elif node.op in ("Relu", "Clip"):
            low, high = (0.0, math.inf) if node.op == "Relu" else (-math.inf, math.inf)
            if len(node.inputs) > 1 and node.inputs[1] in graph.consts:
                low = float(graph.consts[node.inputs[1]].reshape(()))
            if len(node.inputs) > 2 and node.inputs[2] in graph.consts:
                high = float(graph.consts[node.inputs[2]].reshape(()))
            if all(not name or name in graph.consts for name in node.inputs[1:]):
                # A bound at the end of float32 is no bound (Clip's default).
                limit = float(np.finfo(np.float32).max)
                low, high = (-math.inf if low <= -limit else low), (math.inf if high >= limit else high)
                node.op, node.inputs, node.clip = "Clip", node.inputs[:1], (low, high)


def _pixel_shuffles(graph: Graph) -> None:
    """Reshape -> Transpose -> Reshape that torch writes for PixelShuffle and PixelUnshuffle."""
    reads, made = graph.consumers(), graph.producers()
    gone: list[Node] = []
    for last in graph.nodes:
        middle = made.get(last.inputs[0]) if last.op == "Reshape" and last.inputs else None
        first = made.get(middle.inputs[0]) if middle is not None and middle.op == "Transpose" else None
        if middle is None or first is None or first.op != "Reshape":
            continue
        if not (_between(graph, reads, first.outputs[0]) and _between(graph, reads, middle.outputs[0])):
            continue
        small, split, big = (graph.shapes[n] for n in (first.inputs[0], first.outputs[0], last.outputs[0]))
        if len(small) != 4 or len(split) != 6 or len(big) != 4:
            continue
        perm = tuple(middle.attrs.get("perm", ()))
        _, c, h, w = small
        op: tuple[str, str] | None = None
        if perm == (0, 1, 4, 2, 5, 3) and split[2] == split[3] and split[1] * split[2] ** 2 == c:
            op, block = ("DepthToSpace", "CRD"), split[2]
        elif perm == (0, 3, 4, 1, 5, 2) and split[1] == split[2] and split[3] * split[1] ** 2 == c:
            op, block = ("DepthToSpace", "DCR"), split[1]
        elif perm == (0, 1, 3, 5, 2, 4) and split[3] == split[5] and split[1] == c:
            op, block = ("SpaceToDepth", "CRD"), split[3]
        if op is None:
            continue
        up = op[0] == "DepthToSpace"
        expected = (h * block, w * block) if up else (h // block, w // block)
        if big[2:] != expected or (up and split[4:] != (h, w)) or (not up and (split[2], split[4]) != expected):
            continue
        last.op, last.attrs, last.inputs = op[0], {"mode": op[1], "blocksize": block}, first.inputs[:1]
        gone += [first, middle]
    graph.nodes = [node for node in graph.nodes if not any(node is g for g in gone)]


def _batch_norms(graph: Graph) -> None:
    """BatchNormalization becomes the affine map it is, and folds into the float convolution before it."""
    reads, made = graph.consumers(), graph.producers()
    kept = []
    for node in graph.nodes:
        kept.append(node)
        if node.op != "BatchNormalization" or any(name not in graph.consts for name in node.inputs[1:]):
            continue
        gamma, beta, mean, variance = (graph.consts[name].astype(np.float64) for name in node.inputs[1:5])
        scale = gamma / np.sqrt(variance + node.attrs.get("epsilon", 1e-5))
        shift = beta - mean * scale
        before = made.get(node.inputs[0])
        if before is not None and before.op == "Conv" and before.inputs[1] in graph.consts:
            weight, old = graph.consts[before.inputs[1]], np.zeros(scale.shape)
            if len(before.inputs) > 2 and before.inputs[2]:
                old = graph.consts[before.inputs[2]].astype(np.float64)
            if before.inputs[1] not in graph.stored and _between(graph, reads, before.outputs[0]):
                spread = scale.reshape(-1, *[1] * (weight.ndim - 1))
                before.inputs[1:] = [f"{node.name}/weight", f"{node.name}/bias"]
                graph.consts[before.inputs[1]] = (weight * spread).astype(np.float32)
                graph.consts[before.inputs[2]] = (old * scale + shift).astype(np.float32)
                before.outputs = node.outputs[:1]
                made[node.outputs[0]] = before
                kept.pop()
                continue
        node.op, node.inputs, node.outputs = "Affine", node.inputs[:1], node.outputs[:1]
        node.attrs = {"scale": scale, "shift": shift}
    graph.nodes = kept


def _biases(graph: Graph) -> None:
    """MatMul (or a Gemm without bias) with constant weights, then Add of a constant vector: one linear layer."""
    reads, made = graph.consumers(), graph.producers()
    kept = []
    for node in graph.nodes:
        kept.append(node)
        if node.op != "Add":
            continue
        for x, bias in (node.inputs, node.inputs[::-1]):
            before = made.get(x)
            if before is None or before.op not in ("MatMul", "Gemm") or len(before.inputs) > 2:
                continue
            weight, vector = graph.consts.get(before.inputs[1]), graph.consts.get(bias)
            if weight is None or vector is None or weight.ndim != 2 or not _between(graph, reads, x):
                continue
            width = graph.shapes[x][-1]
            if vector.size != width or vector.shape[-1] != width or graph.shapes[node.outputs[0]] != graph.shapes[x]:
                continue
            before.inputs, before.outputs = [*before.inputs, bias], node.outputs
            made[node.outputs[0]] = before
            kept.pop()
            break
    graph.nodes = kept


def _hard_swishes(graph: Graph) -> None:
    """x * HardSigmoid(x) with slope 1/6 and offset 1/2."""
    reads, made = graph.consumers(), graph.producers()
    gone: list[Node] = []
    for node in graph.nodes:
        if node.op != "Mul":
            continue
        for x, gate in (node.inputs, node.inputs[::-1]):
            before = made.get(gate)
            if before is None or before.op != "HardSigmoid" or before.inputs[0] != x:
                continue
            alpha, beta = before.attrs.get("alpha", 0.2), before.attrs.get("beta", 0.5)
            if abs(alpha - 1 / 6) < 1e-6 and beta == 0.5 and _between(graph, reads, gate):
                node.op, node.inputs, node.attrs = "HardSwish", [x], {}
                gone.append(before)
                break
    graph.nodes = [node for node in graph.nodes if not any(node is g for g in gone)]


def _clips(graph: Graph) -> None:
    """Relu, Relu6 and other clamps move into the operator before them."""
    reads, made = graph.consumers(), graph.producers()
    kept = []
    for node in graph.nodes:
        kept.append(node)
        if node.op != "Clip" or node.clip is None:
            continue
        before, grid = made.get(node.inputs[0]), graph.grids.get(node.outputs[0])
        if before is None or before.op not in _CARRIERS or before.clip or not _between(graph, reads, node.inputs[0]):
            continue
        # A grid that cannot leave [low, high] clamps by saturating.
        if node.clip in FUSED or (grid is not None and grid.within(*node.clip)):
            before.clip, before.outputs = node.clip, node.outputs
            made[node.outputs[0]] = before
            kept.pop()
    graph.nodes = kept


def _shuffled_outputs(graph: Graph) -> None:
    """DepthToSpace CRD becomes TFLite's DCR by reordering the output channels of the convolution before it."""
    reads, made = graph.consumers(), graph.producers()
    for node in graph.nodes:
        if node.op != "DepthToSpace" or node.attrs.get("mode", "DCR") != "CRD":
            continue
        before, x = made.get(node.inputs[0]), node.inputs[0]
        if before is None or before.op != "Conv" or before.attrs.get("group", 1) != 1:
            continue
        if reads[x] != 1 or x in graph.outputs.values() or any(i not in graph.consts for i in before.inputs[1:] if i):
            continue
        order = np.arange(graph.shapes[x][1]).reshape(-1, node.attrs["blocksize"] ** 2).T.reshape(-1)
        for position, name in enumerate(before.inputs[1:], start=1):
            if not name:
                continue
            moved = f"{name}/{node.name}"
            graph.consts[moved] = graph.consts[name][order]
            if (held := graph.stored.get(name)) is not None:
                spread = held.scale.size > 1 and held.axis == 0
                graph.stored[moved] = replace(
                    held,
                    values=held.values[order],
                    scale=held.scale[order] if spread else held.scale,
                    zero_point=held.zero_point[order] if spread else held.zero_point,
                )
            before.inputs[position] = moved
        node.attrs = {**node.attrs, "mode": "DCR"}


def _known_ranges(graph: Graph) -> None:
    """A grid for activations whose range follows from the input's grid, where the quantiser left one out.

    ONNX Runtime's quantize_static does so before operators that it does not quantise; without this they are islands of
    float. A graph output without a grid stays float: the caller asked for it.
    """
    for node in graph.nodes:
        x, y = graph.grids.get(node.inputs[0]), node.outputs[0]
        if x is None or y in graph.grids or y in graph.outputs.values():
            continue
        image = _image(node, x.scale * (np.arange(-128, 128) - x.zero_point))
        if node.op in FIXED:
            graph.grids[y] = FIXED[node.op]
        elif image is not None:
            bottom, top = min(float(image.min()), 0.0), max(float(image.max()), 1e-9)
            scale = float(np.float32((top - bottom) / 255))
            graph.grids[y] = Grid(scale, round(-128 - bottom / scale))


def _image(node: Node, points: Array) -> Array | None:
    """An activation function on every point of its input's grid."""
    if node.op == "HardSigmoid":
        return np.asarray(np.clip(node.attrs.get("alpha", 0.2) * points + node.attrs.get("beta", 0.5), 0, 1))
    if node.op == "HardSwish":
        return np.asarray(points * np.clip(points / 6 + 0.5, 0, 1))
    return None
