"""Process, Measurement, Comparison: raw nanoseconds with the state of the device, and the file that keeps them.

The records hold what was seen; every figure is a property, computed again from the raw numbers.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np

from xedge.errors import UsageError
from xedge.intervals import Decision, Interval, early_stopping_discard, median_interval, sign_test

BENCH = "bench.jsonl"
"""In a run folder: one line for each measurement of its artefacts."""

PROTOCOLS = ("quick", "standard", "reference")
"""From the least to the most trustworthy."""

Verdict = Literal["ok", "not-steady", "throttled", "incomplete"]
"""``not-steady``: warm-up never settled. ``throttled``: the device itself changed speed by over 10 %, or its clocks or
its thermal state moved. ``incomplete``: too few runs. Only ``ok`` is a figure to quote."""


@dataclass(frozen=True)
class Process:
    """One fresh process of the agent. Times in nanoseconds, in the order they were taken.

    Attributes:
        warmup_ns: until the steady state; the first is the cold run.
        run_ns: `invoke` alone, every `stride`-th run. Where ``after["batch"]`` is over 1, the clock was too coarse for
            one run: each is the mean of so many.
        steady: whether the warm-up settled before its cap.
        probe_before_ns, probe_after_ns: the agent's fixed computation just before and just after `run_ns`.
        before, after: the agent's facts; ``before`` has those that do not change.
        summary: what a program that keeps its single runs to itself said of them (see `xedge.tools`): ``statistic``
            and ``ns``, among others. The probes are empty wherever the agent did not run.
    """

    warmup_ns: tuple[int, ...]
    run_ns: tuple[int, ...]
    stride: int
    steady: bool
    probe_before_ns: tuple[int, ...]
    probe_after_ns: tuple[int, ...]
    before: Mapping[str, Any]
    after: Mapping[str, Any]
    summary: Mapping[str, Any] = field(default_factory=dict)

    @property
    def median_ms(self) -> float:
        """Or the mean, where a program prints no median."""
        return self.quantile_ms(0.5) if self.run_ns else float(self.summary["ns"]) / 1e6

    def quantile_ms(self, q: float) -> float:
        return float(np.quantile(np.asarray(self.run_ns, dtype=np.int64), q)) / 1e6

    @property
    def probes_ns(self) -> tuple[float, float]:
        """Medians of the probe before and after: a preemption hits few of its repeats and does not move them. 1 and 1
        where there was no probe."""
        if not self.probe_before_ns or not self.probe_after_ns:
            return 1.0, 1.0
        return float(np.median(self.probe_before_ns)), float(np.median(self.probe_after_ns))


@dataclass(frozen=True)
class Agreement:
    """How far a device's outputs are from those of this host's runtime (`xedge.agree`).

    Attributes:
        inputs: seeded ones, on which both ran.
        largest: difference of any output: in steps of an integer output, else as a part of the range of this host's.
        unit: which of the two.
        snr_db: signal over difference; None where every bit is the same.
    """

    inputs: int
    largest: float
    unit: Literal["steps", "range"]
    snr_db: float | None

    def __str__(self) -> str:
        if self.snr_db is None:
            return f"outputs equal this host's, bit for bit, for {self.inputs} inputs"
        steps = f"{self.largest:.0f} step{'s' if self.largest > 1 else ''}"
        apart = steps if self.unit == "steps" else f"{self.largest:.1g} of their range"
        return (
            f"outputs agree with this host's to {self.snr_db:.0f} dB, at most {apart} apart, for {self.inputs} inputs"
        )


@dataclass(frozen=True)
class Measurement:
    """One model on one device over independent processes.

    Attributes:
        model, sha256: file name and content of what was timed.
        runtime, threads, protocol: how; `protocol` is the preset's name.
        device, device_kind: where; ``local`` is the host, whatever target the model is for.
        processes: those that count.
        replaced: those run again because of a fault; kept, never counted.
        verdict, reason: see Verdict.
        created: UTC, ISO 8601.
        agreement: of the outputs there with this host's, where they were compared: in browsers.
    """

    model: str
    sha256: str
    runtime: str
    threads: int
    protocol: str
    device: str
    device_kind: str
    processes: tuple[Process, ...]
    replaced: tuple[Process, ...]
    verdict: Verdict
    reason: str
    created: str
    agreement: Agreement | None = None

    @property
    def runtime_version(self) -> str:
        return str(self.processes[0].before.get("runtime_version", ""))

    @property
    def interval(self) -> Interval:
        """Of the median latency in ms, over the medians of the processes."""
        return median_interval([p.median_ms for p in self.processes])

    def quantile(self, q: float) -> Interval | None:
        """Of the latency's q-quantile in ms, over processes; None where a process has too few runs to bound it.

        None too where runs were timed in batches: their means have lost the tail.
        """
        if any(early_stopping_discard(len(p.run_ns), q) is None or p.after.get("batch", 1) > 1 for p in self.processes):
            return None
        return median_interval([p.quantile_ms(q) for p in self.processes])

    @property
    def first_ms(self) -> float:
        """Median over processes of the first, cold run; NaN where nobody saw it."""
        seen = [p.warmup_ns[0] for p in self.processes if p.warmup_ns]
        return float(np.median(seen)) / 1e6 if seen else float("nan")

    @property
    def unknown(self) -> str:
        """What a program in place of the agent leaves unknown; empty otherwise."""
        parts = ["single runs"] if any(not p.run_ns for p in self.processes) else []
        parts += ["the steady state", "the device's speed during the runs"] * any(
            not p.probe_before_ns for p in self.processes
        )
        means = any(p.summary.get("statistic") == "mean" for p in self.processes)
        return ", ".join(parts) + ("; means in place of medians" if means else "")


@dataclass(frozen=True)
class Comparison:
    """Two models, a and b, in pairs of fresh processes interleaved A B B A: pair i is (a.processes[i], b.processes[i]).

    `disturbed` lists the pairs still at fault after the retries, most often because the device changed speed within
    them; `reason` says so even where the verdict is ok.
    """

    a: Measurement
    b: Measurement
    disturbed: tuple[int, ...]
    verdict: Verdict
    reason: str

    @property
    def ratios(self) -> tuple[float, ...]:
        """Time of a over time of b, pair by pair: over 1 means b is faster."""
        pairs = zip(self.a.processes, self.b.processes, strict=True)
        return tuple(one.median_ms / other.median_ms for one, other in pairs)

    @property
    def ratio(self) -> Interval:
        return median_interval(self.ratios)

    @property
    def p_value(self) -> float:
        """Of the two-sided sign test over the pairs."""
        return sign_test(self.ratios)

    @property
    def finding(self) -> Literal["faster", "slower", "undecided"]:
        """What b is, next to a: decided only where the ratio's interval leaves out 1."""
        ratio = self.ratio
        if self.verdict != "ok" or not ratio.decisive or ratio.lower <= 1 <= ratio.upper:
            return "undecided"
        return "faster" if ratio.lower > 1 else "slower"


def gate(measurement: Measurement, budget_ms: float) -> Decision | Literal["invalid"]:
    """Whether the median latency meets `budget_ms`: ``fail`` only where the interval's lower bound is over it.

    ``invalid`` where the measurement's verdict is not ok. UsageError for an emulated, fake or browser device, whose
    times say nothing about the device that the budget is for.
    """
    if not budget_ms > 0:
        raise UsageError(f"a latency budget of {budget_ms:g} ms cannot be met", fix="give a positive number")
    if measurement.device_kind != "real":
        raise UsageError(
            f"is {measurement.device_kind}, and a latency gate takes a real device",
            where=f"device {measurement.device}",
        )
    return measurement.interval.decide(budget_ms) if measurement.verdict == "ok" else "invalid"


def trust(record: Measurement | Comparison) -> tuple[bool, bool, int]:
    """Orders measurements of one artefact: silicon over emulation, a board over this host, long protocols over short.

    Of equals the latest counts.
    """
    m = record.b if isinstance(record, Comparison) else record
    known = m.protocol in PROTOCOLS
    return m.device_kind == "real", m.device != "local", PROTOCOLS.index(m.protocol) if known else 0


def to_text(record: Measurement | Comparison) -> str:
    """One line: the figures with their intervals, and where they were taken."""

    def time(m: Measurement) -> str:
        return f"{m.interval.median:.3f} ms [{m.interval.lower:.3f}, {m.interval.upper:.3f}]"

    m = record.b if isinstance(record, Comparison) else record
    where = f"on {m.device} ({m.device_kind}), {m.runtime} {m.runtime_version}"
    if isinstance(record, Comparison):
        ratio = record.ratio
        return (
            f"{record.a.model} {time(record.a)}, {record.b.model} {time(record.b)}, ratio {ratio.median:.2f} "
            f"[{ratio.lower:.2f}, {ratio.upper:.2f}], {record.finding} {where}, {len(record.ratios)} pairs"
            + (f"; not known: {m.unknown}" if m.unknown else "")
        )
    p90 = m.quantile(0.9)
    more = f", 90 % within {p90.median:.3f} ms" if p90 else ""
    first = f", first run {m.first_ms:.3f} ms" if m.first_ms == m.first_ms else ""
    unknown = f"; not known: {m.unknown}" if m.unknown else ""
    return f"{time(m)}{more}{first}, {where}, {len(m.processes)} processes{unknown}"


def _process(value: Mapping[str, Any]) -> Process:
    numbers = {key: tuple(value[key]) for key in ("warmup_ns", "run_ns", "probe_before_ns", "probe_after_ns")}
    return Process(**{**value, **numbers})


def _measurement(value: Mapping[str, Any]) -> Measurement:
    processes = {key: tuple(_process(p) for p in value[key]) for key in ("processes", "replaced")}
    agreed = value.get("agreement")
    return Measurement(**{**_without(value), **processes, "agreement": agreed and Agreement(**agreed)})


def _without(value: Mapping[str, Any]) -> dict[str, Any]:
    return {key: item for key, item in value.items() if key != "record"}


def _fields(record: Process | Measurement | Comparison) -> dict[str, Any]:
    """As dataclasses.asdict, but without visiting a million integers one by one."""
    return {f.name: getattr(record, f.name) for f in fields(record)}


def to_json(record: Measurement | Comparison) -> dict[str, Any]:
    """Plain JSON with a "record" key that names the class."""
    plain = {"record": type(record).__name__, **_fields(record)}
    if isinstance(record, Comparison):
        return {**plain, "a": to_json(record.a), "b": to_json(record.b)}
    processes = {key: [_fields(p) for p in plain[key]] for key in ("processes", "replaced")}
    return {**plain, **processes, "agreement": record.agreement and asdict(record.agreement)}


def from_json(value: Mapping[str, Any]) -> Measurement | Comparison:
    """Inverse of `to_json`. UsageError where it is not one."""
    try:
        if value["record"] == "Measurement":
            return _measurement(value)
        if value["record"] == "Comparison":
            sides = {"a": _measurement(value["a"]), "b": _measurement(value["b"])}
            return Comparison(**{**_without(value), **sides, "disturbed": tuple(value["disturbed"])})
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"not a measurement of this version: {error!r}") from error
    raise UsageError(f"not a measurement: record {value['record']!r}")


def append_measurement(path: Path, record: Measurement | Comparison) -> None:
    """Append one line and see it to the disk."""
    append_line(path, to_json(record))


def append_line(path: Path, value: Mapping[str, Any]) -> None:
    """Append JSON as one line and see it to the disk. A line is whole when its newline is there.

    The torn end that a killed writer left is cut off first; on a full disk the file is put back as it was.
    """
    line = json.dumps(value, separators=(",", ":"), allow_nan=False).encode() + b"\n"
    try:
        with path.open("a+b", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            end = _whole_lines(file.fileno())
            file.truncate(end)
            try:
                rest = memoryview(line)
                while rest:
                    rest = rest[os.write(file.fileno(), rest) :]
                os.fsync(file.fileno())
            except OSError:
                file.truncate(end)
                raise
    except OSError as error:
        raise UsageError(
            f"cannot write: {error.strerror or error}",
            where=str(path),
            fix="free space there, or choose another folder",
        ) from error


def _whole_lines(descriptor: int) -> int:
    """The offset behind the last newline."""
    end = os.fstat(descriptor).st_size
    while end > 0:
        start = max(0, end - (1 << 16))
        newline = os.pread(descriptor, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def read_measurements(path: Path) -> list[Measurement | Comparison]:
    """Every whole line of the file, oldest first; none where there is no file. UsageError where a line is damaged."""
    if not path.exists():
        return []
    try:
        lines: Sequence[bytes] = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise UsageError(f"cannot read: {error.strerror or error}", where=str(path)) from error
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(from_json(json.loads(line)))
        except (ValueError, UsageError) as error:
            raise UsageError(
                f"line {number} is damaged: {error}",
                where=str(path),
                fix="remove the line, or the file, and bench again",
            ) from error
    return records
