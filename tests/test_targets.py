"""Targets: every file holds one complete target with sources, no two share a name, and ONNX artefacts run."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import get_args

import numpy as np
import onnx
import pytest
from flavours import images, quantised, run

from xedge import targets
from xedge.target import Flavour, Target
from xedge.targets import host_cpu, tensorrt


def found() -> dict[str, Target]:
    out = {}
    for info in pkgutil.iter_modules(targets.__path__):
        module = importlib.import_module(f"xedge.targets.{info.name}")
        if hasattr(module, "TARGET"):
            out[info.name] = module.TARGET
    return out


@pytest.mark.parametrize("file", found())
def test_every_target_is_complete(file: str) -> None:
    target = found()[file]
    assert target.name == file.replace("_", "-")
    assert target.summary
    assert "\n" not in target.summary
    assert target.flavour in get_args(Flavour)
    assert target.sources
    assert all(len(s) > 10 for s in target.sources)
    assert target.align >= 1
    assert target.opset >= 17
    assert target.suffix == (".tflite" if target.flavour == "litert" else ".onnx")
    assert (8 in target.weight_bits) is (target.flavour != "float")
    assert target.activation_symmetric is (target.flavour == "tensorrt")


def test_names_and_aliases_are_unambiguous() -> None:
    every = found()
    assert {"jetson_orin_nano", "android", "host_cpu", "tensorrt", "tflite"} <= set(every)
    names = [n for t in every.values() for n in (t.name, *t.aliases)]
    assert len(names) == len(set(names)), "an alias inherited by replace() would name two targets"


@pytest.mark.parametrize(
    ("target", "flavour", "exact"), [(tensorrt.TARGET, "tensorrt", True), (host_cpu.TARGET, "onnxruntime", False)]
)
def test_onnx_artefacts_run_a_batch_image_by_image(
    target: Target, flavour: Flavour, exact: bool, tmp_path: Path
) -> None:
    q = quantised("plain")
    onnx.save(q.flavour[flavour], tmp_path / "in.onnx")
    model = target.compile(tmp_path / "in.onnx", tmp_path, "net")
    x = images(5, 1)
    got = target.load(model, 1)(x)
    assert got.shape == (5, 10)
    assert got.dtype == np.float32
    assert np.array_equal(got, run(q.flavour[flavour], x, exact=exact).numpy())
