"""Google Pixel 8 (Tensor G3): fully integer .tflite for LiteRT on the CPU."""

from __future__ import annotations

from dataclasses import replace

from xedge.target import Fact
from xedge.targets import tflite

CORES = "Android Authority, Tensor G3 as the Device Info HW app reads it: androidauthority.com/google-tensor-g3-specs"

TARGET = replace(
    tflite.TARGET,
    name="pixel8",
    summary="Google Pixel 8 (Tensor G3): fully integer .tflite for LiteRT (XNNPACK on the CPU)",
    aliases=(),
    facts=(
        Fact("CPU", "1 Cortex-X3, 4 Cortex-A715, 4 Cortex-A510", "", f"{CORES}-leak-3369648"),
        Fact("CPU clock of the Cortex-X3", 2.91, "GHz", f"{CORES}-leak-3369648"),
        Fact("CPU clock of the Cortex-A715", 2.37, "GHz", f"{CORES}-leak-3369648"),
        Fact("CPU clock of the Cortex-A510", 1.7, "GHz", f"{CORES}-leak-3369648"),
    ),
)
