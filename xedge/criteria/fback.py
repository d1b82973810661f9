"""DI with the next layer's response as teacher, weighted by Fisher information: label-free, and the default.

The teacher is the response u_o = sum_k w_ok x of the consuming layer, each output weighted by how much the model's
own log-likelihood feels it, F_o = E sum_pixels (d log p(y) / d u_o)^2 with y drawn from the model. Then

    X Y^T Y X^T = S M S,  M = sum_o F_o sum_k w_ok w_ok^T,  S = covariance of single pixels

and the exact loss of removing channel i while the rest is refitted (which folding then really does) is the DI
formula's ||G_i||^2 / P_ii with G G^T = P S M S P. Channels are eliminated one by one, exactly.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from xedge.criteria.greedy import eliminate
from xedge.groups import ChannelGroup
from xedge.observe import Observed

EPS = 1e-3
Array = NDArray[np.float64]


def score(group: ChannelGroup, observed: Observed, keep: NDArray[np.bool_]) -> Array:
    """The Fisher-weighted error of the next layers' responses when the channel goes in its turn, [C]."""
    inverses, readouts = [], []
    for seen, columns in observed.of(group):
        moments = seen.pixels.select(np.arange(columns.start, columns.stop)[keep])
        s = moments.scatter() / moments.count
        size = len(s)
        rho = EPS * (float(np.trace(s)) / size or 1.0)
        p = np.linalg.inv(s + rho * np.eye(size))
        w = seen.weight[:, columns][:, keep] * np.sqrt(seen.fisher)[:, None, None, None]
        w = w.transpose(1, 0, 2, 3).reshape(size, -1)
        m = w @ w.T
        # M = B B^T by its eigenvectors: G = P S B then has at most C columns however many outputs there are.
        values, vectors = np.linalg.eigh(m)
        b = vectors * np.sqrt(np.clip(values, 0, None))
        inverses.append((p + p.T) / 2)
        readouts.append(p @ s @ b)
    order, costs = eliminate(inverses, readouts)
    kept = np.zeros(int(keep.sum()))
    kept[order] = np.maximum.accumulate(costs) * (1 + 1e-9 * np.arange(len(costs)))
    total = np.zeros(group.size)
    total[keep] = kept
    return total
