"""First-order Taylor: the squared change of the loss when the channel is zeroed (Molchanov et al., CVPR 2019).

    T_i = E_n ( sum_pixels x_i dLoss/dx_i )^2

taken at the inputs of the consuming layers. The loss is the cross-entropy with the labels, or with a label drawn from
the model's own prediction where there are none.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from xedge.groups import ChannelGroup
from xedge.observe import Observed


def score(group: ChannelGroup, observed: Observed, keep: NDArray[np.bool_]) -> NDArray[np.float64]:
    """T of each channel, [C], summed over the group's taps."""
    total = np.zeros(group.size)
    for seen, columns in observed.of(group):
        total += seen.taylor[columns]
    return np.where(keep, total, 0.0)
