"""Training through roundings: integers stay in their bits, the loss falls, artefacts are still the judge's model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import tiny
import tiny_pictures
import torch
from flavours import SHAPE, fits, quantised
from safetensors.torch import load_file
from torch import nn

from xedge.judge import Judge
from xedge.onnx_graph import export_float
from xedge.progress import Talk
from xedge.qat import Tuned, tune
from xedge.quantize import ScaleTable, quantize
from xedge.ranges import calibrate, for_pictures
from xedge.request import Request, load_everything
from xedge.simulate import Quantized
from xedge.train import Recipe, fit

if TYPE_CHECKING:
    from tiny_runs import Xedge

pytest_plugins = ["tiny_runs"]


@pytest.mark.parametrize("bits", [2.0, 5.0])
def test_untrained_it_is_the_judge(bits: float) -> None:
    q = quantised("plain", bits)
    x = torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(0))
    judge = Quantized(q.model, q.proto, q.table, "litert", SHAPE)
    with torch.no_grad():
        want = judge(x)
    tuned = Tuned(Quantized(q.model, q.proto, q.table, "litert", SHAPE), q.table)
    with torch.no_grad():
        assert float((tuned(x) - want).abs().max()) < 0.02 * float(want.abs().max())
    back = tuned.table(q.table)
    for name, w in q.table.weights.items():
        assert np.array_equal(back.weights[name].values, w.values)
        np.testing.assert_allclose(back.weights[name].scale, w.scale, rtol=1e-6)
    assert {n for n, _ in tuned.named_parameters()} == {
        f"{kind}.{i}" for kind in ("weights", "biases", "growths") for i in range(len(q.table.weights))
    }


def test_gradients_pass_straight_through_and_move_scales() -> None:
    q = quantised("plain", 3.0)
    tuned = Tuned(Quantized(q.model, q.proto, q.table, "litert", SHAPE), q.table)
    x = torch.randn(8, *SHAPE, generator=torch.Generator().manual_seed(1))
    nn.functional.cross_entropy(tuned(x), torch.arange(8)).backward()
    for p in tuned.parameters():
        if p.numel():
            assert p.grad is not None
            assert bool(p.grad.isfinite().all())
    assert all(float(p.grad.abs().max()) > 0 for p in tuned.growths if p.grad is not None)


def test_any_memory_format_will_do() -> None:
    """Training gives images and weights channels last; a traced flatten takes none of these."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 49, 4)).eval()
    proto = export_float(model, SHAPE, 17)
    x = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(1))
    table = quantize(proto, calibrate(proto, lambda: (row[None].numpy() for row in x)), mean_bits=4)
    tuned = Tuned(Quantized(model, proto, table, "litert", SHAPE), table)
    want = tuned(x)
    got = tuned.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(got, want)
    for name, w in tuned.table(table).weights.items():
        assert np.array_equal(w.values, table.weights[name].values)


def test_training_mends_two_bits(weights: Path) -> None:
    model = tiny.net()
    model.load_state_dict(load_file(weights))
    data = tiny.data()
    proto = export_float(model.eval(), data.shape, 17)
    seen = calibrate(proto, lambda: (data.train[i][0][None].numpy() for i in range(64)))
    table = quantize(proto, seen, mean_bits=2, feedback=False, correct=False)
    judge = Quantized(model, proto, table, "onnxruntime", data.shape)

    def loss(one: ScaleTable) -> float:
        x, y = tiny.pictures(256, 1)
        with torch.no_grad():
            return float(nn.functional.cross_entropy(Quantized(model, proto, one, "onnxruntime", data.shape)(x), y))

    tuned = Tuned(judge, table)
    fit(tuned, data, Recipe(epochs=8, lr=0.05, batch=32, weight_decay=0.0, distill=0.5), original=model)
    after = tuned.table(table)
    with torch.no_grad():
        x, y = tiny.pictures(256, 1)
        least = float(nn.functional.cross_entropy(model(x), y))
    assert loss(after) - least < 0.5 * (loss(table) - least)
    assert after.bits_of() == table.bits_of()
    changed = 0
    for name, w in after.weights.items():
        assert fits(w.values, w.bits, w.axis)
        assert (w.scale > 0).all()
        changed += int((w.values != table.weights[name].values).sum())
    assert changed > 0


def test_training_mends_pictures(picture_weights: Path) -> None:
    model, data = tiny_pictures.net(), tiny_pictures.data()
    model.load_state_dict(load_file(picture_weights))
    proto = export_float(model.eval(), data.shape, 17)
    seen = for_pictures(proto, calibrate(proto, lambda: (data.train[i][0][None].numpy() for i in range(16))))
    table = quantize(proto, seen, mean_bits=3, feedback=False, correct=False)
    judge = Judge.of(data)

    def quality(one: ScaleTable) -> float:
        pairs = [data.val[i] for i in range(len(data.val))]
        x, truth = (torch.stack(part) for part in zip(*pairs, strict=True))
        with torch.no_grad():
            out = Quantized(model, proto, one, "litert", data.shape)(x)
        return judge.quality(out, truth, out)

    tuned = Tuned(Quantized(model, proto, table, "litert", data.shape), table)
    recipe = Recipe(epochs=10, lr=3e-4, batch=16, weight_decay=0.0, distill=0.5)
    fit(tuned, data, recipe, original=model)
    after = tuned.table(table)
    assert quality(after) > quality(table) + 1
    assert after.bits_of() == table.bits_of()
    assert all(fits(w.values, w.bits, w.axis) for w in after.weights.values())


def test_training_that_makes_things_worse_is_undone(picture_weights: Path, tmp_path: Path) -> None:
    model, data = tiny_pictures.net(), tiny_pictures.data()
    model.load_state_dict(load_file(picture_weights))
    proto = export_float(model.eval(), data.shape, 17)
    seen = for_pictures(proto, calibrate(proto, lambda: (data.train[i][0][None].numpy() for i in range(16))))
    table = quantize(proto, seen, mean_bits=8)
    request = Request(
        model=tiny_pictures.NET,
        weights=str(picture_weights),
        data=tiny_pictures.DATA,
        targets=("android",),
        qat=1,
        lr=0.5,
    )
    said: list[str] = []
    talk = Talk(quiet=True)
    talk.say = said.append  # type: ignore[method-assign]
    assert tune(load_everything(request), model, proto, table, tmp_path / "c.safetensors", talk) is table
    assert re.search(r"in integers: .* dB on held-back data for .* dB before, undone", said[-1])


def test_a_run(xedge: Xedge, weights: Path, tmp_path: Path) -> None:
    words = [
        "compress",
        "-m",
        tiny.NET,
        "--weights",
        weights,
        "-d",
        tiny.DATA,
        "--target",
        "jetson",
        "--target",
        "android",
    ]
    words += ["--macs", "1.0", "--bits", "3", "--no-fit", "--qat", "2", "--batch", "32", "--no-bench"]
    ended = xedge(*words, "-o", tmp_path / "run")
    assert ended.code == 0, ended.err
    assert "training in integers: epoch 2 of 2" in ended.err
    before, after = (ScaleTable.load(tmp_path / f"run/{n}.safetensors") for n in ("rounded", "tuned"))
    assert before.bits_of() == after.bits_of()
    assert any(not np.array_equal(before.weights[n].scale, w.scale) for n, w in after.weights.items())
    verified = json.loads((tmp_path / "run/verify.json").read_text())
    assert all(row["verified_agreement"] > 0.97 for row in verified["targets"].values())
    for flag, value in (("--bytes", "9kB"), ("--codebook", None)):
        refused = xedge("compress", "--qat", "1", *([flag, value] if value else [flag]), "-o", tmp_path / "no")
        assert refused.code == 2
        assert f"--qat and {flag}" in refused.err
    refused = xedge("compress", "--fit", "--codebook", "-o", tmp_path / "no")
    assert (refused.code, "--fit and --codebook" in refused.err) == (2, True)
