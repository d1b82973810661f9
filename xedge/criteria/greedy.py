"""Exact greedy elimination on Discriminant Information: each removal sees the ones before it.

After channel i goes, P and G of the rest follow by a rank-one downdate:

    P <- P - p p^T / P_ii,  G <- G - p G_i / P_ii        (p = column i of P)

so all C removals together cost O(C^3). One-shot scores throw away both copies of a duplicated channel; this keeps one.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from xedge.criteria.di import scale, solve
from xedge.groups import ChannelGroup
from xedge.observe import Observed

EPS = 0.05
Array = NDArray[np.float64]


def eliminate(inverses: list[Array], readouts: list[Array]) -> tuple[NDArray[np.intp], Array]:
    """Remove all channels one by one, always the one that costs least over all taps.

    The losses need G only through A = G G^T, whose downdate is of rank two:

        A <- A - p u^T - u p^T,  u = a / P_ii - p A_ii / (2 P_ii^2)        (a = column i of A)

    Args:
        inverses: P of each tap, [C, C].
        readouts: G of each tap, [C, L].

    Returns:
        The order of removal, [C], and what each removal costs, [C], in that order.
    """
    ps = [torch.from_numpy(p.copy()) for p in inverses]
    taught = [torch.from_numpy(g @ g.T) for g in readouts]
    size = len(inverses[0])
    left = torch.arange(size)
    gone = torch.zeros(size, dtype=torch.bool)
    order = np.empty(size, dtype=np.intp)
    costs = np.empty(size)
    for step in range(size):
        loss = torch.zeros(len(left), dtype=torch.float64)
        for p, a in zip(ps, taught, strict=True):
            loss += a.diagonal().clamp_min(0) / p.diagonal()
        loss[gone] = torch.inf
        i = int(loss.argmin())
        order[step], costs[step] = int(left[i]), float(loss[i])
        gone[i] = True
        for p, a in zip(ps, taught, strict=True):
            column, pii = p[:, i].clone(), float(p[i, i])
            u = a[:, i] / pii - column * (float(a[i, i]) / (2 * pii * pii))
            a.addr_(column, u, alpha=-1).addr_(u, column, alpha=-1)
            p.addr_(column, column, alpha=-1 / pii)
            p[i, i] = 1.0  # the row is gone; only its diagonal is still divided by
        if 8 * int(gone.sum()) >= len(left) and len(left) > 16:  # now and then, so that the work shrinks as well
            rest = ~gone
            ps = [p[rest][:, rest] for p in ps]
            taught = [a[rest][:, rest] for a in taught]
            left, gone = left[rest], gone[rest]
    return order, costs


def score(group: ChannelGroup, observed: Observed, keep: NDArray[np.bool_]) -> Array:
    """What DI loses when the channel goes in its turn, relative to the teacher's energy, [C]; never falling along
    the order of removal, so that sorting by it gives that order."""
    inverses, readouts = [], []
    for seen, columns in observed.of(group):
        moments = seen.pooled.select(np.arange(columns.start, columns.stop)[keep])
        one = solve(moments, observed.teacher, EPS, standardise=True)
        inverses.append(one.inverse)
        readouts.append(one.readout / np.sqrt(scale(moments, observed.teacher)))
    order, costs = eliminate(inverses, readouts)
    kept = np.zeros(int(keep.sum()))
    # The rank breaks ties in the order of removal.
    kept[order] = np.maximum.accumulate(costs) * (1 + 1e-9 * np.arange(len(costs)))
    total = np.zeros(group.size)
    total[keep] = kept
    return total
