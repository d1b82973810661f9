"""The report's plots, as inline SVG that follows the page's colours and is the same bytes for the same report.

matplotlib draws with stand-in colours, which are then replaced by the page's CSS variables: one drawing serves the
light and the dark scheme. Text stays text: it is searchable and takes the page's font.
"""

from __future__ import annotations

import html
import io
import re
import warnings
from typing import TYPE_CHECKING, Any

from xedge.report_words import shorten

if TYPE_CHECKING:
    from xedge.report import Report, Subspace

# A colour that matplotlib writes -> the page's variable.
INK, MUTED, GRID, ACCENT, SURFACE = "#010101", "#020202", "#030303", "#040404", "#050505"
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--rule", ACCENT: "--accent", SURFACE: "--surface"}

_STYLE: Any = {  # rc_context wants the names as literals
    "svg.hashsalt": "xedge",  # element ids do not change from run to run
    "svg.fonttype": "none",
    "text.parse_math": False,  # a layer may be called a$b
    "font.family": "DejaVu Sans",  # ships with matplotlib, so the layout does not depend on the machine
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "figure.facecolor": "none",
    "path.simplify": False,
}

NAMED_LAYERS = 24
"""Up to here the bits plot names each layer; above, it numbers them as the table does."""


def accuracy_against_macs(report: Report) -> str | None:
    """Quality on the held-back split of the training data (PSNR, top-1, agreement without labels) over MACs, each
    iteration.

    Returns:
        An `<svg>` element, or None where fewer than two iterations were measured.
    """
    kinds = (("select_psnr", 1, "PSNR, dB"), ("select_top1", 100, "top-1"))
    field, factor, what = next(
        (kind for kind in kinds if any(getattr(it, kind[0]) is not None for it in report.iterations)),
        ("select_agreement", 100, "agreement with the original"),
    )
    measured = [
        (100 * it.macs_fraction, factor * value, it)
        for it in report.iterations
        if (value := getattr(it, field)) is not None
    ]
    if len(measured) < 2:
        return None
    returned = next((row.macs for row in report.rows if row.name == "compressed"), None)
    x, y = [m[0] for m in measured], [m[1] for m in measured]

    def draw(axes: Any) -> None:
        axes.axhline(y[0], color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
        axes.plot(x, y, color=ACCENT, linewidth=1.6, marker="o", markersize=4, markeredgewidth=0)
        for mx, my, it in measured:
            if it.macs == returned:
                axes.plot([mx], [my], "o", color=INK, markersize=10, fillstyle="none", zorder=3)
                axes.annotate("returned", (mx, my), (7, -13), textcoords="offset points", color=INK)
                break
        axes.annotate("start", (x[0], y[0]), (0, 6), textcoords="offset points", ha="center", color=MUTED)
        axes.set_xlabel("MACs, % of the original")
        axes.set_ylabel(f"{what}, %")
        low, high = min(y), max(y)
        pad = max(0.22 * (high - low), 0.5)
        axes.set_ylim(low - 1.3 * pad, max(high + 0.1 * pad, min(high + pad, 100.9)))
        axes.set_xlim(min(0.9 * min(x), max(x) - 10), max(x) + 4)
        axes.grid(axis="x", visible=False)

    shown = "; ".join(f"{a:.1f} % of MACs: {b:.2f} %" for a, b, _ in measured)
    return _svg("accuracy", (5.7, 3.1), draw, f"{what} against MACs over the iterations", shown)


def bits_per_layer(report: Report) -> str | None:
    """Bits a weight for each layer: cells as dark as their share of the layer's channels, and the mean as a line.

    Returns:
        An `<svg>` element, or None where nothing was quantised.
    """
    layers = [(i, layer) for i, layer in enumerate(report.layers) if layer.bits_mean is not None]
    if not layers:
        return None
    named = len(report.layers) <= NAMED_LAYERS
    top = max(8, *(bits for _, layer in layers for bits in layer.bits_histogram or {8: 1}))

    def draw(axes: Any) -> None:
        for i, layer in layers:
            channels = sum(layer.bits_histogram.values())
            for bits, n in sorted(layer.bits_histogram.items()):
                if n:
                    alpha = 0.12 + 0.6 * n / channels
                    axes.bar(i, 0.92, 0.84, bits - 0.46, color=ACCENT, alpha=alpha, linewidth=0)
            mean = layer.bits_mean
            axes.plot([i - 0.46, i + 0.46], [mean, mean], color=INK, linewidth=1.8, solid_capstyle="butt")
        axes.set_ylim(-0.1, top + 0.7)
        axes.set_yticks(range(0, top + 1, 2 if top <= 8 else 4))
        axes.set_xlim(-0.7, len(report.layers) - 0.3)
        axes.set_ylabel("bits a weight")
        axes.grid(axis="x", visible=False)
        if named:
            names = [shorten(layer.name, 22) for layer in report.layers]
            slanted = max(map(len, names)) * len(names) > 80
            kind: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if slanted else {}
            axes.set_xticks(range(len(names)), names, **kind)
        else:
            step = 10 if len(report.layers) <= 150 else 50
            ticks = [0, *range(step - 1, len(report.layers), step)]
            axes.set_xticks(ticks, [str(t + 1) for t in ticks])
            axes.set_xlabel("layer, numbered as in the table")

    shown = "; ".join(f"{layer.name}: {layer.bits_mean:.2f}" for _, layer in layers)
    return _svg("bits", (5.7, 3.1), draw, "Bits stored a weight, by layer", shown)


def explained_by_components(report: Report) -> str | None:
    """Share of each group's discriminant information in its first components, a line a group, stronger with depth.

    Returns:
        An `<svg>` element, or None where no group's was analysed.
    """
    subspaces = [s for s in report.subspaces if s.di > 0]
    if not subspaces:
        return None

    def draw(axes: Any) -> None:
        for i, s in enumerate(subspaces):
            y = [0.0, *(100 * v for v in s.explained)]
            alpha = 0.25 + 0.75 * (i + 1) / len(subspaces)
            axes.plot(range(len(y)), y, color=ACCENT, alpha=alpha, linewidth=1.4, marker="o", markersize=2.5)
        axes.set_xlabel("components")
        axes.set_ylabel("DI explained, %")
        axes.set_ylim(0, 103)
        axes.set_xlim(0, None)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(axis="x", visible=False)

    def needed(s: Subspace) -> str:
        count = next((k for k, v in enumerate(s.explained, 1) if v >= 0.9), len(s.explained))
        return f"{s.group}: {count} components of {s.channels} channels explain 90 %"

    shown = "; ".join(map(needed, subspaces))
    return _svg("components", (5.7, 3.1), draw, "Discriminant information explained, by number of components", shown)


def _svg(prefix: str, inches: tuple[float, float], draw: Any, title: str, description: str) -> str:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    out = io.StringIO()
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # A name in a script that DejaVu lacks is drawn by the browser, which has fonts of its own.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=inches, dpi=72, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.tick_params(length=0)
        draw(axes)
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(out, format="svg", metadata=nothing, transparent=True)
    return _inline(out.getvalue(), prefix, title, description)


def _inline(svg: str, prefix: str, title: str, description: str) -> str:
    """matplotlib's file as an element: no prolog, ids of its own, the page's colours, a title and a description."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"\s*<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)  # it would style the page
    svg = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    svg = re.sub(r"font-family: [^;\"]*; ?", "", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    box = re.search(r'viewBox="[^"]*"', svg)
    body = svg[svg.index(">") + 1 :]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'{box.group(0) if box else ""} stroke-linejoin="round" '
        f'role="img" aria-labelledby="{prefix}-title {prefix}-text">'
        f'<title id="{prefix}-title">{html.escape(title)}</title>'
        f'<desc id="{prefix}-text">{html.escape(description)}</desc>'
    )
    return head + body.strip()
