"""Exact greedy elimination on Discriminant Information: each removal sees the ones before it.

After channel i goes, P and G of the rest follow by a rank-one downdate:

    P <- P - p p^T / P_ii,  G <- G - p G_i / P_ii        (p = column i of P)

so all C removals together cost O(C^3). One-shot scores throw away both copies of a duplicated channel; this keeps one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from xedge.criteria.di import scale, solve
from xedge.groups import ChannelGroup
from xedge.observe import Observed

EPS = 0.05
Array = NDArray[np.float64]


def eliminate(inverses: list[Array], readouts: list[Array]) -> tuple[NDArray[np.intp], Array]:
    """Remove all channels one by one, always the one that costs least over all taps.

    Args:
        inverses: P of each tap, [C, C].
        readouts: G of each tap, [C, L].

    Returns:
        The order of removal, [C], and what each removal costs, [C], in that order.
    """
    ps = [p.copy() for p in inverses]
    gs = [g.copy() for g in readouts]
    left = np.arange(len(ps[0]))
    order = np.empty(len(left), dtype=np.intp)
    costs = np.empty(len(left))
    for step in range(len(order)):
        loss = np.zeros(len(left))
        for p, g in zip(ps, gs, strict=True):
            loss += np.sum(g**2, axis=1) / np.diag(p)
        i = int(np.argmin(loss))
        order[step], costs[step] = left[i], loss[i]
        rest = np.delete(np.arange(len(left)), i)
        for t, (p, g) in enumerate(zip(ps, gs, strict=True)):
            column = p[rest, i] / p[i, i]
            gs[t] = g[rest] - np.outer(column, g[i])
            ps[t] = p[np.ix_(rest, rest)] - np.outer(column, p[i, rest])
        left = left[rest]
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
