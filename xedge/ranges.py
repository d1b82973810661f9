"""Calibration: what each tensor of the float graph ranges over, and the second moments of what each weight multiplies.

Both come from ONNX Runtime running the float graph on training images with its inner tensors exposed, so they belong
to the graph that is quantised, batch norms folded. Memory does not grow with the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper
from torch import Tensor

from xedge.errors import UsageError
from xedge.onnx_graph import MOVES, Graph, exposing, session

Array = NDArray[np.float64]
BINS = 2048
COUNTED = 1 << 16
"""Values of a tensor and image that its histogram counts, about."""
KEPT = 0.9999
"""Of a tensor's values, by the percentile rule."""
RangeRule = Literal["mse", "percentile", "minmax"]
"""How the 8-bit range of an activation is chosen from what calibration saw."""
MEANS = ("AveragePool", "GlobalAveragePool", "ReduceMean")
FACTOR = 2**7
"""Between the scales of what an integer kernel sums and of what it writes, at most: half of what XNNPACK takes."""
POSITIONS = 49
"""Output positions per image whose patches enter a Gram matrix."""
ROWS = 1024
"""Patches that are added to a Gram matrix at once: adding a large matrix takes as long as the products of a few."""
DENSE = 1300
"""Up to this many weights an output a full Gram matrix is kept; above, one block per input channel."""


@dataclass(frozen=True)
class Patches:
    """Second moments of the patches that a weight multiplies.

    Attributes:
        blocks: [B, K, K], mean of patch patch^T; B is the number of groups of a convolution (1 for a plain one), or
            with `split` the number of input channels.
        mean: [G, K_all], mean patch of each group.
        split: whether the Gram keeps only the blocks of single input channels.
        ridge: what rounding adds to the diagonal, relative to the mean variance (`rounding.choose_ridges`).
    """

    blocks: Array
    mean: Array
    split: bool
    ridge: float = 0.01

    def covariance(self) -> Array:
        """The blocks about the mean."""
        m = self.mean.reshape(-1, self.blocks.shape[1])
        return self.blocks - m[:, :, None] * m[:, None, :]


def attributes(node: NodeProto) -> dict[str, object]:
    """A node's attributes by name."""
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def patches(node: NodeProto, x: NDArray[np.float32], weight: tuple[int, ...], groups: int) -> NDArray[np.float32]:
    """Patches [G, n, K] of one image that multiply a node's weight, at up to POSITIONS output positions.

    K runs like the weight's own axes behind the output axis. A transposed convolution has K = input channels.
    """
    if node.op_type == "Conv" and len(weight) in (3, 4):
        a = attributes(node)
        kernel = tuple(weight[2:])
        stride, dilation = ints(a.get("strides", [1, 1])), ints(a.get("dilations", [1, 1]))
        pads = ints(a.get("pads", [0] * 2 * len(kernel)))
        if len(kernel) == 1:
            x, kernel, stride, dilation = x[:, :, None], (1, *kernel), [1, *stride[-1:]], [1, *dilation[-1:]]
            pads = [0, pads[0], 0, pads[1]]
        n, c, *sides = x.shape
        read, unseen = _windows(tuple(sides), kernel, tuple(stride), tuple(dilation), tuple(pads))
        p = torch.from_numpy(x).flatten(2).index_select(2, read)
        if unseen is not None:
            p.masked_fill_(unseen, 0)
        p = p.view(n, groups, c // groups, -1, kernel[0] * kernel[1]).permute(1, 0, 3, 2, 4)
        return p.reshape(groups, p.shape[1] * p.shape[2], -1).contiguous().numpy()
    if node.op_type in ("Conv", "ConvTranspose"):  # by input channel
        pixels = x.reshape(x.shape[0], x.shape[1], -1).transpose(0, 2, 1).reshape(-1, groups, x.shape[1] // groups)
        step = max(1, len(pixels) // POSITIONS)
        return np.ascontiguousarray(pixels[::step].transpose(1, 0, 2))
    flat = x.reshape(-1, x.shape[-1])
    return np.ascontiguousarray(flat[:: max(1, len(flat) // POSITIONS)][None])


@lru_cache(maxsize=1024)
def _windows(
    sides: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    pads: tuple[int, ...],
) -> tuple[Tensor, Tensor | None]:
    """Flat pixels under a kernel at `positions`, [position * kernel element], and which of them lie in the padding."""
    where, inside = [], []
    for i, side in enumerate(sides):
        count = (side + pads[i] + pads[i + 2] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
        at = positions(count)[:, None] * stride[i] - pads[i] + np.arange(kernel[i]) * dilation[i]
        where.append(at.clip(0, side - 1))
        inside.append((at >= 0) & (at < side))
    read = torch.from_numpy(where[0][:, None, :, None] * sides[1] + where[1][None, :, None, :]).flatten()
    seen = torch.from_numpy(inside[0][:, None, :, None] & inside[1][None, :, None, :]).flatten()
    return read, None if bool(seen.all()) else ~seen


def positions(side: int) -> NDArray[np.int64]:
    """Rows, or columns, of a convolution's output map whose patches are looked at: each row at each column."""
    return np.unique(np.linspace(0, side - 1, min(side, int(POSITIONS**0.5))).round().astype(np.int64))


def ints(value: object) -> list[int]:
    """An attribute that is a list of whole numbers."""
    assert isinstance(value, Sequence)
    return [int(v) for v in value]


@dataclass(frozen=True)
class Calibration:
    """What calibration saw.

    Attributes:
        low, high: smallest and largest value of each tensor.
        histograms: of each tensor's values, or evenly spread ones of them, between the extremes and zero, [BINS].
        outputs: tensors that leave the graph, or whose values are all kept for another reason.
        patches: weight name -> moments of its patches.
        images: how many images were seen.
        held: the moments on other images, by which rounding is judged; empty where there were none.
    """

    low: dict[str, float]
    high: dict[str, float]
    histograms: dict[str, Array]
    outputs: tuple[str, ...]
    patches: dict[str, Patches]
    images: int
    held: dict[str, Patches] = field(default_factory=dict)

    def ranges(self, how: RangeRule = "mse") -> dict[str, tuple[float, float]]:
        """The range of each tensor, zero included; of what leaves the graph all is kept, because the user sees it."""
        out = {}
        for name, histogram in self.histograms.items():
            span = (min(self.low[name], 0.0), max(self.high[name], 0.0))
            if how == "minmax" or name in self.outputs:
                out[name] = span
            else:
                out[name] = (best_range if how == "mse" else percentile_range)(histogram, span)
        return out


class _Gather:
    """Adds up the moments of the patches of every weight, image after image."""

    def __init__(self, graph: Graph) -> None:
        self.nodes = graph.weighted()
        self.shapes = {n.input[1]: tuple(graph.initializers[n.input[1]].dims) for n in self.nodes}
        self.sums: dict[str, tuple[Array, Array, int]] = {}
        self.waiting: dict[str, list[NDArray[np.float32]]] = {n.input[1]: [] for n in self.nodes}

    def see(self, values: Mapping[str, NDArray[np.float32]]) -> None:
        """One image's tensors."""
        for node in self.nodes:
            w = node.input[1]
            self.waiting[w].append(patches(node, values[node.input[0]], self.shapes[w], groups_of(node)))
            if sum(p.shape[1] for p in self.waiting[w]) >= ROWS:
                self._settle(node)

    def _settle(self, node: NodeProto) -> None:
        w = node.input[1]
        if not self.waiting[w]:
            return
        # In float64: the covariance is a small difference of these where a channel's mean is large, and float32
        # products leave it indefinite.
        p = np.concatenate(self.waiting[w], 1).astype(np.float64)
        self.waiting[w] = []
        g, n, k = p.shape
        mean = p.sum(1)
        if self._split(node):
            c = self.shapes[w][1] if node.op_type == "Conv" else k
            p = p.reshape(g, n, c, k // c).transpose(0, 2, 1, 3).reshape(g * c, n, k // c)
        # Of one matrix numpy computes a product with its own transpose by half.
        gram = (p[0].T @ p[0])[None] if len(p) == 1 else p.transpose(0, 2, 1) @ p
        before = self.sums.get(w, (np.zeros_like(gram), np.zeros_like(mean), 0))
        self.sums[w] = (before[0] + gram, before[1] + mean, before[2] + n)

    def _split(self, node: NodeProto) -> bool:
        return patch_length(node, self.shapes[node.input[1]]) > DENSE

    def patches(self) -> dict[str, Patches]:
        """The moments of each weight."""
        out = {}
        for node in self.nodes:
            self._settle(node)
            gram, mean, count = self.sums[node.input[1]]
            out[node.input[1]] = Patches(gram / count, mean / count, self._split(node))
        return out


def calibrate(
    proto: ModelProto, images: Callable[[], Iterable[NDArray[np.float32]]], *, threads: int = 1
) -> Calibration:
    """Run the float graph over images [1, C, H, W], twice; `images` starts a pass.

    The first pass finds extremes and patch moments, the second histograms between the extremes.

    Raises:
        UsageError: no image, or an activation is NaN or infinite.
    """
    graph = Graph(proto)
    tensors = graph.activations()
    gather = _Gather(graph)
    low = dict.fromkeys(tensors, np.inf)
    high = dict.fromkeys(tensors, -np.inf)
    seen = 0
    for values in _values(proto, [*tensors, *(n.input[0] for n in gather.nodes)], images(), threads):
        seen += 1
        for name in tensors:
            least, most = float(values[name].min()), float(values[name].max())
            if not (np.isfinite(least) and np.isfinite(most)):
                raise UsageError(
                    "is NaN or infinite on the calibration data", where=f"tensor {name}", fix="check the weights"
                )
            low[name], high[name] = min(low[name], least), max(high[name], most)
        gather.see(values)
    if not seen:
        raise UsageError("there are no images to calibrate on", fix="check --data")
    histograms = {n: np.zeros(BINS) for n in tensors}
    for values in _values(proto, tensors, images(), threads):
        for name in tensors:
            span = (min(low[name], 0.0), max(high[name], 0.0))
            if span[1] > span[0]:
                flat = values[name].reshape(-1)
                # An odd stride walks through all columns of an image.
                histograms[name] += _histogram(flat[:: flat.size // COUNTED | 1], span)
    return Calibration(
        low=low, high=high, histograms=histograms, outputs=tuple(graph.outputs), patches=gather.patches(), images=seen
    )


def patch_moments(proto: ModelProto, images: Iterable[NDArray[np.float32]], *, threads: int = 1) -> dict[str, Patches]:
    """Weight name -> moments of its patches on images [1, C, H, W]: what `calibrate` finds in its first pass.

    Raises:
        UsageError: no image.
    """
    gather, seen = _Gather(Graph(proto)), 0
    for values in _values(proto, [n.input[0] for n in gather.nodes], images, threads):
        gather.see(values)
        seen += 1
    if not seen:
        raise UsageError("there are no images to measure on", fix="check --data")
    return gather.patches()


def _values(
    proto: ModelProto, tensors: Sequence[str], images: Iterable[NDArray[np.float32]], threads: int
) -> Iterator[dict[str, NDArray[np.float32]]]:
    """The values of some tensors on each image."""
    feed = Graph(proto).inputs[0]
    inner = [n for n in dict.fromkeys(tensors) if n != feed]
    run = session(exposing(proto, inner), threads=threads)
    for image in images:
        values = dict(zip(inner, run.run(inner, {feed: image}), strict=True)) if inner else {}
        values[feed] = image
        yield values


def _histogram(values: NDArray[np.float32], span: tuple[float, float]) -> Array:
    """Counts in BINS equal bins of a span that holds all values: numpy's own is five times slower."""
    at = ((values - np.float32(span[0])) * np.float32(BINS / (span[1] - span[0]))).astype(np.int64)
    return np.bincount(np.clip(at, 0, BINS - 1), minlength=BINS).astype(np.float64)


def last_layers(proto: ModelProto) -> tuple[list[NodeProto], list[str]]:
    """The weighted nodes with none behind them, and the tensors that they read and all behind them."""
    graph = Graph(proto)
    weighted = {n.output[0] for n in graph.weighted()}
    layers: list[NodeProto] = []
    tensors: dict[str, None] = {}
    behind = [*graph.outputs]
    while behind:
        name = behind.pop()
        if name in tensors or not name or graph.is_constant(name):
            continue
        tensors[name] = None
        node = graph.producer.get(name)
        if node is not None and name in weighted:
            layers.append(node)
            tensors[node.input[0]] = None
        elif node is not None:
            behind += node.input
    return layers, list(tensors)


def for_pictures(proto: ModelProto, calibration: Calibration) -> Calibration:
    """The calibration of a graph from pictures to pictures, both on 0..1.

    Input and output are stored in 8 bits: on 0..1 their 255 steps are those of the file, and what an output has outside
    is lost anyhow. What the last layers read, and all behind them, is seen directly: nothing of it is clipped.
    """
    graph = Graph(proto)
    _, tensors = last_layers(proto)
    ends = {n for n in graph.inputs if n in calibration.low}
    behind = list(graph.outputs)
    while behind:
        name = behind.pop()
        ends.add(name)
        node = graph.producer.get(name)
        if node is not None and _moves(node):
            behind.append(node.input[0])
    ends &= set(calibration.low)
    low = {**calibration.low, **{n: max(calibration.low[n], 0.0) for n in ends}}
    high = {**calibration.high, **dict.fromkeys(ends, 1.0)}
    outputs = tuple(dict.fromkeys((*calibration.outputs, *(n for n in tensors if n in low), *sorted(ends))))
    return replace(calibration, low=low, high=high, outputs=outputs)


def patch_length(node: NodeProto, shape: tuple[int, ...]) -> int:
    """K: weights behind one output."""
    if node.op_type in ("Gemm", "MatMul"):
        return int(shape[1] if transposed(node) else shape[0])
    if node.op_type == "ConvTranspose":
        return int(shape[0] // groups_of(node))
    return int(np.prod(shape[1:]))


def transposed(node: NodeProto) -> bool:
    """Whether a Gemm's weight is stored [out, in]."""
    return node.op_type == "Gemm" and bool(attributes(node).get("transB", 0))


def groups_of(node: NodeProto) -> int:
    """Groups of a convolution, 1 elsewhere."""
    return int(attributes(node).get("group", 1))  # type: ignore[call-overload, no-any-return]


def best_range(histogram: Array, span: tuple[float, float], bits: int = 8) -> tuple[float, float]:
    """The range inside `span` with the least squared error of rounding to 2^bits levels, clipping included.

    Each end is drawn in on its own, over a geometric grid; zero stays inside.
    """
    total = histogram.sum()
    if total == 0 or span[1] <= span[0]:
        return span
    edges = np.linspace(span[0], span[1], len(histogram) + 1)
    centres = (edges[:-1] + edges[1:]) / 2

    def error(lo: float, hi: float) -> float:
        step = (hi - lo) / (2**bits - 1)
        outside = np.maximum(lo - centres, 0) + np.maximum(centres - hi, 0)
        inside = (centres >= lo) & (centres <= hi)
        return float(histogram @ (outside**2) + histogram[inside].sum() * step**2 / 12)

    shrink = np.concatenate([[1.0], np.geomspace(0.95, 0.1, 24)])
    best = (error(*span), span)
    for s in shrink:
        hi = span[1] * s
        if span[0] < 0:
            for r in shrink:
                lo = span[0] * r
                if lo < hi:
                    best = min(best, (error(lo, hi), (lo, hi)))
        elif hi > 0:
            best = min(best, (error(0.0, hi), (0.0, hi)))
    return best[1]


def percentile_range(histogram: Array, span: tuple[float, float]) -> tuple[float, float]:
    """The range inside `span` that leaves half of 1 - KEPT of the values outside at each end, zero included."""
    total = histogram.sum()
    if total == 0 or span[1] <= span[0]:
        return span
    edges = np.linspace(span[0], span[1], len(histogram) + 1)
    below = np.concatenate([[0.0], np.cumsum(histogram)]) / total
    low, high = np.interp([(1 - KEPT) / 2, (1 + KEPT) / 2], below, edges)
    return min(float(low), 0.0), max(float(high), 0.0)


def wide_enough(graph: Graph, ranges: Mapping[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """Ranges that integer kernels can rescale to. Where a layer is dead, or its sums all but cancel, its results would
    lie on a grid so fine that XNNPACK refuses the model: it takes factors below 2^8 between the scales of sums and of
    results, and not below 2^-10 in additions.
    """
    out = dict(ranges)

    def width(name: str) -> float:
        return out[name][1] - out[name][0] if name in out else 0.0

    def widen(name: str, least: float) -> None:
        if width(name) < least and name in out:
            out[name] = (out[name][0], out[name][0] + least)

    weighted = {n.output[0]: n for n in graph.weighted()}
    for node in graph.nodes:
        inside = [width(n) for n in node.input]
        if node.output and node.output[0] in weighted:
            # A weight's step is at most the largest weight, of an input at most its width over 255.
            widen(graph.written(node), inside[0] * float(np.abs(graph.array(node.input[1])).max()) / FACTOR)
        elif node.op_type in ("Add", "Sub", *MEANS):
            widen(graph.written(node), max(inside) / FACTOR)
        elif node.op_type == "Mul":
            widen(graph.written(node), math.prod(inside) / (255 * FACTOR))
    for node in graph.nodes:
        if node.op_type in ("Add", "Sub"):
            for name in node.input:
                widen(name, width(graph.written(node)) / 2**9)
    return out


def shared_ranges(proto: ModelProto, clip: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """Give tensors that must lie on one grid one range: in and out of moves, and all parts of a concatenation."""
    graph = Graph(proto)
    parent = {n: n for n in clip}

    def root(n: str) -> str:
        while parent[n] != n:
            parent[n] = parent[parent[n]]
            n = parent[n]
        return n

    for node in graph.nodes:
        if _moves(node) or node.op_type == "Concat":
            data = [*node.input] if node.op_type == "Concat" else [node.input[0]]
            names = [n for n in [*data, *node.output] if n in clip]
            for n in names[1:]:
                parent[root(n)] = root(names[0])
    span: dict[str, tuple[float, float]] = {}
    for n, (lo, hi) in clip.items():
        # A move only passes on what its input holds; a concatenation holds all its parts.
        r = root(n)
        old = span.get(r, (0.0, 0.0))
        span[r] = (min(old[0], lo), max(old[1], hi))
    out = {n: span[root(n)] for n in clip}
    # LiteRT's kernels write these on one grid only. What merely moves their result lies on it too.
    unit = (0.0, 255 / 256)
    fixed = {"Sigmoid": unit, "HardSigmoid": unit, "Softmax": unit, "Tanh": (-1.0, 127 / 128)}
    for node in graph.nodes:
        if node.op_type in fixed and node.output[0] in out:
            out[node.output[0]] = fixed[node.op_type]
            behind = [node.output[0]]
            while behind:
                for after in graph.consumers.get(behind.pop(), []):
                    if _moves(after):
                        out.update({n: fixed[node.op_type] for n in after.output if n in out})
                        behind.extend(after.output)
    return out


def _moves(node: NodeProto) -> bool:
    nearest = node.op_type == "Resize" and attributes(node).get("mode", b"nearest") == b"nearest"
    return node.op_type in MOVES or nearest
