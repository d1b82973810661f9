"""The benchmark of super-resolution: what it says of its nets and pictures, and its table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from xedge import load
from xedge.benchmarks import sr
from xedge.metrics import macs, parameters


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
    rows.add({**row, "float": [34.5, 0.91], "LiteRT": [34.4, 0.9], "ONNX Runtime": [34.3, 0.9]})
    assert sr.Rows(tmp_path / "rows.jsonl").has(notes="2 times smaller", net="FEQE")
    assert not rows.has(notes="noise 30", net="FEQE")
    times = {
        ("FEQE", "LiteRT int8"): {"ms": 12.34, "verdict": "ok"},
        ("FEQE", "LiteRT float"): {"ms": 50.0, "verdict": "throttled"},
    }
    lines = sr.table(rows.done, times).splitlines()
    cells = [c.strip() for c in lines[2].split("|")[1:-1]]
    assert cells == ["FEQE", "5.60", "96.5", "34.50", "0.9100", "34.40", "34.30", "50.0?", "12.3", "", ""]
    assert len({line.count("|") for line in lines}) == 1
    assert parameters(sr.SR["FEQE"]()) == 95_340  # its form for scale 2
