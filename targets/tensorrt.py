"""TensorRT, for Jetson: a folder with the QDQ graph and the exact commands that build and time its engine there.

An engine is bound to the board, the TensorRT version and the JetPack it was built on, so xedge ships the graph and
builds on the board.
"""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from xedge.onnx_graph import session
from xedge.target import Runner, Target

BUILD = {
    # Weakly typed: layers between Q/DQ run in int8, the others in the faster of fp16 and fp32. The last three flags
    # make 10 measure as 11 does by default.
    10: ["--int8", "--fp16", "--useCudaGraph", "--useSpinWait", "--noDataTransfers"],
    # Always strongly typed; the precision flags are gone, the Q/DQ in the graph decides.
    11: [],
}


def command(version: int, *, timing: bool = True) -> list[str]:
    """The trtexec call for TensorRT 10 or 11, to be run inside the artefact's folder on the board."""
    common = ["--onnx=model.onnx", "--saveEngine=model.plan", "--timingCacheFile=timing.cache"]
    time = ["--warmUp=1000", "--duration=10", "--iterations=1000", "--percentile=50,90,99", "--exportTimes=times.json"]
    layers = ["--profilingVerbosity=detailed", "--exportLayerInfo=layers.json"]
    return ["trtexec", *common, *BUILD[version], *(time if timing else []), *layers]


def compile_onnx(onnx_path: Path, folder: Path, name: str) -> Path:
    """Write the artefact folder: model.onnx, one build script a version, README.md."""
    model = folder / "model.onnx"
    shutil.copyfile(onnx_path, model)
    for version in BUILD:
        script = folder / f"build-tensorrt{version}.sh"
        line = shlex.join(command(version))
        script.write_text(
            f'#!/bin/sh\n# On Jetson trtexec lies in /usr/src/tensorrt/bin.\ncd "$(dirname "$0")" && {line}\n'
        )
        script.chmod(0o755)
    (folder / "README.md").write_text(
        f"1. {name}: int8 Q/DQ ONNX, opset 17, batch 1. Copy this folder to the board; an engine built elsewhere "
        "does not load there.\n"
        f"2. TensorRT 10 (JetPack 6): `{shlex.join(command(10))}`\n"
        f"3. TensorRT 11 (JetPack 7.2.2 and later): `{shlex.join(command(11))}`\n"
    )
    return model


def load(model_path: Path, threads: int = 1) -> Runner:
    """The graph as it is written, in ONNX Runtime without optimisation: what TensorRT has to reproduce."""
    run = session(model_path, threads=threads, exact=True)
    name = run.get_inputs()[0].name

    def runner(x: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.concatenate([run.run(None, {name: x[i : i + 1]})[0] for i in range(len(x))])

    return runner


TARGET = Target(
    name="tensorrt",
    summary="TensorRT 10 and 11 on any NVIDIA GPU: int8 Q/DQ ONNX, opset 17, with the trtexec commands",
    flavour="tensorrt",
    align=8,
    compile=compile_onnx,
    load=load,
    opset=17,
    weight_bits=(8,),
    activation_symmetric=True,
    sources=(
        "NVIDIA TensorRT documentation, Working with Quantized Types: explicit quantisation, zero-point 0",
        "NVIDIA TensorRT documentation, Migrating trtexec Usage from TensorRT 10.x to 11.x",
        "github.com/NVIDIA/TensorRT#993: int8 convolutions want channel counts in multiples",
    ),
)
