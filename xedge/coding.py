"""Bits as an entropy coder counts them: steps by the length of the code that a channel's integers take.

Kernels multiply int8 whatever a channel's width is, so what few bits save is what a packed file saves, and there an
integer costs what its code costs. A width of b bits clips large weights to 2^b integers and pays as much for rare ones
as for common ones. Given the same bits of code instead, a channel has finer steps and clips nothing: of a Gaussian at 4
bits the error is 3.2 dB smaller, 1.5 dB off Shannon's bound (entropy-constrained scalar quantisation: Gish and Pierce,
1968; of networks: Choi, El-Khamy and Lee, ICLR 2017, arXiv:1612.01543). In water-filling, too, a bit is one of code.

The code is adaptive and of order 0 (Krichevsky and Trofimov, 1981): the next integer has the probability (n_q + 1/2) /
(n + M/2) where n integers came before, n_q of them alike, out of M between the channel's least and largest. What it
takes to learn the distribution is so counted, which an entropy would hide in channels of few weights. Where those M
integers in as many bits each are shorter, that counts. Least and largest are not counted, as the scale is not.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]
MOST = 127
"""The largest integer of int8 that has a negative."""
STEPS = 48
"""Scales between MOST integers for the largest weight and none."""


def code_length(integers: NDArray[Any], *, shared: bool = False) -> Array:
    """Bits of code a weight, [O], of integers [O, ...] of int8; `shared`: one code for all channels."""
    o = len(integers)
    q = integers.reshape(1 if shared else o, -1).astype(np.int64)
    rows, count = q.shape
    span = q.max(1) - q.min(1) + 1
    place = np.arange(rows)[:, None] * 256 + q + 128
    found = np.bincount(place.ravel(), minlength=256 * rows).reshape(rows, 256)
    half = torch.from_numpy(span / 2)
    whole = (torch.lgamma(count + half) - torch.lgamma(half)).numpy()
    seen = torch.lgamma(torch.arange(count + 1, dtype=torch.float64) + 0.5)
    bits = (whole - (seen - seen[0]).numpy()[found].sum(1)) / (np.log(2) * count)
    return np.broadcast_to(np.minimum(bits, np.log2(span)), (o,)).copy()


def width(integers: NDArray[Any]) -> NDArray[np.int64]:
    """The fewest bits b for which -2^(b-1) .. 2^(b-1) - 1 hold a channel's integers [O, ...], 0 where all are 0;
    8 for -127 .. 127."""
    q = integers.reshape(len(integers), -1).astype(np.int64)
    reach = np.maximum(-q.min(1), q.max(1) + 1)
    bits = np.ceil(np.log2(np.maximum(reach, 1))).astype(np.int64) + 1
    return np.asarray(np.where((q == 0).all(1), 0, bits))


class Rates:
    """How long the code of each channel is at scales from fine to coarse, when weights are rounded to the nearest.

    Args:
        rows: weights [O, T, K]. shared: whether all channels have one scale and one code.

    Attributes:
        scales: rising, [O, n]. bits: falling to 0, [O, n].
    """

    def __init__(self, rows: Array, *, shared: bool) -> None:
        flat = rows.reshape(len(rows), -1)
        top = np.abs(flat).max(1)
        top = np.full_like(top, top.max()) if shared else top
        # Weights as good as 0 would give a scale that is no float32.
        self.scales = np.where(top > 1e-20, top, 1.0)[:, None] / MOST * np.geomspace(1, 3 * MOST, STEPS)
        steps = (np.rint(flat / self.scales[:, i : i + 1]) for i in range(STEPS))
        self.bits = np.minimum.accumulate(np.stack([code_length(q, shared=shared) for q in steps], 1), 1)

    def scale(self, bits: NDArray[Any]) -> Array:
        """The scale at which each channel's code is so long, [O]; the finest where it never is."""
        rows = np.arange(len(bits))
        above = (self.bits > bits[:, None]).sum(1)  # scales that are too fine; at the coarsest nothing is left
        fine, coarse = np.maximum(above - 1, 0), np.minimum(above, STEPS - 1)
        long, short = self.bits[rows, fine], self.bits[rows, coarse]
        part = np.where(long > short, (long - bits) / np.where(long > short, long - short, 1.0), 0.0).clip(0, 1)
        low, high = np.log(self.scales[rows, fine]), np.log(self.scales[rows, coarse])
        return np.asarray(np.exp(low + part * (high - low)))

    def repeated(self, times: int) -> Rates:
        """Of each channel so many times in a row."""
        more = Rates.__new__(Rates)
        more.scales, more.bits = np.repeat(self.scales, times, 0), np.repeat(self.bits, times, 0)
        return more
