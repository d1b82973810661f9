"""The report's page: one file, well formed, escaped and legible."""

from __future__ import annotations

import html.parser
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from made_reports import EMPTY, VARIANTS, each_variant, report, unlabelled

from xedge import report_page, report_plots
from xedge.report import Report, write_html, write_json

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
