"""Whether NVIDIA's own parser and builder take the graphs, and what `xedge lint` says of them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from jetson_artefact import convolution, half_net, model_of
from onnx import TensorProto, helper, numpy_helper

from xedge import load
from xedge.cli import main
from xedge.errors import UnsupportedGraph, UsageError
from xedge.export import write_flavour
from xedge.onnx_graph import export_float
from xedge.quantize import quantize
from xedge.ranges import calibrate


def residual(quantise: str) -> onnx.ModelProto:
    """A block conv-relu-conv plus shortcut, then relu and a convolution. `quantise`: which inputs of the addition go
    through Q/DQ, ``none``, ``residual`` (the shortcut) or ``both``."""
    channels = 32
    draw = np.random.default_rng(0)
    constants: list[onnx.TensorProto] = []
    nodes: list[onnx.NodeProto] = []

    def rounded(name: str) -> str:
        constants.extend(
            [numpy_helper.from_array(np.float32(0.05), f"{name}_s"), numpy_helper.from_array(np.int8(0), f"{name}_z")]
        )
        for op, source, out in (("QuantizeLinear", name, f"{name}_q"), ("DequantizeLinear", f"{name}_q", f"{name}_d")):
            nodes.append(helper.make_node(op, [source, f"{name}_s", f"{name}_z"], [out], name=f"{name}_{op[0]}"))
        return f"{name}_d"

    def conv(source: str, out: str) -> str:
        w = draw.integers(-127, 128, (channels, channels, 3, 3)).astype(np.int8)
        for name, value in (("w_q", w), ("w_s", np.full(channels, 0.01, np.float32)), ("b", np.ones(channels))):
            kind = np.float32 if name == "b" else value.dtype
            constants.append(numpy_helper.from_array(value.astype(kind), f"{out}_{name}"))
        nodes.append(helper.make_node("DequantizeLinear", [f"{out}_w_q", f"{out}_w_s"], [f"{out}_w"], axis=0))
        inputs = [source, f"{out}_w", f"{out}_b"]
        nodes.append(helper.make_node("Conv", inputs, [out], name=f"{out}_conv", pads=[1, 1, 1, 1]))
        return out

    def relu(source: str, out: str) -> str:
        nodes.append(helper.make_node("Relu", [source], [out], name=f"{out}_relu"))
        return out

    trunk = relu(conv(rounded("x"), "a0"), "a")
    shortcut = rounded(trunk)
    branch = conv(rounded(relu(conv(shortcut, "b0"), "b")), "c")
    left = rounded(branch) if quantise == "both" else branch
    nodes.append(helper.make_node("Add", [left, trunk if quantise == "none" else shortcut], ["s"], name="add"))
    conv(rounded(relu("s", "r")), "y")
    return model_of(nodes, constants, (1, channels, 16, 16), 17)


def flavour(model: torch.nn.Module, shape: tuple[int, ...]) -> onnx.ModelProto:
    """A net with random weights, calibrated on noise, in the TensorRT flavour."""
    torch.manual_seed(0)
    draw = np.random.default_rng(0)
    images = [draw.standard_normal((1, *shape), dtype=np.float32) for _ in range(2)]
    proto = export_float(model.eval(), shape, 17)
    return write_flavour(proto, quantize(proto, calibrate(proto, lambda: images), mean_bits=8), "tensorrt")


needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="needs tensorrt-rtx: pip install xedge[tensorrt-lint]"
)


def saved(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    onnx.save(model, path)
    return path


def net(name: str) -> tuple[torch.nn.Module, tuple[int, ...]]:
    torch.manual_seed(0)
    if name == "efficientnet_lite0":
        lite = pytest.importorskip("efficientnet_lite_pytorch", reason="needs efficientnet-lite-pytorch")
        return lite.EfficientNet.from_name("efficientnet-lite0"), (3, 64, 64)
    channels, side = {"lenet5": (1, 28), "resnet20": (3, 32)}[name]
    return load.load_model(name, classes=10, channels=channels), (channels, side, side)


@needs_rtx
def test_tensorrt_takes_float16(tmp_path: Path) -> None:
    from xedge.targets.tensorrt_lint import lint

    assert lint(half_net(tmp_path, "a")) == []


@needs_rtx
@pytest.mark.parametrize("name", ["lenet5", "resnet20", "efficientnet_lite0"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_tensorrt_takes_what_xedge_writes_and_runs_it_in_int8(tmp_path: Path, name: str) -> None:
    from xedge.targets.tensorrt_lint import kernels, lint

    model = flavour(*net(name))
    path = saved(model, tmp_path)
    assert lint(path) == []
    built = kernels(path)
    # Every convolution and linear layer is a kernel whose activations come in as int8.
    weighted = {n.name for n in model.graph.node if n.op_type in ("Conv", "Gemm", "MatMul")}
    heavy = [k for k in built if k.kind in ("correlation", "gemm")]
    assert {k.reads for k in heavy} == {("Int8",)}
    assert weighted == {layer for k in heavy for layer in k.layers} & weighted
    assert len(heavy) == len(weighted)


REFUSED = {
    "activation zero-point": ({"zero": 3}, "QuantizeLinear", "x_Q", "zero point"),
    "uint8 activations": ({"activation": TensorProto.UINT8}, "QuantizeLinear", "x_Q", "uint8"),
    "uint8 with zero-point": ({"activation": TensorProto.UINT8, "zero": 128}, "QuantizeLinear", "x_Q", "zero point"),
    "weight zero-point": ({"weight_zero": 3}, "DequantizeLinear", "w_DQ", "zero point"),
    "uint8 weights": ({"weight": TensorProto.UINT8}, "DequantizeLinear", "w_DQ", "UINT8"),
    "int32 bias": ({"bias": "int32"}, "DequantizeLinear", "b_DQ", "Int32"),
    "int2 weights": ({"weight": TensorProto.INT2, "opset": 25}, "", "", "w_q"),
    "int4 weights of a convolution": ({"weight": TensorProto.INT4, "opset": 21}, "", "", "dtype"),
}


@needs_rtx
@pytest.mark.parametrize("name", REFUSED)
def test_tensorrt_refuses_what_it_cannot_run_and_the_node_is_named(tmp_path: Path, name: str) -> None:
    from xedge.targets.tensorrt_lint import lint

    options, operator, node, words = REFUSED[name]
    found = [f for f in lint(saved(convolution(**options), tmp_path)) if f.severity == "error"]
    assert found
    assert (found[0].operator, found[0].node) == (operator, node)
    assert words in found[0].message
    assert "\n" not in str(found[0])
    if not operator:  # int2 fails in the parser's constants, int4 in the builder
        assert found[0].stage == ("build" if "int4" in name else "parse")


@needs_rtx
def test_tensorrt_takes_the_graph_that_the_refused_ones_are_made_from(tmp_path: Path) -> None:
    from xedge.targets.tensorrt_lint import lint

    assert lint(saved(convolution(), tmp_path)) == []


@needs_rtx
def test_every_refused_node_is_named_not_the_first_alone(tmp_path: Path) -> None:
    from xedge.targets.tensorrt_lint import lint

    nodes = [
        helper.make_node("Det", ["x"], ["a"], name="first"),
        helper.make_node("Relu", ["x"], ["b"], name="fine"),
        helper.make_node("Det", ["b"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", (1, 3, 3)), ("y", (1,)))]
    model = helper.make_model(
        helper.make_graph(nodes, "g", ends[:1], ends[1:]), opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    )
    found = lint(saved(model, tmp_path))
    assert [(f.node, f.operator, f.message) for f in found] == [
        ("first", "Det", "not supported"),
        ("y", "Det", "not supported"),
    ]


@needs_rtx
def test_rounding_the_shortcut_alone_is_what_an_addition_wants(tmp_path: Path) -> None:
    """Same kernels in all three. Without Q/DQ on the shortcut it is written and read as float as well; with Q/DQ on
    the convolution's side too, nothing is saved and the sum is rounded once more."""
    from xedge.targets.tensorrt_lint import kernels

    def add_of(how: str) -> tuple[int, Any, int]:
        built = kernels(saved(residual(how), tmp_path))
        (add,) = [k for k in built if "add" in k.layers]
        return len(built), add, sum(k.writes.count("Float") for k in built)

    none, only, both = (add_of(how) for how in ("none", "residual", "both"))
    assert none[0] == only[0] == both[0]
    assert only[1].reads == both[1].reads == ("Int8", "Float")
    assert none[1].reads == ("Float", "Float")
    assert none[2] == only[2] + 1 == both[2] + 1
    assert both[1].name.count("Roun") == only[1].name.count("Roun") + 1


@needs_rtx
def test_command_prints_the_findings_and_exits_by_them(tmp_path: Path) -> None:
    path = saved(convolution(), tmp_path)
    good = CliRunner().invoke(main, ["lint", str(path)])
    assert (good.exit_code, good.output.strip()) == (0, f"{path}: TensorRT takes it")
    path = saved(convolution(zero=3), tmp_path)
    bad = CliRunner().invoke(main, ["lint", str(path), "--json"])
    assert bad.exit_code == UnsupportedGraph.exit_code
    assert json.loads(bad.stdout)[0]["node"] == "x_Q"
    assert len(bad.stderr.splitlines()) == 1


@pytest.mark.parametrize("content", [None, b"", b"no model"])
def test_command_refuses_what_is_no_onnx_in_one_line(tmp_path: Path, content: bytes | None) -> None:
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("needs tensorrt-rtx: pip install xedge[tensorrt-lint]")
    path = tmp_path / "m.onnx"
    if content is not None:
        path.write_bytes(content)
    done = CliRunner().invoke(main, ["lint", str(path)])
    assert done.exit_code == 2
    assert str(path) in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_lint_without_the_extra_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from xedge.targets import tensorrt_lint

    def absent(name: str) -> ModuleType:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(tensorrt_lint.importlib, "import_module", absent)
    with pytest.raises(UsageError, match=r"xedge\[tensorrt-lint\]"):
        tensorrt_lint.lint(saved(convolution(), tmp_path))
