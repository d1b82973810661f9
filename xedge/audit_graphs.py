"""What an ONNX graph asks for: per layer its arithmetic, its multiply-adds, and what stands in the way of integers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from xedge.errors import UsageError

if TYPE_CHECKING:
    from onnx import NodeProto

    from xedge.onnx_graph import Graph
    from xedge.target import Flavour

FUSED_ACTIVATIONS = ("Relu", "Clip", "LeakyRelu", "PRelu", "HardSwish", "HardSigmoid", "Sigmoid", "Tanh")


@dataclass(frozen=True)
class Layer:
    """A convolution or matrix product.

    Attributes:
        name: of the module where the weight's name tells it, else of the node.
        op: ONNX or TFLite operator.
        inputs, outputs: channels.
        groups: of a convolution.
        macs: multiply-adds of one inference.
        asked: the arithmetic that the graph asks for: int8, int4 (weights, int8 activations), int16,
            "int8 dynamic" (activations rounded at run time), "int8 weights, float32", float16, float32.
        why: what keeps the graph from asking for integers.
        risks: what may keep a runtime from giving the integers that the graph asks for.
        aliases: names by which a runtime may call it: ONNX node, tensors.
        index: of the operator in a .tflite.
        planned_bits: mean planned bits a weight, where a run says it.
        executed: the arithmetic that ran, where the board says it; "unknown" where it says too little.
        kernel: what ran it.
    """

    name: str
    op: str
    inputs: int
    outputs: int
    groups: int
    macs: int
    asked: str
    why: tuple[str, ...] = ()
    risks: tuple[str, ...] = ()
    aliases: frozenset[str] = frozenset()
    index: int | None = None
    planned_bits: float | None = None
    executed: str | None = None
    kernel: str | None = None

    @property
    def precision(self) -> str:
        """What ran, or what is asked for where nothing is known of the run."""
        return self.asked if self.executed is None else self.executed

    @property
    def integer(self) -> bool:
        """Whether its multiply-adds are of integers."""
        return is_integer(self.precision)


@dataclass(frozen=True)
class Reading:
    """An artefact's layers in order.

    Attributes:
        kind: "onnx" or "tflite".
        flavour: the Q/DQ dialect it is written in.
        operators: how many it has, Q/DQ and constants aside.
        order: node names in order (ONNX), for foreign nodes.
        islands: runs of float operators between integer ones.
    """

    kind: str
    flavour: Flavour
    layers: tuple[Layer, ...]
    operators: int
    order: tuple[str, ...] = ()
    islands: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())


def is_integer(precision: str) -> bool:
    """Whether a precision names integer arithmetic; "int8 weights, float16" does not."""
    return precision in ("int8", "int4", "int16", "int8 dynamic")


def _narrow(inputs: int, outputs: int, groups: int) -> tuple[str, ...]:
    """Widths that lose integer kernels (NVIDIA/TensorRT#993; tensor cores take int8 in 16s and 32s)."""
    found = []
    depthwise = groups > 1 and groups == inputs
    if groups > 1 and not depthwise:
        found.append(f"grouped, {groups} x {inputs // groups} channels: int8 kernels run group by group")
    for side, count in (("input", inputs), ("output", outputs)):
        if count < 16 and not depthwise:
            found.append(f"{count} {side} channel{'s' * (count != 1)}, below {8 if count < 8 else 16}")
    return tuple(found)


def read_onnx(path: Path) -> Reading:
    """The layers of a float or Q/DQ ONNX graph.

    Raises:
        UsageError: missing, not ONNX, or without a convolution or matrix product.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    from xedge.onnx_graph import Graph

    fix = "give a .onnx, a .tflite, a target's folder or a run"
    try:
        model = onnx.load(path, load_external_data=False)
        graph = Graph(model)
    except OSError as e:
        raise UsageError(f"cannot be read ({e.strerror})", where=str(path), fix=fix) from e
    except (DecodeError, onnx.shape_inference.InferenceError, ValueError, TypeError) as e:
        raise UsageError("is damaged or no ONNX model", where=str(path), fix=fix) from e
    if not graph.nodes:
        raise UsageError("is no ONNX model with operators", where=str(path), fix=fix)
    flavour = _flavour(graph)
    layers = [_onnx_layer(graph, n, flavour) for n in graph.nodes if _is_layer(graph, n)]
    if not layers:
        raise UsageError("has no convolution and no matrix product to audit", where=str(path), fix=fix)
    unknown = any(0 in (_shape(graph, n.output[0]) or (0,)) for n in graph.nodes if _is_layer(graph, n))
    return Reading(
        kind="onnx",
        flavour=flavour,
        layers=tuple(layers),
        operators=sum(n.op_type not in ("QuantizeLinear", "DequantizeLinear", "Constant") for n in graph.nodes),
        order=tuple(n.name for n in graph.nodes),
        notes=("sizes that the graph leaves open count as 1 in the MACs",) if unknown else (),
    )


def _is_layer(graph: Graph, node: NodeProto) -> bool:
    return node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul") and len(_shape(graph, node.input[1])) > 1


def _shape(graph: Graph, name: str) -> tuple[int, ...]:
    if name in graph.initializers:
        return tuple(graph.initializers[name].dims)
    return graph.shapes.get(name, ())


def _flavour(graph: Graph) -> Flavour:
    """By the zero-points of the activations' Q/DQ."""
    from onnx import TensorProto

    found: Flavour = "float"
    for node in graph.nodes:
        if node.op_type != "QuantizeLinear" or graph.is_constant(node.input[0]):
            continue
        zero = graph.initializers.get(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        if zero is None or zero.data_type == TensorProto.UINT8:
            return "onnxruntime"  # no zero-point means uint8 0
        found = "litert" if found == "litert" or graph.array(node.input[2]).any() else "tensorrt"
    return found


def _stored(graph: Graph, name: str, *, through: tuple[str, ...]) -> str | None:
    """The integer type behind a tensor: what the DequantizeLinear that it comes from reads, if it does."""
    from onnx import TensorProto

    node = graph.producer.get(name)
    while node is not None and node.op_type in through:
        node = graph.producer.get(node.input[0])
    if node is None or node.op_type != "DequantizeLinear":
        return None
    source = node.input[0]
    kind = graph.initializers[source].data_type if graph.is_constant(source) else graph.types.get(source)
    if kind is None and len(node.input) > 2 and graph.is_constant(node.input[2]):
        kind = graph.initializers[node.input[2]].data_type
    words = {"INT8": "int8", "UINT8": "int8", "INT4": "int4", "UINT4": "int4", "INT16": "int16", "UINT16": "int16"}
    return words.get(TensorProto.DataType.Name(kind)) if kind else None


def _weight_name(graph: Graph, name: str) -> str:
    """The initializer behind a weight operand, Q/DQ peeled off."""
    while (node := graph.producer.get(name)) is not None and node.input:
        name = node.input[0]
    return name


def _onnx_layer(graph: Graph, node: NodeProto, flavour: Flavour) -> Layer:
    from xedge.gather import BOOK
    from xedge.onnx_graph import MOVES

    source, weight = node.input[0], node.input[1]
    shape, out, before = (_shape(graph, n) for n in (weight, node.output[0], source))
    attributes = {a.name: a for a in node.attribute}
    groups = int(attributes["group"].i) if "group" in attributes else 1
    size = math.prod(max(d, 1) for d in out)
    if node.op_type == "Conv":
        inputs, outputs, macs = shape[1] * groups, shape[0], size * math.prod(shape[1:])
    elif node.op_type == "ConvTranspose":
        inputs, outputs = shape[0], shape[1] * groups
        macs = math.prod(max(d, 1) for d in before) * math.prod(shape[1:])
    else:
        flipped = "transB" in attributes and attributes["transB"].i == 1
        inputs, outputs = (shape[-1], shape[-2]) if flipped else (shape[-2], shape[-1])
        macs = size * inputs
    initializer = _weight_name(graph, weight)
    x = _stored(graph, source, through=MOVES)
    w = _stored(graph, weight, through=("Transpose", "Reshape", "Identity", "Squeeze", "Unsqueeze"))
    asked, why = _asked(graph, node, flavour, x, w)
    integer = is_integer(asked)
    base = initializer.removesuffix("_quantized").removesuffix("_q").removesuffix(BOOK)
    named = base.removesuffix(".weight") if base.endswith(".weight") else ""
    outs = _written(graph, node)
    return Layer(
        name=named or node.name or node.output[0],
        op=node.op_type,
        inputs=inputs,
        outputs=outputs,
        groups=groups,
        macs=macs,
        asked=asked,
        why=why,
        risks=(*_narrow(inputs, outputs, groups), *_residual(graph, node, flavour)) if integer else (),
        aliases=frozenset(n for n in (node.name, *outs, *(f"node_of_{o}" for o in outs), base) if n),
    )


def _asked(
    graph: Graph, node: NodeProto, flavour: Flavour, x: str | None, w: str | None
) -> tuple[str, tuple[str, ...]]:
    """The arithmetic that a node's Q/DQ ask for, and what keeps it from integers."""
    from onnx import TensorProto

    real = "float16" if graph.types.get(node.output[0]) == TensorProto.FLOAT16 else "float32"
    if flavour == "float" and x is None and w is None:
        return real, ("the graph is float: it has no Q/DQ",)
    if x is None:
        where = "" if w is None else f"{w} weights, "
        return f"{where}{real}", ("its input is not quantised",) if w else ("neither input nor weight is quantised",)
    if w is None:
        island = " (an island of float between quantised tensors)" if _leaves_quantised(graph, node)[0] else ""
        return real, (f"its weight is not quantised{island}",)
    if flavour == "tensorrt" and w == "int4":
        return f"int4 weights, {real}", ("TensorRT has no int4 kernel for int8 activations, and its build fails",)
    asked = "int16" if x == "int16" else w
    if flavour != "tensorrt" and not _leaves_quantised(graph, node)[0]:
        return f"{w} weights, {real}", ("its output is not quantised, so the runtime computes in float",)
    return asked, ()


def _leaves_quantised(graph: Graph, node: NodeProto) -> tuple[bool, str | None]:
    """Whether the result reaches a QuantizeLinear with nothing but fused activations between; and the activation that
    a Q/DQ keeps from fusing."""
    name = node.output[0]
    while True:
        after = graph.consumers.get(name, [])
        if any(n.op_type == "QuantizeLinear" for n in after):
            split = None
            if name == node.output[0]:
                for q in after:
                    for dq in graph.consumers.get(q.output[0], []):
                        nexts = graph.consumers.get(dq.output[0], [])
                        if len(nexts) == 1 and nexts[0].op_type in ("Relu", "Clip"):
                            split = nexts[0].name or nexts[0].output[0]
            return True, split
        if len(after) != 1 or after[0].op_type not in FUSED_ACTIVATIONS:
            return False, None
        name = after[0].output[0]


def _residual(graph: Graph, node: NodeProto, flavour: Flavour) -> tuple[str, ...]:
    """Q/DQ that keep a convolution from its activation or its addition (NVIDIA, Q/DQ layer-placement
    recommendations)."""
    if flavour != "tensorrt":
        return ()
    _, split = _leaves_quantised(graph, node)
    found = [f"Q/DQ stand between it and {split}, so they do not fuse"] if split else []
    for n in graph.consumers.get(node.output[0], []):
        live = [i for i in n.input if not graph.is_constant(i)]
        if n.op_type == "Add" and len(live) == 2 and not any(_stored(graph, i, through=()) for i in live):
            found.append(f"no input of {n.name or n.output[0]} is quantised, so addition and convolution do not fuse")
    return tuple(found)


def _written(graph: Graph, node: NodeProto) -> tuple[str, ...]:
    """The tensors under which a layer's result may go: its own and those of activations fused into it."""
    names = [node.output[0]]
    while True:
        after = graph.consumers.get(names[-1], [])
        if len(after) != 1 or after[0].op_type not in (
            *FUSED_ACTIVATIONS, "BatchNormalization", "QuantizeLinear", "DequantizeLinear",
        ):  # fmt: skip
            return tuple(names)
        names.append(after[0].output[0])
