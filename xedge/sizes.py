"""A run's graphs at another size of picture: nets that restore are convolutions, and take any.

The graphs on disk have one fixed input, as engines want it. What of a graph depends on that size is rewritten here: the
shapes, and the sizes that pixel shuffles written as reshapes carry. Weights, scales and zero-points are the same.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, numpy_helper

from xedge.errors import UnsupportedGraph, UsageError, resume
from xedge.onnx_graph import Graph
from xedge.target import Target

if TYPE_CHECKING:
    from xedge.report import Report


def resized(proto: ModelProto, height: int, width: int) -> ModelProto:
    """The same graph for inputs [1, C, height, width].

    Raises:
        UnsupportedGraph: it was made for one size only, such as by a linear layer behind a flatten.
    """
    before = Graph(proto)
    (feed,), (out,) = before.inputs, before.outputs
    old, answer = before.shapes[feed], before.shapes[out]
    if len(old) != 4 or len(answer) != 4:
        raise UnsupportedGraph("takes no pictures, or gives none", where=f"{feed} {old} to {out} {answer}")
    model = ModelProto()
    model.CopyFrom(proto)
    del model.graph.value_info[:]
    for value, shape in ((model.graph.input[0], (1, old[1], height, width)), (model.graph.output[0], ())):
        del value.type.tensor_type.shape.dim[:]
        for size in shape:
            value.type.tensor_type.shape.dim.add().dim_value = size
    model.graph.output[0].type.tensor_type.ClearField("shape")
    for node in model.graph.node:
        if node.op_type == "Reshape":
            _reshape(model, node, before, Graph(model))
    after = Graph(model)
    wanted = (1, answer[1], height * answer[2] // old[2], width * answer[3] // old[3])
    if after.shapes.get(out) != wanted:
        raise UnsupportedGraph(
            f"was made for pictures of {old[3]}x{old[2]} only: at {width}x{height} it gives {after.shapes.get(out)}",
            where=out,
            fix="give the size to the data: patch=...",
        )
    for size in wanted:
        model.graph.output[0].type.tensor_type.shape.dim.add().dim_value = size
    onnx.checker.check_model(model, full_check=True)
    return model


def _reshape(model: ModelProto, node: NodeProto, before: Graph, now: Graph) -> None:
    """Give one reshape of a pixel shuffle, or of its inverse, the sizes that follow from its input's."""
    x, shape = before.shapes[node.input[0]], before.shapes[node.output[0]]
    new = now.shapes.get(node.input[0], ())
    sizes: tuple[int, ...] = ()
    if len(x) == 4 and len(shape) == 6:
        if shape[2] * shape[3] == x[2] and shape[4] * shape[5] == x[3] and shape[1] == x[1]:  # [N, C, h, r, w, r]
            sizes = (*shape[:2], new[2] // shape[3], shape[3], new[3] // shape[5], shape[5])
        elif shape[4:] == x[2:]:  # [N, C, r, r, h, w]
            sizes = (*shape[:4], *new[2:])
    elif len(x) == 6 and len(shape) == 4:
        if shape[2:] == x[4:]:
            sizes = (*shape[:2], *new[4:])
        elif shape[2:] == (x[2] * x[3], x[4] * x[5]):
            sizes = (*shape[:2], new[2] * new[3], new[4] * new[5])
    if math.prod(sizes) != math.prod(new) or not sizes:
        raise UnsupportedGraph("reshapes pictures of one size only", where=node.name, fix="give the data that size")
    name = f"{node.output[0]}.sizes"
    model.graph.initializer.append(numpy_helper.from_array(np.array(sizes, np.int64), name))
    node.input[1] = name


def scale_of(proto: ModelProto) -> int:
    """How many times larger than its input the output is.

    Raises:
        UnsupportedGraph: the graph gives no picture, or one of another shape.
    """
    graph = Graph(proto)
    x, y = graph.shapes[graph.inputs[0]], graph.shapes[graph.outputs[0]]
    if len(x) != 4 or len(y) != 4 or y[2] % x[2] or y[2] // x[2] * x[3] != y[3]:
        raise UnsupportedGraph(f"gives {y} from {x}, which is no enlarged picture", where=graph.outputs[0])
    return y[2] // x[2]


def shipped(report: Report, target: str) -> str:
    """The form in which a run ships a target's artefact (`xedge.candidates`)."""
    return next((choice.form for choice in report.choices if choice.target == target), "int8")


def source(run: Path, target: Target | None, form: str = "int8") -> ModelProto:
    """The graph that a run's artefact for a target was compiled from; without one, the float original.

    Raises:
        UsageError: it is not there.
    """
    path = run / "original.onnx"
    if target is not None:
        forms = {"float16": "float.onnx", "float32": "float.onnx"}
        forms["int8 with exceptions"] = f"candidates/{target.name}-exceptions.onnx"
        forms["int8 and float"] = f"candidates/{target.name}-precision.onnx"
        path = run / forms.get(form, f"model.{target.flavour}.onnx")
    if not path.is_file():
        raise UsageError("there is no such file", where=str(path), fix=f"make it again: {resume(run)}")
    return onnx.load(path)


@contextmanager
def compiled(proto: ModelProto, target: Target, form: str = "int8") -> Iterator[Path]:
    """The target's model file for a graph, while it lasts."""
    compile_ = target.half if form == "float16" and target.half is not None else target.compile
    with tempfile.TemporaryDirectory(prefix="xedge-") as folder:
        onnx.save(proto, Path(folder) / "source.onnx")
        (Path(folder) / "made").mkdir()
        yield compile_(Path(folder) / "source.onnx", Path(folder) / "made", "model")


@contextmanager
def baseline_of(proto: ModelProto, target: Target) -> Iterator[Path]:
    """The float original's graph in the target's format, while it lasts: what a speed-up is measured against."""
    if target.suffix != ".onnx":
        with compiled(proto, target) as model:
            yield model
        return
    with tempfile.TemporaryDirectory(prefix="xedge-") as folder:
        onnx.save(proto, Path(folder) / "original.onnx")
        yield Path(folder) / "original.onnx"
