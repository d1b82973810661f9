"""A target: what a runtime and its chip accept, and how a model gets there.

One file under `targets/` holds one `TARGET = Target(...)`. A board is
`dataclasses.replace(tensorrt.TARGET, name=..., align=...)`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Flavour = Literal["tensorrt", "litert", "onnxruntime", "float"]
"""Which dialect of ONNX the target is written from, Q/DQ but for the last:

- ``tensorrt``: int8 symmetric activations (zero-point 0), int8 weights per channel on axis 0, float bias, Q/DQ
  only where a convolution, linear or residual add reads.
- ``litert``: int8 asymmetric activations on every tensor, int8 weights per channel, int32 bias (scale s_in * s_w).
- ``onnxruntime``: uint8 asymmetric activations on every tensor, int8 weights per channel, int32 bias.
- ``float``: no Q/DQ, for chips whose runtime has no integer arithmetic.
"""

BitsPer = Literal["channel", "layer", "tensor"]
"""How finely bits may differ, from the finest on: each output channel has its own; all channels of a layer share one
width, each with its own scale; they share the scale as well."""

Runner = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""A compiled model on this host: a batch [N, C, H, W] of float32 in, the outputs [N, ...] of float32 out."""


@dataclass(frozen=True)
class Fact:
    """One number or name from a data sheet.

    Attributes:
        name: such as ``memory bandwidth``; unique within a target.
        value: as the source gives it.
        unit: ``GB/s``, ``GHz``; empty where there is none.
        source: the page or document it was read in.
    """

    name: str
    value: str | int | float
    unit: str
    source: str

    def __str__(self) -> str:
        return f"{self.value} {self.unit}".rstrip()


@dataclass(frozen=True)
class Artifact:
    """A file or folder that a device runs. Names and numbers only, so that it is JSON on disk."""

    path: str  # relative to the run folder
    kind: str  # "onnx", "tflite", "engine"
    target: str
    sha256: str  # of `path`, or of the model file inside it
    bytes: int  # of the model file
    inputs: dict[str, tuple[int, ...]]
    outputs: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Target:
    """Facts of a runtime on a chip, and the functions of it.

    Attributes:
        name: as given to ``--target``.
        summary: one line for ``xedge list targets``.
        flavour: the QDQ dialect it is compiled from.
        align: channel counts are kept at multiples of this, so that integer kernels stay eligible.
        weight_bits: widths a weight's container may have on this target.
        bits_per: what has a width of its own.
        activation_symmetric: activations use zero-point 0 only.
        opset: the ONNX opset written for it.
        suffix: of the artefact's model file, ``.onnx`` or ``.tflite``.
        compile: ``compile(onnx_path, folder, name) -> Path``: write the artefact from a QDQ or float ONNX file into
            `folder` (which exists) and return the model file. Raises UnsupportedGraph, naming the node.
        load: ``load(model_path, threads) -> Runner``: run the artefact on this host as exactly as it can be run.
        half: ``half(float_onnx_path, folder, name) -> Path``: as `compile`, for float16; None where the runtime has no
            float16 to gain from.
        aliases: other names for ``--target``.
        facts: of the chip and its software, each with its source.
        sources: where the rules above come from.
    """

    name: str
    summary: str
    flavour: Flavour
    align: int
    compile: Callable[[Path, Path, str], Path]
    load: Callable[[Path, int], Runner]
    opset: int = 17
    suffix: str = ".onnx"
    weight_bits: tuple[int, ...] = (8,)
    bits_per: BitsPer = "channel"
    activation_symmetric: bool = False
    half: Callable[[Path, Path, str], Path] | None = None
    aliases: tuple[str, ...] = ()
    facts: tuple[Fact, ...] = ()
    sources: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Everything but the functions."""
        names = ("name", "summary", "flavour", "align", "opset", "suffix", "weight_bits", "bits_per")
        facts = {n: getattr(self, n) for n in (*names, "activation_symmetric", "aliases", "sources")}
        return {**facts, "facts": [asdict(f) for f in self.facts]}
