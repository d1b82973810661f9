"""The float ONNX graph: it computes what torch computes, at the opset asked for, and always in the same bytes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
import torchvision
from flavours import dense, mobile, randomised, shuffle
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

from xedge.errors import UnsupportedGraph
from xedge.onnx_graph import FOLDED, Graph, drop_unused, export_float, exposing, lower_opset, session

SHAPE = (3, 64, 64)


def run(proto: onnx.ModelProto, x: Tensor) -> Tensor:
    s = session(proto)
    name = s.get_inputs()[0].name
    return torch.from_numpy(np.concatenate([s.run(None, {name: x[i : i + 1].numpy()})[0] for i in range(len(x))]))


NETS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=10), 17),
    "mobilenet_v2": (mobile, 18),
    "shufflenet_v2": (shuffle, 17),
    "mobilenet_v3": (lambda: torchvision.models.mobilenet_v3_small(num_classes=10), 17),
    "densenet": (dense, 17),
    "squeezenet": (lambda: torchvision.models.squeezenet1_1(num_classes=10), 17),
}


@pytest.mark.parametrize("name", NETS)
def test_the_graph_is_the_model_at_the_opset_asked_for(name: str) -> None:
    make, opset = NETS[name]
    model = randomised(make())
    model.train()
    proto = export_float(model, SHAPE, opset)
    assert model.training, "the mode is put back"
    model.eval()
    x = torch.randn(2, *SHAPE)
    with torch.no_grad():
        want = model(x)
    assert float((run(proto, x) - want).abs().max()) <= 1e-4 * float(want.abs().max())
    assert [(o.domain, o.version) for o in proto.opset_import if o.domain in ("", "ai.onnx")] == [("", opset)]
    names = [t.name for t in proto.graph.initializer]
    assert len(names) == len(set(names))
    assert not [n for n in proto.graph.node if n.op_type in ("BatchNormalization", "Constant")]
    assert [d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim] == [1, *SHAPE]
    onnx.checker.check_model(proto, full_check=True)


def test_lone_batch_norms_of_equal_constants_get_names_of_their_own() -> None:
    """A fresh DenseNet's norms are all alike, and the exporter may store their constants once."""
    model = dense().eval()
    model.features.denseblock1.denselayer1.norm1.running_var.fill_(4.0)
    proto = export_float(model, (3, 32, 32), 17)
    folded = [n for n in proto.graph.node if len(n.input) > 1 and n.input[1].endswith(FOLDED)]
    lone = [m for n, m in model.named_modules() if n.endswith(("norm1", "norm5", "norm"))]
    assert len(folded) == len(lone) == 6
    assert len({n.input[1] for n in folded}) == 6
    assert len({t.name for t in proto.graph.initializer}) == len(proto.graph.initializer)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(run(proto, x), model(x), rtol=1e-4, atol=1e-5)


class Tail(nn.Module):
    """Operators whose form changed in opset 18: Split, ReduceMean, Resize, Pad."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.conv(x).chunk(2, 1)
        a = F.interpolate(F.pad(a, (1, 0, 0, 1)), scale_factor=2.0, mode="nearest")
        b = F.interpolate(b, size=(11, 13), mode="bilinear", align_corners=False)
        return torch.cat([a.mean((2, 3)), b.amax((2, 3)), b.mean(1).flatten(1)], 1)


@pytest.mark.parametrize("opset", [17, 18])
def test_operators_of_opset_18_have_their_old_form_at_17(opset: int) -> None:
    model = Tail().eval()
    proto = export_float(model, (3, 9, 12), opset)
    assert proto.opset_import[0].version == opset
    x = torch.randn(2, 3, 9, 12)
    with torch.no_grad():
        torch.testing.assert_close(run(proto, x), model(x), rtol=1e-4, atol=1e-5)


def test_an_operator_without_an_old_form_is_refused() -> None:
    node = helper.make_node("Mish", ["x"], ["y"], name="the_mish")
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 3]) for n in "xy"]
    model = helper.make_model(
        helper.make_graph([node], "g", value[:1], value[1:]), opset_imports=[helper.make_opsetid("", 18)]
    )
    with pytest.raises(UnsupportedGraph, match=r"the_mish: Mish has no form at opset 17"):
        lower_opset(model, 17)


def test_the_same_model_gives_the_same_bytes() -> None:
    model = randomised(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)))
    first, second = (export_float(model, (3, 8, 8), 17).SerializeToString(deterministic=True) for _ in range(2))
    assert first == second
    assert b"/tests/" not in first, "no path of this machine travels along"


class DataDependent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if float(x.sum()) > 0 else -x


def test_a_model_that_cannot_be_traced_is_refused_in_one_line() -> None:
    with pytest.raises(UnsupportedGraph) as error:
        export_float(DataDependent(), (3, 8, 8), 17)
    assert str(error.value).startswith("DataDependent: ")
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 6


def test_what_lies_between_a_convolution_and_its_relu_is_no_tensor_of_its_own() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            z = F.relu6(y)
            w = self.b(z)
            return F.relu(w) + w  # the second convolution's result is read twice, so it exists

    graph = Graph(export_float(Net().eval(), (3, 6, 6), 17))
    first, second = (n.output[0] for n in graph.nodes if n.op_type == "Conv")
    assert graph.fused_activation(first)
    assert not graph.fused_activation(second)
    assert first not in graph.activations()
    assert second in graph.activations()
    assert graph.activations()[0] == graph.inputs[0]


def test_unused_constants_go_and_inner_tensors_can_be_seen() -> None:
    proto = export_float(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()).eval(), (3, 4, 4), 17)
    proto.graph.initializer.append(numpy_helper.from_array(np.zeros(3, np.float32), "nobody"))
    drop_unused(proto)
    assert "nobody" not in {t.name for t in proto.graph.initializer}
    inner = next(n.output[0] for n in proto.graph.node if n.op_type == "Conv")
    wide = exposing(proto, [inner, inner])
    assert [o.name for o in wide.graph.output].count(inner) == 1
    assert len(proto.graph.output) == 1, "the graph itself is left as it was"
    assert session(wide).run([inner], {proto.graph.input[0].name: np.zeros((1, 3, 4, 4), np.float32)})[0].shape == (
        1, 4, 4, 4,
    )  # fmt: skip
