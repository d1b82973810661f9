"""Chance: the floor every criterion has to beat. The same group draws the same numbers each time."""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import NDArray

from xedge.groups import ChannelGroup
from xedge.observe import Observed


def score(group: ChannelGroup, observed: Observed, keep: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Uniform numbers in (0, 1), [C]."""
    draw = np.random.default_rng([zlib.crc32(group.name.encode()), observed.seed])
    return np.where(keep, draw.uniform(1e-6, 1.0, group.size), 0.0)
