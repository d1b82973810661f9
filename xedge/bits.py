"""X-Quantization's allocation: how many bits each channel deserves, under one budget for all layers.

With n_i(b) the noise that b bits leave on channel i and c_i the number of its weights, minimise

    sum_i D_i(b_i)   subject to   sum_i c_i b_i <= B.

For D_i(b) = s_i r_i^2 4^-b the optimum is the reverse water-filling of `closed_form`. For measured distortions the
exact optimum over the lower convex hulls is greedy: give the next step to the channel that gains most per bit
(`allocate`). `compare` says what that is worth. The paper (section 4) asks for a closed form and gives none; this one
is Shannon's (1959), with the layer's own output as teacher deciding s_i.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from xedge.errors import UsageError

Array = NDArray[np.float64]
READ = 4
"""Bits at which s_i r_i^2 is read off a measured distortion: 4^-b holds from about here on."""


def closed_form(sensitivity: Array, weights: Array, budget: float, most: Array | None = None) -> Array:
    """Continuous bits b_i = theta + 1/2 log2(s_i / c_i), never negative, with sum_i c_i b_i = budget.

    Args:
        sensitivity: s_i r_i^2 > 0, the distortion at 0 bits, [n].
        weights: c_i, weights of each channel, [n].
        budget: bits in all.
        most: bits that a channel may have, [n]; what is left over when all have them is not spent.
    """
    want = 0.5 * np.log2(np.maximum(sensitivity, 1e-300) / weights)
    order = np.argsort(-want)
    active = len(want)
    while active > 0:
        chosen = order[:active]
        theta = (budget - weights[chosen] @ want[chosen]) / weights[chosen].sum()
        if theta + want[order[active - 1]] >= 0:
            break
        active -= 1
    bits = np.zeros(len(want))
    bits[order[:active]] = theta + want[order[:active]] if active else 0.0
    if most is not None and (bits > most).any():  # what these leave raises the others, so these stay where they are
        full = bits > most
        bits[full] = most[full]
        rest = budget - float(weights[full] @ most[full])
        bits[~full] = closed_form(sensitivity[~full], weights[~full], rest, most[~full])
    return bits


@dataclass(frozen=True)
class Compared:
    """What two allocations of one budget leave, in the unit of the distortions.

    Attributes:
        optimum: of `allocate`.
        closed: of the closed form in whole bits.
        apart: bits a weight by which the closed form, before it is rounded, and the optimum differ in the mean.
    """

    optimum: float
    closed: float
    apart: float

    def words(self) -> str:
        """One line."""
        more = f", {self.closed / self.optimum:.2f} times as much" if self.optimum > 0 else ""
        return (
            f"bits by the integer optimum leave a distortion of {self.optimum:.3g}, the closed form in whole bits "
            f"under the same budget {self.closed:.3g}{more}; they are {self.apart:.2f} bits a weight apart"
        )


def compare(
    distortion: Array,
    weights: NDArray[np.int64],
    budget: int,
    least: NDArray[np.int64],
    bits: NDArray[np.int64],
) -> Compared:
    """The closed form beside `bits`, which `allocate` found for the same problem, on levels 0, 1, .. one bit apart.

    Its s_i r_i^2 are the distortions at READ bits. Rounded down, it spends what that leaves by the largest remainders.
    """
    rows, most = np.arange(len(weights)), distortion.shape[1] - 1
    sensitivity = distortion[:, READ] * 4.0 ** (READ - least)
    real = least + closed_form(sensitivity, weights.astype(np.float64), float(budget - weights @ least), most - least)
    whole = np.floor(real + 1e-9).astype(np.int64)
    left = budget - int(weights @ whole)
    for i in np.argsort(whole - real, kind="stable"):
        if weights[i] <= left and whole[i] < most:
            whole[i] += 1
            left -= int(weights[i])
    return Compared(
        optimum=float(distortion[rows, bits].sum()),
        closed=float(distortion[rows, whole].sum()),
        apart=float(np.average(np.abs(real - bits), weights=weights)),
    )


def lower_hull(levels: NDArray[np.int64], distortion: Array) -> list[int]:
    """Indices of the points (level, distortion) on the lower convex hull, from the first level on, falling only."""
    hull: list[int] = []
    for i in range(len(levels)):
        if hull and distortion[i] >= distortion[hull[-1]]:
            continue
        while len(hull) >= 2:
            a, b = hull[-2], hull[-1]
            ab = (distortion[a] - distortion[b]) / (levels[b] - levels[a])
            bi = (distortion[b] - distortion[i]) / (levels[i] - levels[b])
            if bi < ab:
                break
            hull.pop()
        hull.append(i)
    return hull


def allocate(
    levels: NDArray[np.int64],
    distortion: Array,
    weights: NDArray[np.int64],
    budget: int,
    least: NDArray[np.int64] | None = None,
) -> NDArray[np.int64]:
    """Bits of every channel: the steepest steps of the hulls first, exact as long as the next step fits; then what is
    left of the budget is spent where it still helps. Never worse than equal bits for all.

    Args:
        levels: allowed bits, rising, [B].
        distortion: what each channel loses at each level, [n, B].
        weights: weights of each channel, [n].
        budget: bits in all; never exceeded.
        least: bits that each channel gets in any case, [n].

    Returns:
        Bits of each channel, [n].

    Raises:
        UsageError: the budget is below the least level for all.
    """
    n = len(weights)
    start = np.zeros(n, np.int64) if least is None else np.searchsorted(levels, least)

    def cost(at: NDArray[np.int64]) -> int:
        return int(weights @ levels[at])

    if budget < cost(start):
        raise UsageError(
            f"the bit budget of {budget / weights.sum():.2f} bits a weight is below the least width of "
            f"{cost(start) / weights.sum():.4g}",
            fix="raise --bits",
        )
    hulls = [[int(i) + k for k in lower_hull(levels[i:], distortion[j, i:])] for j, i in enumerate(start)]
    best = _spend(levels, distortion, weights, hulls, start.tolist(), budget - cost(start))
    equal = [np.maximum(start, j) for j in range(len(levels))]
    even = max((at for at in equal if cost(at) <= budget), key=cost)
    rows = np.arange(n)
    if distortion[rows, even].sum() < distortion[rows, best].sum():
        # Few channels of unlike weights: a heavy one may find nothing left for its step. Start from equal widths then.
        best = _spend(levels, distortion, weights, hulls, even.tolist(), budget - cost(even))
    return levels[best].astype(np.int64)


def _spend(
    levels: NDArray[np.int64],
    distortion: Array,
    weights: NDArray[np.int64],
    hulls: list[list[int]],
    at: list[int],
    left: int,
) -> list[int]:
    """Raise the level indices `at` with `left` bits, the steepest step first, until no step that helps fits."""

    def steepest(i: int, targets: Iterable[int]) -> None:
        steps = [
            ((distortion[i, j] - distortion[i, at[i]]) / ((levels[j] - levels[at[i]]) * weights[i]), i, j)
            for j in targets
            if distortion[i, j] < distortion[i, at[i]]
        ]
        if steps:
            heapq.heappush(heap, min(steps))

    def onward(i: int) -> None:
        steepest(i, hulls[i][bisect_right(hulls[i], at[i]) :][:1])

    heap: list[tuple[float, int, int]] = []
    for i in range(len(at)):
        onward(i)
    while heap:
        _, i, j = heapq.heappop(heap)
        cost = int((levels[j] - levels[at[i]]) * weights[i])
        if cost <= left:
            left -= cost
            at[i] = j
            onward(i)
        else:  # a shorter step, off the hull, may still fit
            room = left // int(weights[i])
            steepest(i, [k for k in range(at[i] + 1, len(levels)) if levels[k] - levels[at[i]] <= room])
    return at
