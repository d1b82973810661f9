"""Jetson AGX Thor, T5000 (Blackwell): TensorRT 10 with JetPack 7, 11.4 with JetPack 7.2.2."""

from __future__ import annotations

from dataclasses import replace

from xedge.target import Fact
from xedge.targets import tensorrt
from xedge.targets.jetson_agx_orin import JETPACK7
from xedge.targets.jetson_orin_nano import MODULES

PRECISIONS = (
    "NVIDIA, TensorRT 10.10 for DRIVE OS 7.0.3, hardware and precision of Thor: "
    "developer.nvidia.com/docs/drive/drive-os/7.0.3/public/drive-os-tensorrt-release-notes/release-properties.html"
)

TARGET = replace(
    tensorrt.TARGET,
    name="jetson-thor",
    summary="Jetson AGX Thor T5000 (Blackwell): TensorRT 10 with JetPack 7, 11.4 with JetPack 7.2.2",
    aliases=(),
    facts=(
        Fact("precisions", "int8, fp8, fp16, bf16, tf32, fp32", "", PRECISIONS),
        Fact("GPU cores", 2560, "", MODULES),
        Fact("tensor cores", 96, "", MODULES),
        Fact("CPU", "14 Neoverse-V3AE", "", MODULES),
        Fact("CPU clock", 2.6, "GHz", MODULES),
        Fact("memory", 128, "GB", MODULES),
        Fact("memory bandwidth", 273, "GB/s", MODULES),
        Fact("JetPack", "7", "", JETPACK7),
        Fact("TensorRT with JetPack 7.2.2", "11.4.1", "", JETPACK7),
    ),
)
