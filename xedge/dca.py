"""Discriminant component analysis: the subspace of a layer's channels that carries the teacher (section 3.4).

The components are the principal eigenvectors of P S_B,

    P S_B v_k = mu_k v_k,  v_k^T (S + rho I) v_l = [k = l],  sum_k mu_k = tr(P S_B) = DI

so that DI is explained component by component, mu_k each. S_B = C C^T with C = X Y^T has the rank of the centred
teacher at most: L - 1 for labels (Theorem 1), however many channels there are. The more channels than components, the
more of them can go without the teacher noticing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from xedge.criteria.di import EPS, ridge, scale, scatters
from xedge.groups import Groups
from xedge.moments import Moments
from xedge.observe import Observed
from xedge.teacher import Teacher

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Components:
    """Discriminant components of one set of channels.

    Attributes:
        values: mu_k >= 0, falling, [K], K = min(C, L). They add up to DI; beyond the rank of S_B they are 0.
        vectors: v_k as columns, [C, K], on channels of unit scatter when these were standardised.
    """

    values: Array
    vectors: Array


def components(moments: Moments, teacher: Teacher, eps: float, *, standardise: bool = False) -> Components:
    """The components of DI as `xedge.criteria.di.solve` defines it, by the singular values of R^-1 X Y^T with
    S + rho I = R R^T.

    Args:
        moments: of the channels with the encoded teacher.
        teacher: weights its rows.
        eps: ridge relative to tr(S) / C.
        standardise: divide each channel by its deviation first.
    """
    s, c = scatters(moments, teacher, standardise=standardise)
    root = np.linalg.cholesky(s + ridge(s, eps) * np.eye(len(s)))
    u, sigma, _ = np.linalg.svd(np.linalg.solve(root, c), full_matrices=False)
    return Components(sigma**2, np.linalg.solve(root.T, u))


def explained(observed: Observed, groups: Groups) -> dict[str, Array]:
    """For each group, DI of its first 1, 2, ... K components relative to the teacher's energy, [K], averaged over its
    taps: the last is the DI of all its channels. Taps of several resolutions have teachers, and so components, of
    several lengths: K is the longest."""
    curves = {}
    for g in groups.free:
        taps = [
            (components(m, observed.teacher, EPS, standardise=True).values, scale(m, observed.teacher))
            for seen, columns in observed.of(g)
            for m in [seen.pooled.select(np.arange(columns.start, columns.stop))]
        ]
        if taps:
            longest = max(len(values) for values, _ in taps)
            rows = [np.pad(values / energy, (0, longest - len(values))) for values, energy in taps]
            curves[g.name] = np.cumsum(np.mean(rows, axis=0))
    return curves
