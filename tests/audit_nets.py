"""What the audit's tests share: one net in every flavour with its MACs by hand, and ways to spoil it.

`data/audit` holds layer information in the form of each TensorRT version; each file names where that was recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from xedge.errors import UsageError
from xedge.onnx_graph import Graph
from xedge.quantize import ScaleTable, quantize
from xedge.ranges import calibrate
from xedge.targets import tflite

DATA = Path(__file__).parent / "data" / "audit"
MACS = {"first": 16 * 16 * 16 * 27, "second": 16 * 8 * 8 * 144, "grouped": 16 * 8 * 8 * 36, "head": 64}
"""By hand: output elements times weights of one output channel."""


def float_net() -> onnx.ModelProto:
    """conv 3 -> 16, relu, max pool; residual conv; conv in 4 groups; mean; linear 16 -> 4."""
    draw = np.random.default_rng(0)
    weights = {"first": (16, 3, 3, 3), "second": (16, 16, 3, 3), "grouped": (16, 4, 3, 3), "head": (4, 16)}
    initial = [
        numpy_helper.from_array((draw.standard_normal(s) / np.sqrt(np.prod(s[1:]))).astype(np.float32), f"{n}.weight")
        for n, s in weights.items()
    ]
    initial += [numpy_helper.from_array(np.zeros(s[0], np.float32), f"{n}.bias") for n, s in weights.items()]

    def conv(name: str, x: str, **more: int) -> onnx.NodeProto:
        pads = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
        return helper.make_node("Conv", [x, f"{name}.weight", f"{name}.bias"], [name], name=name, **pads, **more)

    def node(op: str, name: str, *inputs: str, **more: Any) -> onnx.NodeProto:
        return helper.make_node(op, list(inputs), [name], name=name, **more)

    nodes = [
        conv("first", "x"),
        node("Relu", "first_relu", "first"),
        node("MaxPool", "pool", "first_relu", kernel_shape=[2, 2], strides=[2, 2]),
        conv("second", "pool"),
        node("Add", "add", "second", "pool"),
        node("Relu", "add_relu", "add"),
        conv("grouped", "add_relu", group=4),
        node("Relu", "grouped_relu", "grouped"),
        node("GlobalAveragePool", "mean", "grouped_relu"),
        node("Flatten", "flat", "mean"),
        helper.make_node("Gemm", ["flat", "head.weight", "head.bias"], ["y"], name="head", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 16, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])],
        initial,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture(scope="module")
def table() -> ScaleTable:
    images = np.random.default_rng(1).standard_normal((8, 1, 3, 16, 16)).astype(np.float32)
    return quantize(float_net(), calibrate(float_net(), lambda: iter(images)), mean_bits=6.0)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, table: ScaleTable) -> dict[str, Path]:
    """The net in every flavour, as files."""
    from xedge.export import write_flavour

    folder = tmp_path_factory.mktemp("nets")
    models = {"float": float_net()}
    models |= {f: write_flavour(float_net(), table, f) for f in ("tensorrt", "litert", "onnxruntime")}  # type: ignore[arg-type]
    found = {}
    for flavour, model in models.items():
        found[flavour] = folder / f"{flavour}.onnx"
        onnx.save(model, found[flavour])
    for name, source in (("tflite", "litert"), ("float-tflite", "float")):
        found[name] = folder / f"{name}.tflite"
        found[name].write_bytes(tflite.convert(models[source]))
    return found


def changed(path: Path, folder: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    model = onnx.load(path)
    change(model)
    onnx.save(model, folder / "changed.onnx")
    return folder / "changed.onnx"


def bypass(*outputs: str) -> Callable[[onnx.ModelProto], None]:
    """Let the readers of a DequantizeLinear's output read the float tensor before the Q/DQ."""

    def change(model: onnx.ModelProto) -> None:
        made = Graph(model).producer
        before = {}
        for out in outputs:
            q = made.get(made[out].input[0])
            before[out] = q.input[0] if q is not None else ""
        for n in model.graph.node:
            for i, name in enumerate(n.input):
                if name in before:
                    n.input[i] = before[name]

    return change


def refused_in_one_line(read: Callable[[], object]) -> bool:
    """Whether it is refused; any other error, and any second line, fails the test."""
    try:
        read()
    except UsageError as e:
        return "\n" not in str(e) or pytest.fail(str(e))
    return False
