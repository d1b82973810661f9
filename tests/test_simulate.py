"""The torch judge: bit for bit what the written graph computes, and able to tell a graph that is written wrongly."""

from __future__ import annotations

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from flavours import FLAVOURS, MAKERS, SHAPE, constants, edited, images, quantised, randomised, run
from onnx import numpy_helper
from sklearn.datasets import load_digits
from torch import Tensor, nn

from xedge.candidates import Form
from xedge.data import from_tensors
from xedge.errors import InternalError, UnsupportedGraph
from xedge.export import write_flavour
from xedge.metrics import agreement, snr_db
from xedge.models.lenet import lenet5
from xedge.models.resnet import resnet20
from xedge.onnx_graph import FOLDED, Graph, export_float
from xedge.progress import Talk
from xedge.quantize import ScaleTable, quantize
from xedge.ranges import calibrate
from xedge.simulate import Quantized, align, torch_graph
from xedge.target import Flavour
from xedge.targets import host_cpu
from xedge.verify import MOST, least_snr, verify


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("name", ["plain", "shuffle", "dense"])
def test_the_judge_is_onnx_runtime_without_optimisation(name: str, flavour: Flavour) -> None:
    q = quantised(name)
    judge = Quantized(q.model, q.proto, q.table, flavour, SHAPE)
    assert judge.unmatched == []
    x = images(16, 1)
    with torch.no_grad():
        want = judge(torch.from_numpy(x))
    got = run(q.flavour[flavour], x)
    step = float(want.abs().max()) / 127
    if flavour != "tensorrt":
        step = float(constants(q.flavour[flavour])[f"{q.proto.graph.output[0].name}_scale"])
    steps = (got - want).abs() / step
    assert float((steps <= 1.01).double().mean()) > 0.99
    assert float((steps <= 0.01).double().mean()) > 0.7, "most agree to the last bit, for both round the same sums"
    with torch.no_grad():
        assert snr_db(want, got) > snr_db(q.model(torch.from_numpy(x)), want), "nearer than quantisation is to float"


@pytest.mark.parametrize("name", MAKERS)
def test_every_tensor_of_the_graph_is_found_in_torchs(name: str) -> None:
    q = quantised(name)
    graph = Graph(q.proto)
    tensors = graph.activations()
    found = align(torch_graph(q.model, SHAPE), q.proto, tensors, SHAPE)
    split = {o for n in graph.nodes if n.op_type in ("Transpose", "Split") for o in n.output}
    assert set(tensors) - set(found) <= split
    results = [n.output[0] for n in graph.weighted() if n.output[0] in tensors]
    assert len({found[t] for t in results}) == len(results), "each to a node of its own"


def test_an_untrained_batch_norm_is_not_taken_for_its_input() -> None:
    """A fresh norm changes nothing, so its result equals its input's; a lone one is a layer of its own."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)).eval()
    proto = export_float(net, (3, 8, 8), 17)
    x = images(8, 0, (3, 8, 8))
    table = quantize(proto, calibrate(proto, lambda: x[:, None]), mean_bits=3)
    assert [n for n in table.weights if n.endswith(FOLDED)]
    for flavour in FLAVOURS:
        judge = Quantized(net, proto, table, flavour, (3, 8, 8))
        with torch.no_grad():
            assert snr_db(judge(torch.from_numpy(x)), run(write_flavour(proto, table, flavour), x)) > 40


def test_the_float_flavour_is_the_float_model() -> None:
    q = quantised("plain")
    assert write_flavour(q.proto, q.table, "float").SerializeToString() == q.proto.SerializeToString()
    judge = Quantized(q.model, q.proto, q.table, "float", SHAPE)
    x = torch.from_numpy(images(4, 1))
    with torch.no_grad():
        want = judge(x)
        torch.testing.assert_close(want, q.model(x))
        assert least_snr(judge, x, want, 4) == MOST


def test_two_models_that_differ_are_told_apart() -> None:
    q = quantised("plain")
    other = randomised(MAKERS["plain"](), seed=5)
    with pytest.raises(UnsupportedGraph, match="disagree at its output"):
        align(torch_graph(other, SHAPE), q.proto, [], SHAPE)


def test_what_cannot_be_traced_is_refused() -> None:
    class DataDependent(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if float(x.sum()) > 0 else -x

    with pytest.raises(UnsupportedGraph, match=r"^DataDependent: torch cannot trace it"):
        torch_graph(DataDependent(), (3, 4, 4))


def test_jitter_is_seeded_and_grows() -> None:
    q = quantised("plain")
    judge = Quantized(q.model, q.proto, q.table, "litert", SHAPE)
    x = torch.from_numpy(images(16, 1))
    with torch.no_grad():
        want = judge(x)
        noise = [snr_db(want, judge.run(x, j, torch.Generator().manual_seed(0))) for j in (0.05, 0.5, 4.0)]
        again = snr_db(want, judge.run(x, 0.5, torch.Generator().manual_seed(0)))
    assert noise[0] > noise[1] > noise[2]
    assert again == noise[1]


# -- mutations: what makes the limit of `verify` worth something ----------------------------------------------------


@functools.cache
def trained(name: str) -> tuple[nn.Module, onnx.ModelProto, ScaleTable, Tensor]:
    """LeNet-5 and ResNet-20 on scikit-learn's digits, trained for seconds, at a mean of 4 bits."""
    torch.manual_seed(0)
    digits = load_digits()
    size = 28 if name == "lenet5" else 8
    x = torch.from_numpy(digits.images.astype(np.float32) / 8 - 1)[:, None]
    x = nn.functional.interpolate(x, size=(size, size), mode="bilinear")
    y = torch.from_numpy(digits.target)
    net = lenet5(10, 1) if name == "lenet5" else resnet20(10, 1)
    epochs = 3 if name == "lenet5" else 5
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    draw = torch.Generator().manual_seed(0)
    net.train()
    for _ in range(epochs):
        for rows in torch.split(torch.randperm(1500, generator=draw), 64):
            loss = nn.functional.cross_entropy(net(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    net.eval()
    with torch.no_grad():
        assert float((net(x[1500:]).argmax(1) == y[1500:]).double().mean()) > 0.8
    proto = export_float(net, tuple(x.shape[1:]), 17)
    table = quantize(proto, calibrate(proto, lambda: x[:64, None].numpy()), mean_bits=4)
    return net, proto, table, x[1500:1628]


def other_dequantisation(model: onnx.ModelProto, tensor: str, place: int, change: float) -> onnx.ModelProto:
    """A copy whose DequantizeLinear of one tensor has another scale (place 1) or zero-point (place 2) than the Q."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    node = next(n for n in copy.graph.node if n.name == f"{tensor}_DQ")
    value = constants(model)[node.input[place]]
    new = value * change if place == 1 else int(value) + (change if int(value) < 50 else -change)
    copy.graph.initializer.append(numpy_helper.from_array(np.asarray(new).astype(value.dtype), "wrong"))
    node.input[place] = "wrong"
    return copy


def swapped(q: np.ndarray) -> np.ndarray:
    """Kernel axes exchanged; the columns of a linear layer in another order."""
    if q.ndim == 4:
        return q.transpose(0, 1, 3, 2)
    return q[:, np.random.default_rng(0).permutation(q.shape[1])]


@pytest.mark.parametrize(
    ("name", "flavour"), [("lenet5", "onnxruntime"), ("lenet5", "tensorrt"), ("resnet20", "litert")]
)
def test_wrong_graphs_fall_below_the_limit_and_right_ones_do_not(name: str, flavour: Flavour) -> None:
    net, proto, table, x = trained(name)
    model = write_flavour(proto, table, flavour)
    judge = Quantized(net, proto, table, flavour, tuple(x.shape[1:]))
    with torch.no_grad():
        want = judge(x)
    least = least_snr(judge, x, want, 64)
    assert 15 < least <= MOST

    def reaches(candidate: onnx.ModelProto, *, exact: bool = True) -> float:
        return snr_db(want, run(candidate, x.numpy(), exact=exact)) - least

    assert reaches(model) > 5, "as it is written"
    assert reaches(model, exact=False) > 3, "as ONNX Runtime fuses it"
    wrong: dict[str, float] = {}
    weights = list(table.weights)
    for w in (weights[0], weights[len(weights) // 2], weights[-1]):
        wrong[f"scale of {w} by a fifth"] = reaches(edited(model, f"{w}_scale", lambda v: v * 1.2))
        wrong[f"layout of {w}"] = reaches(edited(model, f"{w}_q", swapped))
    graph = Graph(proto)
    inner = [n for n in judge.rounding_nodes if n not in graph.inputs]
    for t in (graph.inputs[0], inner[len(inner) // 2], inner[-1]):
        wrong[f"scale of {t} by a fifth"] = reaches(other_dequantisation(model, t, 1, 1.2))
        wrong[f"zero-point of {t} by ten"] = reaches(other_dequantisation(model, t, 2, 10))
    missed = {k: round(v, 1) for k, v in wrong.items() if v >= 0}
    assert not missed


def test_agreement_alone_would_miss_a_wrong_scale() -> None:
    """Why `verify` looks at the noise: the last layer's scale, wrong by half, changes no top-1."""
    _, proto, table, x = trained("lenet5")
    model = write_flavour(proto, table, "tensorrt")
    last = list(table.weights)[-1]
    right = run(model, x.numpy())
    broken = run(edited(model, f"{last}_scale", lambda v: v * 1.5), x.numpy())
    assert agreement(right, broken) > 0.97
    assert snr_db(right, broken) < 10


@pytest.mark.parametrize("judged", [512, 48])
def test_verify_passes_a_right_artefact_and_stops_at_a_wrong_one(
    judged: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xedge.verify.JUDGED", judged)  # more images reported than judged: the same ones are compared
    net, proto, table, x = trained("lenet5")
    data = from_tensors("digits", (x, net(x).argmax(1)), (x, net(x).argmax(1)), seed=0, classes=10)
    loaded = SimpleNamespace(data=data, targets=(host_cpu.TARGET,))
    model = write_flavour(proto, table, "onnxruntime")
    onnx.save(model, tmp_path / "right.onnx")
    last = list(table.weights)[-1]
    onnx.save(edited(model, f"{last}_scale", lambda v: v * 1.2), tmp_path / "wrong.onnx")

    def rows(name: str) -> dict[str, Any]:
        shipped = {"host-cpu": Form("int8", tmp_path / name, "onnxruntime", table)}
        return verify(loaded, net, net, proto, shipped, Talk(quiet=True))  # type: ignore[arg-type]

    row = rows("right.onnx")["targets"]["host-cpu"]
    assert row["snr_db"] > row["least_snr_db"] + 5
    assert row["verified_agreement"] > 0.98
    assert row["unmatched"] == []
    with pytest.raises(InternalError, match=r"wrong\.onnx: the artefact disagrees .* dB are expected"):
        rows("wrong.onnx")
