"""The report: JSON round trip, honest words, and a page that is one file, well formed, escaped and legible."""

from __future__ import annotations

import dataclasses
import html.parser
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from xedge import report_page, report_plots
from xedge import report_words as words
from xedge.errors import InternalError, UsageError
from xedge.report import (
    Iteration,
    Latency,
    Layer,
    Report,
    Row,
    Subspace,
    from_json,
    markdown,
    print_report,
    read_json,
    to_json,
    write_html,
    write_json,
)
from xedge.target import Artifact

NASTY = "<script>alert('1')</script>&\"|$x_1$ 卷積"


def latency(ms: float, ratio: tuple[float, float, float] | None = None, **more: Any) -> Latency:
    facts = {"runtime": "onnxruntime 1.20, 1 thread", "device": "local", "device_kind": "real", "processes": 11} | more
    return Latency(ms, 0.97 * ms, 1.04 * ms, ratio=ratio, **facts)


def report(depth: int = 5, targets: tuple[str, ...] = ("jetson", "android"), **changes: Any) -> Report:
    """A labelled, quantised, timed run whose figures are inputs of these tests, not claims."""
    rows = [
        row
        for i, target in enumerate(targets)
        for row in (
            Row("original", target, 0.9778, 1.0, 281_640, 61_706, 248_310, 229_000, 221_000, latency(0.0743)),
            Row(
                "compressed", target, 0.9722, 0.9861, 112_210, 18_232, 26_110, 15_200, 14_800,
                latency(0.0512, ((1.45, 1.41, 1.49), (1.01, 0.97, 1.04))[i % 2]), 31.2, 0.9972,
            ),
        )
    ]  # fmt: skip
    table = tuple(
        Layer(
            f"features.block{i}.depthwise_convolution_{i}", "conv", 64, 32 + i % 2, 3, 3, 10_000 + i, 5_000,
            4.5 - i % 3, {2: 3, 4: 10, 8: 1}, dict.fromkeys(targets, 8), 0.99 - 0.001 * i,
        )
        for i in range(depth)
    )  # fmt: skip
    rounds = tuple(
        Iteration(i, macs, macs / 281_640, 0.98 - 0.004 * i, 1 - 0.003 * i, 9.0 - i, 4.2, "uniform")
        for i, macs in enumerate((281_640, 200_000, 112_210))
    )
    made = Report(
        xedge="0.1.0", created="2025-11-22T10:31:19+00:00", request={"seed": 0, "bits": 4.5}, model="lenet5",
        data="digits", teacher="labels", environment={"python": "3.11", "cpu": {"cores": 2}}, rows=tuple(rows),
        layers=table, iterations=rounds, stopped_by="the MAC budget", price_of_alignment="3 % more MACs",
        certificate={"ok": True, "max_error": 1e-13, "moved": 0.2, "limit": 1e-9, "channels": 8, "reason": ""},
        artifacts=(Artifact("targets/a/model.onnx", "onnx", "jetson", "ab" * 32, 26_110, {"x": (1, 1, 8, 8)}, {}),),
        notes=("trained first",), planned_bits_mean=4.5, commands=(("repeat", "xedge compress --seed 0"),),
        subspaces=(Subspace("conv1", 64, 0.9, (0.6, 0.88, 0.93, 0.995)), Subspace("conv2", 32, 0.95, (0.91, 1.0))),
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


def unlabelled() -> Report:
    """No labels, no latency, no DI, no bits: what a first run on a folder of pictures gives."""
    full = report(targets=("jetson",))
    return dataclasses.replace(
        full,
        rows=tuple(dataclasses.replace(r, top1=None, latency=None, snr_db=None) for r in full.rows),
        layers=tuple(
            dataclasses.replace(x, di_kept=None, bits_mean=None, bits_histogram={}, executed_bits={})
            for x in full.layers
        ),
        iterations=tuple(dataclasses.replace(i, select_top1=None, di_total=None) for i in full.iterations),
        planned_bits_mean=None,
    )


EMPTY = report(
    rows=(), layers=(), iterations=(), notes=(), artifacts=(), certificate={}, commands=(), environment={}, subspaces=()
)

VARIANTS = {
    "full": report(),
    "unlabelled": unlabelled(),
    "110 layers": report(depth=110),
    "empty": EMPTY,
    "nasty": report(
        model=NASTY,
        data=NASTY,
        layers=tuple(dataclasses.replace(x, name=f"{NASTY}{i}", note=NASTY) for i, x in enumerate(report().layers)),
        notes=(NASTY,),
        request={NASTY: NASTY},
        commands=((NASTY, NASTY),),
        subspaces=(Subspace(NASTY, 3, 0.5, (1.0,)),),
        stopped_by=NASTY,
    ),
}
each_variant = pytest.mark.parametrize("made", VARIANTS.values(), ids=VARIANTS.keys())

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
    with pytest.raises(UsageError, match="cannot be read"):
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


# ----------------------------------------------------------------------------------------------------------- words


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


# ------------------------------------------------------------------------------------------------------------ page

VOID = {"meta", "br", "wbr", "img", "link", "hr", "input"}


class Page(html.parser.HTMLParser):
    """A strict reader: tags must balance."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"an attribute twice in <{tag}>"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@each_variant
def test_page_is_one_well_formed_accessible_file(made: Report) -> None:
    text = report_page.render(made)
    page = Page(text)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "img", "link", "iframe", "object", "foreignobject"}
    assert set(re.findall(r"https?://[^\"'\s)]+", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert "@import" not in text
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.tags:
        for name in ("aria-labelledby", "aria-describedby"):
            assert set((attributes.get(name) or "").split()) <= set(ids), (tag, attributes)
        for name in ("xlink:href", "href"):
            target = attributes.get(name)
            assert target is None or target[1:] in ids
        if tag == "th":
            assert attributes.get("scope") in {"col", "row", "rowgroup"}
        if tag == "svg":
            assert attributes["role"] == "img"
            assert attributes["aria-labelledby"]
    assert re.findall(r"url\(#([^)]+)\)", text) == [i for i in re.findall(r"url\(#([^)]+)\)", text) if i in ids]
    assert not re.search(r"(?:nan|inf)\b", page.text.lower().replace("information", ""))


def test_page_escapes_everything() -> None:
    text = report_page.render(VARIANTS["nasty"])
    assert "<script" not in text
    assert "alert('1')" not in text  # the quotes are escaped too
    assert Page(text).text.count("<script>alert('1')</script>") >= 10


def test_page_is_the_same_bytes_in_another_process(tmp_path: Path) -> None:
    write_json(report(), tmp_path / "report.json")
    code = (
        "import sys; from pathlib import Path; from xedge.report import read_json, write_html\n"
        "write_html(read_json(Path(sys.argv[1])), Path(sys.argv[2]))"
    )
    pages = []
    for hash_seed in ("1", "2"):
        path = tmp_path / f"{hash_seed}.html"
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-c", code, str(tmp_path / "report.json"), str(path)]
        subprocess.run(command, check=True, env=environment, timeout=120)
        pages.append(path.read_bytes())
    assert pages[0] == pages[1]
    assert pages[0].decode() == report_page.render(report())


def test_plots_show_what_was_measured() -> None:
    accuracy, bits = report_plots.accuracy_against_macs(report()), report_plots.bits_per_layer(report())
    assert accuracy is not None
    assert bits is not None
    assert "100.0 % of MACs: 98.00 %" in accuracy
    assert "returned" in accuracy
    assert "features.block4.depthwise_convolution_4: 3.50" in bits
    components = report_plots.explained_by_components(report())
    assert components is not None
    assert "conv1: 3 components of 64 channels explain 90 %; conv2: 1 components of 32 channels" in components
    assert report_plots.explained_by_components(EMPTY) is None
    for plot in (accuracy, bits, components):
        assert not re.search(r"#[0-9a-f]{6}\b", plot), "a colour that does not follow the page"
    assert report_plots.accuracy_against_macs(report(iterations=report().iterations[:1])) is None
    assert report_plots.bits_per_layer(unlabelled()) is None
    agreement = report_plots.accuracy_against_macs(unlabelled())
    assert agreement is not None
    assert "agreement with the original" in agreement


def _schemes() -> dict[str, dict[str, tuple[int, ...]]]:
    """The page's colour variables, light and dark, as the browser reads them."""
    blocks = re.findall(r":root \{(.*?)\}", report_page.render(EMPTY), flags=re.DOTALL)
    colours = [
        {name: tuple(bytes.fromhex(value)) for name, value in re.findall(r"--(\w+): #([0-9a-f]{6})", block)}
        for block in blocks
    ]
    return dict(zip(("light", "dark"), colours, strict=True))


def _luminance(colour: tuple[int, ...]) -> float:
    """Relative luminance, WCAG 2.2."""
    linear = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(scheme: str) -> None:
    """At least 4.5 to 1, the AA level of WCAG 2.2, for each colour of text on each ground it stands on."""
    colours = _schemes()[scheme]
    pairs = [(text, ground) for text in ("ink", "muted", "good", "bad") for ground in ("page", "surface")]
    for text, ground in [*pairs, ("ink", "tint"), ("ink", "mark"), ("muted", "mark")]:
        low, high = sorted((_luminance(colours[text]), _luminance(colours[ground])))
        assert (high + 0.05) / (low + 0.05) >= 4.5, f"{text} on {ground}"


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize(("scheme", "setting"), [("light", "1"), ("dark", "0")])
def test_a_browser_draws_both_schemes(scheme: str, setting: str, tmp_path: Path) -> None:
    import matplotlib.image

    write_html(report(), tmp_path / "report.html")
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", f"--user-data-dir={tmp_path / 'profile'}",
        f"--blink-settings=preferredColorScheme={setting}", "--hide-scrollbars", "--window-size=900,2600",
        f"--screenshot={tmp_path / 'page.png'}", (tmp_path / "report.html").as_uri(),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    pixels = (matplotlib.image.imread(tmp_path / "page.png")[..., :3] * 255).round().astype(int)
    colours = _schemes()[scheme]
    assert tuple(pixels[0, 0]) == colours["page"]
    for name in ("surface", "tint", "accent", "good", "bad", "ink"):
        assert (pixels == colours[name]).all(axis=-1).any(), f"no pixel has --{name}"
