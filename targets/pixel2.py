"""Google Pixel 2, the LPIRC 2018 phone: fully integer .tflite, one big core, 30 ms an image."""

from __future__ import annotations

from dataclasses import replace

from xedge.target import Fact
from xedge.targets import tflite

BENCHMARK = "tensorflow/lite/tools/benchmark/README.md: `taskset f0` is the mask of the big cores on Pixel 2"
REVIEW = "TechSpot, Google Pixel 2 XL review, system performance: techspot.com/review/1516-google-pixel-2-xl/page3.html"

TARGET = replace(
    tflite.TARGET,
    name="pixel2",
    summary="Google Pixel 2, the LPIRC 2018 phone: fully integer .tflite, one big core, 30 ms an image",
    aliases=(),
    facts=(
        Fact("CPU", "4 Kryo 280 at 2.45 GHz, 4 Kryo 280 at 1.9 GHz", "", REVIEW),
        Fact("memory bandwidth", 29.8, "GB/s", REVIEW),
        Fact("big cores", "4-7", "", BENCHMARK),
        Fact("affinity mask of the big cores", "f0", "", BENCHMARK),
        Fact("LPIRC 2018 budget", 30, "ms", "arXiv 1810.01732, LPIRC 2018 track 1"),
    ),
    sources=(*tflite.TARGET.sources, "arXiv 1810.01732, LPIRC 2018 track 1"),
)
