"""Scales and biases learn the float net's answers; integers, and so bits and bytes, stay as they are.

A layer's rounding error has a part that a factor and a constant for each output channel take away: w ~ s exp(t) q and
b + u r, with u the tensor's range, so that one rate suits all. They are trained end to end on calibration images by KL
from the float net's answers, activations rounded straight through, so that later layers mend what earlier ones leave.
No label is read (cf. norm tweaking, Li et al., AAAI 2024; the learned scales of LSQ, Esser et al., ICLR 2020).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from onnx import ModelProto
from torch import Tensor, nn
from torch.utils.data import Subset

from xedge.budget import CALIBRATED
from xedge.data import Images, enough, permutation
from xedge.onnx_graph import Graph
from xedge.qat import quantised_judge, unless_worse
from xedge.quantize import ScaleTable
from xedge.simulate import Quantized
from xedge.train import Recipe, fit

if TYPE_CHECKING:
    from xedge.progress import Talk
    from xedge.request import Loaded

RATE = 1e-3
"""Of Adam: a step changes a scale by a thousandth, and a bias by a thousandth of what its channel spreads."""
BATCH = 16
SPREADS = 8.0
"""A tensor's range in standard deviations, about."""


class Rescaled(nn.Module):
    """A quantised net with trainable scales and biases.

    Args:
        judge: the quantised net; its weights are replaced at each forward.
        proto: its float graph. table: where to start from.
    """

    def __init__(self, judge: Quantized, proto: ModelProto, table: ScaleTable) -> None:
        super().__init__()
        self._judge = (judge,)  # in a tuple, so that its float parameters are not trained
        self.names = list(table.weights)
        self.growths, self.shifts = nn.ParameterList(), nn.ParameterList()
        self.weights: list[Tensor] = []
        self.biases: list[Tensor | None] = []
        self.units: list[float] = []
        graph = Graph(proto)
        written = {n.input[1]: graph.written(n) for n in graph.weighted()}
        for name, w in table.weights.items():
            shape = [-1 if i == w.axis else 1 for i in range(w.values.ndim)]
            step = torch.from_numpy(w.scale.copy()).view(shape)
            self.weights.append(torch.from_numpy(w.values.astype(np.float32)) * step)
            self.biases.append(None if w.bias is None else torch.from_numpy(w.bias.copy()))
            low, high = table.activations.get(written[name], (0.0, SPREADS))
            self.units.append((high - low) / SPREADS)
            self.growths.append(nn.Parameter(torch.zeros_like(step)))
            self.shifts.append(nn.Parameter(torch.zeros(len(w.scale) if w.bias is not None else 0)))

    def forward(self, x: Tensor) -> Tensor:
        """Answers of a batch [N, C, H, W]."""
        (judge,) = self._judge
        for i, name in enumerate(self.names):
            weight = self.weights[i] * torch.exp(self.growths[i])
            judge.weights[judge.weight_nodes[name]] = (weight, self.bias(i))
        return judge.run(x.contiguous())  # a traced view wants the layout it was traced with

    def bias(self, i: int) -> Tensor | None:
        """Of a weight's outputs, [O]."""
        bias = self.biases[i]
        return None if bias is None else bias + self.units[i] * self.shifts[i]

    @torch.no_grad()
    def table(self, before: ScaleTable) -> ScaleTable:
        """The table as it is now."""
        weights = dict(before.weights)
        for i, name in enumerate(self.names):
            old, bias = weights[name], self.bias(i)
            weights[name] = replace(
                old,
                scale=old.scale * torch.exp(self.growths[i]).flatten().numpy(),
                bias=None if bias is None else bias.numpy(),
            )
        return replace(before, weights=weights)


def learning(data: Images, seed: int) -> Images:
    """The images that scales learn on."""
    count = min(len(data), enough(data, CALIBRATED))
    chosen: Images = Subset(data, permutation(len(data), seed, "scales")[:count].tolist())  # type: ignore[arg-type]
    return chosen


def rescale(
    loaded: Loaded, model: nn.Module, proto: ModelProto, table: ScaleTable, checkpoint: Path, talk: Talk
) -> ScaleTable:
    """Let scales and biases learn for --learn-scales epochs; where held-back data say that it was worse, it is undone.

    Args:
        loaded: request and data; the rounding is that of the first target with integers.
        model: the float model, which teaches. proto: its graph.
        table: the quantised net to start from.
        checkpoint: written after each epoch, read at the start.
        talk: says what goes on.

    Raises:
        UsageError: no target computes in integers, or the model's forward fixes the batch.
    """
    flag, request = "--learn-scales", loaded.request
    net = Rescaled(quantised_judge(loaded, model, proto, table, flag), proto, table)
    data = replace(loaded.data, train=learning(loaded.data.train, request.seed))
    recipe = recipe_of(request.learn_scales, request.seed)

    def train() -> None:
        fit(net, data, recipe, original=model, checkpoint=checkpoint, talk=talk, what="learning scales")

    return net.table(table) if unless_worse(net, train, loaded, model, talk, "learning scales") else table


def recipe_of(epochs: int, seed: int) -> Recipe:
    """How scales learn: Adam, from the float net's answers alone, as they are."""
    return Recipe(
        epochs=epochs, lr=RATE, batch=BATCH, weight_decay=0.0, distill=1.0, temperature=1.0, adam=True, seed=seed
    )
