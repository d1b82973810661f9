"""The benchmark of super-resolution: what it says of its nets and pictures, and its table."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import tiny_pictures
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from xedge import load
from xedge.benchmarks import sr
from xedge.metrics import macs, parameters
from xedge.train import Recipe, fit


def test_the_restorers_have_equal_multiply_adds_and_the_base_has_what_it_says() -> None:
    counts = {name: macs(make(), (3, 16, 16)).total / 256 for name, make in sr.RESTORERS.items()}
    assert set(counts.values()) == {53_136}
    names = [*sr.SR, *sr.RESTORERS]
    assert len(set(names)) == len(names)
    small, base = (macs(sr.SR[n](), (3, 16, 16)).total for n in (f"{sr.BASE} of 8 channels", sr.BASE))
    assert small < base / 14  # the control that is trained from the start has no more than the pruned nets


def test_bicubic_is_judged_as_the_middles_of_the_pictures_say(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for i in range(4):
        small = (255 * generator.random((20, 22, 3))).astype(np.uint8)
        Image.fromarray(small).resize((330, 300), Image.Resampling.BICUBIC).save(tmp_path / f"{i}.png")
    data = load.load_data(f"sr:{tmp_path}?scale=2", root=None, seed=0)
    bicubic, nothing = (sr.judged(run, data) for run in (sr.Bicubic(2), lambda x: torch.full((1, 3, 288, 288), 0.5)))
    assert 45 < bicubic[0] < 70  # the pictures are smooth
    assert 0.99 < bicubic[1] <= 1
    assert nothing[0] < 20


def test_a_row_is_written_once_and_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = sr.Rows(tmp_path / "rows.jsonl")
    row = {"task": "sr", "notes": "2 times smaller", "net": "FEQE", "macs": 5.6e9, "parameters": 96_464}
    rows.add({**row, "float": [34.5, 0.91], "LiteRT": [34.4, 0.905], "ONNX Runtime": [34.3, 0.9]})
    rows.add({**row, "net": "SRCNN", "float": [33.0, 0.9], "training seconds": 95.6})
    assert sr.Rows(tmp_path / "rows.jsonl").has(notes="2 times smaller", net="FEQE")
    assert not rows.has(notes="noise 30", net="FEQE")
    times = {
        ("FEQE", "LiteRT int8"): {"ms": 12.34, "verdict": "ok"},
        ("FEQE", "LiteRT float"): {"ms": 50.0, "verdict": "throttled"},
    }

    def cells(line: str) -> list[str]:
        return [c.strip() for c in line.split("|")[1:-1]]

    heads, _, first, second = sr.table(rows.done, times).splitlines()
    assert cells(heads)[5:] == [
        "int8 in LiteRT, dB", "SSIM", "int8 in ONNX Runtime, dB", "SSIM", "training, s",
        "LiteRT, ms: float / int8", "ONNX Runtime, ms: float / int8",
    ]  # fmt: skip
    assert cells(first) == ["SRCNN", "5.60", "96.5", "33.00", "0.9000", *[""] * 4, "96", "", ""]  # in the order of SR
    assert cells(second) == [
        "FEQE", "5.60", "96.5", "34.50", "0.9100", "34.40", "0.9050", "34.30", "0.9000", "", "50.0? / 12.3", "",
    ]  # fmt: skip
    assert "training" not in sr.table(rows.done[:1], {})  # rows from before it was recorded
    assert parameters(sr.SR["FEQE"]()) == 95_340  # its form for scale 2


def test_seconds_are_those_of_trainings_that_nothing_interrupted(tmp_path: Path) -> None:
    data = tiny_pictures.data()
    whole, resumed, old = (tmp_path / f"{name}.safetensors" for name in ("whole", "resumed", "old"))
    sr.half(tiny_pictures.net(), 0, data, whole)
    assert 0 < (sr.seconds(whole, whole) or 0) == pytest.approx(2 * (sr.seconds(whole) or 0))
    save_file(load_file(whole), old)
    recipe = Recipe(epochs=sr.EPOCHS, lr=sr.RATES[0], batch=sr.BATCH)
    fit(tiny_pictures.net(), data, recipe, checkpoint=resumed.with_suffix(".checkpoint"))
    sr.half(tiny_pictures.net(), 0, data, resumed)
    assert sr.seconds(whole, resumed) is sr.seconds(whole, old) is None


def test_the_base_has_the_median_of_the_comparisons_that_held() -> None:
    facts = ((3.0, "ok"), (5.0, "ok"), (4.0, "ok"), (90.0, "not-steady"))
    times = [
        {"net": net, "file": "LiteRT int8", "ms": 2.0, "base": base, "verdict": verdict}
        for net, (base, verdict) in zip(sr.SR, facts, strict=False)
    ]
    found = sr.clock(times)
    assert found[sr.BASE, "LiteRT int8"] == {"ms": 4.0, "verdict": "ok"}
    assert found["SRCNN", "LiteRT int8"] == times[0]
    assert sr.clock(times[3:]) == {(times[3]["net"], "LiteRT int8"): times[3]}


def test_every_pruned_net_has_its_place_in_the_table_and_is_timed() -> None:
    assert len(set(sr.ORDER)) == len(sr.ORDER)
    assert set(sr.ORDER) >= {f"X-SRResNet / {part}, {how}" for part in (4, 8, 14) for how in sr.METHODS}


def test_held_out_photographs_of_another_package_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("skimage", reason="needs scikit-image: pip install -e .[dev]")
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels).save(tmp_path / "b.png")
    digest = hashlib.sha256(pixels).hexdigest()
    monkeypatch.setattr(sr, "HELD_OUT", {"a.png": digest, "b.png": digest})
    folder = sr.test_pictures(tmp_path, tmp_path / "out")
    assert {"a.png", "b.png", "sklearn-china.png"} < {p.name for p in folder.iterdir()}
    Image.fromarray(pixels + np.uint8(1)).save(tmp_path / "b.png")
    with pytest.raises(
        SystemExit, match=r"b\.png is not the picture of the recorded figures, which needs Debian's gnome"
    ):
        sr.test_pictures(tmp_path, tmp_path / "out")
    (tmp_path / "b.png").unlink()
    with pytest.raises(SystemExit, match=r"has no b\.png; make it by"):
        sr.test_pictures(tmp_path, tmp_path / "out")
