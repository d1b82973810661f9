"""A report in words: units, ratios, the five answers. Shared by the terminal, Markdown and the HTML page.

Every ratio says its direction ("3.10x smaller", "1.25x slower") and a speed-up is only claimed when its interval
leaves out 1.
"""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xedge.report import Choice, Latency, Layer, Report, Row, Sized

TIMES, MINUS, ARROW, DASH = "\N{MULTIPLICATION SIGN}", "\N{MINUS SIGN}", "\N{RIGHTWARDS ARROW}", "\N{EN DASH}"
NONE = "\N{EM DASH}"
UNMEASURED = "not measured"


@dataclass(frozen=True)
class Line:
    """One line of a summary table; `better` colours the change (None: neither)."""

    metric: str
    original: str
    compressed: str
    change: str
    better: bool | None = None


@dataclass(frozen=True)
class Figure:
    """One of the answers at a glance: a big figure, what it is, and a small line beneath."""

    label: str
    value: str
    detail: str
    better: bool | None = None


@dataclass(frozen=True)
class Glance:
    """What a target's reader asks first. `where` says on which device the times were taken."""

    target: str
    lines: tuple[Line, ...]
    figures: tuple[Figure, ...]
    where: str


# --------------------------------------------------------------------------------------------------- one number


def count(n: int) -> str:
    """Three significant digits with a decimal prefix: 999, 1.23 k, 281 k, 2.00 G."""
    return _prefixed(n, ("", " k", " M", " G", " T"))


def size(n: int) -> str:
    """Bytes with a decimal prefix: 999 B, 44.4 kB, 1.23 MB."""
    return _prefixed(n, (" B", " kB", " MB", " GB", " TB"))


def _prefixed(n: int, units: Sequence[str]) -> str:
    if abs(n) < 1000:
        return f"{n}{units[0]}"
    value = float(n)
    for unit in units[1:]:
        value /= 1000
        # 999.5 and more would be shown as 1000: take the next prefix instead
        if abs(value) < 999.5 or unit == units[-1]:
            return f"{significant(value)}{unit}"
    return str(n)


def significant(value: float, digits: int = 3) -> str:
    """`value` with at least `digits` significant digits, never in exponent form: 0.0312, 1.23, 44.4, 281, 12345."""
    if value == 0:
        return "0"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:.{places}f}"
    if places and len(text.replace("-", "").replace(".", "").lstrip("0")) > digits:  # 9.996 rounded up to 10.00
        text = f"{value:.{places - 1}f}"
    return text


def percent(fraction: float | None, places: int = 2) -> str:
    """A fraction as a percentage; a dash when absent. Just below 1 is never rounded up to 100 %."""
    if fraction is None:
        return NONE
    text = f"{100 * fraction:.{places}f}"
    if fraction < 1 and float(text) >= 100:
        text = f"{100 - 10.0**-places:.{places}f}"
    return f"{text} %"


def points(difference: float) -> str:
    """A difference of two fractions in percentage points, with its sign."""
    text = f"{100 * difference:+.2f}".replace("-", MINUS)
    return f"{'0.00' if float(f'{100 * difference:.2f}') == 0 else text} points"


def decibels(value: float | None) -> str:
    """34.12 dB; a dash when absent."""
    return NONE if value is None else f"{value:.2f} dB"


def change_db(difference: float) -> str:
    """A difference in decibels, with its sign."""
    text = f"{difference:+.2f}".replace("-", MINUS)
    return f"{'0.00' if float(f'{difference:.2f}') == 0 else text} dB"


def times(ratio: float) -> str:
    """A ratio with the multiplication sign: 2.51x, 12.4x, 130x."""
    return f"{significant(ratio)}{TIMES}"


def interval(low: float, high: float, like: float) -> str:
    """`[low, high]` with as many decimals as `significant` gives the estimate `like`."""
    places = len(significant(like).partition(".")[2])
    return f"[{low:.{places}f}, {high:.{places}f}]"


def smaller(before: float, after: float) -> tuple[str, bool | None]:
    """(`3.10x smaller`, whether that is better) for a cost where less is better."""
    if before == after:
        return "the same", None
    if not before or not after:
        return NONE, None
    return (f"{times(before / after)} smaller", True) if after < before else (f"{times(after / before)} larger", False)


def milliseconds(latency: Latency | None) -> tuple[str, str]:
    """(median, interval) in the same number of decimals."""
    if latency is None:
        return UNMEASURED, ""
    mid = latency.median_ms
    return f"{significant(mid)} ms", interval(latency.lower_ms, latency.upper_ms, mid)


def speed(latency: Latency | None) -> tuple[str, str, bool | None]:
    """(verdict, interval, better) from the interleaved ratio original / compressed.

    A verdict of faster or slower needs an interval that leaves out 1: else the answer is "no difference measured".
    """
    if latency is None:
        return UNMEASURED, "", None
    return compared(latency.ratio)


def compared(found: tuple[float, float, float] | None) -> tuple[str, str, bool | None]:
    """`speed` of a ratio with its interval."""
    if found is None:
        return "not compared", "", None
    ratio, low, high = found
    if high < 1:
        return f"{times(1 / ratio)} slower", interval(1 / high, 1 / low, 1 / ratio), False
    if low > 1:
        return f"{times(ratio)} faster", interval(low, high, ratio), True
    return "no difference measured", interval(low, high, ratio), None


def place(latency: Latency) -> str:
    """The device in words, with its kind unless it is the real thing."""
    kind = "" if latency.device_kind == "real" else f" ({latency.device_kind})"
    return ("this host" if latency.device == "local" else latency.device) + kind


def timed_on(latency: Latency | None) -> str:
    """On which device, with what, how often."""
    if latency is None:
        return ""
    agreed = f"; {latency.agreement}" if latency.agreement else ""
    return f"timed on {place(latency)}, {latency.runtime}, {latency.processes} processes, batch 1{agreed}"


# --------------------------------------------------------------------------------------------------- the answers


def title(report: Report) -> str:
    """`lenet5 for jetson and android`."""
    return f"{report.model} for {_and(report.targets)}" if report.targets else report.model


def _and(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _worse(original: Row | None, compressed: Row) -> Figure:
    """How much worse: dB of PSNR of pictures, points of top-1 of labels, else agreement with the original."""
    if compressed.psnr is not None and original is not None and original.psnr is not None:
        drop = compressed.psnr - original.psnr
        better = None if abs(drop) < 5e-3 else drop > 0
        detail = f"{decibels(original.psnr)} {ARROW} {decibels(compressed.psnr)}"
        return Figure("dB of PSNR", change_db(drop).partition(" ")[0], detail, better)
    if compressed.top1 is not None and original is not None and original.top1 is not None:
        drop = compressed.top1 - original.top1
        better = None if abs(drop) < 5e-5 else drop > 0
        value = points(drop).partition(" ")[0]
        return Figure("points of top-1", value, f"{percent(original.top1)} {ARROW} {percent(compressed.top1)}", better)
    if compressed.top1 is not None:
        return Figure("top-1", percent(compressed.top1), "the original was not measured")
    if compressed.agreement is not None:
        return Figure("same top-1 as the original", percent(compressed.agreement), "no labels: agreement instead")
    return Figure("accuracy", NONE, UNMEASURED)


def blame(report: Report) -> Layer | None:
    """The layer that kept the smallest share of its discriminant information; None when none was measured."""
    measured = [layer for layer in report.layers if layer.di_kept is not None]
    return min(measured, key=lambda layer: layer.di_kept if layer.di_kept is not None else 1.0, default=None)


def blame_words(report: Report) -> str:
    layer = blame(report)
    if layer is None or layer.di_kept is None:
        return "no layer is to blame: DI was not measured"
    if layer.di_kept >= 0.9995:
        return "every layer kept all of its discriminant information"
    return f"{layer.name} lost most: it keeps {percent(layer.di_kept, 1)} of its discriminant information"


def _lines(report: Report, original: Row | None, compressed: Row) -> Iterator[Line]:
    before, after = original, compressed
    if after.psnr is not None:
        fell = None if before is None or before.psnr is None else after.psnr - before.psnr
        better = None if fell is None or abs(fell) < 5e-3 else fell > 0
        change = "" if fell is None else change_db(fell)
        yield Line("PSNR of Y", decibels(before.psnr if before else None), decibels(after.psnr), change, better)
    if after.top1 is not None or (before is not None and before.top1 is not None):
        change, better = "", None
        if before is not None and before.top1 is not None and after.top1 is not None:
            drop = after.top1 - before.top1
            change, better = points(drop), None if abs(drop) < 5e-5 else drop > 0
        yield Line("top-1", percent(before.top1 if before else None), percent(after.top1), change, better)
    if after.agreement is not None:
        yield Line("same as original", NONE, percent(after.agreement), "")
    for metric, field, unit in (
        ("MACs", "macs", count),
        ("parameters", "parameters", count),
        ("file", "bytes", size),
        ("file, zstd", "bytes_zstd", size),
        ("file, Brotli", "bytes_brotli", size),
    ):
        new = getattr(after, field)
        if before is None:
            yield Line(metric, NONE, unit(new), "")
        else:
            old = getattr(before, field)
            yield Line(metric, unit(old), unit(new), *smaller(old, new))
    verdict, between, better = speed(after.latency)
    old_time, new_time = milliseconds(before.latency if before else None), milliseconds(after.latency)
    yield Line("latency", old_time[0], new_time[0], verdict, better)
    if after.latency is not None:
        yield Line("  interval", old_time[1], new_time[1], between)
    if report.planned_bits_mean is not None:
        bits = report.planned_bits_mean
        yield Line(
            "bits a weight", "32", f"{bits:.2f}", "mean, planned" if report.coding == "fixed" else "mean, of code"
        )
        if before is not None and bits > 0:
            pruned, rounded = before.parameters / after.parameters, 32 / bits
            whole, left = size(4 * before.parameters), size(round(bits * after.parameters / 8))
            product = f"{times(pruned)} by pruning, {times(rounded)} by bits: {times(pruned * rounded)}"
            yield Line("  parameters", whole, left, product)
    if after.entropy_bits is not None:
        yield Line("  entropy", NONE, f"{after.entropy_bits:.2f}", "order 0, as stored")
    if after.executed_bits is not None:
        yield Line("  executed", "32", f"{after.executed_bits:.4g}", "mean, by the kernels")
    if after.verified_agreement is not None or after.snr_db is not None:
        snr = "" if after.snr_db is None else f"SNR {after.snr_db:.1f} dB"
        if after.verified_agreement is None:
            yield Line("agrees with torch", NONE, snr, "")
        else:
            yield Line("agrees with torch", NONE, percent(after.verified_agreement), snr)


def _figures(original: Row | None, compressed: Row) -> Iterator[Figure]:
    if original is not None:
        for label, old, new, unit in (
            ("file", original.bytes, compressed.bytes, size),
            ("MACs", original.macs, compressed.macs, count),
        ):
            verdict, better = smaller(old, new)
            value, _, direction = verdict.partition(" ")
            what = {"smaller file": "smaller file", "smaller MACs": "fewer MACs", "larger MACs": "more MACs"}
            if better is None:
                yield Figure(label, "same", unit(new))
            else:
                caption = what.get(f"{direction} {label}", f"{direction} {label}")
                yield Figure(caption, value, f"{unit(old)} {ARROW} {unit(new)}", better)
    latency = compressed.latency
    verdict, between, better = speed(latency)
    if latency is None:
        yield Figure("latency", NONE, UNMEASURED)
    elif latency.ratio is None:
        yield Figure("latency", milliseconds(latency)[0], "not compared with the original")
    elif better is None:
        yield Figure("not measurably faster", times(latency.ratio[0]), f"interval {between}")
    else:
        value, _, direction = verdict.partition(" ")
        yield Figure(f"{direction} on {place(latency)}", value, f"interval {between}", better)
    yield _worse(original, compressed)


def glances(report: Report) -> list[Glance]:
    """The summary of each target that has a compressed row."""
    out = []
    for target in report.targets:
        before, after = report.row("original", target), report.row("compressed", target)
        if after is not None:
            lines, figures = tuple(_lines(report, before, after)), tuple(_figures(before, after))
            out.append(Glance(target, lines, figures, timed_on(after.latency)))
    return out


def answers(report: Report) -> list[tuple[str, str]]:
    """(question, answer) for the five questions; an answer names the targets where they differ."""
    pairs = [
        (target, report.row("original", target), after)
        for target in report.targets
        if (after := report.row("compressed", target)) is not None
    ]
    if not pairs:
        return [("smaller", "nothing was compressed")]
    macs, files, speeds, worse, devices = [], [], [], [], []
    for target, before, after in pairs:
        if before is not None:
            verdict, better = smaller(before.macs, after.macs)
            macs.append(
                (
                    target,
                    f"{verdict.partition(' ')[0]} {'fewer' if better else 'more'} MACs"
                    if better is not None
                    else "as many MACs",
                )
            )
            verdict, better = smaller(before.bytes, after.bytes)
            files.append((target, f"{verdict} file" if better is not None else "a file of the same size"))
        verdict, between, better = speed(after.latency)
        speeds.append((target, f"{verdict} {between}".strip()))
        figure = _worse(before, after)
        worse.append((target, f"{figure.value} {figure.label}, {figure.detail}"))
        devices.append((target, timed_on(after.latency) or "latency was not measured"))
    return [
        ("smaller", "; ".join(filter(None, (_merged(macs), _merged(files)))) or UNMEASURED),
        ("faster", _merged(speeds)),
        ("worse", _merged(worse)),
        ("device", _merged(devices)),
        ("to blame", blame_words(report)),
    ]


def _merged(said: Sequence[tuple[str, str]]) -> str:
    """`a` when all targets say a, else `jetson a, android b`."""
    if len({text for _, text in said}) <= 1:
        return said[0][1] if said else ""
    return "; ".join(f"{target} {text}" for target, text in said)


# --------------------------------------------------------------------------------------------------- the layers


def channels(before: int, after: int) -> str:
    """`64 -> 32`, or `64` when unchanged."""
    return str(before) if before == after else f"{before} {ARROW} {after}"


def layer_table(report: Report) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the per-layer table: outputs, inputs, share of the original's MACs, bits stored and run, DI.

    `runs` is the width of the arithmetic: one number where the targets agree, else one for each target.
    """
    head = ["layer", "out", "in", "% of MACs", "bits", "runs", "DI kept"]
    total = sum(layer.macs_before for layer in report.layers) or 1
    executed = executed_on(report)
    rows = []
    for layer in report.layers:
        rows.append(
            [
                layer.name,
                channels(layer.out_before, layer.out_after),
                channels(layer.in_before, layer.in_after),
                f"{100 * layer.macs_before / total:.1f} {ARROW} {100 * layer.macs_after / total:.1f}",
                NONE if layer.bits_mean is None else f"{layer.bits_mean:.2f}",
                widths(layer, executed),
                percent(layer.di_kept, 1),
            ]
        )
    return head, rows


def shorten(name: str, limit: int) -> str:
    """At most `limit` columns wide, cut at the front: the end of a module path says more than its beginning."""
    width = [2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in name]
    if sum(width) <= limit:
        return name
    start = next(i for i in range(len(name) + 1) if sum(width[i:]) < limit)
    return "\N{HORIZONTAL ELLIPSIS}" + name[start:]


def widths(layer: Layer, targets: Sequence[str]) -> str:
    """`8` where the targets agree, else `8/4` in their order."""
    said = [str(layer.executed_bits.get(target, NONE)) for target in targets]
    return "/".join(said if len(set(said)) > 1 else said[:1]) or NONE


def executed_on(report: Report) -> list[str]:
    """Targets for which executed widths are known, in the order of the rows."""
    known = {target for layer in report.layers for target in layer.executed_bits}
    return [*(t for t in report.targets if t in known), *sorted(known - set(report.targets))]


def sections(report: Report) -> list[tuple[str, list[str]]]:
    """What follows the tables: (title, lines), empty ones left out."""
    run = [f"stopped by: {report.stopped_by}"]
    if report.price_of_alignment:
        run.append(f"price of the hardware's channel multiples: {report.price_of_alignment}")
    if report.certificate:
        run.append(f"masked model against cut model: {_certificate(report.certificate)}")
    frozen = [f"{layer.name}: {layer.frozen}" for layer in report.layers if layer.frozen]
    notes = [*report.notes, *(f"{layer.name}: {layer.note}" for layer in report.layers if layer.note)]
    forms = [line for choice in report.choices for line in choice_lines(choice)]
    files = [f"{a.target}: {a.path} ({a.kind}, {size(a.bytes)}, sha256 {a.sha256[:12]})" for a in report.artifacts]
    commands = [f"{what}: {command}" for what, command in report.commands]
    named = (
        ("Run", run),
        ("Layers that could not be cut", frozen),
        ("Candidates", forms),
        ("Notes", notes),
        ("Other sizes of pictures", [sized(found) for found in report.sizes]),
        ("Artefacts", files),
        ("Commands", commands),
    )
    return [(name, lines) for name, lines in named if lines]


def _certificate(facts: Mapping[str, Any]) -> str:
    """What the proof of the last cut said."""
    if not facts["ok"]:
        return f"not proven: {facts['reason']}"
    apart = "equal to the last bit" if facts["max_error"] == 0 else f"at most {facts['max_error']:.0e} apart in float64"
    return f"{apart} (limit {facts['limit']:.0e}); the {facts['channels']} channels of the last cut moved the output"


def choice_lines(choice: Choice) -> list[str]:
    """What a target ships and why, then each candidate with its held-back quality, its size and its fate."""
    return [
        f"{choice.target}: {choice.why}",
        *(
            f"{choice.target}, {c.form}: {c.words}"
            + (f" ({c.quality} on held-back data, {size(c.bytes)})" if c.bytes is not None else "")
            for c in choice.candidates
        ),
    ]


def sized(found: Sized) -> str:
    """One line of what was timed at another size of pictures."""
    verdict, between, _ = compared(found.ratio)
    pixels = found.width * found.height / 1e6
    ms = f"{significant(found.before_ms)} ms {ARROW} {significant(found.after_ms)} ms"
    each = f"{significant(found.before_ms / pixels)} {ARROW} {significant(found.after_ms / pixels)} ms a megapixel"
    macs = f"{count(found.macs_before)} {ARROW} {count(found.macs_after)} MACs"
    where = "this host" if found.device == "local" else found.device
    return (
        f"{found.target} at {found.width}x{found.height}: {macs}; {ms}, {' '.join(filter(None, (verdict, between)))}; "
        f"{each}; on {where}, {found.runtime}, {found.protocol} protocol"
    )


def flat(data: Mapping[str, Any]) -> list[str]:
    """`key: value` of a dictionary by key, nested keys joined with dots; values as JSON unless they are text."""
    out: list[str] = []
    for key, value in sorted(data.items()):
        if isinstance(value, Mapping):
            out += [f"{key}.{inner}" for inner in flat(value)]
        else:
            out.append(f"{key}: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}")
    return out
