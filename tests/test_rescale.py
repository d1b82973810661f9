"""Scales and biases that learn: integers stay, unseen images come nearer to the float net, artefacts agree."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import tiny
import tiny_pictures
import torch
from flavours import SHAPE, quantised
from safetensors.torch import load_file
from torch import Tensor

from xedge.judge import Judge
from xedge.onnx_graph import export_float
from xedge.quantize import ScaleTable, quantize
from xedge.ranges import calibrate, for_pictures
from xedge.rescale import BATCH, Rescaled, learning, recipe_of
from xedge.simulate import Quantized
from xedge.train import fit, predict

if TYPE_CHECKING:
    from tiny_runs import Xedge

pytest_plugins = ["tiny_runs"]


@pytest.mark.parametrize("flavour", ["litert", "tensorrt"])
def test_untrained_it_is_the_judge(flavour: str) -> None:
    q = quantised("plain", 3.0)
    x = torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(0))
    judge = Quantized(q.model, q.proto, q.table, flavour, SHAPE)  # type: ignore[arg-type]
    with torch.no_grad():
        want = judge(x)
        net = Rescaled(judge, q.proto, q.table)
        assert float((net(x) - want).abs().max()) < 0.02 * float(want.abs().max())
    back = net.table(q.table)
    for name, w in q.table.weights.items():
        assert np.array_equal(back.weights[name].scale, w.scale)
        assert back.weights[name].bias is w.bias or np.array_equal(back.weights[name].bias, w.bias)  # type: ignore[arg-type]


@pytest.mark.parametrize("pictures", [False, True], ids=["classes", "pictures"])
def test_unseen_images_come_nearer_to_the_float_net(pictures: bool, weights: Path, picture_weights: Path) -> None:
    module = tiny_pictures if pictures else tiny
    model, data = module.net(), module.data()
    model.load_state_dict(load_file(picture_weights if pictures else weights))
    proto = export_float(model.eval(), data.shape, 17)
    seen = calibrate(proto, lambda: (data.train[i][0][None].numpy() for i in range(32)))
    seen = for_pictures(proto, seen) if pictures else seen
    table = quantize(proto, seen, mean_bits=3, feedback=False, correct=False)
    net = Rescaled(Quantized(model, proto, table, "litert", data.shape), proto, table)
    base, _ = predict(model, data.val)

    def far(got: Tensor) -> float:
        return Judge.of(data).divergence(base, got)

    before = far(predict(net, data.val)[0])
    fit(net, replace(data, train=learning(data.train, 0)), recipe_of(6, 0), original=model)
    after = net.table(table)
    again = Rescaled(Quantized(model, proto, after, "litert", data.shape), proto, after)
    assert far(predict(again, data.val)[0]) < 0.9 * before
    assert after.bits_of() == table.bits_of()
    for name, w in after.weights.items():
        assert np.array_equal(w.values, table.weights[name].values)
        assert (w.scale > 0).all()
        assert w.scale.dtype == np.float32


def test_what_it_learns_on_is_fixed_by_the_seed() -> None:
    data = tiny.data()
    one, again, other = (learning(data.train, seed) for seed in (0, 0, 1))
    assert len(one) >= BATCH
    assert all(torch.equal(one[i][0], again[i][0]) for i in range(8))
    assert not all(torch.equal(one[i][0], other[i][0]) for i in range(8))


def test_a_run(xedge: Xedge, weights: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["compress", "-m", tiny.NET, "--weights", weights, "-d", tiny.DATA, "--target", "android", "--macs", "1.0"]
    ended = xedge(*words, "--bits", "3", "--learn-scales", "2", "--no-bench", "-o", run)
    assert ended.code == 0, ended.err
    assert "learning scales: epoch 2 of 2" in ended.err
    assert "on held-back data for" in ended.err
    before, after = (ScaleTable.load(run / f"{n}.safetensors") for n in ("rounded", "rescaled"))
    assert any(not np.array_equal(before.weights[n].scale, w.scale) for n, w in after.weights.items())
    verified = json.loads((run / "verify.json").read_text())
    assert all(row["verified_agreement"] > 0.97 for row in verified["targets"].values())
    assert not list(run.glob(".*checkpoint*"))
    refused = xedge("compress", "--learn-scales", "1", "--bytes", "9kB", "-o", tmp_path / "no")
    assert refused.code == 2
    assert "--learn-scales and --bytes" in refused.err
