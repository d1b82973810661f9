"""The Jetson artefact's build.sh, run on a double of trtexec."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from jetson_artefact import artefact, facts_of, half_net, model_of
from onnx import helper

from xedge.errors import UsageError
from xedge.run import digest_file
from xedge.targets import tensorrt, tensorrt_engine
from xedge.targets.tensorrt_engine import precision

DOUBLE = """#!/bin/sh
# A test double of trtexec: it says which version it is, records its arguments and writes the file it was asked for.
echo "&&&& RUNNING TensorRT.trtexec {banner}# trtexec $*"
[ "$1" = --help ] && exit 0
printf '%s\\n' "$@" >"$RECORD"
echo "[11/22/2025-10:00:00] [I] === Device Information ==="
echo "[11/22/2025-10:00:00] [I] Selected Device: Orin"
echo "[11/22/2025-10:00:00] [I] Selected Device ID: 0"
echo "[11/22/2025-10:00:00] [I] Compute Capability: 8.7"
[ -z "$FAIL" ] || {{ echo "[E] Error[2]: no tactic"; exit 1; }}
echo plan >model.plan
echo "[11/22/2025-10:00:09] [I] GPU Compute Time: min = 1 ms, max = 2 ms"
"""


class Board:
    """A folder on PATH with a double of trtexec, of dpkg-query and of python3."""

    def __init__(self, folder: Path, banner: str = "", dpkg: str = "", python: str = "") -> None:
        self.bin, self.record = folder / "bin", folder / "arguments"
        self.bin.mkdir(parents=True)
        self.put("trtexec", DOUBLE.format(banner=banner))
        self.put("dpkg-query", f"#!/bin/sh\n[ -n '{dpkg}' ] || exit 1\nprintf '%s' '{dpkg}'\n")
        self.put("python3", f"#!/bin/sh\n[ -n '{python}' ] || exit 1\necho '{python}'\n")

    def put(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def run(self, folder: Path, fail: str = "") -> subprocess.CompletedProcess[str]:
        environment = {"PATH": f"{self.bin}:/usr/bin:/bin", "RECORD": str(self.record), "FAIL": fail}
        return subprocess.run(
            ["sh", str(folder / "build.sh")], env=environment, capture_output=True, text=True, check=False, timeout=30
        )

    @property
    def arguments(self) -> list[str] | None:
        return self.record.read_text().splitlines() if self.record.exists() else None


@pytest.mark.parametrize(
    ("banner", "major", "version"),
    [
        ("[TensorRT v8502] ", 8, "8.5.2"),
        ("[TensorRT v100300] ", 10, "10.3.0"),
        ("[TensorRT v101602] [b10] ", 10, "10.16.2"),
        ("[TensorRT v110100] [b26] ", 11, "11.1.0"),
    ],
)
def test_script_picks_the_flags_of_the_version(tmp_path: Path, banner: str, major: int, version: str) -> None:
    folder, board = artefact(tmp_path / "a b"), Board(tmp_path / "board", banner)
    done = board.run(folder)
    assert done.returncode == 0, done.stderr
    assert board.arguments == tensorrt.command(major)[1:]
    assert "GPU Compute Time: min = 1 ms" in done.stdout
    # engine.json is what the Python side reads, and it fits the board that wrote it.
    record = json.loads((folder / "engine.json").read_text())
    assert record["plan_sha256"] == digest_file(folder / "model.plan")
    assert record["tensorrt"] == version
    assert (record["gpu"], record["compute_capability"]) == ("Orin", "8.7")
    here = facts_of(folder / "engine.json")
    tensorrt_engine.check_engine(folder / "model.plan", folder / "manifest.json", here)
    with pytest.raises(UsageError, match="GPU Orin and here is Xavier"):
        tensorrt_engine.check_engine(folder / "model.plan", folder / "manifest.json", replace(here, gpu="Xavier"))


@pytest.mark.parametrize(
    ("dpkg", "python", "version"),
    [("10.3.0.30-1+cuda12.5", "", "10.3.0"), ("", "8.5.2.2", "8.5.2"), ("11.0.0.114-1+cuda13.2", "8.5.2", "11.0.0")],
)
def test_script_asks_dpkg_then_python_where_trtexec_is_silent(
    tmp_path: Path, dpkg: str, python: str, version: str
) -> None:
    folder, board = artefact(tmp_path / "a"), Board(tmp_path / "board", "", dpkg, python)
    assert board.run(folder).returncode == 0
    assert facts_of(folder / "engine.json").tensorrt == version
    assert board.arguments == tensorrt.command(int(version.split(".")[0]))[1:]


@pytest.mark.parametrize(
    "banner",
    ["[TensorRT v8201] ", "[TensorRT v8602] ", "[TensorRT v9300] ", "[TensorRT v120000] ", "", "[TensorRT x] "],
)
def test_script_refuses_versions_whose_flags_it_does_not_know(tmp_path: Path, banner: str) -> None:
    folder, board = artefact(tmp_path / "a"), Board(tmp_path / "board", banner)
    done = board.run(folder)
    assert done.returncode == 2
    assert board.arguments is None
    assert len(done.stderr.splitlines()) == 1
    assert "8.5, 10 and 11" in done.stderr


def test_script_refuses_a_model_that_changed_on_the_way(tmp_path: Path) -> None:
    folder, board = artefact(tmp_path / "a"), Board(tmp_path / "board", "[TensorRT v100300] ")
    (folder / "model.onnx").write_bytes((folder / "model.onnx").read_bytes()[:-1])
    done = board.run(folder)
    assert (done.returncode, board.arguments) == (2, None)
    assert "manifest.json" in done.stderr


def test_script_leaves_no_old_engine_when_the_build_fails(tmp_path: Path) -> None:
    folder, board = artefact(tmp_path / "a"), Board(tmp_path / "board", "[TensorRT v100300] ")
    assert board.run(folder).returncode == 0
    done = board.run(folder, fail="yes")
    assert done.returncode == 2
    assert "no tactic" in done.stderr
    assert not (folder / "model.plan").exists()
    assert not (folder / "engine.json").exists()


def test_script_says_how_to_get_trtexec(tmp_path: Path) -> None:
    if shutil.which("trtexec", path="/usr/bin:/bin:/usr/src/tensorrt/bin"):
        pytest.skip("this machine has a trtexec of its own")
    folder, board = artefact(tmp_path / "a"), Board(tmp_path / "board")
    (board.bin / "trtexec").unlink()
    done = board.run(folder)
    assert done.returncode == 2
    assert "apt-get install" in done.stderr


def test_float_graph_gets_no_int8_flag(tmp_path: Path) -> None:
    nodes = [helper.make_node("Relu", ["x"], ["y"], name="relu")]
    folder = artefact(tmp_path / "a", model_of(nodes, [], (1, 3, 4, 4), 17))
    board = Board(tmp_path / "board", "[TensorRT v100300] ")
    assert board.run(folder).returncode == 0
    assert "--int8" not in (board.arguments or [])
    assert "--fp16" in (board.arguments or [])
    assert "--int8" not in (folder / "README.md").read_text()


def test_float16_graph_is_asked_for_by_its_types_and_by_fp16(tmp_path: Path) -> None:
    """TensorRT 8.5 and 10 need the flag, 11 takes it from the graph. The graph's own results stay."""
    model = half_net(tmp_path, "a")
    assert precision(onnx.load(model)) == "float16"
    made = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    assert {p.name: p.read_bytes() for p in half_net(tmp_path, "b").parent.iterdir()} == made
    board = Board(tmp_path / "board", "[TensorRT v100300] ")
    assert board.run(tmp_path / "a").returncode == 0
    assert "--fp16" in (board.arguments or [])
    assert "--int8" not in (board.arguments or [])
    x = np.random.default_rng(0).standard_normal((4, 3, 32, 32)).astype(np.float32)
    want = tensorrt.TARGET.load(tmp_path / "net.onnx", 1)(x)
    np.testing.assert_allclose(tensorrt.TARGET.load(model, 1)(x), want, atol=2e-3 * np.abs(want).max())
