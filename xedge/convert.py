"""`xedge convert`: an ONNX model, float or Q/DQ, in another runtime's format."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import onnx

from xedge.errors import UsageError
from xedge.run import writing


def convert(
    model: Path,
    kind: str,
    output: Path | None = None,
    weights: Literal["float16", "int4"] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Write `model` as `kind`; the file appears whole or not at all.

    Args:
        model: ONNX, float or quantised in Q/DQ form, by whatever tool.
        kind: the target that compiles it: "tflite".
        output: file to write; by default beside the model, with the format's suffix.
        weights: "float16": those of float layers in half the bytes. "int4": also convolutions' in 4 bits where they
            fit, in fewer bytes and on slower kernels.
        say: takes a line about what the file has otherwise than the model.

    Returns:
        The file.

    Raises:
        UsageError: the model is missing or is not ONNX, or the file cannot be written.
        UnsupportedGraph: an operator has no form there; it is named.
    """
    target = importlib.import_module(f"xedge.targets.{kind}").TARGET
    output = model.with_suffix(target.suffix) if output is None else output
    if output.is_dir():
        raise UsageError("is a folder", where=str(output), fix="name the file with -o")
    if output.exists() and model.exists() and output.samefile(model):
        raise UsageError("is the model itself", where=str(output), fix="name another file with -o")
    with writing(output.parent):
        output.parent.mkdir(parents=True, exist_ok=True)
        # Beside the result, so that the last step is a rename within one file system.
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as folder:
            made: Path = target.compile(model, Path(folder), "model", weights=weights)
            made.replace(output)
    batch = _batch(model)
    if batch > 1:
        say(f"batch {batch} is written as 1")
    return output


def _batch(model: Path) -> int:
    """The batch that an ONNX file spells; 1 where it spells none."""
    graph = onnx.load(model, load_external_data=False).graph
    held = {t.name for t in graph.initializer}
    sizes = [v.type.tensor_type.shape.dim for v in graph.input if v.name not in held]
    return max((dims[0].dim_value for dims in sizes if dims), default=1)
