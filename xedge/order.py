"""Channels in the order of their widths: equal widths lie together, which an entropy coder likes.

Where a channel lies is no matter to a net as long as all who make it, pass it on and read it agree, and a channel group
says who they are.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from xedge.groups import ChannelGroup, Groups
from xedge.quantize import ScaleTable, WeightScale

Ints = NDArray[np.int64]
Orders = dict[str, Ints]
"""Group -> its channels in their new order."""


def by_width(model: nn.Module, groups: Groups, table: ScaleTable) -> Orders:
    """Each free group's channels by their planned bits, the widest first, else as they lie; without groups that lie so.

    Empty where the table has weights that are none of the model's parameters, such as those of a lone batch norm: it
    could not follow.
    """
    if not set(table.weights) <= set(dict(model.named_parameters())):
        return {}
    found = {g.name: np.argsort(-_bits(g, table), kind="stable") for g in groups.free if _follows(g, table)}
    return {name: order for name, order in found.items() if (np.diff(order) < 0).any()}


def _follows(g: ChannelGroup, table: ScaleTable) -> bool:
    """Whether the table's arrays run along the axes of the parameters."""
    for piece in g.slices:
        w = table.weights.get(piece.param)
        if w is not None:
            reads = piece.kind == "in"
            if piece.size != w.values.shape[1 - w.axis if reads else w.axis] or len(w.bits) != w.values.shape[w.axis]:
                return False
    return True


def _bits(g: ChannelGroup, table: ScaleTable) -> NDArray[np.float64]:
    """Planned bits of each channel, in all weights that make it or pass it on, [C]."""
    total = np.zeros(g.size)
    for piece in g.slices:
        w = table.weights.get(piece.param)
        if w is not None and piece.kind != "in":
            total += w.planned[piece.index].sum(1, dtype=np.float64) * (w.values.size // len(w.bits))
    return total


def _places(groups: Groups, orders: Orders) -> dict[tuple[str, int], tuple[bool, Ints]]:
    """Parameter and axis -> whether channels are read there, and where each position is taken from."""
    places: dict[tuple[str, int], tuple[bool, Ints]] = {}
    for name, order in orders.items():
        for piece in groups[name].slices:
            start = (piece.kind == "in", np.arange(piece.size))
            _, place = places.setdefault((piece.param, piece.axis), start)
            place[piece.index] = piece.index[order]
    return places


@torch.no_grad()
def reordered(model: nn.Module, groups: Groups, orders: Orders) -> nn.Module:
    """A copy of `model` that computes the same with its channels in another order."""
    other = copy.deepcopy(model)
    tensors = dict(other.named_parameters(remove_duplicate=False)) | dict(other.named_buffers(remove_duplicate=False))
    for (param, axis), (_, place) in _places(groups, orders).items():
        tensor = tensors[param]
        tensor.copy_(tensor.index_select(axis, torch.from_numpy(place).to(tensor.device)))
    return other


def reordered_table(table: ScaleTable, groups: Groups, orders: Orders) -> ScaleTable:
    """The table of the reordered model."""
    weights = dict(table.weights)
    for (param, _), (reads, place) in _places(groups, orders).items():
        if param in weights:
            weights[param] = _moved(weights[param], reads, place)
    return replace(table, weights=weights)


def _moved(w: WeightScale, reads: bool, place: Ints) -> WeightScale:
    if reads:
        return replace(w, values=np.ascontiguousarray(w.values.take(place, 1 - w.axis)))
    return replace(
        w,
        scale=w.scale[place],
        bits=w.bits[place],
        coded=None if w.coded is None else w.coded[place],
        values=np.ascontiguousarray(w.values.take(place, w.axis)),
        bias=None if w.bias is None else w.bias[place],
    )
