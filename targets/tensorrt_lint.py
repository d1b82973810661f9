"""Would TensorRT take this graph? NVIDIA's own parser and builder say so, on a machine without a GPU.

`tensorrt-rtx` shares TensorRT's ONNX parser and builds on a CPU. Its engines run on no Jetson, and their size, kernels
and speed say nothing about a Jetson's; whether a graph is refused, and at which node, does.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal

import onnx
from onnx import ModelProto, TensorProto

from xedge.errors import UsageError
from xedge.targets.tensorrt_engine import logger, network_flags

Stage = Literal["parse", "build", "meaning"]


@dataclass(frozen=True)
class Finding:
    """What TensorRT has against a graph.

    Attributes:
        severity: an ``error`` means that there is no engine, or one that computes something else.
        stage: ``parse`` or ``build``, as TensorRT said it; ``meaning`` is xedge's own: it parses, as something else.
        node: the node's name, or its first output; empty where TensorRT names none.
        operator: the node's, or empty.
        message: one line.
    """

    severity: Literal["error", "warning"]
    stage: Stage
    node: str
    operator: str
    message: str

    def __str__(self) -> str:
        place = f"{self.operator} {self.node}: ".lstrip() if self.node or self.operator else ""
        return f"{self.severity}: {place}{self.message}"


def lint(onnx_path: Path, *, build: bool = True) -> list[Finding]:
    """Parse a graph with tensorrt-rtx and, where that goes well, build it. An empty list: TensorRT takes it.

    Args:
        onnx_path: static shapes.
        build: False stops after the parser.

    Raises:
        UsageError: tensorrt-rtx does not import, or the file is no ONNX model.
    """
    trt = _import()
    model = _read(onnx_path)
    found = unsigned(model)
    log, kept = logger(trt)
    builder = trt.Builder(log)
    network = builder.create_network(network_flags(trt, strongly_typed=True))
    parser = trt.OnnxParser(network, log)
    nodes = model.graph.node
    if not parser.parse(model.SerializeToString()):
        for i in range(parser.num_errors):
            error = parser.get_error(i)
            node = nodes[error.node()] if 0 <= error.node() < len(nodes) else None
            name = (node.name or node.output[0]) if node is not None else error.node_name()
            operator = node.op_type if node is not None else error.node_operator()
            found.append(Finding("error", "parse", name, operator, _clean(error.desc())))
        if parser.num_errors == 0:
            found.append(Finding("error", "parse", "", "", _said(kept)))
        refused = {f.node for f in found if f.stage == "parse"}
        return [f for f in found if f.stage == "parse" or f.node not in refused]
    if build:
        config = builder.create_builder_config()
        if builder.build_serialized_network(network, config) is None:
            found.append(Finding("error", "build", "", "", _said(kept)))
    warnings = dict.fromkeys(_clean(m) for s, m in kept if s == "warning" and "UINT8 zero_point" not in m)
    return found + [Finding("warning", "parse", "", "", m) for m in warnings]


def unsigned(model: ModelProto) -> list[Finding]:
    """Q/DQ on uint8 activations. The parser only warns and reads them as int8: half the range is lost in silence."""
    types = {t.name: t.data_type for t in model.graph.initializer}
    types |= {n.output[0]: a.t.data_type for n in model.graph.node for a in n.attribute if a.name == "value"}
    found = []
    for node in model.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        kind = types.get(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        if kind is None and node.op_type == "QuantizeLinear":  # ONNX: uint8, unless opset 21's output_dtype says
            kind = next((a.i for a in node.attribute if a.name == "output_dtype" and a.i), TensorProto.UINT8)
        if kind == TensorProto.UINT8 and node.input[0] not in types:
            message = "rounds to uint8, which TensorRT reads as int8; use symmetric int8"
            found.append(Finding("error", "meaning", node.name or node.output[0], node.op_type, message))
    return found


def _import() -> ModuleType:
    try:
        return importlib.import_module("tensorrt_rtx")
    except (ImportError, OSError) as e:  # OSError: its libraries are not there
        raise UsageError(f"tensorrt-rtx does not import ({e})", fix="pip install 'xedge[tensorrt-lint]'") from e


def _read(path: Path) -> ModelProto:
    try:
        model = onnx.load(path)
    except OSError as e:
        raise UsageError(f"cannot be read ({e.strerror})", where=str(path), fix="check the path") from e
    except Exception as e:  # protobuf's own, whose module has no types
        raise UsageError("is no ONNX model", where=str(path), fix="give an .onnx file") from e
    if not model.graph.node:
        raise UsageError("is no ONNX model, or an empty one", where=str(path), fix="give an .onnx file")
    return model


def _said(kept: list[tuple[str, str]]) -> str:
    errors = [m for s, m in kept if s == "error"]
    return _clean(errors[-1]) if errors else "refused without a reason"


def _clean(message: str) -> str:
    """One line, without the source lines of NVIDIA's build and without the echo of the missing GPU."""
    lines = [line for line in message.splitlines() if "CUDA driver version is insufficient" not in line]
    text = " ".join(" ".join(lines).split()).removeprefix("Assertion failed: ")
    return "not supported" if text in ("", "false") else text[:400]
