"""The report as one self-contained HTML page: no script, no request to anywhere, the same bytes for the same report."""

from __future__ import annotations

import base64
import importlib.resources
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from xedge import report_plots
from xedge import report_words as words

if TYPE_CHECKING:
    from xedge.report import Report


MOST_BYTES = 1 << 18
"""Of one embedded picture."""


def render(report: Report, folder: Path | None = None) -> str:
    """The page. Everything that comes from the report is escaped; only the plots are markup.

    Args:
        folder: the run's, with the pictures of its crops.
    """
    import jinja2

    template = importlib.resources.files("xedge").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["breakable"] = _breakable
    return environment.from_string(template).render(
        _page(report),
        crops=list(_crops(report, folder)),
        accuracy_plot=report_plots.accuracy_against_macs(report),
        bits_plot=report_plots.bits_per_layer(report),
        components_plot=report_plots.explained_by_components(report),
    )


def _crops(report: Report, folder: Path | None) -> Iterator[dict[str, Any]]:
    """Each crop that is on disk, its pictures as data URIs."""
    names = {
        "bicubic": "bicubic",
        "input": "input",
        "original": "original",
        "compressed": "compressed",
        "truth": "truth",
    }
    for crop in report.crops:
        shown = []
        for name, caption in names.items():
            path = folder / "crops" / crop.files[name] if folder is not None and name in crop.files else None
            if path is None or not path.is_file() or path.stat().st_size > MOST_BYTES:
                continue
            uri = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
            score = f"{crop.psnr[name]:.2f} dB, SSIM {crop.ssim[name]:.4f}" if name in crop.psnr else "held out"
            shown.append({"name": caption, "uri": uri, "score": score})
        if shown:
            where = f"{crop.picture}, {crop.side}x{crop.side} at {crop.left}, {crop.top}"
            yield {"where": where, "target": crop.target, "shown": shown, "side": crop.side}


def _breakable(text: str) -> Markup:
    """Escaped, and a long module path may break after a separator instead of anywhere."""
    return Markup(re.sub(r"(?<=[._:/])(?=\w)", "<wbr>", str(escape(text))))


def _page(report: Report) -> dict[str, Any]:
    """Everything the template shows, as text and fractions: the template only loops."""
    macs = sum(layer.macs_before for layer in report.layers) or 1
    most = max((layer.macs_before for layer in report.layers), default=1) or 1
    worst = words.blame(report)
    executed = words.executed_on(report)
    layers = [
        {
            "name": layer.name,
            "kind": layer.kind,
            "out": words.channels(layer.out_before, layer.out_after),
            "in": words.channels(layer.in_before, layer.in_after),
            "share": f"{100 * layer.macs_before / macs:.1f} %",
            "share_after": f"{100 * layer.macs_after / macs:.1f} %",
            "bar": f"{100 * layer.macs_before / most:.2f}",
            "bar_after": f"{100 * layer.macs_after / most:.2f}",
            "bits": words.NONE if layer.bits_mean is None else f"{layer.bits_mean:.2f}",
            "histogram": ", ".join(f"{n} at {b} bits" for b, n in sorted(layer.bits_histogram.items())),
            "executed": words.widths(layer, executed),
            "di": words.percent(layer.di_kept, 1),
            "worst": worst is not None and layer.name == worst.name and (worst.di_kept or 0) < 0.9995,
            "remark": "; ".join(t for t in (f"not cut: {layer.frozen}" if layer.frozen else "", layer.note) if t),
        }
        for layer in report.layers
    ]
    return {
        "title": words.title(report),
        "report": report,
        "blame": words.blame_words(report),
        "glances": words.glances(report),
        "layers": layers,
        "executed": executed,
        "created": report.created.replace("T", " ").replace("+00:00", " UTC"),
        "sections": [
            (name, lines)
            for name, lines in words.sections(report)
            if name not in ("Commands", "Layers that could not be cut")
        ],
        "restores": any(it.select_psnr is not None for it in report.iterations),
        "environment": [line.partition(": ")[::2] for line in words.flat(report.environment)],
        "request": [line.partition(": ")[::2] for line in words.flat(report.request)],
        "iterations": [
            {
                "index": it.index,
                "macs": words.count(it.macs),
                "fraction": words.percent(it.macs_fraction, 1),
                "top1": words.percent(it.select_top1),
                "psnr": words.decibels(it.select_psnr),
                "agreement": words.percent(it.select_agreement),
                "di": words.NONE if it.di_total is None else words.significant(it.di_total),
                "seconds": f"{it.seconds:.1f} s",
                "allocation": it.allocation,
            }
            for it in report.iterations
        ],
    }
