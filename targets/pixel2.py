"""Google Pixel 2, the LPIRC 2018 phone: fully integer .tflite, one big core, 30 ms an image."""

from __future__ import annotations

from dataclasses import replace

from xedge.target import Fact
from xedge.targets import tflite

BENCHMARK = "tensorflow/lite/tools/benchmark/README.md: `taskset f0` is the mask of the big cores on Pixel 2"

TARGET = replace(
    tflite.TARGET,
    name="pixel2",
    summary="Google Pixel 2, the LPIRC 2018 phone: fully integer .tflite, one big core, 30 ms an image",
    aliases=(),
    facts=(
        Fact("big cores", "4-7", "", BENCHMARK),
        Fact("affinity mask of the big cores", "f0", "", BENCHMARK),
        Fact("LPIRC 2018 budget", 30, "ms", "arXiv 1810.01732, LPIRC 2018 track 1"),
    ),
    sources=(*tflite.TARGET.sources, "arXiv 1810.01732, LPIRC 2018 track 1"),
)
