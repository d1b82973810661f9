"""Would TensorRT take this graph? NVIDIA's own parser and builder say so, on a machine without a GPU.

`tensorrt-rtx` shares TensorRT's ONNX parser and builds on a CPU. Its engines run on no Jetson, and their size, kernels
and speed say nothing about a Jetson's; whether a graph is refused, and at which node, does.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import ModelProto, TensorProto

from xedge.errors import InternalError, UnsupportedGraph, UsageError
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
        others = [f for f in found if f.stage == "meaning" and f.node not in refused]
        return [f for f in found if f.stage == "parse"] + others
    if build:
        config = builder.create_builder_config()
        if builder.build_serialized_network(network, config) is None:
            found.append(Finding("error", "build", "", "", _said(kept)))
    warnings = dict.fromkeys(_clean(m) for s, m in kept if s == "warning" and "UINT8 zero_point" not in m)
    return found + [Finding("warning", "parse", "", "", m) for m in warnings]


@dataclass(frozen=True)
class Kernel:
    """One kernel of the engine that tensorrt-rtx built.

    Attributes:
        kind: ``correlation`` is a convolution or linear layer; ``kgen`` is generated, elementwise work.
        layers: names of the ONNX nodes it computes.
        reads, writes: types of its tensors, constants aside, such as ``Int8`` and ``Float``.
    """

    name: str
    kind: str
    layers: tuple[str, ...]
    reads: tuple[str, ...]
    writes: tuple[str, ...]


def kernels(onnx_path: Path) -> list[Kernel]:
    """Build a graph and list its kernels, in order: which tensors cross kernels, and in which type.

    The engine inspector needs a GPU; what it would say stands in the builder's verbose log too. A Jetson's builder
    fuses more into its convolutions (bias, addition, activation, rounding), so what counts here is which types enter
    a convolution and which tensors are written.

    Raises:
        UsageError: as `lint`. UnsupportedGraph: TensorRT does not take the graph. InternalError: the log has changed.
    """
    found = [f for f in lint(onnx_path, build=False) if f.severity == "error"]
    if found:
        raise UnsupportedGraph(str(found[0]), where=str(onnx_path))
    trt = _import()
    log, kept = logger(trt, everything=True)
    builder = trt.Builder(log)
    network = builder.create_network(network_flags(trt, strongly_typed=True))
    parser = trt.OnnxParser(network, log)
    parser.parse(onnx_path.read_bytes())
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if builder.build_serialized_network(network, config) is None:
        raise UnsupportedGraph(_said(kept), where=str(onnx_path))
    listing = next((m for _, m in kept if m.startswith("Layers:")), "")
    rows = [k for k in map(_kernel, listing.splitlines()) if k is not None]
    if not rows:
        raise InternalError(f"tensorrt-rtx {trt.__version__} lists its kernels in another form", where=str(onnx_path))
    return rows


def _kernel(line: str) -> Kernel | None:
    row = re.match(
        r"Name: (.*?), LayerType: (\w+), Inputs: (\[.*?\])(?:, Constants: .*?)?, Outputs: (\[.*?\]), Tactic", line
    )
    if row is None:
        return None
    name, kind, reads, writes = row.groups()
    types = [tuple(re.findall(r"Datatype: (\w+)", part)) for part in (reads, writes)]
    return Kernel(name, kind, tuple(re.findall(r"\[ONNX Layer: ([^\]]*)\]", line)), *types)


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
    except (DecodeError, ValueError) as e:
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
