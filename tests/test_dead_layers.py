"""Layers that never fire, as training and pruning leave them: their files run on every kernel all the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import flavours
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from xedge.export import write_flavour
from xedge.onnx_graph import export_float, session
from xedge.quantize import quantize
from xedge.ranges import calibrate
from xedge.targets import tflite

Joined = Callable[["Dead", Tensor, Tensor], Tensor]
JOINED: Mapping[str, Joined] = {
    "alone": lambda net, _, dead: net.last(dead),
    "added": lambda net, live, dead: net.last(dead + live),
    "subtracted": lambda net, live, dead: net.last(live - dead),
    "multiplied": lambda net, live, dead: net.last(dead * live),
    "concatenated": lambda net, live, dead: net.last(torch.cat((dead, live), 1)[:, 4:12]),
    "pooled": lambda net, _, dead: net.last(nn.functional.avg_pool2d(dead, 2)),
    "averaged": lambda net, live, dead: net.last(live * dead.mean((2, 3), keepdim=True)),
}


class Dead(nn.Module):
    """Two convolutions, the second so biased that its ReLU lets nothing through, and a third."""

    def __init__(self, joined: Joined) -> None:
        super().__init__()
        self.first, self.dead, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 3)
        nn.init.constant_(self.dead.bias, -100.0)
        self.joined = joined

    def forward(self, x: Tensor) -> Tensor:
        live = self.first(x).relu()
        return self.joined(self, live, self.dead(live).relu())


@pytest.mark.parametrize("bits", [8.0, 3.0])
@pytest.mark.parametrize("how", JOINED)
def test_a_dead_layer_runs_on_every_kernel(how: str, bits: float) -> None:
    torch.manual_seed(0)
    net = Dead(JOINED[how]).eval()
    proto = export_float(net, flavours.SHAPE, 17)
    x = flavours.images(8, 0)
    table = quantize(proto, calibrate(proto, lambda: (one[None] for one in x)), mean_bits=bits)
    with torch.no_grad():
        float_ = net(torch.from_numpy(x)).numpy()
    spread = np.abs(float_).max()
    for flavour in ("litert", "onnxruntime", "tensorrt"):
        graph = write_flavour(proto, table, flavour)  # type: ignore[arg-type]
        run = session(graph, exact=True)
        got = np.concatenate([run.run(None, {run.get_inputs()[0].name: one[None]})[0] for one in x])
        assert np.abs(got - float_).max() < (0.05 if bits == 8 else 0.6) * spread
        if flavour == "litert":
            for reference in (True, False):
                again = tflite.runner(tflite.convert(graph), reference=reference)(x)
                assert np.abs(again - got).max() < 0.03 * spread
