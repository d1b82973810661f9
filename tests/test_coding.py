"""Bits of an entropy coder: the length is that of a code, the budget holds, and the packed file is as small as that."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import brotli
import numpy as np
import onnx
import pytest
import tiny
import torch
from flavours import constants, fits, images, quantised
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from xedge.coding import Rates, code_length, width
from xedge.errors import UsageError
from xedge.export import write_flavour
from xedge.onnx_graph import export_float
from xedge.quantize import ScaleTable, noise_tables, quantize
from xedge.ranges import calibrate
from xedge.report import read_json
from xedge.request import Request, load_everything
from xedge.rounding import layers_of

if TYPE_CHECKING:
    from tiny_runs import Xedge

pytest_plugins = ["tiny_runs"]


def one_by_one(row: list[int]) -> float:
    """The code's length, integer after integer."""
    low, span = min(row), max(row) - min(row) + 1
    seen, bits = [0] * span, 0.0
    for n, q in enumerate(row):
        bits -= math.log2((seen[q - low] + 0.5) / (n + span / 2))
        seen[q - low] += 1
    return bits


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(-127, 127), min_size=12, max_size=12), min_size=1, max_size=4))
def test_the_length_is_that_of_the_adaptive_code_or_of_equal_widths(rows: list[list[int]]) -> None:
    got = code_length(np.array(rows).reshape(len(rows), 3, 4))
    for row, bits in zip(rows, got, strict=True):
        equal = len(row) * math.log2(max(row) - min(row) + 1)
        assert bits * len(row) == pytest.approx(min(one_by_one(row), equal), abs=1e-6)
    whole = [q for row in rows for q in row]
    shared = code_length(np.array(rows), shared=True) * len(whole)
    assert len(set(shared.tolist())) == 1
    assert shared[0] == pytest.approx(
        min(one_by_one(whole), len(whole) * math.log2(max(whole) - min(whole) + 1)), abs=1e-6
    )


@given(st.lists(st.integers(-127, 127), min_size=1, max_size=9))
def test_a_width_holds_the_integers_and_no_narrower_one_does(row: list[int]) -> None:
    (bits,) = width(np.array([row])).tolist()
    if not any(row):
        assert bits == 0
    else:
        assert -(2 ** (bits - 1)) <= min(row)
        assert max(row) <= 2 ** (bits - 1) - 1
        assert bits == 1 or not (-(2 ** (bits - 2)) <= min(row) and max(row) <= 2 ** (bits - 2) - 1)


@pytest.mark.parametrize("shared", [False, True])
def test_scales_are_those_at_which_the_code_is_so_long(shared: bool) -> None:
    rows = np.random.default_rng(0).standard_normal((6, 1, 800)) * np.geomspace(1, 100, 6)[:, None, None]
    rates = Rates(rows, shared=shared)
    for bits in (1, 2.5, 4):
        scale = rates.scale(np.full(6, bits))
        assert code_length(np.rint(rows / scale[:, None, None]), shared=shared) == pytest.approx(bits, abs=0.06)
        assert (len(set(scale.tolist())) == 1) == shared
    assert rates.scale(np.full(6, 20)) == pytest.approx(rates.scales[:, 0]), "the finest where none is so long"
    assert not np.rint(rows / rates.scale(np.zeros(6))[:, None, None]).any()
    none = Rates(np.zeros((2, 1, 5)), shared=False)
    assert np.isfinite(none.scale(np.array([0, 4]))).all()


def test_of_a_gaussian_the_error_is_that_of_the_theory() -> None:
    """Shannon's bound is 6.02 b dB; uniform steps with an ideal coder end 1.53 dB below it from about 3 bits on."""
    rows = np.random.default_rng(0).standard_normal((4, 1, 20_000))
    for bits in (3, 4, 5):
        scale = Rates(rows, shared=False).scale(np.full(4, bits))[:, None, None]
        noise = np.square(rows - np.rint(rows / scale) * scale).mean()
        assert -10 * math.log10(noise) == pytest.approx(6.02 * bits - 1.53, abs=0.2)


@pytest.mark.parametrize("bits", [2.0, 3.3, 5.0])
@pytest.mark.parametrize("per", ["channel", "layer", "tensor"])
def test_the_budget_holds_in_the_integers_of_the_file(bits: float, per: str, tmp_path: Path) -> None:
    q = quantised("residual")
    layers = layers_of(q.proto, q.calibration.patches, shared=per == "tensor", coded=True)
    tables = noise_tables(layers, feedback=True)
    table = quantize(q.proto, q.calibration, mean_bits=bits, tables=tables, bits_per=per, coding="entropy")  # type: ignore[arg-type]
    assert table.coding == "entropy"
    assert bits - 0.1 < table.mean_bits() <= bits + 1e-9
    stored = constants(write_flavour(q.proto, table, "onnxruntime"))
    spent = total = 0.0
    for name, w in table.weights.items():
        values = np.moveaxis(stored[f"{name}_q"].astype(int), w.axis, 0)
        assert fits(stored[f"{name}_q"], w.bits, w.axis)
        spent += code_length(values, shared=per == "tensor").mean() * values.size
        total += values.size
    assert spent / total == pytest.approx(table.mean_bits(), abs=1e-9)
    table.save(tmp_path / "table")
    again = ScaleTable.load(tmp_path / "table")
    assert again.coding == "entropy"
    assert again.mean_bits() == table.mean_bits()


def wide() -> onnx.ModelProto:
    """A net whose weights are many enough for a coder to learn them."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2), nn.ReLU(), nn.Conv2d(64, 64, 3, 2),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip
    for p in net.parameters():
        p.data = torch.randn_like(p) * 0.1
    return export_float(net.eval(), (3, 16, 16), 17)


@pytest.mark.parametrize("bits", [2.5, 4.0])
def test_a_packed_file_takes_the_planned_bits_and_the_noise_is_less_than_of_equal_widths(bits: float) -> None:
    proto = wide()
    found = calibrate(proto, lambda: images(16, 0, (3, 16, 16))[:, None])
    noise, packed = {}, {}
    for coding in ("fixed", "entropy"):
        table = quantize(proto, found, mean_bits=bits, coding=coding)
        assert table.mean_bits() <= bits + 1e-9
        noise[coding] = 0.0
        for name, layer in layers_of(proto, found.patches).items():
            w = table.weights[name]
            error = layer.rows - np.moveaxis(w.rounded(), w.axis, 0).reshape(layer.rows.shape)
            noise[coding] += float(layer.distortion(error).sum() / layer.distortion(layer.rows).sum())
        content = b"".join(w.values.tobytes() for w in table.weights.values())
        packed[coding] = 8 * len(brotli.compress(content, quality=11)) / len(content)
    assert packed["entropy"] < 1.06 * bits
    assert noise["entropy"] < 0.7 * noise["fixed"]


def test_what_excludes_it_is_refused() -> None:
    for other in ({"codebook": True}, {"qat": 1}):
        with pytest.raises(UsageError, match="exclude each other"):
            load_everything(Request(coding="entropy", **other))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no --coding entropie"):
        load_everything(Request(coding="entropie"))  # type: ignore[arg-type]
    assert Request().counted == "fixed"
    assert Request(bytes=100_000).counted == "entropy"
    assert Request(bytes=100_000, codebook=True).counted == "fixed"
    assert Request(bytes=100_000, coding="fixed").counted == "fixed"


def test_a_run_says_what_its_bits_are(xedge: Xedge, weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    ended = xedge(
        "compress", "-m", tiny.NET, "--weights", weights, "-d", tiny.DATA, "--target", "android", "--macs", "0.9",
        "--bits", "4", "--coding", "entropy", "--epochs", "0", "--iterations", "1", "--no-bench", "-o", out,
    )  # fmt: skip
    assert ended.code == 0, ended.err
    report = read_json(out / "report.json")
    assert report.coding == "entropy"
    assert report.planned_bits_mean is not None
    assert 3.5 < report.planned_bits_mean <= 4
    assert "mean, of code" in ended.out
    assert "4 mean bits of code" in ended.err
