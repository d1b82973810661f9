"""Soft X-pruning: a channel whose bits are worth more elsewhere gets none, and is cut.

It is cut as pruning cuts: in widths that the target likes, what it carried folded into what stays, with a certificate
that the cut net computes what the net computes whose layers do not read it. Of a channel that is the same everywhere,
as one whose weights are all 0, nothing but a constant is folded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from xedge.batchnorm import input_statistics
from xedge.choose import observe_training
from xedge.groups import Groups
from xedge.plan import MIN_KEEP, STEM_KEEP, Keep, widths
from xedge.prune import prune
from xedge.quantize import ScaleTable
from xedge.refit import cut_and_fold

if TYPE_CHECKING:
    from xedge.request import Loaded


def silent(groups: Groups, table: ScaleTable, originals: Mapping[str, int], align: int) -> Keep:
    """Masks without channels of 0 bits: all layers that make one have none for it, or a depthwise one behind them has.

    Args:
        groups: of the model. originals: their sizes before any cut.
        table: of the model.
        align: of each group so many channels go that its width is a multiple of this.
    """
    keep = groups.whole()
    for g in groups.free:
        pieces = [(p, table.weights[p.param].bits) for p in g.slices if p.param in table.weights and p.kind != "in"]
        planned = all(f"{p}.weight" in table.weights for p in g.producers)
        if not planned or any(p.size != len(bits) for p, bits in pieces):  # grouped transposed: bits along no axis
            continue
        zero = [(p.kind, (bits == 0)[p.index].all(1)) for p, bits in pieces]
        made = np.all([z for kind, z in zero if kind == "out"], 0)
        gone = np.flatnonzero(np.any([made, *(z for kind, z in zero if kind == "pass")], 0))
        steps = widths(g.size, originals[g.name], align, STEM_KEEP if g.stem else MIN_KEEP)
        width = min(w for w in steps if w >= g.size - len(gone))
        keep[g.name][gone[: g.size - width]] = False
    return keep


def cut_silent(loaded: Loaded, model: nn.Module, groups: Groups, keep: Keep) -> tuple[nn.Module, Keep]:
    """`model` without what `keep` drops, and the masks with what the certificate put back."""
    data = loaded.data
    keep = prune(model, groups, keep, torch.stack([data.train[0][0]])).keep
    seen = observe_training(model, groups, data, loaded.teacher, loaded.settings, gradients=False)
    statistics = input_statistics(model, data.train)
    return cut_and_fold(model, groups, keep, data.train, statistics, seen, sequential=False), keep
