"""What a .tflite holds: its operators, its float tensors, the step of its output."""

from __future__ import annotations

import collections

from ai_edge_litert import schema_py_generated as schema

from xedge.targets import tflite


def unpacked(data: bytes) -> object:
    return schema.ModelT.InitFromPackedBuf(data, 0)


def operators(data: bytes) -> collections.Counter[str]:
    names = {v: k for k, v in vars(schema.BuiltinOperator).items() if isinstance(v, int)}
    model = unpacked(data)
    return collections.Counter(
        names[model.operatorCodes[o.opcodeIndex].builtinCode] for o in model.subgraphs[0].operators
    )


def floats(data: bytes) -> list[str]:
    return [t.name.decode() for t in unpacked(data).subgraphs[0].tensors if t.type == schema.TensorType.FLOAT32]


def step(data: bytes) -> float:
    """One step of the output's grid."""
    return float(tflite.runner(data).interpreter.get_output_details()[0]["quantization"][0])
