"""Codebook quantisation: a layer's weights share 2^b values of any spacing, b by the same allocation as channels' bits.

The values are int8 in steps of each channel's scale, w_oj ~ s_o c[k_oj], so that every runtime runs it as int8. ONNX
Runtime decodes it when loading (`xedge.gather`; as Han et al., Deep Compression, ICLR 2016, do). For the others it is
decoded where the artefact is written; an entropy coder sees 2^b symbols and stores no more than b bits a weight.

1. Values: k-means in one dimension over w / s, each weight counted by what an error of it costs: s_o^2 S_jj times the
   channel's sensitivity.
2. Indices: the nearest value, with error feedback as for grids.
3. Values again: with the indices given, the loss sum_o f_o (w_o - s_o P_o c)^T S (w_o - s_o P_o c), P_o the indicators,
   is quadratic in c. Indices once more for its minimum, rounded to integers; both are kept where the loss is lower.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning

from xedge.bits import allocate
from xedge.onnx_graph import Graph
from xedge.quantize import ScaleTable, error_tables, float_ranges, least_scale, noise_tables, weight_scale
from xedge.ranges import Calibration, RangeRule
from xedge.rounding import Array, Grid, Layer, layers_of, round_nearest, round_with_feedback

LEVELS = np.arange(1, 8)
"""Bits an index may have; 2^7 values are more than half of int8's."""
BINS = 4096
REACH = (4.0, 8.0)
"""Deviations from 0 that int8 spans: as many as the widest channel needs, within these."""
READ = 4
"""Bits at which a channel's sensitivity is read off its distortion table."""


@dataclass(frozen=True)
class Booked:
    """A layer in its codebook: `values` [K], rising; `integers` [O, T, K'], `scale` [O], and what the errors cost."""

    values: NDArray[np.int64]
    integers: Array
    scale: Array
    loss: float


def quantize_by_codebook(
    proto: ModelProto,
    calibration: Calibration,
    *,
    mean_bits: float,
    tables: Mapping[str, Array] | None = None,
    feedback: bool = True,
    correct: bool = True,
    rule: RangeRule = "mse",
    least: Mapping[str, int] | None = None,
    keep_float: Collection[str] = (),
) -> ScaleTable:
    """`quantize` with a codebook for each layer instead of a grid for each channel; the same arguments.

    Raises:
        UsageError: the budget is below what `least` asks for.
        UnsupportedGraph: the model has no weights that can be quantised.
    """
    layers = {n: la for n, la in layers_of(proto, calibration.patches).items() if la.name not in keep_float}
    ranges = float_ranges(proto, calibration, rule, layers)
    graph = Graph(proto)
    tables = noise_tables(layers, feedback=feedback) if tables is None else tables
    felt = {n: sensitivity(la, tables[n], feedback=feedback) for n, la in layers.items()}
    options: dict[str, list[Booked]] = {}
    for name, layer in layers.items():
        floor = least_scale(graph, layer, ranges)
        options[name] = [encode(layer, 2 ** int(b), felt[name], floor, feedback=feedback) for b in LEVELS]
    losses = np.array([[b.loss for b in row] for row in options.values()])
    counts = np.array([la.rows.size for la in layers.values()])
    floors = np.array([max((least or {}).get(la.name, 1), 1) for la in layers.values()]).clip(max=LEVELS[-1])
    bits = allocate(LEVELS, losses, counts, int(mean_bits * counts.sum()), floors)
    weights = {}
    for (name, layer), b in zip(layers.items(), bits, strict=True):
        chosen = improve(layer, options[name][int(b - LEVELS[0])], felt[name], feedback=feedback)
        wide = np.full(len(layer.rows), b)
        weights[name] = weight_scale(graph, name, layer, wide, chosen.integers, chosen.scale, correct=correct)
    return ScaleTable(weights, ranges, codebooks=True)


def sensitivity(layer: Layer, table: Array, *, feedback: bool = True) -> Array:
    """f_o: what a unit of each channel's output noise costs, [O], read off its distortion table."""
    noise = error_tables(layer, feedback=feedback, levels=np.array([READ]))[:, 0]
    total = noise.sum() or 1.0
    return np.asarray(np.where(noise > 1e-12 * total, table[:, READ] / np.maximum(noise, 1e-12 * total), 0.0))


def encode(layer: Layer, size: int, felt: Array, floor: Array, *, feedback: bool) -> Booked:
    """A layer in `size` values.

    Args:
        layer: to encode.
        size: K, values at most.
        felt: f_o, [O].
        floor: least scales, [O].
        feedback: feed errors forward.
    """
    deviation = np.sqrt(np.square(layer.rows).mean((1, 2)))
    deviation = np.where(deviation > 1e-20, deviation, 1.0)
    reach = np.clip(np.max(np.abs(layer.rows).max((1, 2)) / deviation), *REACH)
    scale = np.maximum(deviation * reach / 127, floor).astype(np.float32).astype(np.float64)
    worth = felt[:, None, None] * scale[:, None, None] ** 2 * np.maximum(layer.diagonal(), 0)
    values = k_means(layer.rows / scale[:, None, None], np.broadcast_to(worth, layer.rows.shape), size)
    return _indices(layer, values, scale, felt, feedback=feedback)


def improve(layer: Layer, booked: Booked, felt: Array, *, feedback: bool) -> Booked:
    """Values fitted to the indices, and indices to the values; what was given where that is no better."""
    again = _indices(layer, refit(layer, booked, felt), booked.scale, felt, feedback=feedback)
    return again if again.loss < booked.loss else booked


def k_means(points: Array, worth: Array, size: int) -> NDArray[np.int64]:
    """At most `size` integers of int8 that lie nearest to `points` by `worth`, both of one shape."""
    edges = np.linspace(-127.5, 127.5, BINS + 1)
    inside = np.clip(points.ravel(), -127.4999, 127.4999)
    mass = np.histogram(inside, edges, weights=worth.ravel())[0]
    if not mass.sum() > 0:
        mass = np.histogram(inside, edges)[0].astype(np.float64)
    centres = (edges[:-1] + edges[1:]) / 2
    used = mass > 0
    if used.sum() <= size:
        return np.unique(np.round(centres[used])).astype(np.int64)
    below = np.cumsum(np.cbrt(mass[used]))  # Panter and Dite: the best density goes with the third root
    at = np.searchsorted(below, (np.arange(size) + 0.5) / size * below[-1])
    start = np.unique(centres[used][at])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = KMeans(len(start), init=start[:, None], n_init=1, max_iter=100).fit(
            centres[used][:, None], sample_weight=mass[used] / mass.max()
        )
    return np.unique(np.clip(np.round(found.cluster_centers_.ravel()), -127, 127)).astype(np.int64)


def _indices(layer: Layer, values: NDArray[np.int64], scale: Array, felt: Array, *, feedback: bool) -> Booked:
    grid = Grid.of_values(values, scale)
    q = round_nearest(layer, grid)
    loss = layer.distortion(layer.rows - q * scale[:, None, None])
    if feedback:
        fed = round_with_feedback(layer, grid)
        other = layer.distortion(layer.rows - fed * scale[:, None, None])
        q, loss = np.where((other < loss)[:, None, None], fed, q), np.minimum(other, loss)
    return Booked(values, q, scale, float(felt @ loss))


def refit(layer: Layer, booked: Booked, felt: Array) -> NDArray[np.int64]:
    """The values of least loss for the indices as they are, rounded to int8; at most as many as before."""
    k, size = len(booked.values), layer.gram.shape[1]
    t = layer.rows.shape[1]
    index = np.searchsorted(booked.values, booked.integers).reshape(layer.groups, -1, booked.integers.shape[2])
    target = (layer.rows / booked.scale[:, None, None]).reshape(index.shape)
    worth = np.repeat(felt * booked.scale**2, t).reshape(layer.groups, -1)
    h, g = np.zeros((k, k)), np.zeros(k)
    for group in range(layer.groups):
        for part in range(index.shape[2] // size):  # one for each block of the Gram matrix
            columns = slice(part * size, (part + 1) * size)
            s = layer.gram[group * (index.shape[2] // size) + part]
            for row in range(index.shape[1]):
                p = np.zeros((size, k))
                p[np.arange(size), index[group, row, columns]] = 1.0
                sp = s @ p
                h += worth[group, row] * (p.T @ sp)
                g += worth[group, row] * (target[group, row, columns] @ sp)
    h += 1e-6 * (np.trace(h) / k or 1.0) * np.eye(k)
    start = booked.values.astype(np.float64)
    best = start + np.linalg.solve(h, g - h @ start)
    return np.unique(np.clip(np.round(best), -127, 127)).astype(np.int64)
