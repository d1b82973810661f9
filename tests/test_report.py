"""The report on disk and in the terminal: JSON round trip, tables that fit."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_reports import EMPTY, each_variant, report
from rich.console import Console

from xedge import report_words as words
from xedge.errors import InternalError, UsageError
from xedge.report import (
    Latency,
    Layer,
    Report,
    Row,
    from_json,
    markdown,
    print_report,
    read_json,
    to_json,
    write_html,
    write_json,
)

# ------------------------------------------------------------------------------------------------------------ JSON

finite = st.floats(allow_nan=False, allow_infinity=False)
fraction = st.none() | st.floats(0, 1)
whole = st.integers(0, 10**12)
latencies = st.builds(
    Latency,
    finite,
    finite,
    finite,
    st.text(),
    st.text(),
    st.text(),
    whole,
    st.none() | st.tuples(finite, finite, finite),
)
rows = st.builds(
    Row, st.sampled_from(["original", "compressed"]), st.text(), fraction, fraction, whole, whole, whole, whole, whole,
    st.none() | latencies, st.none() | finite, fraction,
)  # fmt: skip
layers = st.builds(
    Layer, st.text(), st.text(), whole, whole, whole, whole, whole, whole, st.none() | finite,
    st.dictionaries(st.integers(0, 16), whole), st.dictionaries(st.text(), st.integers(0, 32)), st.none() | finite,
    st.none() | st.text(), st.text(),
)  # fmt: skip
free = st.dictionaries(st.text(), st.none() | st.booleans() | whole | finite | st.text() | st.lists(finite))
reports = st.builds(
    lambda r, ls, f: report(rows=tuple(r), layers=tuple(ls), request=f, environment=f),
    st.lists(rows, max_size=3), st.lists(layers, max_size=3), free,
)  # fmt: skip


@given(reports)
@settings(max_examples=60)
def test_json_round_trip(made: Report) -> None:
    text = json.dumps(to_json(made), allow_nan=False)
    assert from_json(json.loads(text)) == made


def test_json_keys_do_not_depend_on_insertion_order() -> None:
    forward, backward = {"a": 1, "b": {"c": 2, "d": 3}}, {"b": {"d": 3, "c": 2}, "a": 1}
    layer = report().layers[0]
    one = report(environment=forward, layers=(dataclasses.replace(layer, bits_histogram={2: 1, 10: 2}),))
    two = report(environment=backward, layers=(dataclasses.replace(layer, bits_histogram={10: 2, 2: 1}),))
    assert json.dumps(to_json(one)) == json.dumps(to_json(two))
    assert list(to_json(one)["layers"][0]["bits_histogram"]) == ["2", "10"]  # by number, not by text


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_json_refuses_what_is_no_number(bad: float, tmp_path: Path) -> None:
    made = report(layers=(dataclasses.replace(report().layers[0], bits_mean=bad),))
    with pytest.raises(InternalError, match=r"layers\[0\]\.bits_mean"):
        write_json(made, tmp_path / "report.json")
    assert not list(tmp_path.iterdir())


def test_reading_names_the_field(tmp_path: Path) -> None:
    data = to_json(report())
    del data["rows"][0]["macs"]
    with pytest.raises(UsageError, match=r"rows\[0\]\.macs: is missing"):
        from_json(data)
    data = to_json(report())
    data["rows"][1]["macs"] = "many"
    with pytest.raises(UsageError, match=r"rows\[1\]\.macs.*'many'"):
        from_json(data)
    with pytest.raises(UsageError, match="schema 2"):
        from_json({**to_json(report()), "schema": 2})
    assert from_json({**to_json(report()), "later": 1}) == report()
    path = tmp_path / "report.json"
    with pytest.raises(UsageError, match="holds no report"):
        read_json(path)
    for text in ("{", '{"schema": NaN}', "[]"):
        path.write_text(text)
        with pytest.raises(UsageError, match=r"report\.json"):
            read_json(path)


@pytest.mark.parametrize("percentage", [97.8, -0.1])
def test_accuracy_is_a_fraction(percentage: float) -> None:
    with pytest.raises(InternalError, match="top1"):
        dataclasses.replace(report().rows[0], top1=percentage)
    with pytest.raises(InternalError, match="select_agreement"):
        dataclasses.replace(report().iterations[0], select_agreement=percentage)


def test_writing_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    write_json(report(), path)
    assert read_json(path) == report()
    before = path.read_bytes()

    def full(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    for write in (write_json, write_html):
        with pytest.raises(UsageError, match="No space left") as caught:
            write(EMPTY, path)
        assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]
    with pytest.raises(UsageError, match="cannot be written"):
        write_json(report(), tmp_path / "absent" / "report.json")
    with pytest.raises(UsageError, match="cannot be written"):
        write_json(report(), path / "report.json")


# -------------------------------------------------------------------------------------------------------- terminal


@each_variant
@pytest.mark.parametrize("width", [80, 160])
def test_terminal(made: Report, width: int) -> None:
    console = Console(file=io.StringIO(), width=width)
    print_report(made, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    table = text.split("layers: original")[-1].split("\nRun\n")[0] if made.layers else ""
    assert all(len(line.rstrip()) <= width for line in table.splitlines())
    for layer in made.layers:
        assert any(  # no figure of a layer is cut off
            words.channels(layer.out_before, layer.out_after) in line and words.percent(layer.di_kept, 1) in line
            for line in table.splitlines()
        )
        shown = next(x for x in table.splitlines() if words.percent(layer.di_kept, 1) in x)
        assert "\N{HORIZONTAL ELLIPSIS}" not in shown.strip()[1:]  # only a name's beginning is shortened
    if made.rows:
        assert "2.51\N{MULTIPLICATION SIGN} smaller" in text


@each_variant
def test_markdown_tables_are_rectangular(made: Report) -> None:
    lines = markdown(made).splitlines()
    blocks = re.findall(r"(?:^\|.*\n?)+", "\n".join(lines), flags=re.MULTILINE)
    assert len(blocks) == len(words.glances(made)) + bool(made.layers)
    for block in blocks:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1
    assert "<script>" not in "\n".join(lines)
