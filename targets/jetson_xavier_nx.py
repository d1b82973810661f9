"""Jetson Xavier NX 8 GB (Volta, SM72): TensorRT 8.5 with JetPack 5.1."""

from __future__ import annotations

from dataclasses import replace

from xedge.target import Fact
from xedge.targets import tensorrt
from xedge.targets.jetson_orin_nano import DEVICES, JETPACK5, MODULES, PRECISIONS

JETPACK4 = "NVIDIA, JetPack SDK 4.6.1: developer.nvidia.com/jetpack-sdk-461"

TARGET = replace(
    tensorrt.TARGET,
    name="jetson-xavier-nx",
    summary="Jetson Xavier NX 8 GB (Volta, SM72): TensorRT 8.5 with JetPack 5.1",
    aliases=(),
    facts=(
        Fact("compute capability", "7.2", "", PRECISIONS),
        Fact("precisions", "int8, fp16, fp32", "", PRECISIONS),
        Fact("GPU cores", 384, "", MODULES),
        Fact("tensor cores", 48, "", MODULES),
        Fact("CPU", "6 Carmel", "", MODULES),
        Fact("CPU clock", 1.9, "GHz", MODULES),
        Fact("memory", 8, "GB", MODULES),
        Fact("memory bandwidth", 59.7, "GB/s", MODULES),
        Fact("JetPack", "4, 5", "", DEVICES),
        Fact("TensorRT with JetPack 4.6.1", "8.2", "", JETPACK4),
        Fact("TensorRT with JetPack 5.1.2", "8.5.2", "", JETPACK5),
    ),
)
