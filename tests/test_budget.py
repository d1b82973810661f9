"""Budgets that are measured: packed bytes hold exactly, and a drop is that of the artefact on held-back data."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import tiny

from xedge import cli_types
from xedge.budget import _last
from xedge.quantize import ScaleTable

if TYPE_CHECKING:
    from tiny_runs import Xedge

pytest_plugins = ["tiny_runs"]


@pytest.mark.parametrize("edge", [-1, 0, 3, 7, 8])
def test_the_bisection_finds_the_edge_in_few_trials(edge: int) -> None:
    tried: list[float] = []

    def at(bits: float) -> ScaleTable:
        tried.append(bits)
        return ScaleTable({}, {})

    found = _last([float(i) for i in range(8)], at, lambda _: tried[-1] <= edge)
    assert (None if found is None else found[0]) == (None if edge < 0 else min(edge, 7))
    assert len(tried) <= 4


@pytest.mark.parametrize(
    ("text", "size"), [("300000", 300_000), ("300kB", 300_000), ("1.5MB", 1_500_000), ("2 KiB", 2048), ("7B", 7)]
)
def test_sizes(text: str, size: int) -> None:
    assert cli_types.SIZE.convert(text, None, None) == size


def test_packed_bytes_and_drop(xedge: Xedge, weights: Path, tmp_path: Path) -> None:
    base = ["compress", "-m", tiny.NET, "--weights", weights, "-d", tiny.DATA]
    base += ["--target", "jetson", "--target", "android", "--macs", "1.0", "--no-bench", "--epochs", "0"]

    def packed(folder: Path) -> int:
        return max(p.stat().st_size for p in folder.glob("targets/*/model.*.br"))

    def bits(folder: Path) -> float:
        return float(json.loads((folder / "report.json").read_text())["planned_bits_mean"])

    allowed = 5_000
    small = xedge(*base, "--bytes", allowed, "-o", tmp_path / "small")
    assert small.code == 0, small.err
    assert allowed - 250 < packed(tmp_path / "small") <= allowed, "all of it is used"
    assert bits(tmp_path / "small") < 7.5
    none = xedge(*base, "--bytes", "1kB", "-o", tmp_path / "none")
    assert none.code == 2
    said = re.search(r"--bytes 1000 is less than the (\d+) of the packed artefact at 2 mean bits", none.err)
    assert said is not None
    assert 1000 < int(said[1]) < packed(tmp_path / "small"), "the bytes that would do"
    few = xedge(*base, "--bits-drop", "3%", "--sensitivity", "kfac", "-o", tmp_path / "few")
    assert few.code == 0, few.err
    assert 1.5 <= bits(tmp_path / "few") < 6
    lost = [line for line in few.err.splitlines() if "lost on held-back" in line]
    assert 4 <= len(lost) <= 7
