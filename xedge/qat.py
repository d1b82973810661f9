"""Quantisation-aware fine-tuning: the rounded net is trained through its roundings, and the scales with it.

The judge's own graph runs (`simulate.Quantized`), so that what is trained is what the artefact computes. A weight w
with scale s is w ~ s round(clip(w / s)); the rounding passes gradients straight through (Bengio et al., 2013), which
gives the scale the gradient of LSQ (Esser et al., ICLR 2020). Scales are trained as s = s_0 exp(t), which keeps them
positive.
Bits and ranges of activations stay as they were chosen, batch norms stay folded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from onnx import ModelProto
from torch import Tensor, nn

from xedge.errors import UsageError
from xedge.judge import Judge
from xedge.quantize import ScaleTable, WeightScale
from xedge.rounding import Grid
from xedge.simulate import Quantized, straight_through
from xedge.train import Recipe, fit, predict

if TYPE_CHECKING:
    from xedge.progress import Talk
    from xedge.request import Loaded

RATE = 0.1
"""Of --lr: the net is trained already."""
DISTILL = 0.5
"""Weight of the float net's answers against the labels."""


class Tuned(nn.Module):
    """A quantised net with trainable weights, biases and scales.

    Args:
        judge: the quantised net; its weights are replaced at each forward.
        table: where to start from.
    """

    def __init__(self, judge: Quantized, table: ScaleTable) -> None:
        super().__init__()
        self._judge = (judge,)  # in a tuple, so that its float parameters are not trained
        self.names = list(table.weights)
        self.weights, self.biases, self.growths = nn.ParameterList(), nn.ParameterList(), nn.ParameterList()
        self.steps: list[Tensor] = []
        self.grids: list[tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]] = []
        for w in table.weights.values():
            shape = [-1 if i == w.axis else 1 for i in range(w.values.ndim)]
            step = torch.from_numpy(w.scale.copy()).view(shape)
            self.steps.append(step)
            rest = tuple(i for i in range(w.values.ndim) if i != w.axis)
            odd = (w.bits > 0) & (w.values % 2 != 0).all(rest)
            grid = Grid.of(w.bits.astype(np.int64), w.scale.astype(np.float64), odd)
            low, high = (torch.from_numpy(a.astype(np.float32)).view(shape) for a in (grid.low, grid.high))
            self.grids.append((low, high, grid.rounding(np.arange(len(w.bits)).reshape(shape))))
            self.weights.append(nn.Parameter(torch.from_numpy(w.values.astype(np.float32)) * step))
            self.biases.append(nn.Parameter(torch.zeros(0) if w.bias is None else torch.from_numpy(w.bias.copy())))
            self.growths.append(nn.Parameter(torch.zeros(1 if table.bits_per == "tensor" else len(w.scale))))

    def rounded(self, i: int) -> tuple[Tensor, Tensor]:
        """(integers, scale) of a weight; both pass gradients."""
        (low, high, nearest), like = self.grids[i], self.steps[i]
        scale = like * torch.exp(self.growths[i].view([-1 if n > 1 else 1 for n in like.shape]))
        v = torch.minimum(torch.maximum(self.weights[i] / scale, low), high)
        return straight_through(v, nearest(v).float()), scale

    def forward(self, x: Tensor) -> Tensor:
        """Logits of a batch [N, C, H, W]."""
        (judge,) = self._judge
        for i, name in enumerate(self.names):
            q, scale = self.rounded(i)
            bias = self.biases[i]
            judge.weights[judge.weight_nodes[name]] = ((q * scale).contiguous(), bias if bias.numel() else None)
        return judge.run(x.contiguous())  # a traced view wants the layout it was traced with

    @torch.no_grad()
    def table(self, before: ScaleTable) -> ScaleTable:
        """The table as it is now."""
        weights: dict[str, WeightScale] = {}
        for i, name in enumerate(self.names):
            old = before.weights[name]
            q, scale = self.rounded(i)
            bias = None if old.bias is None else self.biases[i].numpy().astype(np.float32)
            weights[name] = replace(
                old,
                scale=scale.flatten().numpy().astype(np.float32),
                values=np.ascontiguousarray(q.round().numpy().astype(np.int8)),
                bias=bias,
            )
        return replace(before, weights=weights)


def tune(
    loaded: Loaded, model: nn.Module, proto: ModelProto, table: ScaleTable, checkpoint: Path, talk: Talk
) -> ScaleTable:
    """Train the quantised net for --qat epochs; where held-back data say that this made it worse, it is undone.

    Args:
        loaded: request and data; the rounding is that of the first target with integers.
        model: the float model, which teaches. proto: its graph.
        table: the quantised net to start from.
        checkpoint: written after each epoch, read at the start.
        talk: says what goes on.

    Raises:
        UsageError: no target computes in integers, or the model's forward fixes the batch.
    """
    request = loaded.request
    flavours = [t.flavour for t in loaded.targets if t.flavour != "float"]
    if not flavours:
        raise UsageError("no target computes in integers", where="--qat", fix="leave --qat out")
    judge = Quantized(model, proto, table, flavours[0], loaded.data.shape)
    if judge.single:
        raise UsageError("the model's forward fixes the batch at 1", where="--qat", fix="make it take any batch")
    tuned = Tuned(judge, table)
    recipe = Recipe(
        epochs=request.qat, lr=RATE * loaded.lr, batch=loaded.batch, weight_decay=0.0, distill=DISTILL,
        seed=request.seed,
    )  # fmt: skip
    judged, select = Judge.of(loaded.data), loaded.data.select
    base, truth = predict(model, select, limit=judged.held(len(select)))
    before, _ = predict(tuned, select, limit=len(base))
    fit(tuned, loaded.data, recipe, original=model, checkpoint=checkpoint, talk=talk, what="training in integers")
    after, _ = predict(tuned, select, limit=len(base))
    worse = judged.dislike(after, truth, base) > judged.dislike(before, truth, base)
    then, now = (judged.say(judged.quality(out, truth, base)) for out in (before, after))
    talk.say(f"  training in integers: {now} on held-back data for {then} before{', undone' if worse else ''}")
    return table if worse else tuned.table(table)
