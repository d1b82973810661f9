"""Jetson AGX Orin 64 GB (Ampere, SM87): TensorRT 10.3 with JetPack 6, 11.4 with JetPack 7.2.2."""

from __future__ import annotations

from dataclasses import replace

from xedge.target import Fact
from xedge.targets import tensorrt
from xedge.targets.jetson_orin_nano import DEVICES, JETPACK6, MODULES, PRECISIONS

JETPACK7 = (
    "NVIDIA, Migrating TensorRT from 10.x to 11.x on Jetson/JetPack (11.4.1): "
    "docs.nvidia.com/deeplearning/tensorrt/11.4.1/api/migration/tensorrt-10x-to-11x-jetson.html"
)

TARGET = replace(
    tensorrt.TARGET,
    name="jetson-agx-orin",
    summary="Jetson AGX Orin 64 GB (Ampere, SM87): TensorRT 10.3 with JetPack 6, 11.4 with JetPack 7.2.2",
    aliases=(),
    facts=(
        Fact("compute capability", "8.7", "", PRECISIONS),
        Fact("precisions", "int8, fp16, tf32, fp32", "", PRECISIONS),
        Fact("GPU cores", 2048, "", MODULES),
        Fact("tensor cores", 64, "", MODULES),
        Fact("CPU", "12 Cortex-A78AE", "", MODULES),
        Fact("CPU clock", 2.2, "GHz", MODULES),
        Fact("memory", 64, "GB", MODULES),
        Fact("memory bandwidth", 204.8, "GB/s", MODULES),
        Fact("JetPack", "5, 6, 7", "", f"{DEVICES}; {JETPACK7}"),
        Fact("TensorRT with JetPack 6.1", "10.3", "", JETPACK6),
        Fact("TensorRT with JetPack 7.2.2", "11.4.1", "", JETPACK7),
    ),
)
