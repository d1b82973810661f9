"""The report's words: figures to three digits, and no claim that was not measured."""

from __future__ import annotations

import dataclasses
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_reports import EMPTY, latency, report, unlabelled
from rich.cells import cell_len

from xedge import report_page
from xedge import report_words as words


@given(st.integers(1, 10**14))
def test_counts_are_within_half_a_percent(n: int) -> None:
    for text, unit in ((words.count(n), ""), (words.size(n), "B")):
        value, _, prefix = text.partition(" ")
        power = 1000 ** ("", "k", "M", "G", "T").index(prefix.removesuffix(unit))
        assert float(value) * power == pytest.approx(n, rel=0.0051)
        assert len(value) <= 5 or prefix.startswith("T")


@given(st.floats(1e-6, 1e6))
def test_three_significant_digits(value: float) -> None:
    text = words.significant(value)
    assert "e" not in text
    assert float(text) == pytest.approx(value, rel=0.0051)
    digits = text.replace(".", "").lstrip("0")
    assert len(digits) == 3 or (value > 999 and "." not in text)


@given(st.floats(0, 1), st.integers(0, 3))
def test_only_all_is_a_hundred_percent(value: float, places: int) -> None:
    text = words.percent(value, places)
    assert (float(text.removesuffix(" %")) == 100) == (value == 1)


@given(st.tuples(st.floats(0.01, 100), st.floats(0.01, 100), st.floats(0.01, 100)).map(sorted))
def test_a_speed_up_needs_an_interval_that_leaves_out_one(bounds: list[float]) -> None:
    low, ratio, high = bounds
    verdict, _, better = words.speed(latency(1.0, (ratio, low, high)))
    if low > 1:
        assert (verdict.endswith("faster"), better) == (True, True)
    elif high < 1:
        assert (verdict.endswith("slower"), better) == (True, False)
        assert float(verdict.partition(words.TIMES)[0]) >= 1
    else:
        assert (verdict, better) == ("no difference measured", None)


def test_nothing_is_claimed_that_was_not_measured() -> None:
    said = dict(words.answers(unlabelled()))
    assert said["faster"] == "not measured"
    assert said["device"] == "latency was not measured"
    assert "agreement" in said["worse"]
    assert "not measured" in said["to blame"]
    apart = report(rows=(report().rows[0], dataclasses.replace(report().rows[1], latency=latency(0.01))))
    assert dict(words.answers(apart))["faster"] == "not compared"  # a smaller median alone is no speed-up
    alone = report(rows=report().rows[1:2])
    assert dict(words.answers(alone))["smaller"] == "not measured"
    assert words.answers(EMPTY) == [("smaller", "nothing was compressed")]


def test_no_change_has_its_unit() -> None:
    for field, value, want in (
        ("top1", 0.9778, "0.00 points of top-1, 97.78 % \N{RIGHTWARDS ARROW} 97.78 %"),
        ("psnr", 34.1, "0.00 dB of PSNR, 34.10 dB \N{RIGHTWARDS ARROW} 34.10 dB"),
    ):
        made = report()
        rows = tuple(dataclasses.replace(r, **{"top1": None, field: value}) for r in made.rows)
        assert dict(words.answers(dataclasses.replace(made, rows=rows)))["worse"] == want


def test_the_five_answers() -> None:
    said = dict(words.answers(report()))
    assert list(said) == ["smaller", "faster", "worse", "device", "to blame"]
    assert said["smaller"] == "2.51\N{MULTIPLICATION SIGN} fewer MACs; 9.51\N{MULTIPLICATION SIGN} smaller file"
    assert said["faster"].startswith("jetson 1.45\N{MULTIPLICATION SIGN} faster [1.41, 1.49]; android no difference")
    assert "\N{MINUS SIGN}0.56 points" in said["worse"]
    assert said["device"].startswith("timed on this host")
    assert "features.block4" in said["to blame"]  # the lowest DI kept of all layers


def test_the_cascade_says_each_factor_and_their_product() -> None:
    made = report(targets=("jetson",))
    before, after = made.row("original", "jetson"), made.row("compressed", "jetson")
    assert before is not None
    assert after is not None
    (line,) = [x for x in words.glances(made)[0].lines if x.metric == "  parameters"]
    pruned, bits = before.parameters / after.parameters, 32 / 4.5
    said = [float(v) for v in re.findall(rf"([0-9.]+){words.TIMES}", line.change)]
    assert said == pytest.approx([pruned, bits, pruned * bits], rel=0.005)


@pytest.mark.parametrize("kind", ["emulated", "fake", "browser"])
def test_an_unreal_device_says_so(kind: str) -> None:
    slow = dataclasses.replace(report().rows[1], latency=latency(1.0, (1.2, 1.1, 1.3), device_kind=kind))
    made = report(rows=(report().rows[0], slow))
    assert f"({kind})" in dict(words.answers(made))["device"]
    assert f"({kind})" in report_page.render(made)


@given(st.text("ab.\N{CJK UNIFIED IDEOGRAPH-5377}", max_size=30), st.integers(2, 20))
def test_a_shortened_name_keeps_its_end(name: str, limit: int) -> None:
    short = words.shorten(name, limit)
    assert cell_len(short) <= limit
    assert name.endswith(short.removeprefix("\N{HORIZONTAL ELLIPSIS}"))
    assert (short == name) == (cell_len(name) <= limit)


def test_direction_of_a_change() -> None:
    assert words.smaller(10, 5) == ("2.00\N{MULTIPLICATION SIGN} smaller", True)
    assert words.smaller(5, 10) == ("2.00\N{MULTIPLICATION SIGN} larger", False)
    assert words.smaller(7, 7) == ("the same", None)
    assert words.points(-0.0000001) == "0.00 points"
