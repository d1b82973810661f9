"""Soft X-pruning: channels of 0 bits go where the graph and the target allow it, and nothing else changes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
import tiny
import torch
from flavours import SHAPE, quantised
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from xedge.groups import Groups, find_groups
from xedge.load import load_target
from xedge.onnx_graph import export_float
from xedge.pipeline import rebuild
from xedge.quantize import ScaleTable, quantize
from xedge.ranges import calibrate
from xedge.report import read_json
from xedge.request import Loaded, Request
from xedge.rework import bits_left
from xedge.soft import cut_silent, silent
from xedge.teacher import Teacher

if TYPE_CHECKING:
    from tiny_runs import Xedge

pytest_plugins = ["tiny_runs"]


def without_bits(table: ScaleTable, weight: str, channels: list[int]) -> ScaleTable:
    """The table with 0 bits, and integers of 0, for some outputs of a weight."""
    w = table.weights[weight]
    bits, values = w.bits.copy(), np.moveaxis(w.values.copy(), w.axis, 0)
    bits[channels], values[channels] = 0, 0
    changed = replace(w, bits=bits, values=np.ascontiguousarray(np.moveaxis(values, 0, w.axis)))
    return replace(table, weights={**table.weights, weight: changed})


def groups_of(name: str) -> Groups:
    return find_groups(quantised(name).model, torch.zeros(1, *SHAPE), prune_stem=True)


def gone(groups: Groups, table: ScaleTable, align: int = 1) -> dict[str, list[int]]:
    keep = silent(groups, table, {g.name: g.size for g in groups.groups}, align)
    return {name: np.flatnonzero(~mask).tolist() for name, mask in keep.items() if not mask.all()}


def test_all_who_make_a_channel_must_have_no_bits_for_it() -> None:
    groups, table = groups_of("residual"), quantised("residual").table
    coupled = next(g for g in groups.free if len(g.producers) == 2)
    one = without_bits(table, f"{coupled.producers[0]}.weight", [1, 2, 3])
    assert gone(groups, one) == {}
    both = without_bits(one, f"{coupled.producers[1]}.weight", [2, 3, 4])
    assert gone(groups, both) == {coupled.name: [2, 3]}
    assert gone(groups, both, align=2) == {coupled.name: [2, 3]}
    assert gone(groups, both, align=4) == {}, "two fewer would be no multiple of 4"
    kept = {n: w for n, w in both.weights.items() if w.layer != coupled.producers[0]}
    assert gone(groups, replace(both, weights=kept)) == {}, "one that stays float makes it"


def test_a_depthwise_layer_without_bits_cuts_a_channel() -> None:
    groups, table = groups_of("plain"), quantised("plain").table
    group = next(g for g in groups.free if "4.weight" in {s.param for s in g.slices if s.kind == "pass"})
    assert gone(groups, without_bits(table, "4.weight", [5])) == {group.name: [5]}
    most = gone(groups, without_bits(table, "4.weight", list(range(8))))[group.name]
    assert len(most) == 7, "one always stays"


class Net(nn.Module):
    """Layers without borders, and some with them behind a ReLU."""

    def __init__(self, seed: int, norm: bool) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Conv2d(1, 8, 3, bias=not norm)
        self.norm = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.second = nn.Conv2d(8, 12, 3, padding=1)
        self.third = nn.Conv2d(12, 8, 2)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images [N, 1, 8, 8] to logits."""
        x = torch.relu(self.norm(self.first(x)))
        x = torch.tanh(self.second(x))
        return self.head(torch.relu(self.third(x)).mean((2, 3)))


@settings(max_examples=3)
@given(st.integers(0, 999), st.booleans())
def test_the_cut_graph_is_the_graph_with_channels_of_zero(seed: int, norm: bool) -> None:
    draw = np.random.default_rng(seed)
    model = Net(seed, norm).eval()
    dead = {"first": [1, 6], "second": [0, 3, 4], "third": [7]}
    with torch.no_grad():
        for name, rows in dead.items():
            layer = getattr(model, name)
            layer.weight[rows] = 0
            if layer.bias is not None:
                layer.bias[rows] = torch.tensor(draw.standard_normal(len(rows)), dtype=torch.float32)
        # Borders of zeros would show a constant that is none.
        (model.norm if norm else model.first).bias[dead["first"]] = -0.3
    data = tiny.data()
    target = replace(load_target("host-cpu"), align=1)
    loaded = Loaded(Request(bits=3.0), data, Teacher("labels", 4), (target,), model, False)
    proto = export_float(model, data.shape, 17)
    images = torch.stack([data.train[i][0] for i in range(16)])
    table = quantize(proto, calibrate(proto, lambda: images.numpy()[:, None]), mean_bits=3)
    for name, rows in dead.items():
        assert (table.weights[f"{name}.weight"].bits[rows] == 0).all(), "nothing is spent on them"
    groups = find_groups(model, images[:1], prune_stem=True)
    small, keep = cut_silent(loaded, model, groups, silent(groups, table, {g.name: g.size for g in groups.groups}, 1))
    assert {name: (~mask).nonzero()[0].tolist() for name, mask in keep.items()} == dead
    assert small.second.weight.shape == (9, 6, 3, 3)
    with torch.no_grad():
        assert float((small(images) - model(images)).abs().max()) < 1e-4 * float(model(images).abs().max())
    left = bits_left(groups, keep, table)
    assert {n: len(b) for n, b in left.items()} == {
        "first.weight": 6, "second.weight": 9, "third.weight": 7, "head.weight": 4,
    }  # fmt: skip
    assert all((b > 0).all() for b in left.values())


@pytest.fixture(scope="module")
def idle(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of the tiny net, in which training left channels idle: 9 of the first layer's 16, 17 of the second's."""
    tensors = load_file(weights)
    tensors["first.weight"][:9] = 0
    tensors["second.weight"][3:20] = 0
    file = tmp_path_factory.mktemp("idle") / "net.safetensors"
    save_file(tensors, file)
    return file


def test_channels_without_bits_leave_the_artefacts(xedge: Xedge, idle: Path, tmp_path: Path) -> None:
    words = ["compress", "-m", tiny.NET, "--weights", idle, "-d", tiny.DATA, "--macs", "1", "--bits", "2", "--no-bench"]
    words += ["--target", "host-cpu", "--target", "android", "--prune-stem"]
    ended = xedge(*words, "-o", tmp_path / "run")
    assert ended.code == 0, ended.err
    shapes = {t.name: list(t.dims) for t in onnx.load(tmp_path / "run/targets/host-cpu/model.onnx").graph.initializer}
    assert shapes["first.weight_q"][0] == 8, "9 have no bits, and 8 is the multiple that the target likes"
    assert shapes["second.weight_q"][:2] == [16, 8]
    assert shapes["head.weight_q"] == [4, 16]
    report = read_json(tmp_path / "run/report.json")
    notes = " ".join(report.notes)
    assert "soft X-pruning: 24 channels cut by quantisation" in notes
    assert "soft X-pruning: 2 channels of 0 bits stay" in notes
    table = ScaleTable.load(tmp_path / "run/scales.safetensors")
    whole = sum(p.numel() for n, p in tiny.net().named_parameters() if n.endswith("weight") and n != "norm.weight")
    assert sum(float(w.bits.mean()) * w.values.size for w in table.weights.values()) <= 2 * whole
    assert report.planned_bits_mean == pytest.approx(table.mean_bits())
    small = rebuild(tmp_path / "run")
    plan = json.loads((tmp_path / "run/plan.json").read_text())
    assert sorted(plan["keep"]["first"]) == list(range(8, 16))
    net = tiny.net()
    net.load_state_dict(load_file(idle))
    x = torch.stack([tiny.data().val[i][0] for i in range(64)])
    with torch.no_grad():
        want, got = net.eval()(x), small(x)
    assert float((got - want).square().mean()) < 1e-3 * float(want.square().mean()), "idle channels leave no trace"
    row, first = report.row("compressed", "android"), report.row("original", "android")
    assert row is not None
    assert first is not None
    assert row.macs < 0.4 * first.macs
    again = xedge(*words[:-1], "--prune-stem", "--bits-min", "1", ".", "-o", tmp_path / "other")
    assert again.code == 0, again.err
    assert "soft" not in " ".join(read_json(tmp_path / "other/report.json").notes)
