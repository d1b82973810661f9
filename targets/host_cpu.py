"""This host's CPU through ONNX Runtime: always there, and the reference for what is correct."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from xedge.onnx_graph import session
from xedge.target import Runner, Target


def compile_onnx(onnx_path: Path, folder: Path, name: str) -> Path:
    """The artefact is the QDQ graph itself."""
    model = folder / f"{name}.onnx"
    shutil.copyfile(onnx_path, model)
    return model


def load(model_path: Path, threads: int = 1) -> Runner:
    """ONNX Runtime with its optimisations, as it ships."""
    run = session(model_path, threads=threads)
    name = run.get_inputs()[0].name

    def runner(x: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.concatenate([run.run(None, {name: x[i : i + 1]})[0] for i in range(len(x))])

    return runner


TARGET = Target(
    name="host-cpu",
    summary="this host's CPU by ONNX Runtime: uint8 activations, int8 weights per channel, int32 bias",
    flavour="onnxruntime",
    align=8,
    compile=compile_onnx,
    load=load,
    opset=17,
    aliases=("onnxruntime", "cpu"),
    sources=("ONNX Runtime documentation, Quantize ONNX models: U8S8 on x86, x64quantprecision",),
)
