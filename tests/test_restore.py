"""Nets that restore pictures, through the same commands: `xedge compress` of a tiny one, and what is special to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
import tiny
import tiny_pictures
import torch
from safetensors.torch import load_file

from xedge.data import enough
from xedge.judge import Judge
from xedge.metrics import macs
from xedge.onnx_graph import Graph, export_float
from xedge.pipeline import rebuild
from xedge.quantize import ScaleTable
from xedge.ranges import calibrate, for_pictures, last_layers
from xedge.report import read_json
from xedge.run import read_json as read
from xedge.train import Recipe, fit, predict

if TYPE_CHECKING:
    from tiny_runs import Xedge

pytest_plugins = ["tiny_runs"]
TARGETS = ("jetson-orin-nano", "android", "host-cpu")


def test_a_run_reports_decibels(restored: Path) -> None:
    report, verified = read_json(restored / "report.json"), read(restored / "verify.json")
    judge, data = Judge.of(tiny_pictures.data()), tiny_pictures.data()
    out, truth = predict(rebuild(restored), data.val)
    assert verified["float"]["psnr"] == pytest.approx(judge.quality(out, truth, out), abs=1e-6)
    for target in TARGETS:
        before, after = report.row("original", target), report.row("compressed", target)
        assert before is not None
        assert after is not None
        assert (after.top1, after.agreement, after.verified_agreement) == (None, None, None)
        assert before.psnr == verified["original"]["psnr"]
        assert after.psnr == verified["targets"][target]["psnr"]
        assert abs(verified["float"]["psnr"] - (after.psnr or 0)) < 0.5  # six bits
        assert (after.snr_db or 0) > verified["targets"][target]["least_snr_db"] - 1e-9
        assert after.macs < before.macs / 2
    assert [i.select_psnr is not None for i in report.iterations] == [True, True]
    assert report.teacher.startswith("the true pictures")
    page = (restored / "report.html").read_text()
    assert "PSNR" in page
    assert "agreement" not in page


def test_the_floor_and_the_gate_are_in_decibels(xedge: Xedge, restored: Path) -> None:
    passed = xedge("gate", restored, "--max-drop", "3dB")
    assert passed.code == 0, passed.err
    assert "PSNR fell by" in passed.out
    assert xedge("gate", restored, "--max-drop", "3%").code == 2
    found = xedge("diagnose", restored, "--target", "android", "--quiet")
    assert found.code == 0, found.err
    assert "PSNR" in found.out
    assert "27." in found.out or "dB" in found.out


def test_a_drop_in_the_wrong_unit_is_one_line(xedge: Xedge, picture_weights: Path) -> None:
    common = [
        "compress",
        "-m",
        tiny_pictures.NET,
        "--weights",
        picture_weights,
        "-d",
        tiny_pictures.DATA,
        "-o",
        "nowhere",
    ]
    for words in (["--max-drop", "0.5%"], ["--bits-drop", "0.5%"], ["--teacher", "labels"]):
        ended = xedge(*common, *words)
        assert (ended.code, len(ended.err.strip().splitlines())) == (2, 1), ended.err
    ended = xedge("compress", "-m", tiny.NET, "-d", tiny.DATA, "--max-drop", "0.2dB", "-o", "nowhere")
    assert (ended.code, len(ended.err.strip().splitlines())) == (2, 1), ended.err
    assert "decibels" in ended.err
    ended = xedge("compress", "-m", tiny.NET, "-d", tiny_pictures.DATA, "-o", "nowhere")
    assert (ended.code, len(ended.err.strip().splitlines())) == (2, 1), ended.err


# -- training --------------------------------------------------------------------------------------------------------


def test_training_goes_on_after_a_kill_as_if_nothing_had_been(picture_weights: Path, tmp_path: Path) -> None:
    data, recipe = tiny_pictures.data(), Recipe(epochs=2, lr=1e-3, batch=16)

    def fresh() -> torch.nn.Module:
        model = tiny_pictures.net()
        model.load_state_dict(load_file(picture_weights))
        return model

    whole = fit(fresh(), data, recipe)
    checkpoint = tmp_path / "c.safetensors"
    halves = fresh()

    class Killed(Exception):
        pass

    class Talk:
        def bar(self, items, what, total):  # type: ignore[no-untyped-def]
            if "2/2" in what:
                raise Killed
            return items

        def say(self, _line: str) -> None: ...

    with pytest.raises(Killed):
        fit(halves, data, recipe, checkpoint=checkpoint, talk=Talk())  # type: ignore[arg-type]
    again = fit(fresh(), data, recipe, checkpoint=checkpoint)
    for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    judge = Judge.of(data)
    (before, truth), (after, _) = predict(fresh(), data.train), predict(whole, data.train)
    assert judge.quality(after, truth, after) > judge.quality(before, truth, before)


# -- ranges ----------------------------------------------------------------------------------------------------------


def test_pictures_lie_on_the_steps_of_their_files_and_the_last_layers_are_whole() -> None:
    model, data = tiny_pictures.net().eval(), tiny_pictures.data()
    proto = export_float(model, data.shape, 17)
    graph = Graph(proto)
    layers, tensors = last_layers(proto)
    assert [n.input[1] for n in layers] == ["up.weight"]
    assert layers[0].input[0] in tensors
    images = [data.train[i][0].numpy()[None] for i in range(8)]
    calibration = for_pictures(proto, calibrate(proto, lambda: images))
    ranges = calibration.ranges("mse")
    assert ranges[graph.inputs[0]][1] == ranges[graph.outputs[0]][1] == 1.0
    assert ranges[graph.outputs[0]][0] == 0.0
    for name in tensors:
        if name in ranges and name not in graph.outputs and name not in graph.inputs:
            assert ranges[name][1] == max(calibration.high[name], 0.0)
    inner = next(n for n in ranges if n not in calibration.outputs)
    assert ranges[inner] != (min(calibration.low[inner], 0), max(calibration.high[inner], 0))


def test_a_run_protects_its_last_layer(restored: Path) -> None:
    table = ScaleTable.load(restored / "scales.safetensors")
    assert set(table.bits_of()["up"]) == {8}
    assert table.mean_bits() <= 6
    floats = Graph(onnx.load(restored / "float.onnx"))
    assert table.activations[floats.outputs[0]] == (0.0, 1.0)
    np.testing.assert_allclose(table.activations[floats.inputs[0]], (0.0, 1.0))


def test_it_was_cut_as_asked(restored: Path) -> None:
    data = tiny_pictures.data()
    small, whole = macs(rebuild(restored), data.shape).total, macs(tiny_pictures.net(), data.shape).total
    assert small <= 0.5 * whole
    assert enough(data.select, 100) == 25
    assert json.loads((restored / "plan.json").read_text())["keep"]
