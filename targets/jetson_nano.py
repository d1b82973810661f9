"""Jetson Nano (Maxwell): no int8 arithmetic, so its artefact is the float graph, built in fp16 by TensorRT 8.2.

TensorRT refuses Q/DQ there: "Networks with QuantizeLayer/DequantizeLayer layers require hardware with Int8 support"
(NVIDIA/TensorRT#3157).
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from xedge.errors import UnsupportedGraph, UsageError
from xedge.target import Fact
from xedge.targets import tensorrt
from xedge.targets.jetson_orin_nano import DEVICES, MODULES
from xedge.targets.jetson_xavier_nx import JETPACK4

NO_INT8 = "github.com/ceccocats/tkDNN#26: TensorRT says `Float16 support: 1, Int8 support: 0`; NVIDIA/TensorRT#3157"
BUILD = "trtexec --onnx=model.onnx --saveEngine=model.plan --fp16"


def compile_float(onnx_path: Path, folder: Path, name: str) -> Path:
    """Write model.onnx and build.sh.

    Raises:
        UnsupportedGraph: the graph holds Q/DQ. UsageError: the file is missing or is not ONNX.
    """
    try:
        graph = onnx.load(onnx_path, load_external_data=False).graph
    except (FileNotFoundError, DecodeError) as error:
        raise UsageError("is not an ONNX model", where=str(onnx_path), fix="give the path of one") from error
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            raise UnsupportedGraph(
                "Jetson Nano has no int8 arithmetic and TensorRT refuses Q/DQ there",
                where=f"{name}: {node.op_type} {node.name or node.output[0]!r}",
                fix="compile the float graph, which runs in fp16",
            )
    model = folder / "model.onnx"
    shutil.copyfile(onnx_path, model)
    script = folder / "build.sh"
    script.write_text(
        f'#!/bin/sh\n# On Jetson trtexec lies in /usr/src/tensorrt/bin.\ncd "$(dirname "$0")" && {BUILD}\n'
    )
    script.chmod(0o755)
    (folder / "README.md").write_text(
        f"{name}: float ONNX, batch 1. Copy this folder to the board, then `{BUILD}` (TensorRT 8.2, JetPack 4.6.1). "
        "An engine built elsewhere does not load there.\n"
    )
    return model


TARGET = replace(
    tensorrt.TARGET,
    name="jetson-nano",
    summary="Jetson Nano 4 GB (Maxwell): no int8; float ONNX for TensorRT 8.2 in fp16, JetPack 4.6.1",
    flavour="float",
    compile=compile_float,
    weight_bits=(16, 32),
    activation_symmetric=False,
    half=None,
    aliases=(),
    facts=(
        Fact("precisions", "fp16, fp32", "", NO_INT8),
        Fact("GPU cores", 128, "", MODULES),
        Fact("CPU", "4 Cortex-A57", "", MODULES),
        Fact("CPU clock", 1.43, "GHz", MODULES),
        Fact("memory", 4, "GB", MODULES),
        Fact("memory bandwidth", 25.6, "GB/s", MODULES),
        Fact("JetPack", "4", "", DEVICES),
        Fact("TensorRT with JetPack 4.6.1", "8.2", "", JETPACK4),
    ),
    sources=(NO_INT8,),
)
