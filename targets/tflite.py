"""TFLite (LiteRT) files written from ONNX: float models as they are, QDQ models fully in integers.

    tflite_graph   ONNX -> static shapes, constants folded, Q/DQ pairs turned into int8 grids
    tflite_fuse    activations, biases, batch norms into the operator before them
    tflite_emit    layout (NHWC inside, no TRANSPOSE) and grids, converted only where an operator insists
    tflite_conv, _pool, _ops, _move    one writer per operator
    tflite_write   the flatbuffer

The file takes NHWC (images, [N, H, W, C]; other inputs as in ONNX) and gives NHWC for outputs with four axes.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from numpy.typing import NDArray

from xedge.errors import UnsupportedGraph, UsageError, nearest
from xedge.target import Runner, Target

from .tflite_conv import CONV_WRITERS
from .tflite_emit import NHWC, Emitter, WeightForm, preferred
from .tflite_fuse import fuse
from .tflite_graph import read
from .tflite_move import MOVE_WRITERS
from .tflite_ops import ELEMENTWISE_WRITERS
from .tflite_pool import POOL_WRITERS

Array = NDArray[Any]

_WRITERS: Mapping[str, Any] = {**CONV_WRITERS, **POOL_WRITERS, **ELEMENTWISE_WRITERS, **MOVE_WRITERS}
# Written under another name, or gone before writing.
_ABSORBED = (
    *("BatchNormalization", "Cast", "Constant", "DequantizeLinear", "Dropout", "Flatten", "GlobalAveragePool"),
    *("GlobalMaxPool", "Identity", "QuantizeLinear", "Squeeze", "Unsqueeze"),
)


def operators() -> tuple[str, ...]:
    """The ONNX operators that `convert` takes."""
    return tuple(sorted({*_WRITERS, *_ABSORBED} - {"Affine", "Requantize"}))


def convert(model: onnx.ModelProto, name: str = "model", *, batch: int | None = 1, weights: WeightForm = None) -> bytes:
    """The bytes of a .tflite file for an ONNX model (opset 13 or later); the same model gives the same bytes.

    Args:
        model: float, or quantised in QDQ form: int8 or uint8 activations per tensor, int8 weights with zero point 0.
        name: of the subgraph.
        batch: the batch that is written (and stays resizable where every operator allows); None keeps the model's.
        weights: "float16" or "int4"; see `WeightForm`.

    Raises:
        UnsupportedGraph: one line that names the operator, its node, and what to do.
    """
    for proto in model.graph.node:
        if proto.op_type not in operators() and not _folds(model, proto):
            raise UnsupportedGraph(
                f"TFLite writing does not know the operator {proto.op_type}",
                where=f"node {proto.name or proto.output[0]!r}",
                fix=f"replace it in the model, or run this part elsewhere; {nearest(proto.op_type, operators())}",
            )
    graph = read(model, batch)
    fuse(graph)
    emitter = Emitter(graph, weights)
    inputs = {public: emitter.start(tensor).index for public, tensor in graph.inputs.items()}
    for node in graph.nodes:
        if node.op not in _WRITERS:
            raise UnsupportedGraph(f"{node.op} is left after folding", where=str(node), fix="replace it in the model")
        _WRITERS[node.op](emitter, node)
    outputs = {}
    for public, tensor in graph.outputs.items():
        if not emitter.is_activation(tensor):
            raise UnsupportedGraph("it does not depend on the input", where=f"output {public!r}", fix="remove it")
        value = emitter.raw(tensor)
        outputs[public] = emitter.layout(value, preferred(value.shape)).index
    return emitter.flat.pack(inputs, outputs, name, free_batch=batch is not None and emitter.free_batch)


def _folds(model: onnx.ModelProto, proto: onnx.NodeProto) -> bool:
    """True for nodes that compute sizes and constants, which are folded before writing."""
    known = {t.name for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in ("Constant", "Shape") or (node.input and all(i in known for i in node.input if i)):
            known.update(node.output)
    return all(out in known for out in proto.output)


def compile(  # noqa: A001  the name in Target's contract
    onnx_path: Path, folder: Path, name: str, weights: WeightForm = None
) -> Path:
    """Write folder/name.tflite from a float or QDQ ONNX file; the file appears whole or not at all.

    Raises:
        UsageError: the file is missing or is not ONNX, or the folder cannot be written. UnsupportedGraph: as `convert`.
    """
    try:
        model = onnx.load(onnx_path)
    except FileNotFoundError as error:
        raise UsageError("no such file", where=str(onnx_path), fix="give the path of an ONNX model") from error
    except DecodeError as error:
        raise UsageError("not an ONNX model", where=str(onnx_path), fix="give the path of an ONNX model") from error
    data = convert(model, name, weights=weights)
    path = folder / f"{name}.tflite"
    try:
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise UsageError(
            f"cannot be written ({error.strerror})", where=str(path), fix="choose a folder with room that you own"
        ) from error
    return path


@dataclass(frozen=True)
class TfliteRunner:
    """A .tflite on this host: float32 in ONNX layout in and out, one image at a time (as on the device)."""

    interpreter: Any
    reference: bool

    def __call__(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        """Batch [N, C, H, W] in, the first output [N, ...] out; NHWC and int8 stay inside."""
        return self.outputs(batch)[0]

    def outputs(self, batch: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        """Every output, each [N, ...]."""
        source, sinks = self.interpreter.get_input_details()[0], self.interpreter.get_output_details()
        shape = tuple(int(n) for n in source["shape"])
        step = max(shape[0], 1)
        expected = tuple(np.empty(shape, np.int8).transpose(0, 3, 1, 2).shape) if len(shape) == 4 else shape
        if batch.shape[1:] != expected[1:] or len(batch) % step:
            raise UsageError(f"input of shape {batch.shape}", where="tflite", fix=f"give [N, {expected[1:]}]")
        found: list[list[Array]] = [[] for _ in sinks]
        for start in range(0, len(batch), step):
            image = batch[start : start + step]
            image = image.transpose(NHWC) if len(shape) == 4 else image
            self.interpreter.set_tensor(source["index"], _to_grid(np.ascontiguousarray(image), source))
            self.interpreter.invoke()
            for part, sink in zip(found, sinks, strict=True):
                part.append(_from_grid(self.interpreter.get_tensor(sink["index"]), sink))
        joined = [np.concatenate(part) for part in found]
        return [a.transpose(0, 3, 1, 2) if a.ndim == 4 else a for a in joined]


def _to_grid(real: Array, detail: Mapping[str, Any]) -> Array:
    if detail["dtype"] == np.float32:
        return real.astype(np.float32)
    scale, zero = detail["quantization"]
    limits = np.iinfo(detail["dtype"])
    q = np.rint(real.astype(np.float32) / np.float32(scale)) + zero
    return np.asarray(np.clip(q, limits.min, limits.max).astype(detail["dtype"]))


def _from_grid(stored: Array, detail: Mapping[str, Any]) -> NDArray[np.float32]:
    if detail["dtype"] == np.float32:
        return np.array(stored, np.float32)
    scale, zero = detail["quantization"]
    return (stored.astype(np.float32) - np.float32(zero)) * np.float32(scale)


@contextmanager
def _hushed() -> Iterator[None]:
    """The runtime writes a line about its delegate straight to file descriptor 2; it has no switch for that."""
    sys.stderr.flush()
    before = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nowhere)


def runner(data: bytes, threads: int = 1, *, reference: bool = False) -> TfliteRunner:
    """Run .tflite bytes; `reference` takes TFLite's reference kernels in place of XNNPACK."""
    options: dict[str, Any] = {"model_content": data, "num_threads": threads}
    for name in ("ai_edge_litert.interpreter", "tflite_runtime.interpreter"):
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        if reference:
            options["experimental_op_resolver_type"] = module.OpResolverType.BUILTIN_REF
        try:
            with _hushed():
                interpreter = module.Interpreter(**options)
                interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise UnsupportedGraph(f"the runtime refuses the model: {error}", where=name, fix="update it") from error
        return TfliteRunner(interpreter, reference)
    raise UsageError("no TFLite runtime is installed", fix="pip install ai-edge-litert")


def load(model_path: Path, threads: int) -> Runner:
    """Run a .tflite on this host, int8 or float32: batch [N, C, H, W] of float32 in, outputs [N, ...] out.

    Raises:
        UsageError: the file is missing, or has several inputs or outputs.
    """
    try:
        made = runner(model_path.read_bytes(), threads)
    except FileNotFoundError as error:
        raise UsageError("no such file", where=str(model_path), fix="compile the model first") from error
    if len(made.interpreter.get_input_details()) != 1 or len(made.interpreter.get_output_details()) != 1:
        raise UsageError("several inputs or outputs", where=str(model_path), fix="use a model with one of each")
    return made


TARGET = Target(
    name="tflite",
    summary="LiteRT / TensorFlow Lite: fully integer .tflite (int8, NHWC) for phones and small boards",
    flavour="litert",
    align=8,
    compile=compile,
    load=load,
    suffix=".tflite",
    weight_bits=(8, 4),
    half=partial(compile, weights="float16"),
    sources=(
        "https://ai.google.dev/edge/litert/models/quantization_spec",
        "tensorflow/lite/tools/versioning/op_version.cc",
    ),
)
