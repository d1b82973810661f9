"""Precision under milliseconds: which layers of an integer model are faster in float, conversions included.

    min over s of  sum over units u of t_u(s_u) + sum over tensors of the conversions that s asks of them

A unit is integer or float. A tensor is rounded where its writer or one of its readers is integer: then a float writer
quantises it, and float readers dequantise it, once. Every term is submodular in s, so that a minimum cut is the exact
minimum, whatever the graph; along a chain it is the shortest path through two states.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite
from typing import Any

import networkx
from onnx import ModelProto, TensorProto

from xedge.latency import NOTHING, Point, timed_points
from xedge.onnx_graph import Graph
from xedge.quantize import ScaleTable
from xedge.target import Target
from xedge.units import (
    FREE,
    Positions,
    Unit,
    border_artefact,
    float_artefact,
    unit_artefact,
    units_of,
    weight_shape,
)

LEAST = 1e-12
"""Milliseconds that float must gain: at equal cost a unit is integer."""


@dataclass(frozen=True)
class Tensor:
    """One tensor between units, which are numbers: who writes and who reads it, and the ms of its conversions."""

    writer: int
    readers: tuple[int, ...]
    to_integer: float
    to_float: float

    def rounded(self, floats: Sequence[bool]) -> bool:
        """Whether it has integers, where `floats` tells which units are float."""
        return not all(floats[u] for u in (self.writer, *self.readers))


def fastest(units: Sequence[tuple[float, float]], tensors: Sequence[Tensor]) -> list[bool]:
    """Which units are float in the fastest model.

    Args:
        units: ms of each as an integer unit and as a float one; infinite where it cannot be that.
        tensors: between them; an infinite `to_integer` forbids a float unit to give it rounded.
    """
    cut = networkx.DiGraph()
    for u, (integer, real) in enumerate(units):  # the source's side is integer
        cut.add_edge(u, "float", capacity=integer)
        cut.add_edge("integer", u, capacity=real + LEAST)
    for n, tensor in enumerate(tensors):
        rounded, unread = ("rounded", n), ("no float reader", n)
        cut.add_edge(tensor.writer, rounded)  # without a capacity: an integer writer has it rounded
        cut.add_edge(rounded, tensor.writer, capacity=tensor.to_integer)
        cut.add_edge(rounded, unread, capacity=tensor.to_float)
        for reader in tensor.readers:
            cut.add_edge(reader, rounded)
            cut.add_edge(unread, reader)
    _, (_, floats) = networkx.minimum_cut(cut, "integer", "float")
    return [u in floats for u in range(len(units))]


def choose_floats(
    proto: ModelProto, table: ScaleTable, address: str, target: Target, say: Callable[[str], None]
) -> dict[str, Any]:
    """What is faster in float on the device, by its units' times: {"layers": layer -> ms in float and in int8,
    "tensors": those that are no longer rounded}.

    Args:
        proto: the float graph with its final widths. table: its plan, whose float layers stay so.

    Raises:
        As `xedge.latency.timed_points`.
    """
    graph, units = Graph(proto), units_of(proto)
    left = _positions(graph)
    root: dict[str, str] = {}
    for node in graph.nodes:
        if node.op_type in FREE and node.input:
            root.update((out, root.get(node.input[0], node.input[0])) for out in node.output)
    ins = [{root.get(n, n) for n in u.sizes if n != u.nodes[-1].output[0]} for u in units]
    readers: dict[str, list[int]] = {}
    for k, names in enumerate([*ins, {root.get(n, n) for n in graph.outputs}]):
        for name in names:
            readers.setdefault(name, []).append(k)
    writers = {out: k for k, u in enumerate(units) for out in u.nodes[-1].output}
    end = len(units)
    between = {
        name: (writers.get(name, end), tuple(k for k in by if k < end or name in table.activations))
        for name, by in readers.items()
        if graph.types.get(name, TensorProto.FLOAT) == TensorProto.FLOAT
    }
    have = {w.layer for w in table.weights.values()}
    uses = Counter(u.layer for u in units)
    fixed = [
        (bool(u.layer) and u.layer not in have) or any(n in between and n not in table.activations for n in names)
        for u, names in zip(units, ins, strict=True)
    ]
    at = {k: u.widths(left) for k, u in enumerate(units) if not fixed[k]}
    points: dict[Point, Callable[[], bytes]] = {}
    for k, (i, o) in at.items():
        u = units[k]
        points[_point(u, i, o)] = lambda u=u, i=i, o=o: unit_artefact(u, i, o, target)  # type: ignore[misc]
        points[_point(u, i, o, "plain ")] = lambda u=u, i=i, o=o: float_artefact(u, i, o, target)  # type: ignore[misc]
    for name in between:
        for side in ("", "x", "y"):
            shape = graph.shapes[name]
            points[_border(shape, side)] = lambda s=shape, r=side: border_artefact(s, r, target)  # type: ignore[misc]
    _, _, ns = timed_points(address, target, points, say)

    def ms(point: Point, less: Point = (NOTHING, 0, 0)) -> float:
        return max(0.0, ns[point] - ns[less]) / 1e6

    costs = [
        (inf, 0.0)
        if fixed[k]
        else (ms(_point(u, *at[k])), inf if u.layer and uses[u.layer] > 1 else ms(_point(u, *at[k], "plain ")))
        for k, u in enumerate(units)
    ]
    # LiteRT's artefacts take and give integers, ONNX Runtime's floats.
    costs.append((0.0, inf) if target.flavour == "litert" else (inf, 0.0))
    tensors = {}
    for name, (writer, by) in between.items():
        shape, ranged = graph.shapes[name], name in table.activations
        plain = _border(shape, "")
        to_integer = ms(_border(shape, "y"), plain) if ranged else inf
        tensors[name] = Tensor(writer, by, to_integer, ms(_border(shape, "x"), plain))
    floats = fastest(costs, list(tensors.values()))
    return chosen(graph, units, costs, floats, {n for n, t in tensors.items() if not t.rounded(floats)}, root)


def chosen(
    graph: Graph,
    units: Sequence[Unit],
    costs: Sequence[tuple[float, float]],
    floats: Sequence[bool],
    plain: set[str],
    root: Mapping[str, str],
) -> dict[str, Any]:
    """The decision as plain values: float layers with their times, and the tensors that are float for it."""
    real = [k for k, u in enumerate(units) if floats[k] and isfinite(costs[k][0])]
    inner = {out for k in real for node in units[k].nodes[:-1] for out in node.output}
    tensors = {n for n in graph.activations() if root.get(n, n) in plain} | inner
    return {
        "layers": {units[k].layer: [costs[k][1], costs[k][0]] for k in real if units[k].layer},
        "tensors": sorted(tensors),
    }


def partly(table: ScaleTable, choice: Mapping[str, Any]) -> ScaleTable:
    """The plan's table with what `choose_floats` found left float."""
    weights = {name: w for name, w in table.weights.items() if w.layer not in choice["layers"]}
    activations = {n: r for n, r in table.activations.items() if n not in choice["tensors"]}
    return replace(table, weights=weights, activations=activations)


def words(choice: Mapping[str, Any]) -> list[str]:
    """One line for each layer."""
    rows = choice["layers"].items()
    return [f"{layer} stays float: {real:.3g} ms against {integer:.3g} ms in int8" for layer, (real, integer) in rows]


def _point(unit: Unit, inside: int, outside: int, form: str = "") -> Point:
    return f"{form}{unit.key}", 0 if unit.channelwise else inside, outside


def _border(shape: tuple[int, ...], rounded: str) -> Point:
    return f"border {rounded} {'x'.join(map(str, shape))}", 0, 0


def _positions(graph: Graph) -> Positions:
    """As `plan.Costs.left` of the net as it is."""
    return {
        node.input[1].removesuffix(".weight"): dict(enumerate(weight_shape(graph, node))) for node in graph.weighted()
    }
