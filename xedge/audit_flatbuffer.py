"""What a .tflite asks for: per layer its arithmetic and its multiply-adds, read from the flatbuffer itself."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xedge.audit_graphs import Layer, Reading, is_integer
from xedge.errors import UsageError

if TYPE_CHECKING:
    from xedge.target import Flavour


def read_tflite(path: Path) -> Reading:
    """The layers of a .tflite.

    Raises:
        UsageError: missing, damaged, or without a convolution or matrix product.
    """
    from ai_edge_litert import schema_py_generated as tfl

    fix = "give a .onnx, a .tflite, a target's folder or a run"
    try:
        data = path.read_bytes()
    except OSError as e:
        raise UsageError(f"cannot be read ({e.strerror})", where=str(path), fix=fix) from e
    if data[4:8] != b"TFL3":
        raise UsageError("is no .tflite: its mark TFL3 is missing", where=str(path), fix=fix)
    try:
        model = tfl.ModelT.InitFromObj(tfl.Model.GetRootAs(data))
        reading = _tflite(model, tfl)
    except (struct.error, IndexError, KeyError, ValueError, TypeError, AttributeError, OverflowError, MemoryError) as e:
        # Flatbuffers carry no checksum: a cut or altered file shows when an offset leads nowhere.
        raise UsageError("is damaged or cut off", where=str(path), fix="write it again") from e
    if not reading.layers:
        raise UsageError("has no convolution and no matrix product to audit", where=str(path), fix=fix)
    return reading


def _tflite(model: Any, tfl: Any) -> Reading:
    names = {v: k for k, v in vars(tfl.BuiltinOperator).items() if isinstance(v, int)}
    codes = [names.get(max(c.builtinCode, c.deprecatedBuiltinCode), "?") for c in model.operatorCodes]
    graph = model.subgraphs[0]
    types = {v: k.lower() for k, v in vars(tfl.TensorType).items() if isinstance(v, int)}
    ops = [(codes[op.opcodeIndex], list(op.inputs), list(op.outputs), op.builtinOptions) for op in graph.operators]

    def kind(i: int) -> str:
        return types[graph.tensors[i].type] if i >= 0 else ""

    def shape(i: int) -> list[int]:
        return [max(int(d), 1) for d in graph.tensors[i].shape] if graph.tensors[i].shape is not None else []

    halves = {o[0] for code, i, o, _ in ops if code == "DEQUANTIZE" and kind(i[0]) == "float16"}
    layers = []
    for index, (code, inputs, outputs, _) in enumerate(ops):
        if code not in ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "TRANSPOSE_CONV", "BATCH_MATMUL"):
            continue
        source = inputs[2] if code == "TRANSPOSE_CONV" else inputs[0]
        w, out = shape(inputs[1]), shape(outputs[0])
        groups, x, size = 1, shape(source), math.prod(out)
        if code == "DEPTHWISE_CONV_2D":
            groups, channels, macs = x[-1], (x[-1], out[-1]), size * w[1] * w[2]
        elif code == "TRANSPOSE_CONV":
            channels, macs = (x[-1], out[-1]), math.prod(x) * w[0] * w[1] * w[2]
        elif code == "CONV_2D":
            groups = max(x[-1] // w[-1], 1)
            channels, macs = (x[-1], out[-1]), size * math.prod(w[1:])
        else:
            channels, macs = (w[-1], out[-1]), size * w[-1]
        asked, why = _tflite_asked(kind(source), "float16" if inputs[1] in halves else kind(inputs[1]))
        written = graph.tensors[outputs[0]].name
        name = written.decode() if isinstance(written, bytes) else str(written)
        layers.append(
            Layer(
                name=name,
                op=code,
                inputs=channels[0],
                outputs=channels[1],
                groups=groups,
                macs=macs,
                asked=asked,
                why=why,
                aliases=frozenset({name}),
                index=index,
            )
        )
    islands = _islands(ops, kind)
    flavour: Flavour = "litert" if any(is_integer(layer.asked) for layer in layers) else "float"
    return Reading("tflite", flavour, tuple(layers), len(ops), islands=islands)


def _tflite_asked(x: str, w: str) -> tuple[str, tuple[str, ...]]:
    """By the types of input and weight (LiteRT's static_wi8_ai8, static_wi4_ai8, dynamic_wi8_afp32, ...)."""
    if x in ("int8", "uint8") and w in ("int8", "uint8", "int4", "int2"):
        return ("int8" if w in ("int8", "uint8") else "int4"), ()
    if x == "int16" and w in ("int8", "int4"):
        return "int16", ()
    if x == "float32" and w in ("int8", "int4", "uint8"):
        return "int8 dynamic", ()
    if (x, w) == ("float32", "float16"):  # XNNPACK computes in float16 where the processor does
        return "float16 weights, float32", ("its input and its weight are float",)
    if w in ("float32", "float16"):
        return x, ("its weight is float",) if x != "float32" else ("its input and its weight are float",)
    return x, (f"its input is {x} and its weight {w}",)


def _islands(ops: list[tuple[str, list[int], list[int], Any]], kind: Any) -> tuple[str, ...]:
    """Float operators that are entered through DEQUANTIZE and left through QUANTIZE."""
    made = {o: i for i, (_, _, outputs, _) in enumerate(ops) for o in outputs}
    float_ops = {
        i
        for i, (code, inputs, outputs, _) in enumerate(ops)
        if code not in ("QUANTIZE", "DEQUANTIZE") and any(kind(t) == "float32" for t in (*inputs, *outputs))
    }
    root = {i: i for i in float_ops}

    def find(i: int) -> int:
        while root[i] != i:
            i = root[i]
        return i

    readers: dict[int, list[int]] = {}
    for i, (_, inputs, _, _) in enumerate(ops):
        for t in inputs:
            readers.setdefault(t, []).append(i)
            if i in float_ops and made.get(t) in float_ops:
                root[find(i)] = find(made[t])
    found: dict[int, list[int]] = {}
    for i in sorted(float_ops):
        found.setdefault(find(i), []).append(i)
    islands = []
    for members in found.values():
        entered = any(ops[made[t]][0] == "DEQUANTIZE" for i in members for t in ops[i][1] if t in made)
        left = any(ops[r][0] == "QUANTIZE" for i in members for t in ops[i][2] for r in readers.get(t, []))
        if entered and left:
            islands.append(" -> ".join(f"{ops[i][0]} (operator {i})" for i in members))
    return tuple(islands)
