"""X-Quantization: bits per channel by what each channel's noise does to its layer's output, then rounding.

The teacher of a layer is its own float output u = W x. Giving output channel o b bits leaves the error
delta_o = w_o - q_o(b) and the distortion

    D_o(b) = delta_o^T S delta_o / tr(W S W^T),     S = covariance of the patches x,

noise over output energy, comparable between layers. `bits.allocate` spends the budget; scales minimise the same
error with clipping; rounding feeds each weight's error forward into the weights not yet rounded through S (Frantar
et al., GPTQ, 2022; LeCun's optimal brain surgeon); the mean error goes into the bias (Nagel et al., ICCV 2019).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto

from xedge.bits import allocate
from xedge.errors import UnsupportedGraph, UsageError
from xedge.onnx_graph import Graph
from xedge.ranges import Calibration, Patches, groups_of, shared_ranges, transposed

Array = NDArray[np.float64]
LEVELS = np.arange(2, 9)
"""Widths a channel may have inside its int8 container."""
CORRECTED = ("Conv", "Gemm")
"""Nodes whose mean error goes into their bias, so that only the covariance of their patches counts. A MatMul has no
bias, and borders make the mean of a transposed convolution differ by position."""
SHRINK = np.linspace(1.0, 0.3, 15)
"""Clipping candidates: the scale as a part of the one that reaches the largest weight."""


BIAS_BITS = 28
"""An int32 bias stays below 2^28, so that the accumulator keeps room for the products and the bias for its
correction."""


@dataclass(frozen=True)
class WeightScale:
    """One weight on its grid.

    Attributes:
        layer: module name.
        scale: [C], step of each output channel; the zero-point is 0.
        bits: [C], planned bits: q lies in [-(2^(b-1) - 1), 2^(b-1) - 1].
        axis: of the ONNX initializer that `scale` runs along.
        values: int8, the shape of the initializer.
        bias: [C] float, the corrected bias; None where the node takes none.
    """

    layer: str
    scale: NDArray[np.float32]
    bits: NDArray[np.uint8]
    axis: int
    values: NDArray[np.int8]
    bias: NDArray[np.float32] | None


@dataclass(frozen=True)
class ScaleTable:
    """Every scale of the model, named by the tensors of the float ONNX graph. All flavours are written from it.

    Attributes:
        weights: initializer name -> its grid.
        activations: tensor name -> (low, high), zero included.
    """

    weights: dict[str, WeightScale]
    activations: dict[str, tuple[float, float]]

    def mean_bits(self) -> float:
        """Planned bits a weight."""
        total = sum(w.values.size for w in self.weights.values())
        bits = sum(float(w.bits.mean()) * w.values.size for w in self.weights.values())
        return bits / total if total else 0.0

    def bits_of(self) -> dict[str, list[int]]:
        """Layer -> planned bits of each output channel."""
        return {w.layer: [int(b) for b in w.bits] for w in self.weights.values()}

    def save(self, path: Path) -> None:
        """Write the table as one safetensors file; names and ranges travel in its metadata."""
        import json

        from safetensors.numpy import save_file

        tensors: dict[str, NDArray[Any]] = {}
        meta: dict[str, Any] = {"activations": self.activations, "weights": {}}
        for name, w in self.weights.items():
            meta["weights"][name] = {"layer": w.layer, "axis": w.axis}
            tensors[f"{name}|values"] = np.ascontiguousarray(w.values)
            tensors[f"{name}|scale"] = np.ascontiguousarray(w.scale)
            tensors[f"{name}|bits"] = np.ascontiguousarray(w.bits)
            if w.bias is not None:
                tensors[f"{name}|bias"] = np.ascontiguousarray(w.bias)
        save_file(tensors, path, {"table": json.dumps(meta, sort_keys=True)})

    @classmethod
    def load(cls, path: Path) -> ScaleTable:
        """The inverse of `save`."""
        import json

        from safetensors import safe_open

        with safe_open(path, "np") as f:
            meta = json.loads(f.metadata()["table"])
            names = set(f.keys())
            weights = {
                name: WeightScale(
                    layer=row["layer"],
                    scale=f.get_tensor(f"{name}|scale"),
                    bits=f.get_tensor(f"{name}|bits"),
                    axis=row["axis"],
                    values=f.get_tensor(f"{name}|values"),
                    bias=f.get_tensor(f"{name}|bias") if f"{name}|bias" in names else None,
                )
                for name, row in meta["weights"].items()
            }
        return cls(weights, {k: (float(a), float(b)) for k, (a, b) in meta["activations"].items()})


def asymmetric(low: float, high: float) -> tuple[np.float32, int]:
    """Scale and uint8 zero-point of a range; int8 uses the zero-point minus 128."""
    scale = np.float32(max(high - low, 1e-8) / 255)
    return scale, int(np.clip(round(-low / float(scale)), 0, 255))


def symmetric(low: float, high: float) -> np.float32:
    """Scale of an int8 range with zero-point 0."""
    return np.float32(max(abs(low), abs(high), 1e-8) / 127)


def to_rows(node: NodeProto, w: NDArray[np.float32]) -> Array:
    """A weight as [O, T, K]: output channels, kernel taps that share one patch (transposed convolutions), patch."""
    v = w.astype(np.float64)
    if node.op_type == "ConvTranspose":
        g = groups_of(node)
        i, o = v.shape[:2]
        return np.asarray(v.reshape(g, i // g, o, -1).transpose(0, 2, 3, 1).reshape(g * o, -1, i // g))
    if node.op_type in ("Gemm", "MatMul"):
        return (v if transposed(node) else v.T)[:, None, :]
    return v.reshape(len(v), 1, -1)


def from_rows(node: NodeProto, rows: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """The inverse of `to_rows`."""
    if node.op_type == "ConvTranspose":
        g = groups_of(node)
        i, o = shape[:2]
        return rows.reshape(g, o, -1, i // g).transpose(0, 3, 1, 2).reshape(shape)
    if node.op_type in ("Gemm", "MatMul"):
        return rows[:, 0] if transposed(node) else rows[:, 0].T
    return rows.reshape(shape)


def channel_axis(node: NodeProto) -> int:
    """The axis of the initializer that runs over output channels."""
    if node.op_type == "ConvTranspose":
        return 1
    return 0 if node.op_type == "Conv" or transposed(node) else 1


@dataclass(frozen=True)
class Layer:
    """One weighted node ready for rounding.

    Attributes:
        gram: covariance of the patches (second moments for nodes that are not CORRECTED), [B, K', K'] (see `Patches`).
        rows: [O, T, K].
        groups: of the convolution.
    """

    node: NodeProto
    name: str
    rows: Array
    gram: Array
    mean: Array
    groups: int
    split: bool

    def distortion(self, error: Array) -> Array:
        """delta^T S delta of each output channel, [O], for errors [O, T, K]."""
        o, t, k = error.shape
        e = error.reshape(self.groups, o // self.groups * t, k)
        if self.split:
            size = self.gram.shape[1]
            blocks: Array = e.reshape(self.groups, -1, k // size, size).transpose(0, 2, 1, 3)
            per: Array = blocks.reshape(-1, blocks.shape[2], size)
            d = np.einsum("brk,brk->br", per @ self.gram, per)
            d = d.reshape(self.groups, k // size, -1).sum(1)
        else:
            d = np.einsum("grk,grk->gr", e @ self.gram, e)
        return np.asarray(np.maximum(d.reshape(o, t).sum(1), 0.0))

    def diagonal(self) -> Array:
        """Variance of each patch element for each output channel, [O, 1, K]."""
        d = np.einsum("bkk->bk", self.gram)
        d = d.reshape(self.groups, -1)
        return np.repeat(d, len(self.rows) // self.groups, 0)[:, None, :]

    def step(self, bits: int) -> Array:
        """Scales [O] at a width: the clipping with the least weighted squared error."""
        top = 2 ** (bits - 1) - 1
        full = np.abs(self.rows).max((1, 2)) / top
        full = np.where(full > 1e-20, full, 1.0 / top)  # weights as good as 0 would give a scale that is no float32
        diagonal = self.diagonal()
        # Where a patch element never varies its weight still counts a little, or its scale would be arbitrary.
        diagonal = diagonal + 1e-3 * (diagonal.mean() or 1.0)
        best, chosen = np.full(len(full), np.inf), full.copy()
        for part in SHRINK:
            s = full * part
            q = np.clip(np.round(self.rows / s[:, None, None]), -top, top) * s[:, None, None]
            error = ((self.rows - q) ** 2 * diagonal).sum((1, 2))
            better = error < best
            best[better], chosen[better] = error[better], s[better]
        return np.asarray(chosen.astype(np.float32), dtype=np.float64)


def _layer(graph: Graph, node: NodeProto, patches: Patches) -> Layer:
    w = np.asarray(graph.array(node.input[1]), dtype=np.float32)
    g = groups_of(node)
    if patches.split:
        size = patches.blocks.shape[1]
        m = patches.mean.reshape(-1, size)
    else:
        m = patches.mean
    gram = patches.blocks
    if node.op_type in CORRECTED:
        gram = gram - m[:, :, None] * m[:, None, :]
    name = node.input[1].removesuffix(".weight")
    return Layer(node, name, to_rows(node, w), (gram + gram.transpose(0, 2, 1)) / 2, patches.mean, g, patches.split)


def round_nearest(layer: Layer, scale: Array, bits: NDArray[np.int64]) -> Array:
    """Integers [O, T, K] of each weight rounded by itself."""
    top = (2.0 ** (bits - 1) - 1)[:, None, None]
    return np.asarray(np.clip(np.round(layer.rows / scale[:, None, None]), -top, top))


def round_with_feedback(layer: Layer, scale: Array, bits: NDArray[np.int64], block: int = 64) -> Array:
    """Integers [O, T, K], each rounding error fed into the weights still to be rounded, through the covariance."""
    o, t, k = layer.rows.shape
    size = layer.gram.shape[1]
    per = k // size if layer.split else 1
    rows = layer.rows.reshape(layer.groups, o // layer.groups * t, per, size).transpose(0, 2, 1, 3)
    # A copy: it changes as errors are fed forward, and the layer's own rows must not.
    w = torch.from_numpy(rows.reshape(layer.groups * per, -1, size).copy())
    s = np.repeat(scale, t).reshape(layer.groups, 1, -1).repeat(per, 1).reshape(layer.groups * per, -1)
    top = np.repeat(2.0 ** (bits - 1) - 1, t).reshape(layer.groups, 1, -1).repeat(per, 1).reshape(s.shape)
    step, bound = torch.from_numpy(s), torch.from_numpy(top)
    h = torch.from_numpy(layer.gram.copy())
    variance = h.diagonal(dim1=1, dim2=2).mean(1).clamp_min(0)
    # A channel that never varies has no covariance but rounding noise, of the order of its squared mean.
    square = torch.from_numpy(layer.mean.reshape(len(h), -1)).square().mean(1)
    h += (0.01 * variance + 1e-9 * square + 1e-14)[:, None, None] * torch.eye(size, dtype=h.dtype)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    upper = torch.linalg.cholesky((inverse + inverse.mT) / 2, upper=True)
    q = torch.empty_like(w)
    for start in range(0, size, block):
        stop = min(start + block, size)
        errors = torch.zeros(*w.shape[:2], stop - start, dtype=w.dtype)
        for i in range(start, stop):
            column = w[:, :, i]
            q[:, :, i] = (column / step).round().clamp(-bound, bound)
            error = (column - q[:, :, i] * step) / upper[:, i, i, None]
            errors[:, :, i - start] = error
            if i + 1 < stop:
                w[:, :, i + 1 : stop] -= error[:, :, None] * upper[:, None, i, i + 1 : stop]
        if stop < size:
            w[:, :, stop:] -= errors @ upper[:, start:stop, stop:]
    out = q.numpy().reshape(layer.groups, per, -1, size).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(out.reshape(o, t, k))


def quantize(
    proto: ModelProto,
    calibration: Calibration,
    *,
    mean_bits: float,
    feedback: bool = True,
    floor: Mapping[str, int] | None = None,
) -> ScaleTable:
    """Choose bits, scales and integers for every weight, and a range for every tensor.

    Args:
        proto: the float graph.
        calibration: of the same graph.
        mean_bits: budget, bits a weight on average over all weights, 2 to 8.
        feedback: feed rounding errors forward.
        floor: layer -> least bits of its channels.

    Raises:
        UsageError: the budget lies outside 2 to 8 bits.
        UnsupportedGraph: the model has no weights that can be quantised.
    """
    if not 2 <= mean_bits <= 8:
        raise UsageError(f"--bits {mean_bits:g} is outside 2 to 8", fix="give the mean bits a weight, such as 4.5")
    graph = Graph(proto)
    nodes = {n.input[1]: n for n in graph.weighted()}
    if not nodes:
        raise UnsupportedGraph("the graph has no convolution or linear layer with constant weights")
    layers = {name: _layer(graph, node, calibration.patches[name]) for name, node in nodes.items()}
    chosen = _choose(layers, mean_bits, floor or {})
    ranges = shared_ranges(proto, calibration.clip)
    weights = {}
    for name, layer in layers.items():
        bits = chosen[name]
        scale = np.empty(len(bits))
        for b in np.unique(bits):
            scale[bits == b] = layer.step(int(b))[bits == b]
        scale = np.maximum(scale, _least_scale(graph, layer, ranges)).astype(np.float32).astype(np.float64)
        q = round_with_feedback(layer, scale, bits) if feedback else round_nearest(layer, scale, bits)
        error = layer.rows - q * scale[:, None, None]
        weights[name] = WeightScale(
            layer=layer.name,
            scale=scale.astype(np.float32),
            bits=bits.astype(np.uint8),
            axis=channel_axis(layer.node),
            values=np.ascontiguousarray(from_rows(layer.node, q.astype(np.int8), graph.array(name).shape)),
            bias=_bias(graph, layer, error),
        )
    return ScaleTable(weights, ranges)


def _choose(layers: Mapping[str, Layer], mean_bits: float, floor: Mapping[str, int]) -> dict[str, NDArray[np.int64]]:
    if mean_bits == 8:
        return {n: np.full(len(la.rows), 8, dtype=np.int64) for n, la in layers.items()}
    tables, weights = [], []
    for layer in layers.values():
        energy = layer.distortion(layer.rows).sum() or 1.0
        table = np.empty((len(layer.rows), len(LEVELS)))
        for j, b in enumerate(LEVELS):
            scale = layer.step(int(b))
            bits = np.full(len(scale), b)
            table[:, j] = (
                layer.distortion(layer.rows - round_nearest(layer, scale, bits) * scale[:, None, None]) / energy
            )
        least = floor.get(layer.name, int(LEVELS[0]))
        # Below its floor a width gains nothing but bits: as if it were worse than anything.
        table[:, least > LEVELS] += 1e6
        tables.append(table)
        weights.append(np.full(len(layer.rows), layer.rows.shape[1] * layer.rows.shape[2], dtype=np.int64))
    per = np.concatenate(weights)
    bits = allocate(LEVELS, np.concatenate(tables), per, int(mean_bits * per.sum()))
    out, at = {}, 0
    for name, layer in layers.items():
        out[name] = bits[at : at + len(layer.rows)]
        at += len(layer.rows)
    return out


def _float_bias(graph: Graph, layer: Layer) -> Array:
    node, count = layer.node, len(layer.rows)
    has = len(node.input) > 2 and node.input[2] and graph.is_constant(node.input[2])
    bias = graph.array(node.input[2]).astype(np.float64).reshape(-1) if has else np.zeros(count)
    return np.broadcast_to(bias, (count,))


def _least_scale(graph: Graph, layer: Layer, ranges: Mapping[str, tuple[float, float]]) -> Array:
    """Scales [O] below which the bias, an int32 in steps of s_in * s_w, would overflow: channels that a batch norm
    has all but switched off have tiny weights and a bias of ordinary size."""
    span = ranges.get(layer.node.input[0])
    if span is None:
        return np.zeros(len(layer.rows))
    return np.abs(_float_bias(graph, layer)) / (2.0**BIAS_BITS * float(asymmetric(*span)[0]))


def _bias(graph: Graph, layer: Layer, error: Array) -> NDArray[np.float32] | None:
    node, count = layer.node, len(layer.rows)
    if node.op_type == "MatMul":
        return None
    bias = _float_bias(graph, layer)
    if node.op_type in CORRECTED:
        mean = np.repeat(layer.mean, count // layer.groups, 0)
        bias = bias + (error[:, 0] * mean).sum(1)
    return bias.astype(np.float32)
