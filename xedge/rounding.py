"""Rounding a layer's weights to a few bits: its errors' noise at the output, its scales, and rounding with feedback.

The loss of an error delta_o of output channel o is delta_o^T S delta_o, S the covariance of the patches that the
weights multiply: the noise on the layer's output. Scales minimise the same loss with clipping; rounding feeds each
weight's error forward into the weights not yet rounded through S (Frantar et al., GPTQ, ICLR 2023; LeCun's optimal
brain surgeon).

A channel of b bits takes the better of two grids of 2^b integers: all from -2^(b-1) to 2^(b-1) - 1, or the odd ones
from -(2^b - 1) to 2^b - 1, which lie even about 0. Of 4 bits it has the first, which int4 stores; of 1 bit the second,
{-1, 1}; of 8 bits, to stay in int8, all of -127 .. 127; of 0 bits it is zero. Where bits are those of a code
(`xedge.coding`), all channels have -127 .. 127, and their bits decide the scales.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto
from torch import Tensor

from xedge.coding import MOST, Rates
from xedge.errors import UnsupportedGraph
from xedge.onnx_graph import Graph
from xedge.ranges import Calibration, Patches, groups_of, transposed

Array = NDArray[np.float64]
Ints = NDArray[np.int64]
Bits = Ints | Array
"""Widths, or bits of code, which need not be whole."""
CORRECTED = ("Conv", "Gemm")
"""Nodes whose mean error goes into their bias, so that only the covariance of their patches counts. A MatMul has no
bias, and borders make the mean of a transposed convolution differ by position."""
SHRINK = np.geomspace(1.0, 0.15, 24)
"""Clipping candidates: the scale as a part of the one that reaches the largest weight."""
EITHER = (2, 3)
"""Widths that have both grids."""
RIDGES = (0.01, 0.1, 0.5)
"""Of the mean variance, on the diagonal by which errors are fed forward. The more, the less an error goes where the
calibration images do not vary, for other images may."""
RIDGED = 4
"""Bits at which a layer's ridge is chosen."""


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
class Grid:
    """The integers of each channel, and their steps.

    Attributes:
        scale: [O].
        low, high: [O], the least and the largest integer.
        odd: [O], whether even integers are left out.
        values: rising, the integers of all channels alike instead; None: low, high and odd say them.
    """

    scale: Array
    low: Array
    high: Array
    odd: NDArray[np.bool_]
    values: Ints | None = None

    @classmethod
    def of(cls, bits: Bits, scale: Array, odd: NDArray[np.bool_]) -> Grid:
        """Of channels of these widths, [O]."""
        half = 2.0 ** (bits - 1)
        high = np.where(odd, 2 * half - 1, np.where(bits > 0, half - 1, 0.0))
        low = np.where(odd | (bits == 8), -high, np.where(bits > 0, -half, 0.0))
        return cls(scale, low, high, odd)

    @classmethod
    def of_values(cls, values: Ints, scale: Array) -> Grid:
        """Of channels that share these integers."""
        none = np.zeros(len(scale))
        return cls(scale, none, none, none.astype(bool), values)

    def rounding(self, channel: NDArray[np.intp]) -> Callable[[Tensor], Tensor]:
        """What takes steps to the nearest integers, for a tensor of whose elements `channel` says the channel."""
        if self.values is not None:
            values = torch.from_numpy(self.values).double()
            between = (values[1:] + values[:-1]) / 2
            return lambda steps: values[torch.bucketize(steps.contiguous(), between)]
        offset, low, high = (torch.as_tensor(a[channel].astype(np.float64)) for a in (self.odd, self.low, self.high))
        if not self.odd.any():
            return lambda steps: steps.round().clamp(low, high)
        stride = 1 + offset
        return lambda steps: ((steps - offset) / stride).round().mul(stride).add(offset).clamp(low, high)

    def nearest(self, steps: Tensor, channel: NDArray[np.intp]) -> Tensor:
        """The nearest integers."""
        return self.rounding(channel)(steps)


def _search(rows: Array, worth: Array, bits: int, *, shared: bool) -> tuple[Array, NDArray[np.bool_]]:
    """(scale [O], odd [O]) with the least squared error of rows [O, T, K], weighted by `worth`; `shared`: all alike."""
    w, d = (
        torch.from_numpy(np.ascontiguousarray(a, dtype=np.float32)) for a in (rows, np.broadcast_to(worth, rows.shape))
    )
    most = w.abs().amax((1, 2))
    most = most.max().expand_as(most) if shared else most
    most = torch.where(most > 1e-20, most, 1.0)  # weights as good as 0 would give a scale that is no float32
    best, chosen, kind = torch.full_like(most, torch.inf), most.clone(), torch.zeros(len(most), dtype=torch.bool)
    for odd in (False, True) if bits in EITHER else (bits == 1,) if bits else ():
        which = np.full(len(rows), odd)
        one = Grid.of(np.full(len(rows), bits), np.ones(len(rows)), which)
        nearest = one.rounding(np.zeros((), np.intp))  # all alike, and of no shape, so that float32 stays float32
        for part in SHRINK:
            scale = most * (part / one.high[0])
            error = nearest(w / scale[:, None, None]).mul_(-scale[:, None, None]).add_(w).square_().mul_(d)
            loss = error.sum((1, 2))
            loss = loss.sum().expand_as(loss) if shared else loss
            better = loss < best
            best[better], chosen[better], kind[better] = loss[better], scale[better], odd
    return chosen.double().numpy(), kind.numpy()


@dataclass(frozen=True)
class Layer:
    """One weighted node ready for rounding.

    Attributes:
        gram: covariance of the patches (second moments for nodes that are not CORRECTED), [B, K', K'] (see `Patches`).
        rows: [O, T, K].
        mean: mean patch of each group, [G, K].
        groups: of the convolution.
        split: whether the Gram keeps only the blocks of single input channels.
        ridge: relative to the mean variance, added to the Gram's diagonal where errors are fed forward.
        shared: whether all channels of one width share one scale.
        coded: whether bits are those of an entropy coder.
    """

    node: NodeProto
    name: str
    rows: Array
    gram: Array
    mean: Array
    groups: int
    split: bool
    ridge: float = RIDGES[0]
    shared: bool = False
    coded: bool = False

    def distortion(self, error: Array, gram: Array | None = None) -> Array:
        """delta^T S delta of each output channel, [O], for errors [O, T, K]; `gram` takes the place of S."""
        gram = self.gram if gram is None else gram
        o, t, k = error.shape
        e = error.reshape(self.groups, o // self.groups * t, k)
        if self.split:
            size = gram.shape[1]
            blocks: Array = e.reshape(self.groups, -1, k // size, size).transpose(0, 2, 1, 3)
            per: Array = blocks.reshape(-1, blocks.shape[2], size)
            d = np.einsum("brk,brk->br", per @ gram, per)
            d = d.reshape(self.groups, k // size, -1).sum(1)
        else:
            d = np.einsum("grk,grk->gr", e @ gram, e)
        return np.asarray(np.maximum(d.reshape(o, t).sum(1), 0.0))

    def diagonal(self) -> Array:
        """Variance of each patch element for each output channel, [O, 1, K]."""
        d = np.einsum("bkk->bk", self.gram)
        d = d.reshape(self.groups, -1)
        return np.repeat(d, len(self.rows) // self.groups, 0)[:, None, :]

    def grid(self, bits: Bits, least: Array | None = None) -> Grid:
        """Grids of channels of these widths [O]: the kind and the clipping with the least weighted squared error.

        Args:
            bits: 0 to 8.
            least: scales [O] that are not to be fallen below.
        """
        if self.coded:
            return self._coded_grid(bits, least)
        scale, odd = np.empty(len(bits)), np.empty(len(bits), dtype=bool)
        diagonal = self.diagonal()
        # Where a patch element never varies its weight still counts a little, or its scale would be arbitrary.
        diagonal = diagonal + 1e-3 * (diagonal.mean() or 1.0)
        for b in np.unique(bits):
            which = np.flatnonzero(bits == b)
            scale[which], odd[which] = _search(self.rows[which], diagonal[which], int(b), shared=self.shared)
        return Grid.of(bits, self._scales(scale, least), odd)

    def _coded_grid(self, bits: Bits, least: Array | None) -> Grid:
        high = np.where(bits > 0, float(MOST), 0.0)
        scale = self._scales(self.rates.scale(bits), least)
        return Grid(scale, -high, high, np.zeros(len(bits), dtype=bool))

    def _scales(self, scale: Array, least: Array | None) -> Array:
        if least is not None:
            scale = np.maximum(scale, least.max() if self.shared else least)
        return scale.astype(np.float32).astype(np.float64)

    @cached_property
    def rates(self) -> Rates:
        """The lengths of its channels' codes."""
        return Rates(self.rows, shared=self.shared)

    def repeated(self, times: int) -> Layer:
        """The same with every output channel so many times in a row, to be rounded to several widths at once."""
        more = replace(self, rows=np.repeat(self.rows, times, 0))
        more.__dict__["upper"] = self.upper  # where cached_property keeps it: it is that of the Gram matrix
        if self.coded:
            more.__dict__["rates"] = self.rates.repeated(times)
        return more

    @cached_property
    def upper(self) -> Tensor:
        """The upper Cholesky factor of S^-1, [B, K', K'], by which errors are fed forward."""
        h = torch.from_numpy(self.gram.copy())
        variance = h.diagonal(dim1=1, dim2=2).mean(1).clamp_min(0)
        # A channel that never varies has no covariance but rounding noise, of the order of its squared mean.
        square = torch.from_numpy(self.mean.reshape(len(h), -1)).square().mean(1)
        ridge = self.ridge * variance + 1e-9 * square + 1e-14
        h += ridge[:, None, None] * torch.eye(h.shape[1], dtype=h.dtype)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
        upper: Tensor = torch.linalg.cholesky((inverse + inverse.mT) / 2, upper=True)
        return upper


def layers_of(
    proto: ModelProto, moments: dict[str, Patches], *, shared: bool = False, coded: bool = False
) -> dict[str, Layer]:
    """Weight name -> its layer, in the order of execution; `shared` and `coded` as in `Layer`.

    Raises:
        UnsupportedGraph: the model has no weights that can be quantised.
    """
    graph = Graph(proto)
    nodes = {n.input[1]: n for n in graph.weighted()}
    if not nodes:
        raise UnsupportedGraph("the graph has no convolution or linear layer with constant weights")
    made = {name: make_layer(graph, node, moments[name]) for name, node in nodes.items()}
    return {name: replace(layer, shared=shared, coded=coded) for name, layer in made.items()}


def make_layer(graph: Graph, node: NodeProto, patches: Patches) -> Layer:
    """One node with the moments of its patches."""
    w = np.asarray(graph.array(node.input[1]), dtype=np.float32)
    gram = patches.covariance() if node.op_type in CORRECTED else patches.blocks
    name = node.input[1].removesuffix(".weight")
    gram = (gram + gram.transpose(0, 2, 1)) / 2
    return Layer(node, name, to_rows(node, w), gram, patches.mean, groups_of(node), patches.split, patches.ridge)


def round_nearest(layer: Layer, grid: Grid) -> Array:
    """Integers [O, T, K] of each weight rounded by itself."""
    steps = torch.from_numpy(layer.rows / grid.scale[:, None, None])
    return np.asarray(grid.nearest(steps, np.arange(len(grid.scale))[:, None, None]).numpy())


def round_with_feedback(layer: Layer, grid: Grid, block: int = 64) -> Array:
    """Integers [O, T, K], each rounding error fed into the weights still to be rounded, through the covariance."""
    o, t, k = layer.rows.shape
    size = layer.gram.shape[1]
    per = k // size if layer.split else 1
    # [B, K', rows]: what is rounded together lies together. A copy: it changes as errors are fed forward, and the
    # layer's own rows must not.
    rows = layer.rows.reshape(layer.groups, o // layer.groups * t, per, size).transpose(0, 2, 3, 1)
    w = torch.from_numpy(rows.reshape(layer.groups * per, size, -1).copy())
    channel = np.repeat(np.arange(o), t).reshape(layer.groups, 1, -1).repeat(per, 1).reshape(layer.groups * per, -1)
    nearest, step, upper = grid.rounding(channel), torch.from_numpy(grid.scale[channel]), layer.upper
    q = torch.empty_like(w)
    for start in range(0, size, block):
        stop = min(start + block, size)
        errors = torch.zeros(len(w), stop - start, w.shape[2], dtype=w.dtype)
        for i in range(start, stop):
            q[:, i] = nearest(w[:, i] / step)
            error = (w[:, i] - q[:, i] * step) / upper[:, i, i, None]
            errors[:, i - start] = error
            if i + 1 < stop:
                w[:, i + 1 : stop].addcmul_(upper[:, i, i + 1 : stop, None], error[:, None], value=-1)
        if stop < size:
            w[:, stop:] -= upper[:, start:stop, stop:].mT @ errors
    out = q.numpy().reshape(layer.groups, per, size, -1).transpose(0, 3, 1, 2)
    return np.ascontiguousarray(out.reshape(o, t, k))


def rounded(layer: Layer, bits: Bits, *, feedback: bool, least: Array | None = None) -> tuple[Array, Array]:
    """(integers [O, T, K], scales [O]) of channels of these widths; scales are not below `least`.

    Where few levels clip what is fed forward, feedback may lose; each channel keeps the better of both roundings.
    """
    grid = layer.grid(bits, least)
    q = round_nearest(layer, grid)
    if feedback:
        fed = round_with_feedback(layer, grid)
        near, far = (layer.distortion(layer.rows - x * grid.scale[:, None, None]) for x in (q, fed))
        q = np.where((far < near)[:, None, None], fed, q)
    return q, grid.scale


def choose_ridges(proto: ModelProto, calibration: Calibration, held: dict[str, Patches]) -> Calibration:
    """The calibration, with the ridge of RIDGES for each layer that leaves the least noise at RIDGED bits on other
    images, whose moments are `held`; it keeps these too."""
    judges, chosen = layers_of(proto, held), {}
    for name, layer in layers_of(proto, calibration.patches).items():
        noise = {}
        for ridge in RIDGES:
            q, scale = rounded(replace(layer, ridge=ridge), np.full(len(layer.rows), RIDGED), feedback=True)
            noise[ridge] = judges[name].distortion(layer.rows - q * scale[:, None, None]).sum()
        chosen[name] = replace(calibration.patches[name], ridge=min(RIDGES, key=noise.__getitem__))
    return replace(calibration, patches=chosen, held=held)
