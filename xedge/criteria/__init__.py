"""Criteria: one file each, one function `score(group, observed, keep) -> float64[C]`; low scores go first.

Scores of one criterion share a unit across layers, so that they may be ranked together; where the formula has none
(magnitude, random) each group is divided by its own mean. A channel with keep False scores 0.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from xedge.groups import ChannelGroup
from xedge.observe import Observed

Criterion = Callable[[ChannelGroup, Observed, NDArray[np.bool_]], NDArray[np.float64]]
