"""Fitting each layer, before it is rounded, to what the rounded layers in front of it really give it.

Behind the first rounded layer a layer is given x~ and no longer x. Its weights W are therefore moved first to where
W' x~ comes nearest to what the float net has there, W x:

    W' = W + W (C - S~) (S~ + rho I)^-1,    C = cov(x, x~),  S~ = cov(x~)

(asymmetric calibration: cf. Li et al., GPTAQ, ICML 2025, and `xedge.refit`, which does it for pruning). rho is chosen
for each layer on images that the fit has not seen, "leave it" among the choices. The float graph and its rounded twin
run side by side on the same images, one stretch of nodes from weighted node to weighted node at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor

from xedge.onnx_graph import Graph, drop_unused, session
from xedge.ranges import patches
from xedge.rounding import CORRECTED, Array, Layer

RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0)
"""Of the mean variance of x~."""
MOST_BYTES = 3 << 29
"""Of the tensors that both graphs hold at once; it limits how many images there are."""
PART = 2 / 3
"""Of the images that the fit sees; the others choose its ridge."""
FEWEST = 8
"""Images with which nothing is fitted."""

Image = NDArray[np.float32]


def room(graph: Graph) -> int:
    """How many images MOST_BYTES has room for, by their tensors where these are most."""
    life = _life(graph)
    sizes = {n: 4 * int(np.prod(graph.shapes.get(n, (1,)))) for n in life}
    weighted = {n.output[0] for n in graph.weighted()}
    stops = [i for i, n in enumerate(graph.nodes) if n.output[0] in weighted]
    widest = max((sum(sizes[n] for n in _living(life, i)) for i in stops), default=0)
    return max(1, MOST_BYTES // max(1, 2 * widest))


def _life(graph: Graph) -> dict[str, tuple[int, int]]:
    """The node that makes each tensor, and the last that reads it."""
    last = {name: i for i, n in enumerate(graph.nodes) for name in n.input}
    made = {name: i for i, n in enumerate(graph.nodes) for name in n.output} | dict.fromkeys(graph.inputs, -1)
    return {n: (made[n], last[n]) for n in made if n in last}


def _living(life: Mapping[str, tuple[int, int]], at: int) -> list[str]:
    """Tensors made before a node that it or a later one reads."""
    return [n for n, (made, last) in life.items() if made < at <= last]


class Twins:
    """The float graph and its rounded twin, in step, as far as the layer that is rounded next.

    Args:
        proto: the float graph.
        images: [1, C, H, W] each, that the fit sees. held: other images, that choose its ridge.
    """

    def __init__(self, proto: ModelProto, images: Sequence[Image], held: Sequence[Image]) -> None:
        self.graph = graph = Graph(proto)
        self.at = 0
        self.weights: dict[str, tuple[Image, Image | None]] = {}
        self.life = _life(graph)
        most = room(graph)
        self.fitted = min(len(images), int(most * PART))
        chosen = [*images[: self.fitted], *held[: most - self.fitted]]
        self.pairs = [[{graph.inputs[0]: x} for x in chosen] for _ in range(2)]

    def _live(self, at: int) -> list[str]:
        """Tensors made before a node that it or a later one reads."""
        return _living(self.life, at)

    def reach(self, node: NodeProto) -> None:
        """Run both graphs up to a weighted node."""
        stop = next(i for i, n in enumerate(self.graph.nodes) if n.output[0] == node.output[0])
        if stop == self.at:
            return
        live, names = self._live(stop), self._live(self.at)
        new = [n for n in live if n not in names]
        feeds = [n for n in names if any(n in node.input for node in self.graph.nodes[self.at : stop])]
        for values, rounded in zip(self.pairs, (False, True), strict=True):
            run = session(self._stretch(self.at, stop, feeds, new, rounded=rounded)) if new else None
            for row in values:
                found = run.run(new, {n: row[n] for n in feeds}) if run else []
                row.update(zip(new, found, strict=True))
                for gone in row.keys() - set(live):
                    del row[gone]
        self.at = stop

    def _stretch(self, start: int, stop: int, feeds: list[str], new: list[str], *, rounded: bool) -> ModelProto:
        graph, nodes, constants = self.graph, list[NodeProto](), dict[str, TensorProto]()
        for node in graph.nodes[start:stop]:
            own = NodeProto()
            own.CopyFrom(node)
            constants |= {n: graph.initializers[n] for n in node.input if graph.is_constant(n)}
            w = self.weights.get(node.input[1]) if rounded and len(node.input) > 1 else None
            if w is not None:
                names = [f"{node.output[0]}.{part}" for part in ("weight", "bias")]
                given = [n for n, value in zip(names, w, strict=True) if value is not None]
                constants |= {n: numpy_helper.from_array(v, n) for n, v in zip(names, w, strict=True) if v is not None}
                rest = list(node.input[1 + len(given) :])
                del own.input[1:]
                own.input.extend([*given, *rest])
            nodes.append(own)
        inputs, outputs = (
            [helper.make_tensor_value_info(n, graph.types.get(n, TensorProto.FLOAT), None) for n in side]
            for side in (feeds, new)
        )
        made = helper.make_model(
            helper.make_graph(nodes, "stretch", inputs, outputs, list(constants.values())),
            opset_imports=graph.model.opset_import,
            ir_version=graph.model.ir_version,
        )
        drop_unused(made)
        return made

    def fit(self, layer: Layer) -> tuple[Layer, Array]:
        """A layer moved to where it does on x~ what it did on x, and what its bias gains by that, [O].

        The layer comes back with the mean of x~; its covariance stays what more images gave.
        """
        still = np.zeros(len(layer.rows))
        if len(self.graph.consumers[layer.node.input[1]]) > 1:  # what suits one of its uses harms the others
            return layer, still
        self.reach(layer.node)
        if not self.weights or layer.node.op_type not in CORRECTED or len(self.pairs[0]) < FEWEST:
            return layer, still
        name, shape = layer.node.input[0], tuple(self.graph.initializers[layer.node.input[1]].dims)
        x, y = (
            torch.from_numpy(np.concatenate([patches(layer.node, row[name], shape, layer.groups) for row in side], 1))
            for side in self.pairs
        )
        mx, my = (a.mean(1, keepdim=True, dtype=torch.float64) for a in (x, y))
        rows = torch.from_numpy(layer.rows).view(layer.groups, -1, layer.rows.shape[2])
        cut = x.shape[1] // len(self.pairs[0]) * self.fitted
        better = rows
        if not layer.split and 0 < cut < x.shape[1]:
            x, y = (a - m.float() for a, m in ((x, mx), (y, my)))
            better = rows + _change(rows, (x[:, :cut], y[:, :cut]), (x[:, cut:], y[:, cut:]))
        mean = torch.from_numpy(layer.mean)[:, None]  # of more images: only its change is taken from these
        moved = mean + my - mx
        shift = ((rows * mean).sum(2) - (better * moved).sum(2)).flatten().numpy()
        return replace(layer, rows=better.reshape(layer.rows.shape).numpy(), mean=moved[:, 0].numpy()), shift

    def put(self, layer: Layer, value: Image, bias: Image | None) -> None:
        """The layer as it was rounded: of the shape of its initializer, and [O]."""
        self.weights[layer.node.input[1]] = (value, bias)


def _change(rows: Tensor, seen: tuple[Tensor, Tensor], held: tuple[Tensor, Tensor]) -> Tensor:
    """W' - W [G, O, K] of weights W on centred patches (x, x~), [G, n, K] each, with the ridge best for `held`."""
    (s, d), (s_held, d_held) = ((_gram(y, y), rows @ _gram(x - y, y)) for x, y in (seen, held))
    unit = s.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-12)[:, None, None]
    eye = torch.eye(s.shape[1], dtype=s.dtype)
    best, chosen = 0.0, torch.zeros_like(rows)
    for ridge in RIDGES:
        factor, failed = torch.linalg.cholesky_ex(s + ridge * unit * eye)
        if bool(failed.any()):
            continue
        change = torch.cholesky_solve(d.mT, factor).mT
        gain = float((2 * change * d_held).sum() - (change @ s_held * change).sum())
        if gain > best:
            best, chosen = gain, change
    return chosen


def _gram(a: Tensor, b: Tensor) -> Tensor:
    """Mean of a b^T by group, [G, n, A] and [G, n, B] -> [G, A, B]; float32 products added in float64."""
    total = torch.zeros(a.shape[0], a.shape[2], b.shape[2], dtype=torch.float64)
    for p, q in zip(torch.split(a, 4096, 1), torch.split(b, 4096, 1), strict=True):
        total += p.mT @ q
    return total / a.shape[1]
