"""The Jetson artefact's folder: what it holds, its README, the flags of each version, and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from pathlib import Path

import pytest
from flavours import edited, quantised
from jetson_artefact import artefact

from xedge.errors import UnsupportedGraph, UsageError
from xedge.export import halved
from xedge.targets import tensorrt
from xedge.targets.tensorrt_engine import BOUND


def test_folder_says_what_it_holds_and_what_engines_are_bound_to(tmp_path: Path) -> None:
    folder = artefact(tmp_path / "a b")
    manifest = json.loads((folder / "manifest.json").read_text())
    hashes = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.suffix != ".json"}
    assert manifest["files"] == hashes
    assert set(hashes) == {"model.onnx", "build.sh", "README.md"}
    assert manifest["opset"] == 17
    assert manifest["inputs"] == {"x": [1, 16, 8, 8]}
    assert manifest["outputs"] == {"y": [1, 16, 8, 8]}
    assert manifest["engine"]["bound_to"] == list(BOUND)
    assert set(BOUND) == {"tensorrt", "compute_capability", "gpu", "board", "l4t"}
    assert os.access(folder / "build.sh", os.X_OK)


def test_folder_is_the_same_twice(tmp_path: Path) -> None:
    one, two = (artefact(tmp_path / name) for name in ("one", "two"))
    for path in one.iterdir():
        assert path.read_bytes() == (two / path.name).read_bytes()


def test_readme_has_a_line_for_each_version_with_the_exact_commands(tmp_path: Path) -> None:
    lines = (artefact(tmp_path / "a") / "README.md").read_text().splitlines()
    assert len(lines) == 4
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    for line, version in zip(lines[1:], manifest["tensorrt"], strict=True):
        assert f"TensorRT {version} " in line
        assert line.split("`")[1] == shlex.join(tensorrt.command(int(float(version))))


def test_flags_that_11_dropped_are_not_passed_to_it() -> None:
    # NVIDIA, "Migrating trtexec Usage from TensorRT 10.x to 11.x"; the last four are no-ops with a warning.
    gone = ["--fp16", "--bf16", "--int8", "--fp8", "--int4", "--best", "--stronglyTyped", "--useCudaGraph",
            "--useSpinWait", "--noDataTransfers", "--separateProfileRun"]  # fmt: skip
    assert not set(gone) & set(tensorrt.command(11))
    for version in (8, 10):
        assert {"--int8", "--fp16", "--separateProfileRun"} <= set(tensorrt.command(version))


@pytest.mark.parametrize("content", [None, b"no model"])
def test_what_is_no_onnx_is_one_line(tmp_path: Path, content: bytes | None) -> None:
    source = tmp_path / "m.onnx"
    if content is not None:
        source.write_bytes(content)
    with pytest.raises(UsageError, match="not an ONNX model"):
        tensorrt.compile_onnx(source, tmp_path, "net")


def test_weights_beyond_float16_are_refused(tmp_path: Path) -> None:
    large = edited(quantised("plain").proto, quantised("plain").proto.graph.initializer[0].name, lambda v: v * 1e6)
    with pytest.raises(UnsupportedGraph, match="exceeds float16"):
        halved(large)
