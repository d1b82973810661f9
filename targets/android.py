"""Android phones: fully integer .tflite for LiteRT (XNNPACK on the CPU)."""

from __future__ import annotations

from dataclasses import replace

from xedge.targets import tflite

TARGET = replace(
    tflite.TARGET,
    name="android",
    summary="Android phones: fully integer .tflite for LiteRT (XNNPACK on the CPU)",
    aliases=(),
    sources=(*tflite.TARGET.sources, "github.com/google/XNNPACK: int8 kernels tile output channels by 8 and 16"),
)
