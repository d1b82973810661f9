"""What to keep: a budget, the cost of every channel, and widths the target likes."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from xedge.errors import UsageError
from xedge.groups import Groups

Keep = dict[str, NDArray[np.bool_]]

MIN_KEEP = 0.125
"""At least this part of a group's channels stays: below it a layer starves and folding cannot help."""
STEM_KEEP = 0.5
"""Likewise for the layers that read the model's input: what they drop no later layer can make up for."""


@dataclass(frozen=True)
class Budget:
    """What the user asks for; None is no limit.

    Attributes:
        macs: fraction of the original's multiply-adds to keep, 0 < macs <= 1.
        max_drop: largest fall of accuracy (of agreement, without labels) in points of 1, 0.005 for 0.5 %.
        bits: mean bits a weight, 1 < bits <= 8.
        latency: milliseconds on the device, in place of `macs`.
    """

    macs: float | None = None
    max_drop: float | None = None
    bits: float = 8.0
    latency: float | None = None


@dataclass(frozen=True)
class Plan:
    """Which channels stay and how many bits each gets: names and numbers only, JSON on disk.

    Attributes:
        keep: group -> indices of the kept channels, over the original's channels, as they lie in the compressed model.
        sizes: group -> the original's number of channels.
        spec: how to cut the architecture by itself (see `xedge.prune.apply_spec`).
        bits: layer -> bits of each output channel of the pruned layer.
        notes: what was decided and why.
    """

    keep: dict[str, list[int]]
    sizes: dict[str, int]
    spec: dict[str, Any]
    bits: dict[str, list[int]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**self.__dict__, "notes": list(self.notes)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Plan:
        """The inverse of `to_json`."""
        return cls(**{**value, "notes": tuple(value["notes"])})


class CostModel(Protocol):
    """What a plan costs, in the unit of the budget. `removed` maps groups to the channels that they lose."""

    def widths(self, group: str, now: int, original: int, align: int) -> list[int]:
        """The widths a group may take, from `now` downwards."""

    def total(self, removed: Mapping[str, int]) -> float:
        """Of the whole model."""

    def saving(self, group: str, count: int, removed: Mapping[str, int]) -> float:
        """What taking `count` more channels from a group saves."""

    def words(self, cost: float) -> str:
        """A cost with its unit."""


@dataclass(frozen=True)
class Costs:
    """Multiply-adds of every layer as a function of how many channels each group lost.

    A layer's MACs are proportional to its weight's elements, so each group on one of the weight's axes takes its
    positions off that axis.

    Attributes:
        layers: layer -> (MACs now, {axis: positions now}).
        uses: group -> [(layer, axis, positions a channel)].
        stems: groups of which `STEM_KEEP` stays.
        outside: MACs that no layer does.
    """

    layers: dict[str, tuple[int, dict[int, int]]]
    uses: dict[str, list[tuple[str, int, int]]]
    stems: frozenset[str] = frozenset()
    outside: int = 0

    @classmethod
    def of(
        cls, layer_macs: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]], groups: Groups, total: int = 0
    ) -> Costs:
        """From the MACs of each layer, the shape of each parameter, the channel groups and the model's MACs."""
        layers = {
            name: (macs, dict(enumerate(shapes[f"{name}.weight"])))
            for name, macs in layer_macs.items()
            if f"{name}.weight" in shapes
        }
        uses: dict[str, list[tuple[str, int, int]]] = {}
        for g in groups.groups:
            rows = {(s.layer, s.axis, s.index.shape[1]) for s in g.slices if s.param == f"{s.layer}.weight"}
            uses[g.name] = sorted(row for row in rows if row[0] in layers)
        outside = max(0, total - sum(macs for macs, _ in layers.values()))
        return cls(layers, uses, frozenset(g.name for g in groups.groups if g.stem), outside)

    def widths(self, group: str, now: int, original: int, align: int) -> list[int]:
        """`widths` of a group, with what it must keep."""
        return widths(now, original, align, STEM_KEEP if group in self.stems else MIN_KEEP)

    def layer(self, name: str, removed: Mapping[str, int]) -> float:
        """MACs of one layer once each group lost `removed` channels."""
        macs, axes = self.layers[name]
        left = dict(axes)
        for group, count in removed.items():
            for layer, axis, r in self.uses.get(group, []):
                if layer == name:
                    left[axis] -= r * count
        value = float(macs)
        for axis, size in axes.items():
            value *= left[axis] / size
        return value

    def total(self, removed: Mapping[str, int]) -> float:
        """MACs of the model once each group lost `removed` channels."""
        left = self.left(removed)
        value = float(self.outside)
        for name, (macs, axes) in self.layers.items():
            part = float(macs)
            for axis, size in axes.items():
                part *= left[name][axis] / size
            value += part
        return value

    def left(self, removed: Mapping[str, int]) -> dict[str, dict[int, int]]:
        """layer -> {axis of its weight: positions} once each group lost `removed` channels."""
        left = {name: dict(axes) for name, (_, axes) in self.layers.items()}
        for group, count in removed.items():
            for layer, axis, r in self.uses.get(group, []):
                left[layer][axis] -= r * count
        return left

    def words(self, cost: float) -> str:
        """A cost with its unit."""
        return f"{cost / 1e6:.2f} M MACs"

    def saving(self, group: str, count: int, removed: Mapping[str, int]) -> float:
        """MACs that taking `count` more channels from a group saves."""
        touched = {layer for layer, _, _ in self.uses[group]}
        more = {**removed, group: removed.get(group, 0) + count}
        return sum(self._fast(name, removed) - self._fast(name, more) for name in touched)

    def _fast(self, name: str, removed: Mapping[str, int]) -> float:
        macs, axes = self.layers[name]
        left = dict(axes)
        for group, axis, r in self._by_layer()[name]:
            left[axis] -= r * removed.get(group, 0)
        value = float(macs)
        for axis, size in axes.items():
            value *= left[axis] / size
        return value

    def _by_layer(self) -> dict[str, list[tuple[str, int, int]]]:
        cached: dict[str, list[tuple[str, int, int]]] | None = self.__dict__.get("_index")
        if cached is None:
            cached = {}
            for group, rows in self.uses.items():
                for layer, axis, r in rows:
                    cached.setdefault(layer, []).append((group, axis, r))
            object.__setattr__(self, "_index", cached)
        return cached


def widths(now: int, original: int, align: int, keep: float = MIN_KEEP) -> list[int]:
    """Widths a group may take from `now` downwards: multiples of `align`, at least `keep` of the original."""
    least = max(1, int(np.ceil(keep * original)))
    least = -(-least // align) * align
    return [now, *range((now - 1) // align * align, least - 1, -align)] if now > least else [now]


def reachable(costs: CostModel, sizes: Mapping[str, tuple[int, int]], align: int) -> float:
    """The least any plan can leave. `sizes` maps a group to its channels (now, original)."""
    return costs.total({g: now - costs.widths(g, now, original, align)[-1] for g, (now, original) in sizes.items()})


def allocate(
    scores: Mapping[str, NDArray[np.float64]],
    costs: CostModel,
    target: float,
    *,
    originals: Mapping[str, int],
    align: int,
    between: Mapping[str, NDArray[np.float64]] | None = None,
) -> Keep:
    """Choose which channels stay so that the model costs at most `target`.

    Args:
        scores: group -> importance of each channel that is there now.
        costs: the model's MACs, or milliseconds.
        target: what to reach, in that unit.
        originals: group -> channels the original had.
        align: widths are multiples of this.
        between: scores, with a unit that holds across groups, that decide how many channels each group loses: again
            and again the ones with the least importance for what they save. `scores` then decide which.
            Without them every group keeps the same part.

    Raises:
        UsageError: no widths reach the target.
    """
    steps = {g: costs.widths(g, len(s), originals[g], align) for g, s in scores.items()}
    sizes = {g: (len(s), originals[g]) for g, s in scores.items()}
    least = reachable(costs, sizes, align)
    if least > target * (1 + 1e-9):
        raise UsageError(
            f"the budget cannot be met: {costs.words(target)} asked, {costs.words(least)} is the least that "
            f"widths in multiples of {align}, {MIN_KEEP:.1%} of each layer and {STEM_KEEP:.0%} of the stem leave",
            fix="ask for more, use a target with a smaller align, or --prune-stem",
        )
    width = _uniform(steps, costs, target) if between is None else _global(between, steps, costs, target)
    _refill(width, between, steps, costs, target)
    keep = {}
    for g, s in scores.items():
        order = np.argsort(s, kind="stable")
        keep[g] = np.ones(len(s), dtype=bool)
        keep[g][order[: len(s) - width[g]]] = False
    return keep


def _uniform(steps: Mapping[str, list[int]], costs: CostModel, target: float) -> dict[str, int]:
    def at(ratio: float) -> dict[str, int]:
        return {g: min(w, key=lambda v, n=w[0]: (abs(v - n * ratio), -v)) for g, w in steps.items()}  # type: ignore[misc]

    def cost(width: Mapping[str, int]) -> float:
        return costs.total({g: steps[g][0] - w for g, w in width.items()})

    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        if cost(at(middle)) <= target:
            low = middle
        else:
            high = middle
    return at(low)


def _global(
    scores: Mapping[str, NDArray[np.float64]], steps: Mapping[str, list[int]], costs: CostModel, target: float
) -> dict[str, int]:
    prefix = {g: np.concatenate([[0.0], np.cumsum(np.sort(s))]) for g, s in scores.items()}
    at = dict.fromkeys(scores, 0)
    removed = dict.fromkeys(scores, 0)
    total = costs.total(removed)

    def price(g: str) -> float:
        now, then = steps[g][at[g]], steps[g][at[g] + 1]
        n = len(scores[g])
        loss = prefix[g][n - then] - prefix[g][n - now]
        return float(loss / max(costs.saving(g, now - then, removed), 1e-9))

    heap = [(price(g), g) for g in scores if len(steps[g]) > 1]
    heapq.heapify(heap)
    while total > target and heap:
        old, g = heapq.heappop(heap)
        fresh = price(g)
        if fresh > old * (1 + 1e-9) and heap and fresh > heap[0][0]:
            heapq.heappush(heap, (fresh, g))  # savings shrink as neighbours shrink: look again
            continue
        now, then = steps[g][at[g]], steps[g][at[g] + 1]
        total -= costs.saving(g, now - then, removed)
        at[g] += 1
        removed[g] += now - then
        if at[g] + 1 < len(steps[g]):
            heapq.heappush(heap, (price(g), g))
    return {g: steps[g][at[g]] for g in scores}


def _refill(
    width: dict[str, int],
    scores: Mapping[str, NDArray[np.float64]] | None,
    steps: Mapping[str, list[int]],
    costs: CostModel,
    target: float,
) -> None:
    """Widths come in steps, so the last step overshoots: give back what still fits under the target, dearest first, or
    without scores to the group that lost the largest part."""
    prefix = {g: np.concatenate([[0.0], np.cumsum(np.sort(s))]) for g, s in (scores or {}).items()}
    while True:
        best: tuple[float, str, int] | None = None
        for g, w in width.items():
            wider = [s for s in steps[g] if s > w]
            if not wider:
                continue
            now = {h: steps[h][0] - v for h, v in width.items()}
            if costs.total({**now, g: steps[g][0] - wider[-1]}) > target:
                continue
            price = 1 - w / steps[g][0]
            if scores is not None:
                n = len(scores[g])
                gain = prefix[g][n - w] - prefix[g][n - wider[-1]]
                price = gain / max(costs.saving(g, wider[-1] - w, {**now, g: steps[g][0] - wider[-1]}), 1e-9)
            if best is None or price > best[0]:
                best = (price, g, wider[-1])
        if best is None:
            return
        width[best[1]] = best[2]


def loss_of(scores: Mapping[str, NDArray[np.float64]], keep: Keep) -> float:
    """The importance that a plan gives up, summed in the criterion's own unit."""
    return float(sum(s[~keep[g]].sum() for g, s in scores.items()))
