"""Nets that restore pictures, through the same commands: `xedge compress` of a tiny one, and what is special to it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
import tiny
import tiny_pictures
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from xedge import pipeline
from xedge.bench import bench_at
from xedge.crops import busiest
from xedge.data import enough
from xedge.errors import UsageError
from xedge.image_metrics import psnr
from xedge.judge import Judge
from xedge.metrics import macs
from xedge.onnx_graph import Graph, export_float
from xedge.pipeline import rebuild
from xedge.progress import Talk
from xedge.quantize import ScaleTable, Sensitivity
from xedge.ranges import calibrate, for_pictures, last_layers
from xedge.report import read_json
from xedge.report_words import sections
from xedge.request import Request, load_everything
from xedge.rounding import layers_of
from xedge.run import Run
from xedge.run import read_json as read
from xedge.sensitivity import distortions, information
from xedge.teacher import choose_teacher
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
        assert abs(verified["float"]["psnr"] - (after.psnr or 0)) < 0.7  # six bits, a net of 3732 parameters
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


def test_training_after_a_cut_leaves_the_batch_norms_statistics(
    picture_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def watched(model: torch.nn.Module, *given: Any, **named: Any) -> torch.nn.Module:
        state = {k: v.clone() for k, v in model.state_dict().items()}
        made = fit(model, *given, **named)
        seen.append((state, made.state_dict()))
        return made

    monkeypatch.setattr("xedge.iterate.fit", watched)
    request = Request(
        model=tiny_pictures.NET, weights=str(picture_weights), data=tiny_pictures.DATA, targets=("host-cpu",), macs=0.7,
        epochs=1, iterations=1, batch=16,
    )  # fmt: skip
    pipeline.compress(request, tmp_path / "run", Talk(quiet=True), bench=False)
    ((before, after),) = seen
    running = [k for k in before if "running" in k]
    assert running
    assert all(torch.equal(before[k], after[k]) for k in running)
    assert not torch.equal(before["norm.weight"], after["norm.weight"])
    assert read(tmp_path / "run" / "prune" / "001.json")["allocation"] == "uniform", "no trial, for training follows"


# -- sub-pixel layers ------------------------------------------------------------------------------------------------


def test_subpixel_layers_are_rewritten_and_fitted(picture_weights: Path, tmp_path: Path) -> None:
    request = Request(
        model=tiny_pictures.NET, weights=str(picture_weights), data=tiny_pictures.DATA, rewrite_subpixel=True, epochs=1
    )
    loaded = load_everything(request)
    with Run.open(tmp_path / "run", request.to_json()) as run:
        pipeline._original(loaded, tmp_path / "new.safetensors", run, Talk(quiet=True))
    new = loaded.factory()
    assert not any(isinstance(m, torch.nn.PixelShuffle) for m in new.modules())
    new.load_state_dict(load_file(tmp_path / "new.safetensors"))
    judge, data = Judge.of(loaded.data), loaded.data
    (before, truth), (after, _) = predict(loaded.model, data.val), predict(new, data.val)
    drawn, _ = predict(loaded.factory(), data.val)
    assert judge.quality(drawn, truth, drawn) + 1 < judge.quality(after, truth, after)
    assert judge.quality(after, truth, after) < judge.quality(
        before, truth, before
    )  # a few taps too few, and one epoch
    with safe_open(tmp_path / "new.safetensors", "pt") as f:
        assert "after training" in f.metadata()["note"]
    with pytest.raises(UsageError, match="pixel shuffle"):
        load_everything(Request(model=tiny.NET, data=tiny.DATA, rewrite_subpixel=True))


# -- crops and sizes -------------------------------------------------------------------------------------------------


def test_crops_of_held_out_pictures_are_in_the_report(restored: Path) -> None:
    report, page = read_json(restored / "report.json"), (restored / "report.html").read_text()
    assert [c.picture for c in report.crops] == ["200.png", "201.png"]
    assert page.count("data:image/png;base64,") == 8
    for crop, picture in zip(report.crops, tiny_pictures.data().pictures, strict=True):
        truth = picture.load()[1][crop.top : crop.top + crop.side, crop.left : crop.left + crop.side]
        shown = {n: np.asarray(Image.open(restored / "crops" / f)) for n, f in crop.files.items()}
        np.testing.assert_array_equal(shown["truth"], truth)
        planes = {n: torch.from_numpy(p / np.float32(255)).permute(2, 0, 1) for n, p in shown.items()}
        for name in ("bicubic", "original", "compressed"):
            assert crop.psnr[name] == pytest.approx(psnr(planes["truth"], planes[name]))
            assert f"{crop.psnr[name]:.2f} dB" in page
        model = tiny_pictures.net().eval()
        model.load_state_dict(load_file(restored / "original.safetensors"))
        small = torch.from_numpy(picture.load()[0] / np.float32(255)).permute(2, 0, 1)
        with torch.no_grad():
            whole = (255 * model(small[None])[0].permute(1, 2, 0).clamp(0, 1)).round().numpy()
        cut = whole[crop.top : crop.top + crop.side, crop.left : crop.left + crop.side]
        assert np.abs(cut - shown["original"]).max() <= 1  # the crop is what the whole picture has there


def test_the_busiest_part_is_found() -> None:
    flat = np.full((400, 600, 3), 90, np.uint8)
    flat[200:260, 400:460] = np.random.default_rng(0).integers(0, 255, (60, 60, 3))
    top, left, side = busiest(flat, 4)
    assert (top % 4, left % 4, side) == (0, 0, 120)
    assert top <= 200 <= 260 <= top + side
    assert left <= 400 <= 460 <= left + side


def test_bench_times_other_sizes(restored: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(restored, folder)
    found, record = next(iter(bench_at(folder, "local", "quick", 1, Talk(quiet=True), (64, 48))))
    report = read_json(folder / "report.json")
    assert report.sizes == (found,)
    before, after = report.row("original", found.target), report.row("compressed", found.target)
    assert before is not None
    assert after is not None
    assert (found.macs_before, found.macs_after) == (before.macs * 32 * 24 // 144, after.macs * 32 * 24 // 144)
    assert found.macs_before == macs(tiny_pictures.net(), (3, 24, 32)).total
    assert found.before_ms == record.a.interval.median > 0
    assert "64x48" in "".join(line for _, lines in sections(report) for line in lines)
    with pytest.raises(UsageError, match="multiple of 2"):
        next(iter(bench_at(folder, "local", "quick", 1, Talk(quiet=True), (63, 48))))


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


@pytest.mark.parametrize("how", ["output", "kfac", "di", "mse", "uniform"])
def test_every_sensitivity_weighs_a_net_that_restores(picture_weights: Path, how: Sensitivity) -> None:
    model, data = tiny_pictures.net().eval(), tiny_pictures.data()
    model.load_state_dict(load_file(picture_weights))
    proto = export_float(model, data.shape, 17)
    samples = [(data.train[i][0].numpy()[None], data.train[i][1]) for i in range(12)]
    calibration = calibrate(proto, lambda: (x for x, _ in samples))
    tables = distortions(how, model, proto, calibration, lambda: samples, choose_teacher(None, data, 0))
    for table in tables.values():
        assert np.isfinite(table).all()
        assert table[:, 2].sum() > table[:, 7].sum()
    if how == "di":  # the scatter of single patches, not of their means
        layers = layers_of(proto, calibration.patches)
        cost, scatter = information(proto, layers, samples, choose_teacher(None, data, 0))["third.weight"]
        assert (cost > 0).all()
        np.testing.assert_allclose(scatter, layers["third.weight"].gram, rtol=1e-4, atol=1e-8)


def test_it_was_cut_as_asked(restored: Path) -> None:
    data = tiny_pictures.data()
    small, whole = macs(rebuild(restored), data.shape).total, macs(tiny_pictures.net(), data.shape).total
    assert small <= 0.5 * whole
    assert enough(data.select, 100) == 25
    assert json.loads((restored / "plan.json").read_text())["keep"]
