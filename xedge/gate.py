"""`xedge gate`: does a finished run meet its budgets, by what was measured? Nothing is measured here.

A verdict is ``pass`` or ``fail`` only where the whole interval says so; ``inconclusive`` where it holds the budget;
``invalid`` where the measurement itself was disturbed.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

from xedge.errors import AccuracyMissed, Inconclusive, LatencyMissed, UsageError, XedgeError
from xedge.intervals import Decision
from xedge.judge import Drop, amount, fall
from xedge.measurement import BENCH, Comparison, Measurement, gate, read_measurements, trust
from xedge.report import read_json as read_report
from xedge.run import read_json


@dataclass(frozen=True)
class Check:
    """One budget against one artefact. `words`: the figure with its interval, where and how it was measured."""

    budget: Literal["latency", "accuracy"]
    target: str
    verdict: Decision | Literal["invalid"]
    words: str

    def __str__(self) -> str:
        return f"{self.verdict:12} {self.target}: {self.budget} {self.words}"


def gate_run(folder: Path, latency_ms: float | None, max_drop: Drop | None, device: str | None) -> list[Check]:
    """Every artefact of a run against every budget given.

    Args:
        latency_ms: for the median at batch 1.
        max_drop: largest fall of quality on validation data: of top-1 (without labels, of agreement) a fraction, of
            PSNR "0.2dB".
        device: whose measurements count, by name; None is every device but this host.

    Raises:
        UsageError: no finished run, no budget, no measurement, or one of a device that is not real.
    """
    if latency_ms is None and max_drop is None:
        raise UsageError("there is no budget to hold the run to", fix="add --latency 30ms or --max-drop 1%")
    digests = {a.target: a.sha256 for a in read_report(folder / "report.json").artifacts}
    checks: list[Check] = []
    if latency_ms is not None:
        checks += _latency(folder, digests, latency_ms, device)
    if max_drop is not None:
        checks += _accuracy(folder, max_drop)
    return checks


def _latency(folder: Path, digests: dict[str, str], budget_ms: float, device: str | None) -> Iterator[Check]:
    best: dict[tuple[str, str], Measurement] = {}
    names = {sha256: target for target, sha256 in digests.items()}
    for record in read_measurements(folder / BENCH):
        m = record.b if isinstance(record, Comparison) else record
        wanted = m.device == device if device else m.device != "local"
        if m.sha256 in names and wanted:
            key = names[m.sha256], m.device
            if key not in best or trust(m) >= trust(best[key]):
                best[key] = m
    if not best:
        where, flag = (f" on {device}", shlex.quote(device)) if device else (" on a device", "DEVICE")
        also = "" if device else "; this host counts with --device local"
        fix = f"xedge bench {shlex.quote(str(folder))} --device {flag}{also}"
        raise UsageError(f"was not timed{where}", where=str(folder), fix=fix)
    for (target, _), m in sorted(best.items()):
        i = m.interval
        words = (
            f"{i.median:.4g} ms [{i.lower:.4g}, {i.upper:.4g}] on {m.device} for at most {budget_ms:g} ms, {m.runtime} "
            f"{m.runtime_version}, {len(m.processes)} processes" + (f"; {m.verdict}: {m.reason}" if m.reason else "")
        )
        yield Check("latency", target, gate(m, budget_ms), words)


def _accuracy(folder: Path, given: Drop) -> Iterator[Check]:
    verified = read_json(folder / "verify.json")
    for target in sorted(verified["targets"]):
        fell = fall(verified, target)
        max_drop = amount(given, "--max-drop", restores=fell.kind == "PSNR")
        verdict: Decision = "fail" if fell.low > max_drop else "pass" if fell.high <= max_drop else "inconclusive"
        words = (
            f"{fell.kind} fell by {fell.say(fell.drop)} [{fell.say(fell.low)}, {fell.say(fell.high)}] on "
            f"{verified['images']} images for at most {fell.say(max_drop)}"
        )
        yield Check("accuracy", target, verdict, words)


def outcome(checks: Sequence[Check]) -> XedgeError | None:
    """The error that the worst verdict is, with its exit code; None where all pass."""
    for check in checks:
        if check.verdict == "fail":
            missed = LatencyMissed if check.budget == "latency" else AccuracyMissed
            return missed(f"{check.budget} {check.words}", where=check.target)
    for check in checks:
        if check.verdict != "pass":
            fix = "measure longer: --protocol reference" if check.budget == "latency" else "validate on more images"
            return Inconclusive(f"{check.budget} {check.words}", where=check.target, fix=fix)
    return None


def write_junit(checks: Sequence[Check], path: Path) -> None:
    """As CI servers read it: a fail is a failure, inconclusive and invalid are errors. The file appears whole."""
    bad = sum(check.verdict == "fail" for check in checks)
    unclear = sum(check.verdict in ("inconclusive", "invalid") for check in checks)
    suite = ElementTree.Element(
        "testsuite", name="xedge gate", tests=str(len(checks)), failures=str(bad), errors=str(unclear), skipped="0"
    )
    for check in checks:
        case = ElementTree.SubElement(suite, "testcase", classname=f"xedge.{check.target}", name=check.budget, time="0")
        if check.verdict == "fail":
            ElementTree.SubElement(case, "failure", message=check.words)
        elif check.verdict != "pass":
            ElementTree.SubElement(case, "error", message=f"{check.verdict}: {check.words}")
        else:
            ElementTree.SubElement(case, "system-out").text = check.words
    part = path.with_name(path.name + ".part")
    try:
        ElementTree.ElementTree(suite).write(part, encoding="utf-8", xml_declaration=True)
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UsageError(f"cannot write: {error.strerror or error}", where=str(path)) from error
