"""Google Pixel 2, the LPIRC 2018 phone: fully integer .tflite, one big core, 30 ms an image."""

from __future__ import annotations

from dataclasses import replace

from xedge.targets import tflite

TARGET = replace(
    tflite.TARGET,
    name="pixel2",
    summary="Google Pixel 2, the LPIRC 2018 phone: fully integer .tflite, one big core, 30 ms an image",
    aliases=(),
    sources=(*tflite.TARGET.sources, "arXiv 1810.01732, LPIRC 2018 track 1"),
)
