"""Fisher's discriminant ratio of each channel by itself: between-class over within-class scatter.

    FDR_i = [S_B]_ii / [S_W + rho I]_ii,  S_W = S - S_B      (Eq 6)

on channels of unit scatter, so that it is free of scale. For two classes [S_B]_ii / [S_W]_ii is

    N_1 N_2 / N (mu_1 - mu_2)^2 / (N_1 sigma_1^2 + N_2 sigma_2^2),

half of (mu_1 - mu_2)^2 / (sigma_1^2 + sigma_2^2) when they are of one size. It does not see what channels share: copies
of one good channel all score well (`di` and `greedy` do see it).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from xedge.criteria.di import EPS, scatters
from xedge.errors import UsageError
from xedge.groups import ChannelGroup
from xedge.moments import Moments
from xedge.observe import Observed
from xedge.teacher import Teacher

Array = NDArray[np.float64]


def need_classes(teacher: Teacher) -> None:
    """Raises UsageError when the teacher has no classes."""
    if not teacher.labelled:
        raise UsageError(
            "Fisher's ratio compares classes and the teacher has none",
            where="--criterion fdr or dfdr",
            fix="give labelled data with --teacher labels, or choose di, greedy or fback",
        )


def between_and_total(moments: Moments, teacher: Teacher) -> tuple[Array, Array]:
    """S_B and S of channels of unit scatter, [C, C] each.

    Raises:
        UsageError: the teacher has no classes.
    """
    need_classes(teacher)
    s, c = scatters(moments, teacher, standardise=True)
    return c @ c.T, s


def score(group: ChannelGroup, observed: Observed, keep: NDArray[np.bool_]) -> Array:
    """FDR of each channel, [C], summed over the group's taps.

    Raises:
        UsageError: the teacher has no classes.
    """
    total = np.zeros(group.size)
    for seen, columns in observed.of(group):
        moments = seen.pooled.select(np.arange(columns.start, columns.stop)[keep])
        between, whole = between_and_total(moments, observed.teacher)
        b, w = np.diag(between), np.diag(whole - between)
        total[keep] += b / (np.maximum(w, 0) + EPS)
    return total
