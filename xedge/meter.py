"""What a budget is counted in: multiply-adds, which are counted, or milliseconds on a device, which are measured."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import onnx
from torch import nn

from xedge.choose import costs_of
from xedge.device import open_device
from xedge.errors import LatencyMissed, UsageError
from xedge.groups import Groups
from xedge.latency import LatencyCosts, Table, build_table, corrected, need_real
from xedge.measure import QUICK, STANDARD, measure
from xedge.measurement import Measurement, from_json, to_json, to_text
from xedge.metrics import macs
from xedge.onnx_graph import export_float
from xedge.plan import CostModel, Costs, reachable
from xedge.progress import Talk
from xedge.run import Run, read_json
from xedge.target import Target
from xedge.units import Unit, artefact, units_of

SLACK = 0.98
"""Of a latency budget is aimed at: the upper end of an interval must come under it."""


@dataclass(frozen=True)
class Spent:
    """What a model costs.

    Attributes:
        cost: what the budget is held against: MACs, or the upper end of the latency's interval in ms.
        typical: in the unit of the cost model: MACs, or the median in ms.
        words: it, for people.
    """

    cost: float
    typical: float
    words: str


class Meter(Protocol):
    """Counts, or measures."""

    @property
    def goal(self) -> float | None:
        """In the unit of `Spent.cost`; None where there is no budget."""

    @property
    def aim(self) -> float:
        """Part of the goal that a plan aims at."""

    def spent(self, index: int, model: nn.Module, weights: Path) -> Spent:
        """Of the net after an iteration, whose weights lie in a file; 0 is the original."""

    def costs(self, model: nn.Module, groups: Groups, spent: Spent) -> CostModel:
        """Of the net as it is, whose channels are in `groups`."""

    def check(self, model: nn.Module, groups: Groups, align: int, spent: Spent) -> None:
        """Raises UsageError or LatencyMissed when no widths of the original's groups meet the goal."""


@dataclass(frozen=True)
class MacsMeter:
    """Multiply-adds. `share` is the budget, a fraction of `total`, the original's."""

    shape: tuple[int, ...]
    total: int
    share: float | None
    aim: float = 1.0

    @property
    def goal(self) -> float | None:
        """In MACs."""
        return None if self.share is None else self.share * self.total

    def spent(self, index: int, model: nn.Module, weights: Path) -> Spent:
        """Counted."""
        count = macs(model, self.shape).total
        return Spent(count, count, f"{count / self.total:.1%} of MACs")

    def costs(self, model: nn.Module, groups: Groups, spent: Spent) -> Costs:
        """By layer."""
        return costs_of(model, self.shape, groups)

    def check(self, model: nn.Module, groups: Groups, align: int, spent: Spent) -> None:
        """UsageError when no widths of the original's groups leave few enough MACs."""
        if self.share is None:
            return
        least = _least(costs_of(model, self.shape, groups), groups, align)
        if least > self.share * self.total:
            raise UsageError(
                f"the MACs budget of {self.share:.1%} cannot be met: {least / self.total:.1%} is the least that the "
                f"channels which can be cut leave in multiples of {align}",
                fix="raise --macs, try --prune-stem, or see `xedge compress --dry-run` for what stays and why",
            )


@dataclass(frozen=True)
class LatencyMeter:
    """Milliseconds on a device: widths are chosen by the table, and what comes out is timed whole.

    A net is timed as it would be quantised, before it is: its times do not depend on the values of its scales. What the
    quick protocol leaves open, or finds throttled, the standard one measures again.

    Attributes:
        keep_float: layers that will stay float.
    """

    run: Run
    address: str
    target: Target
    shape: tuple[int, ...]
    goal: float
    table: Table
    units: tuple[Unit, ...]
    keep_float: str | None
    talk: Talk
    aim: float = SLACK

    def spent(self, index: int, model: nn.Module, weights: Path) -> Spent:
        """Measured, once for the same weights."""
        inputs = {
            "weights": weights, "device": self.address, "target": self.target.name, "keep_float": self.keep_float,
            "protocol": f"{QUICK.name}, {STANDARD.name}",
        }  # fmt: skip
        path = self.run.step(
            f"prune/{index:03d}.latency.json", inputs, lambda p: p.write_text(json.dumps(to_json(self._timed(model))))
        )
        record = from_json(read_json(path))
        assert isinstance(record, Measurement)
        i = record.interval
        words = f"{i.median:.4g} ms [{i.lower:.4g}, {i.upper:.4g}] on {record.device}"
        return Spent(i.upper, i.median, words)

    def _timed(self, model: nn.Module) -> Measurement:
        floats = export_float(model, self.shape, self.target.opset)
        with tempfile.TemporaryDirectory(prefix="xedge-") as folder:
            path = Path(folder) / f"model{self.target.suffix}"
            path.write_bytes(artefact(floats, self.target, self.keep_float))
            with open_device(self.address, say=self.talk.say) as device:
                need_real(device)
                record = measure(device, path, None, QUICK)
                self._tell(record)
                i = record.interval
                if record.verdict != "ok" or i.lower <= self.goal < i.upper:
                    # A cut that only a slow spell of the device asks for would never come back.
                    record = measure(device, path, None, STANDARD)
                    self._tell(record)
        return record

    def _tell(self, record: Measurement) -> None:
        self.talk.say(f"  whole: {to_text(record)}" + (f"; {record.reason}" if record.reason else ""))

    def costs(self, model: nn.Module, groups: Groups, spent: Spent) -> LatencyCosts:
        """By the table, at the scale of what was measured last."""
        return corrected(LatencyCosts(costs_of(model, self.shape, groups), self.units, self.table), spent.typical)

    def check(self, model: nn.Module, groups: Groups, align: int, spent: Spent) -> None:
        """LatencyMissed when the table says that no widths are fast enough."""
        least = _least(self.costs(model, groups, spent), groups, align)
        if least > self.goal:
            raise LatencyMissed(
                f"--latency {self.goal:g}ms cannot be met: the original takes {spent.words}, and {least:.4g} ms is the "
                f"least that the table predicts of the channels which can be cut",
                fix="allow more time, try --prune-stem, or choose a smaller model",
            )


def _least(costs: CostModel, groups: Groups, align: int) -> float:
    return reachable(costs, {g.name: (g.size, g.size) for g in groups.free}, align)


def latency_meter(
    run: Run,
    address: str,
    target: Target,
    model: nn.Module,
    shape: tuple[int, ...],
    graph: Path,
    groups: Groups,
    inputs: Mapping[str, object],
    goal: float,
    keep_float: str | None,
    talk: Talk,
) -> LatencyMeter:
    """The meter of a run, its table measured where the cache does not hold it.

    Args:
        model: the original. graph: its float ONNX file.
        inputs: what decides the table besides: the files of weights and groups.
        goal: milliseconds.
    """
    units = units_of(onnx.load(graph), keep_float)
    costs = costs_of(model, shape, groups)
    removed = {g.name: g.size - costs.widths(g.name, g.size, g.size, target.align)[-1] for g in groups.free}

    def make(path: Path) -> None:
        table = build_table(address, target, units, costs.left({}), costs.left(removed), target.align, talk.say)
        path.write_text(json.dumps(table.to_json(), sort_keys=True))

    where = {"device": address, "target": target.name, "keep_float": keep_float}
    table = Table.from_json(read_json(run.step("latency_table.json", {**inputs, **where}, make)))
    stairs = ", ".join(f"{kind} {step}" for kind, step in sorted(table.stairs.items()))
    talk.say(f"  latency table: {table.points} units on {table.device}; steps of channels written: {stairs}")
    return LatencyMeter(run, address, target, shape, goal, table, tuple(units), keep_float, talk)
