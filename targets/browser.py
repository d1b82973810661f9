"""A browser: the same fully integer .tflite, run by LiteRT's XNNPACK in WebAssembly."""

from __future__ import annotations

from dataclasses import replace

from xedge.target import Fact
from xedge.targets import tflite

ISOLATION = "MDN, crossOriginIsolated: developer.mozilla.org/en-US/docs/Web/API/CrossOriginIsolated"

TARGET = replace(
    tflite.TARGET,
    name="browser",
    summary="browsers: fully integer .tflite for @litertjs/core (XNNPACK in WebAssembly)",
    aliases=(),
    facts=(
        Fact("threads need", "COOP same-origin and COEP require-corp or credentialless", "", ISOLATION),
        Fact("a fine clock needs", "COOP same-origin and COEP require-corp or credentialless", "", ISOLATION),
    ),
    sources=(*tflite.TARGET.sources, "npmjs.com/package/@litertjs/core"),
)
