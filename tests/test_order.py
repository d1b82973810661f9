"""Channels in the order of their bits: the net stays the same."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from flavours import SHAPE, images, quantised, run

from xedge.export import write_flavour
from xedge.groups import find_groups
from xedge.onnx_graph import export_float
from xedge.order import by_width, reordered, reordered_table
from xedge.quantize import ScaleTable, dequantised


def spread(table: ScaleTable, seed: int) -> ScaleTable:
    """The table with bits drawn anew, and integers that fit them."""
    draw, weights = np.random.default_rng(seed), {}
    for name, w in table.weights.items():
        bits = draw.integers(2, 9, len(w.bits)).astype(np.uint8)
        top = (2 ** (bits.astype(int) - 1) - 1).reshape([-1 if i == w.axis else 1 for i in range(w.values.ndim)])
        weights[name] = replace(w, bits=bits, values=np.clip(w.values, -top, top).astype(np.int8))
    return replace(table, weights=weights)


@pytest.mark.parametrize("name", ["plain", "residual"])
def test_the_net_stays_the_same(name: str) -> None:
    q = quantised(name)
    table = spread(q.table, 1)
    groups = find_groups(q.model, torch.zeros(1, *SHAPE))
    orders = by_width(q.model, groups, table)
    assert set(orders) == {g.name for g in groups.free}, "every group has bits in no order"
    model, moved = reordered(q.model, groups, orders), reordered_table(table, groups, orders)
    x = torch.from_numpy(images(4, 3))
    with torch.no_grad():
        assert torch.allclose(q.model.double()(x.double()), model.double()(x.double()), rtol=1e-9, atol=1e-9)
    q.model.float(), model.float()
    assert any(not torch.equal(a, b) for a, b in zip(q.model.parameters(), model.parameters(), strict=True))
    proto = export_float(model, SHAPE, 17)
    for want, got in (
        (dequantised(q.proto, table.weights), dequantised(proto, moved.weights)),
        *((write_flavour(q.proto, table, f), write_flavour(proto, moved, f)) for f in ("litert", "onnxruntime")),
    ):
        a, b = run(want, x.numpy()), run(got, x.numpy())
        assert float((a - b).abs().max()) < 0.02 * float(a.abs().max())
    for g in groups.free:
        lead = next(s for s in g.slices if s.kind == "out" and s.param in table.weights)
        if len(g.producers) == 1 and not g.followers:
            assert (np.diff(moved.weights[lead.param].bits[lead.index[:, 0]].astype(int)) <= 0).all()
    for w, m in zip(table.weights.values(), moved.weights.values(), strict=True):
        assert sorted(w.bits) == sorted(m.bits)
        assert np.array_equal(np.sort(w.values.ravel()), np.sort(m.values.ravel()))
    assert by_width(model, find_groups(model, torch.zeros(1, *SHAPE)), moved) == {}, "now they lie in order"


def test_norms_without_a_layer_leave_the_channels_where_they_are() -> None:
    q = quantised("dense")
    groups = find_groups(q.model, torch.zeros(1, *SHAPE))
    assert any(name.endswith(".folded.weight") for name in q.table.weights)
    assert by_width(q.model, groups, q.table) == {}
