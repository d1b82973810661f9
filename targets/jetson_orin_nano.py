"""Jetson Orin Nano (Ampere, SM87): TensorRT 10 with JetPack 6, 11 with JetPack 7.2.2."""

from __future__ import annotations

from dataclasses import replace

from xedge.targets import tensorrt

TARGET = replace(
    tensorrt.TARGET,
    name="jetson-orin-nano",
    summary="Jetson Orin Nano (Ampere, SM87): TensorRT 10 with JetPack 6, 11 with JetPack 7.2.2",
    aliases=("jetson",),
    sources=(*tensorrt.TARGET.sources, "NVIDIA, Jetson Orin Nano Series Data Sheet"),
)
