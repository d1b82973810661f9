"""A latency table: units of a model measured by themselves on the device, and the model's time predicted from them.

    T(widths) = t_0 + s * sum over units u of (t_u(inside, outside) - t_0)

t_0 is the time of as good as nothing (the call of the runtime), t_u of one unit by itself, and s what the units cost
more or less in company, found by timing a whole model. t_u is measured on a grid of widths and interpolated linearly in
either width: a convolution's time is a + b inside + c outside + d inside outside, between the stairs of the kernel's
tiles. Where the table shows stairs in the channels written, a width counts as the stair that it stands on.

All units take turns within one process of the agent, and the processes are several and fresh, so that a device that
drifts slows all of them alike. What was measured is kept in the user's cache folder, by what the device is.
"""

from __future__ import annotations

import io
import json
import os
import re
import tempfile
import zipfile
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from xedge.device import Device, open_device
from xedge.errors import DeviceError, UsageError
from xedge.intervals import median
from xedge.measure import TOLERANCE, agent_lines, agent_path, runtime_for
from xedge.plan import Costs
from xedge.run import digest_file, digest_json, write_atomically
from xedge.target import Target
from xedge.transports.supervised import sha256
from xedge.units import Positions, Unit, compiled_unit, unit_artefact

PROCESSES = 5
"""Fresh processes of the agent for each bundle."""
RETRIES = 2
"""How often those are run again in which the device was slower than in the others."""
BUNDLE = 400
"""Units in one process."""
POINTS = 5
"""Widths of an axis, at most, between which times are interpolated."""
SWEEP = 33
"""Consecutive widths at which stairs are looked for."""
STAIRS = (1, 2, 4, 8, 16, 32)
SWEPT = ("dense", "pointwise", "depthwise", "linear")
NOTHING = "nothing"

Point = tuple[str, int, int]
"""Key of a unit, channels inside, channels outside."""
Raw = dict[Point, list[list[int]]]
"""Nanoseconds of each run, by process; each round's first run, whose caches are cold, is not among them."""


@dataclass(frozen=True)
class Grid:
    """One kind of unit: ns[i, j] at inside[i] and outside[j]; one row where the unit is channel by channel."""

    inside: tuple[int, ...]
    outside: tuple[int, ...]
    ns: NDArray[np.float64]
    stair: int

    def at(self, inside: int, outside: int) -> float:
        """Nanoseconds, between the stairs of `outside` none."""
        stair = min(-(-outside // self.stair) * self.stair, self.outside[-1])
        i, a = _between(self.inside, inside)
        j, b = _between(self.outside, stair)
        if len(self.inside) == 1:
            rows = self.ns[0]
        else:
            rows = (1 - a) * self.ns[i] + a * self.ns[i + 1]
        return float(rows[0] if len(self.outside) == 1 else (1 - b) * rows[j] + b * rows[j + 1])


def _between(axis: Sequence[int], value: int) -> tuple[int, float]:
    """The index below and the share of the way to the next; beyond the ends the line goes on."""
    if len(axis) == 1:
        return 0, 0.0
    i = min(max(bisect_left(axis, value) - 1, 0), len(axis) - 2)
    return i, (value - axis[i]) / (axis[i + 1] - axis[i])


@dataclass(frozen=True)
class Table:
    """What was measured on one device for the units of one model.

    Attributes:
        device, facts: where.
        grids: key -> times.
        nothing: ns of calling the runtime.
        stairs: kind -> channels written in steps of so many cost the same.
        points: how many times were measured for it.
    """

    device: str
    facts: Mapping[str, Any]
    grids: Mapping[str, Grid]
    nothing: float
    stairs: Mapping[str, int]
    points: int

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        grids = {k: {**g.__dict__, "ns": g.ns.tolist()} for k, g in self.grids.items()}
        return {**self.__dict__, "grids": grids}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Table:
        """The inverse of `to_json`."""
        grids = {
            k: Grid(tuple(g["inside"]), tuple(g["outside"]), np.array(g["ns"]), g["stair"])
            for k, g in value["grids"].items()
        }
        return cls(**{**value, "grids": grids})

    def unit_ms(self, key: str, inside: int, outside: int) -> float:
        """What a unit adds to a model's time."""
        return max(0.0, self.grids[key].at(inside, outside) - self.nothing) / 1e6


@dataclass(frozen=True)
class LatencyCosts:
    """Milliseconds of a model as a function of how many channels each group lost: a `plan.CostModel`.

    Attributes:
        macs: the model as it is, which knows what removing channels does to each layer's weight.
        scale: s above.
    """

    macs: Costs
    units: tuple[Unit, ...]
    table: Table
    scale: float = 1.0
    _touched: dict[str, tuple[Unit, ...]] = field(default_factory=dict, compare=False, repr=False)

    def widths(self, group: str, now: int, original: int, align: int) -> list[int]:
        """As in MACs, without those that save nothing: the table's stairs."""
        kept, last = [], np.inf
        for width in self.macs.widths(group, now, original, align):
            cost = self._cost(self._of(group), {group: now - width})
            if cost < last * (1 - 1e-3):
                kept.append(width)
                last = cost
        return kept or [now]

    def total(self, removed: Mapping[str, int]) -> float:
        """Milliseconds once each group lost `removed` channels."""
        return self.table.nothing / 1e6 + self._cost(self.units, removed)

    def saving(self, group: str, count: int, removed: Mapping[str, int]) -> float:
        """Milliseconds that taking `count` more channels from a group saves."""
        units, more = self._of(group), {**removed, group: removed.get(group, 0) + count}
        return self._cost(units, removed) - self._cost(units, more)

    def words(self, cost: float) -> str:
        """A cost with its unit."""
        return f"{cost:.4g} ms"

    def _cost(self, units: Iterable[Unit], removed: Mapping[str, int]) -> float:
        left = self.macs.left(removed)
        return self.scale * sum(self.table.unit_ms(u.key, *u.widths(left)) for u in units)

    def _of(self, group: str) -> tuple[Unit, ...]:
        """The units that a group's width changes."""
        if group not in self._touched:
            layers = {layer for layer, _, _ in self.macs.uses.get(group, [])}
            self._touched[group] = tuple(u for u in self.units if u.layers & layers)
        return self._touched[group]


# -- which points ----------------------------------------------------------------------------------------------------


def wanted(
    units: Sequence[Unit], most: Positions, least: Positions, align: int
) -> dict[str, tuple[list[int], list[int]]]:
    """key -> the widths inside and outside at which it is to be measured, from the least to the most a plan can leave.

    Channel by channel there is one width, which is the one outside.
    """
    axes: dict[str, tuple[list[int], list[int]]] = {}
    for unit in units:
        high, low = unit.widths(most), unit.widths(least)
        for axis, ends in zip(axes.setdefault(unit.key, ([], [])), zip(low, high, strict=True), strict=True):
            axis += ends
    one = {u.key for u in units if u.channelwise}
    return {key: ([0] if key in one else _axis(i, align), _axis(o, align)) for key, (i, o) in axes.items()}


def _axis(ends: Sequence[int], align: int) -> list[int]:
    """At most POINTS widths from the least to the largest of `ends`, equal ratios apart, as multiples of `align`."""
    low, high = min(ends), max(ends)
    steps = sorted({low, high, *range(-(-low // align) * align, high + 1, align)})
    if len(steps) <= POINTS:
        return steps
    return sorted({min(steps, key=lambda s, w=w: abs(s - w)) for w in np.geomspace(low, high, POINTS)})  # type: ignore[misc]


def sweeps(units: Sequence[Unit], most: Positions, least: Positions) -> dict[str, tuple[Unit, int, list[int]]]:
    """kind -> (its largest unit, channels inside, consecutive widths outside): where stairs are looked for."""
    found: dict[str, tuple[Unit, int, list[int]]] = {}
    for unit in units:
        inside, outside = unit.widths(most)
        if unit.kind not in SWEPT or unit.outside.at(least) == outside:
            continue  # nothing can be cut there
        before = found.get(unit.kind)
        if before is None or outside > before[2][-1]:
            top = min(outside, 2 * (SWEEP - 1))
            found[unit.kind] = unit, 0 if unit.channelwise else inside, [*range(max(1, top - SWEEP + 1), top + 1)]
    return found


def stair_of(widths: Sequence[int], ns: Sequence[float]) -> int:
    """The largest step s for which time is a line in the width rounded up to a multiple of s, as well as for any s.

    A step needs two periods within `widths`.
    """
    x, y = np.asarray(widths, float), np.asarray(ns, float)
    errors = {}
    for s in STAIRS:
        if x[-1] - x[0] + 1 < 2 * s:
            continue
        stepped = np.ceil(x / s) * s
        line = np.polynomial.Polynomial.fit(stepped, y, 1)
        errors[s] = float(((line(stepped) - y) ** 2).sum())
    best = min(errors.values(), default=0.0)
    return max((s for s, e in errors.items() if e <= 1.25 * best + 1e-12), default=1)


# -- measuring -------------------------------------------------------------------------------------------------------


def build_table(
    address: str,
    target: Target,
    units: Sequence[Unit],
    most: Positions,
    least: Positions,
    align: int,
    say: Callable[[str], None],
) -> Table:
    """Measure on the device what the user's cache does not hold yet.

    Args:
        most, least: positions of the original, and with as little as a plan can leave.
        align: step of the widths.

    Raises:
        UsageError: an emulated device. DeviceError: it is absent or was lost. UnsupportedGraph: a unit is.
    """
    swept = sweeps(units, most, least)
    axes = wanted(units, most, least, align)
    by_key = {u.key: u for u in units}
    points: dict[Point, Callable[[], bytes]] = {}

    def want(unit: Unit, inside: int, outside: int) -> None:
        wide = inside or outside
        points[unit.key, inside, outside] = lambda: unit_artefact(unit, wide, outside, target)

    for key, (insides, outsides) in axes.items():
        for i in insides:
            for o in outsides:
                want(by_key[key], i, o)
    for unit, inside, widths in swept.values():
        for width in widths:
            want(unit, inside, width)
    name, facts, ns = timed_points(address, target, points, say)
    stairs = {
        kind: stair_of(widths, [ns[unit.key, inside, w] for w in widths])
        for kind, (unit, inside, widths) in swept.items()
    }
    grids = {
        key: Grid(
            tuple(insides),
            tuple(outsides),
            np.array([[ns[key, i, o] for o in outsides] for i in insides]),
            stairs.get(by_key[key].kind, 1),
        )
        for key, (insides, outsides) in axes.items()
    }
    return Table(name, facts, grids, ns[NOTHING, 0, 0], stairs, len(ns))


def timed_points(
    address: str, target: Target, points: Mapping[Point, Callable[[], bytes]], say: Callable[[str], None]
) -> tuple[str, dict[str, Any], dict[Point, float]]:
    """The device's name, its facts, and the nanoseconds of `points` and of (NOTHING, 0, 0) there.

    What the user's cache does not hold yet is made and measured.

    Raises:
        UsageError: an emulated device. DeviceError: it is absent or was lost. UnsupportedGraph: a unit is.
    """
    points = {**points, (NOTHING, 0, 0): lambda: compiled_unit(_nothing(target.opset), target)}
    with open_device(address, say=say) as device:
        need_real(device)
        first = _Bundle(device, target, {(NOTHING, 0, 0): points[NOTHING, 0, 0]})
        facts = first.once(rounds=1)[0]
        cache = _Cache(cache_file(device, target, facts))
        missing = {p: make for p, make in points.items() if p not in cache.raw}
        if missing:
            say(f"  latency table: {len(missing)} units of {len(points)} are new to {device.name}, measuring")
        names = list(missing)
        for start in range(0, len(names), BUNDLE):
            part = _Bundle(device, target, {p: missing[p] for p in names[start : start + BUNDLE]})
            cache.add(part.measured(say))
        name = device.name
    return name, facts, {p: typical(cache.raw[p]) for p in points}


def need_real(device: Device) -> None:
    """UsageError for a device whose times say nothing."""
    if device.kind != "real":
        raise UsageError(f"is {device.kind}, and a latency budget needs a real device", where=f"device {device.name}")


def typical(processes: Sequence[Sequence[int]]) -> float:
    """Median over processes of the median of each."""
    return median([median(runs) for runs in processes])


class _Bundle:
    """Units that are timed in one process, in turns."""

    def __init__(self, device: Device, target: Target, points: Mapping[Point, Callable[[], bytes]]) -> None:
        self._device, self._names = device, [f"{n}{target.suffix}" for n in range(len(points))]
        self._points = list(points)
        self._runtime = runtime_for(Path(f"unit{target.suffix}"))
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as file:
            for name, make in zip(self._names, points.values(), strict=True):
                file.writestr(zipfile.ZipInfo(name), make())
        with _file(packed.getvalue()) as path:
            self._digest = sha256(path)
            self._remote = device.transport.push(path)
        self._agent = device.transport.push(agent_path())

    def once(self, rounds: int = 10, seed: int = 0) -> tuple[dict[str, Any], list[float], Raw]:
        """One fresh process: facts, the probe's two medians, and the times."""
        argv = [*self._device.python, self._agent, "--bundle", self._remote, "--runtime", self._runtime]
        argv += ["--rounds", str(rounds), "--seed", str(seed)]
        if self._device.cpus:
            argv += ["--cpus", ",".join(map(str, self._device.cpus))]
        where = f"latency table on {self._device.name}"
        lines = agent_lines(self._device.transport.run(argv, 900.0), where)
        try:
            facts = next(x for x in lines if x["kind"] == "facts")
            probes = [median(x["ns"]) for x in lines if x["kind"] == "probe"]
            members = {x["name"]: x["ns"] for x in lines if x["kind"] == "member"}
            raw = {
                point: [[t for visit in members[name][1:] for t in visit[1:]]]
                for point, name in zip(self._points, self._names, strict=True)
            }
        except (KeyError, TypeError, StopIteration) as error:
            raise DeviceError(f"the agent's output lacks {error}", where=where, fix="run it again") from error
        if facts.get("model_sha256") != self._digest:
            raise DeviceError("the device timed other bytes than were sent", where=where, fix="run it again")
        if len(probes) != 2 or not all(type(t) is int and t > 0 for runs in raw.values() for t in runs[0]):
            raise DeviceError("the agent's times are no times", where=where, fix="check the device's clock")
        return facts, probes, raw

    def measured(self, say: Callable[[str], None]) -> Raw:
        """PROCESSES processes; those in which the device was over 10 % slower than at its best are run again."""
        kept = [self.once(seed=n) for n in range(PROCESSES)]
        for attempt in range(RETRIES):
            best = min(p for _, probes, _ in kept for p in probes)
            slow = [n for n, (_, probes, _) in enumerate(kept) if max(probes) > (1 + TOLERANCE) * best]
            if not slow:
                break
            say(f"  latency table: the device changed speed in {len(slow)} of {PROCESSES} processes; again")
            for n in slow:
                kept[n] = self.once(seed=PROCESSES * (attempt + 1) + n)
        return {p: [runs[0] for _, _, raw in kept for runs in [raw[p]]] for p in self._points}


@contextmanager
def _file(data: bytes) -> Iterator[Path]:
    """A bundle's bytes as a file, for as long as it is pushed."""
    with tempfile.TemporaryDirectory(prefix="xedge-") as folder:
        path = Path(folder) / "units.zip"
        path.write_bytes(data)
        yield path


def _nothing(opset: int) -> Any:
    """The least that a runtime runs: one number times one."""
    w = numpy_helper.from_array(np.ones((8, 8, 1, 1), np.float32), "w")
    sides = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 8, 1, 1]) for n in "xy"]
    conv = helper.make_node("Conv", ["x", "w"], ["y"], kernel_shape=[1, 1])
    graph = helper.make_graph([conv], "nothing", sides[:1], sides[1:], [w])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


# -- the cache -------------------------------------------------------------------------------------------------------

_STABLE = (
    "machine", "system", "cpu_model", "cores", "affinity", "memory_kib", "governors", "khz_limit", "runtime",
    "runtime_version", "runtime_sha256", "threads", "agent_sha256", "nvpmodel", "jetson_clocks",
)  # fmt: skip
"""Facts of the agent that decide whether an old time still holds."""


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/xedge/latency, or ~/.cache/xedge/latency."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(home) if home and Path(home).is_absolute() else Path.home() / ".cache"
    return base / "xedge" / "latency"


def writers() -> list[str]:
    """Digests of the modules that write artefacts: what another writer makes takes another time."""
    targets = Path(str(files("xedge.targets")))
    return [digest_file(p) for p in (Path(__file__).with_name("units.py"), *sorted(targets.glob("*.py")))]


def cache_file(device: Device, target: Target, facts: Mapping[str, Any]) -> Path:
    """Of a device, by what it is and how the artefacts for it are written."""
    known = {k: facts.get(k) for k in _STABLE}
    own = [
        device.name,
        list(device.cpus),
        target.flavour,
        target.suffix,
        *writers(),
    ]
    name = re.sub(r"[^A-Za-z0-9.]+", "-", device.name).strip("-") or "device"
    return cache_folder() / f"{name}-{digest_json([known, own])[:16]}.json"


class _Cache:
    """One file: [key, inside, outside, nanoseconds by process] of every point ever measured there."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.raw: Raw = {}
        try:
            rows = json.loads(path.read_text())
            self.raw = {
                (str(k), int(i), int(o)): [[int(t) for t in p] for p in ns] for k, i, o, ns in rows if ns and all(ns)
            }
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError):
            self.raw = {}  # damaged: it is measured again

    def add(self, raw: Raw) -> None:
        """Keep more of them."""
        self.raw.update(raw)
        rows = [[*point, ns] for point, ns in self.raw.items()]
        text = json.dumps(rows, separators=(",", ":"))
        write_atomically(self._path, lambda tmp: tmp.write_text(text))


# -- a whole model ---------------------------------------------------------------------------------------------------


def corrected(costs: LatencyCosts, measured: float) -> LatencyCosts:
    """With the scale at which the model as it is takes what was measured, in ms."""
    idle = costs.table.nothing / 1e6
    units = replace(costs, scale=1.0).total({}) - idle
    return replace(costs, scale=max(1e-3, (measured - idle) / max(units, 1e-9)))
