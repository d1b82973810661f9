"""L1 norm of the channel's own filters (Li et al., ICLR 2017), divided by the group's mean."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from xedge.groups import ChannelGroup
from xedge.observe import Observed


def score(group: ChannelGroup, observed: Observed, keep: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The mean over the producing layers of the L1 norm of each channel's weights, [C]."""
    norms = [np.abs(w).sum(1) for w in observed.producer_weights[group.name]]
    total = np.mean([n / (n.mean() or 1.0) for n in norms], axis=0) if norms else np.ones(group.size)
    return np.where(keep, total, 0.0)
