"""Jetson Orin Nano 8 GB (Ampere, SM87): TensorRT 8.5 with JetPack 5.1, 10.3 with JetPack 6."""

from __future__ import annotations

from dataclasses import replace

from xedge.target import Fact
from xedge.targets import tensorrt

MODULES = (
    "NVIDIA, Jetson modules, technical specifications (developer.nvidia.com/embedded/jetson-modules), as copied in the "
    "Ultralytics NVIDIA Jetson guide; Orin Nano is the Super"
)
DEVICES = "Ultralytics, NVIDIA Jetson guide, JetPack by device: docs.ultralytics.com/guides/nvidia-jetson"
JETPACK6 = "PyTorch, Torch-TensorRT in JetPack 6.1: docs.pytorch.org/TensorRT/getting_started/jetpack.html"
JETPACK5 = "github.com/Idein/aicast_jetson_benchmark: JetPack 5.1.2 and JetPack 4.6.1 as installed"
PRECISIONS = "NVIDIA, TensorRT 8.4 support matrix, hardware and precision (blog.csdn.net/HaoZiHuang, 125830864)"

TARGET = replace(
    tensorrt.TARGET,
    name="jetson-orin-nano",
    summary="Jetson Orin Nano 8 GB (Ampere, SM87): TensorRT 8.5 with JetPack 5.1, 10.3 with JetPack 6",
    aliases=("jetson",),
    facts=(
        Fact("compute capability", "8.7", "", PRECISIONS),
        Fact("precisions", "int8, fp16, tf32, fp32", "", PRECISIONS),
        Fact("GPU cores", 1024, "", MODULES),
        Fact("tensor cores", 32, "", MODULES),
        Fact("CPU", "6 Cortex-A78AE", "", MODULES),
        Fact("CPU clock", 1.7, "GHz", MODULES),
        Fact("memory", 8, "GB", MODULES),
        Fact("memory bandwidth", 102, "GB/s", MODULES),
        Fact("JetPack", "5, 6", "", DEVICES),
        Fact("TensorRT with JetPack 5.1.2", "8.5.2", "", JETPACK5),
        Fact("TensorRT with JetPack 6.1", "10.3", "", JETPACK6),
    ),
)
