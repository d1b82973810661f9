"""Bits per channel, per layer, or per tensor: one budget, and as many widths and scales as the target takes."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import numpy as np
import onnx
import pytest
import tiny
from flavours import FLAVOURS, constants, fits, images, quantised, run
from torch import nn

from xedge.export import write_flavour
from xedge.onnx_graph import Graph, export_float
from xedge.quantize import CAUTION, LEVELS, ScaleTable, noise_tables, quantize
from xedge.ranges import calibrate
from xedge.rounding import layers_of
from xedge.target import BitsPer
from xedge.targets import tflite

if TYPE_CHECKING:
    from tiny_runs import Xedge

pytest_plugins = ["tiny_runs"]

PER: tuple[BitsPer, ...] = get_args(BitsPer)


def coarse(per: BitsPer, bits: float) -> tuple[ScaleTable, float]:
    """The plain net's table, and its distortion as the allocation counts it."""
    q = quantised("plain")
    layers = layers_of(q.proto, q.calibration.patches, shared=per == "tensor")
    felt = noise_tables(layers, feedback=True)
    table = quantize(q.proto, q.calibration, mean_bits=bits, tables=felt, bits_per=per)
    return table, sum(float(felt[n][np.arange(len(w.bits)), w.bits].sum()) for n, w in table.weights.items())


@pytest.mark.parametrize("bits", [2.0, 2.7, 4.5])
def test_the_budget_holds_and_what_is_shared_is_equal(bits: float, tmp_path: Path) -> None:
    lost = {}
    for per in PER:
        table, lost[per] = coarse(per, bits)
        assert table.bits_per == per
        assert sum(int(w.bits.sum()) * (w.values.size // len(w.bits)) for w in table.weights.values()) <= bits * sum(
            w.values.size for w in table.weights.values()
        )
        for w in table.weights.values():
            assert fits(w.values, w.bits, w.axis)
            if per != "channel":
                assert len(set(w.bits.tolist())) == 1
                assert w.bits[0] >= 1
            assert (len(set(w.scale.tolist())) == 1) == (per == "tensor")
        table.save(tmp_path / per)
        assert ScaleTable.load(tmp_path / per).bits_per == per
    assert lost["channel"] <= lost["layer"] <= lost["tensor"]


def test_the_integer_optimum_is_that_of_brute_force() -> None:
    """Four layers of equal size with convex tables: the best of all 8^4 choices within the budget."""
    net = nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1) for _ in range(4))).eval()
    proto = export_float(net, (4, 6, 6), 17)
    seen = calibrate(proto, lambda: images(4, 0, (4, 6, 6))[:, None])
    draw = np.random.default_rng(3)
    gains = -np.sort(-draw.random((4, 4, 8)) * draw.lognormal(0, 2, (4, 1, 1)), axis=2)
    loss = np.concatenate([np.cumsum(gains[..., ::-1], 2)[..., ::-1], np.zeros((4, 4, 1))], 2)
    tables = {f"{i}.weight": loss[i] for i in range(4)}
    total = loss.sum(1)
    for mean in (2.0, 2.75, 3.4, 6.0):
        table = quantize(proto, seen, mean_bits=mean, tables=tables, bits_per="layer", feedback=False)
        found = [int(w.bits[0]) for w in table.weights.values()]
        every = itertools.product(LEVELS[max(1, min(CAUTION, int(mean) - 1)) :], repeat=4)
        best = min(sum(total[i, b] for i, b in enumerate(c)) for c in every if sum(c) <= 4 * mean)
        assert sum(total[i, b] for i, b in enumerate(found)) == pytest.approx(best)


def test_a_shared_scale_is_the_best_shared_one() -> None:
    """No other shared scale among the candidates leaves less, summed over the channels; its own scales leave less."""
    q = quantised("plain")
    (one, *_), (own, *_) = (list(layers_of(q.proto, q.calibration.patches, shared=s).values()) for s in (True, False))
    wide = np.full(len(one.rows), 3)

    def left(scale: np.ndarray, odd: np.ndarray) -> float:
        steps = one.rows / scale[:, None, None]
        q = np.clip(2 * np.floor(steps / 2) + 1, -7, 7) if odd[0] else np.clip(np.round(steps), -4, 3)
        diagonal = one.diagonal()
        worth = diagonal + 1e-3 * diagonal.mean()
        return float((np.square(one.rows - q * scale[:, None, None]) * worth).sum())

    grid, apart = one.grid(wide), own.grid(wide)
    found = left(grid.scale, grid.odd)
    for scale, odd in itertools.product(np.linspace(0.3, 2, 15) * grid.scale[0], (False, True)):
        assert found <= 1.02 * left(np.full_like(grid.scale, scale), np.full_like(grid.odd, odd))
    assert len(set(apart.scale.tolist())) > 1


def test_one_scale_is_written_as_one_and_runs() -> None:
    table, _ = coarse("tensor", 4.0)
    q, x = quantised("plain"), images(4, 5)
    made = {f: write_flavour(q.proto, table, f) for f in FLAVOURS}
    for model in made.values():
        stored = constants(model)
        assert all(stored[f"{n}_scale"].shape == () for n in table.weights)
    out = tflite.runner(tflite.convert(made["litert"]))(x)
    low, high = table.activations[Graph(q.proto).outputs[0]]
    assert np.abs(out - run(made["litert"], x).numpy()).max() <= 1.01 * (high - low) / 255
    whole = run(q.proto, x)
    assert float((run(made["onnxruntime"], x) - whole).square().mean()) < float(whole.var())


def test_a_target_of_ones_own_demands_it(xedge: Xedge, weights: Path, tmp_path: Path) -> None:
    """With two targets the stricter counts, training keeps to it, and the files hold one scale a weight."""
    own = tmp_path / "my_board.py"
    own.write_text(
        "from dataclasses import replace\nfrom xedge.load import load_target\n"
        'TARGET = replace(load_target("host-cpu"), name="my-board", aliases=(), bits_per="tensor")\n'
    )
    words = ["compress", "-m", tiny.NET, "--weights", weights, "-d", tiny.DATA, "--macs", "1.0", "--no-bench"]
    words += ["--epochs", "0", "--target", f"{own}:TARGET", "--target", "android", "--bits-per", "layer"]
    ended = xedge(*words, "--bits", "4", "--qat", "1", "-o", tmp_path / "run")
    assert ended.code == 0, ended.err
    table = ScaleTable.load(tmp_path / "run/scales.safetensors")
    assert table.bits_per == "tensor"
    assert all(len(set(w.scale.tolist())) == len(set(w.bits.tolist())) == 1 for w in table.weights.values())
    report = json.loads((tmp_path / "run/report.json").read_text())
    (said,) = (note for note in report["notes"] if "integer optimum" in note)
    assert re.search(r"distortion of \d\S+, the closed form in whole bits under the same budget \d", said)
    assert table.compared is not None
    assert said == table.compared.words()
    assert table.compared.optimum <= table.compared.closed * (1 + 1e-9)
    assert said in (tmp_path / "run/report.html").read_text()
    stored = constants(onnx.load(next((tmp_path / "run/targets/my-board").glob("*.onnx"))))
    assert all(stored[f"{name}_scale"].size == 1 for name in table.weights)
    refused = xedge(*words, "--codebook", "-o", tmp_path / "no")
    assert (refused.code, "--codebook: a codebook has a scale for each channel" in refused.err) == (2, True)
    refused = xedge("compress", "--bits-per", "layr", "-o", tmp_path / "no")
    assert (refused.code, "there is no --bits-per layr" in refused.err) == (2, True)
    assert "layer" in refused.err
