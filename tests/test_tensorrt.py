"""The Jetson artefact: its folder, its build script on a double of trtexec, what an engine is bound to, and whether
NVIDIA's own parser and builder take the graphs."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from flavours import edited, quantised
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from xedge import load
from xedge.cli import main
from xedge.errors import DeviceError, UnsupportedGraph, UsageError
from xedge.export import halved, write_flavour
from xedge.onnx_graph import export_float
from xedge.quantize import quantize
from xedge.ranges import calibrate
from xedge.run import digest_file
from xedge.targets import tensorrt, tensorrt_engine
from xedge.targets.tensorrt_engine import BOUND, Cuda, Facts, precision

# -- graphs ----------------------------------------------------------------------------------------------------------


def convolution(
    *,
    opset: int = 17,
    activation: int = TensorProto.INT8,
    zero: int = 0,
    weight: int = TensorProto.INT8,
    weight_zero: int = 0,
    bias: str = "float",
) -> onnx.ModelProto:
    """Q/DQ, one convolution of 16 channels, ReLU. The defaults are what TensorRT takes."""
    channels = 16
    draw = np.random.default_rng(0)
    high = {TensorProto.INT8: 127, TensorProto.UINT8: 255, TensorProto.INT4: 7, TensorProto.INT2: 1}[weight]
    w = draw.integers(0 if weight == TensorProto.UINT8 else -high, high + 1, (channels, channels, 3, 3))
    constants = [
        numpy_helper.from_array(np.float32(0.05), "s"),
        helper.make_tensor("z", activation, (), [zero]),
        helper.make_tensor("w_q", weight, w.shape, w.ravel().tolist()),
        numpy_helper.from_array(np.full(channels, 0.01, np.float32), "w_s"),
        helper.make_tensor("w_z", weight, (channels,), [weight_zero] * channels),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["x_q"], name="x_Q"),
        helper.make_node("DequantizeLinear", ["x_q", "s", "z"], ["x_d"], name="x_DQ"),
        helper.make_node("DequantizeLinear", ["w_q", "w_s", "w_z"], ["w"], name="w_DQ", axis=0),
    ]
    if bias == "int32":
        constants += [
            numpy_helper.from_array(np.arange(channels, dtype=np.int32), "b_q"),
            numpy_helper.from_array(np.full(channels, 0.0005, np.float32), "b_s"),
        ]
        nodes.append(helper.make_node("DequantizeLinear", ["b_q", "b_s"], ["b"], name="b_DQ", axis=0))
    else:
        constants.append(numpy_helper.from_array(np.zeros(channels, np.float32), "b"))
    nodes += [
        helper.make_node("Conv", ["x_d", "w", "b"], ["c"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["y"], name="relu"),
    ]
    return model_of(nodes, constants, (1, channels, 8, 8), opset)


def residual(quantise: str) -> onnx.ModelProto:
    """A block conv-relu-conv plus shortcut, then relu and a convolution. `quantise`: which inputs of the addition go
    through Q/DQ, ``none``, ``residual`` (the shortcut) or ``both``."""
    channels = 32
    draw = np.random.default_rng(0)
    constants: list[onnx.TensorProto] = []
    nodes: list[onnx.NodeProto] = []

    def rounded(name: str) -> str:
        constants.extend(
            [numpy_helper.from_array(np.float32(0.05), f"{name}_s"), numpy_helper.from_array(np.int8(0), f"{name}_z")]
        )
        for op, source, out in (("QuantizeLinear", name, f"{name}_q"), ("DequantizeLinear", f"{name}_q", f"{name}_d")):
            nodes.append(helper.make_node(op, [source, f"{name}_s", f"{name}_z"], [out], name=f"{name}_{op[0]}"))
        return f"{name}_d"

    def conv(source: str, out: str) -> str:
        w = draw.integers(-127, 128, (channels, channels, 3, 3)).astype(np.int8)
        for name, value in (("w_q", w), ("w_s", np.full(channels, 0.01, np.float32)), ("b", np.ones(channels))):
            kind = np.float32 if name == "b" else value.dtype
            constants.append(numpy_helper.from_array(value.astype(kind), f"{out}_{name}"))
        nodes.append(helper.make_node("DequantizeLinear", [f"{out}_w_q", f"{out}_w_s"], [f"{out}_w"], axis=0))
        inputs = [source, f"{out}_w", f"{out}_b"]
        nodes.append(helper.make_node("Conv", inputs, [out], name=f"{out}_conv", pads=[1, 1, 1, 1]))
        return out

    def relu(source: str, out: str) -> str:
        nodes.append(helper.make_node("Relu", [source], [out], name=f"{out}_relu"))
        return out

    trunk = relu(conv(rounded("x"), "a0"), "a")
    shortcut = rounded(trunk)
    branch = conv(rounded(relu(conv(shortcut, "b0"), "b")), "c")
    left = rounded(branch) if quantise == "both" else branch
    nodes.append(helper.make_node("Add", [left, trunk if quantise == "none" else shortcut], ["s"], name="add"))
    conv(rounded(relu("s", "r")), "y")
    return model_of(nodes, constants, (1, channels, 16, 16), 17)


def model_of(
    nodes: list[onnx.NodeProto], constants: list[onnx.TensorProto], shape: tuple[int, ...], opset: int
) -> onnx.ModelProto:
    ends = [[helper.make_tensor_value_info(n, TensorProto.FLOAT, shape)] for n in ("x", "y")]
    graph = helper.make_graph(nodes, "g", *ends, initializer=constants)
    ir = {17: 8, 21: 10}.get(opset, 13)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir)


def flavour(model: torch.nn.Module, shape: tuple[int, ...]) -> onnx.ModelProto:
    """A net with random weights, calibrated on noise, in the TensorRT flavour."""
    torch.manual_seed(0)
    draw = np.random.default_rng(0)
    images = [draw.standard_normal((1, *shape), dtype=np.float32) for _ in range(2)]
    proto = export_float(model.eval(), shape, 17)
    return write_flavour(proto, quantize(proto, calibrate(proto, lambda: images), mean_bits=8), "tensorrt")


# -- the folder ------------------------------------------------------------------------------------------------------


def artefact(folder: Path, model: onnx.ModelProto | None = None) -> Path:
    source = folder.with_suffix(".source.onnx")
    folder.mkdir()
    onnx.save(model or convolution(), source)
    assert tensorrt.compile_onnx(source, folder, "net") == folder / "model.onnx"
    assert (folder / "model.onnx").read_bytes() == source.read_bytes()
    return folder


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


def test_readme_has_three_lines_with_the_exact_commands(tmp_path: Path) -> None:
    lines = (artefact(tmp_path / "a") / "README.md").read_text().splitlines()
    assert len(lines) == 3
    for line, version in zip(lines[1:], (10, 11), strict=True):
        assert f"TensorRT {version} " in line
        assert line.split("`")[1] == shlex.join(tensorrt.command(version))


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


# -- build.sh on a double of trtexec ---------------------------------------------------------------------------------

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


def facts_of(engine: Path) -> Facts:
    return Facts(**{k: v for k, v in json.loads(engine.read_text()).items() if k in BOUND})


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


def half_net(folder: Path, name: str) -> Path:
    """A float net's artefact in float16; the net itself is folder/net.onnx."""
    assert tensorrt.TARGET.half is not None
    onnx.save(quantised("plain").proto, folder / "net.onnx")
    (folder / name).mkdir()
    return tensorrt.TARGET.half(folder / "net.onnx", folder / name, "net")


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


def test_weights_beyond_float16_are_refused(tmp_path: Path) -> None:
    large = edited(quantised("plain").proto, quantised("plain").proto.graph.initializer[0].name, lambda v: v * 1e6)
    with pytest.raises(UnsupportedGraph, match="exceeds float16"):
        halved(large)


# -- what an engine is bound to --------------------------------------------------------------------------------------

NANO = Facts("10.3.0", "8.7", "Orin", "NVIDIA Jetson Orin Nano Developer Kit", "36.4.3")
text = st.text(st.characters(codec="ascii", exclude_characters="\0"), min_size=1, max_size=8)


@given(facts=st.builds(Facts, text, text, text, text, text), field=st.sampled_from(BOUND), other=text)
def test_any_fact_that_differs_refuses_and_is_named(facts: Facts, field: str, other: str) -> None:
    record = {"format": 1, **asdict(facts)}
    assert tensorrt_engine.refusal(record, facts) is None
    there = replace(facts, **{field: other})
    reason = tensorrt_engine.refusal(record, there)
    if there == facts:
        assert reason is None
    else:
        assert reason is not None
        assert getattr(facts, field) in reason
        assert other in reason


@pytest.mark.parametrize("field", ["tensorrt", "compute_capability", "gpu"])
def test_engine_that_does_not_say_where_it_was_built_is_refused(field: str) -> None:
    assert tensorrt_engine.refusal({"format": 1, **asdict(replace(NANO, **{field: ""}))}, NANO)
    assert tensorrt_engine.refusal({"format": 1, **asdict(NANO), field: None}, NANO)
    assert tensorrt_engine.refusal(asdict(NANO), NANO)


def test_engine_of_a_board_is_refused_off_the_board() -> None:
    assert tensorrt_engine.refusal({"format": 1, **asdict(NANO)}, replace(NANO, board="", l4t=""))


def engine_beside(folder: Path) -> tuple[Path, Path]:
    plan = folder / "model.plan"
    plan.write_bytes(b"plan")
    record = {"format": 1, "onnx_sha256": digest_file(folder / "model.onnx"), "plan_sha256": digest_file(plan)}
    (folder / "engine.json").write_text(json.dumps({**record, **asdict(NANO)}))
    return plan, folder / "manifest.json"


def _drop(path: Path) -> None:
    path.unlink()


def _swap(path: Path) -> None:
    path.write_bytes(b"another")


def _other_graph(path: Path) -> None:
    path.write_text(json.dumps({"files": {"model.onnx": "0" * 64}}))


@pytest.mark.parametrize(
    ("name", "spoil", "reason"),
    [
        ("model.plan", _drop, "no such file"),
        ("model.plan", _swap, "not the file that engine.json describes"),
        ("engine.json", _drop, "no such file"),
        ("engine.json", _swap, "not JSON"),
        ("manifest.json", _other_graph, "another model.onnx"),
    ],
)
def test_engine_that_is_not_the_artefacts_is_refused(
    tmp_path: Path, name: str, spoil: Callable[[Path], None], reason: str
) -> None:
    folder = artefact(tmp_path / "a")
    plan, manifest = engine_beside(folder)
    tensorrt_engine.check_engine(plan, manifest, NANO)
    spoil(folder / name)
    with pytest.raises(UsageError, match=reason):
        tensorrt_engine.check_engine(plan, manifest, NANO)


# -- building and running, on doubles of TensorRT and of the CUDA driver ---------------------------------------------


class DriverDouble:
    """A test double of libcuda: an Orin whose device memory is the host's."""

    def __init__(self) -> None:
        self.memory: dict[int, ctypes.Array[ctypes.c_char]] = {}
        self.fails = ""

    def __getattr__(self, name: str) -> Callable[..., int]:
        known = ["cuInit", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent", "cuStreamSynchronize"]
        if name == self.fails:
            return lambda *_: 700
        if name in known:
            return lambda *_: 0
        raise AttributeError(name)

    def cuDeviceGet(self, device: Any, ordinal: Any) -> int:  # noqa: N802 - CUDA's name
        device._obj.value = ordinal.value
        return 0

    def cuDeviceGetName(self, buffer: Any, size: Any, _device: Any) -> int:  # noqa: N802
        assert ctypes.sizeof(buffer) == size.value
        buffer.value = b"Orin"
        return 0

    def cuDeviceGetAttribute(self, out: Any, attribute: Any, _device: Any) -> int:  # noqa: N802
        out._obj.value = {75: 8, 76: 7}[attribute.value]
        return 0

    def cuStreamCreate(self, out: Any, _flags: Any) -> int:  # noqa: N802
        out._obj.value = 77
        return 0

    def cuMemAlloc_v2(self, out: Any, size: Any) -> int:  # noqa: N802
        buffer = ctypes.create_string_buffer(size.value)
        out._obj.value = ctypes.addressof(buffer)
        self.memory[ctypes.addressof(buffer)] = buffer
        return 0

    def cuMemFree_v2(self, address: Any) -> int:  # noqa: N802
        del self.memory[address.value]
        return 0

    def cuMemcpyHtoD_v2(self, target: Any, source: Any, size: Any) -> int:  # noqa: N802
        assert size.value <= ctypes.sizeof(self.memory[target.value])
        ctypes.memmove(target.value, source, size.value)
        return 0

    def cuMemcpyDtoH_v2(self, target: Any, source: Any, size: Any) -> int:  # noqa: N802
        assert size.value <= ctypes.sizeof(self.memory[source.value])
        ctypes.memmove(target, source.value, size.value)
        return 0


class TensorRTDouble(ModuleType):
    """A test double of the tensorrt package whose engines double their input; it keeps what it was asked for."""

    SHAPE = (1, 16, 8, 8)

    def __init__(self, version: str) -> None:
        super().__init__("tensorrt")
        major = int(version.split(".")[0])
        self.__version__ = version
        self.flags: set[str] = set()
        self.network_flags = -1
        self.caches: list[bytes] = []

        class ILogger:
            INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

        self.ILogger = ILogger
        kinds = {8: ["EXPLICIT_BATCH"], 10: ["EXPLICIT_BATCH", "STRONGLY_TYPED"], 11: ["STRONGLY_TYPED"]}[major]
        self.NetworkDefinitionCreationFlag = SimpleNamespace(**{k: int(k == "STRONGLY_TYPED") for k in kinds})
        self.BuilderFlag = SimpleNamespace(**({} if major == 11 else {"INT8": "INT8", "FP16": "FP16"}))
        self.ProfilingVerbosity = SimpleNamespace(DETAILED="detailed")
        self.LayerInformationFormat = SimpleNamespace(JSON="json")
        self.TensorIOMode = SimpleNamespace(INPUT="in", OUTPUT="out")
        self.nptype = np.dtype
        self.refuses = False
        self.addresses: dict[str, int] = {}

    def Builder(self, _log: Any) -> Any:  # noqa: N802 - TensorRT's names
        def create_network(flags: int) -> str:
            self.network_flags = flags
            return "network"

        def config() -> Any:
            return SimpleNamespace(
                set_flag=self.flags.add,
                create_timing_cache=lambda data: data,
                # A cache of another device is refused.
                set_timing_cache=lambda cache, ignore_mismatch: self.caches.append(cache) or cache != b"elsewhere",
                get_timing_cache=lambda: SimpleNamespace(serialize=lambda: b"timed here"),
            )

        return SimpleNamespace(
            create_network=create_network,
            create_builder_config=config,
            build_serialized_network=lambda _n, _c: b"plan of the double",
        )

    def OnnxParser(self, _network: Any, log: Any) -> Any:  # noqa: N802
        log.log(1, "so said the parser")
        error = SimpleNamespace(node=lambda: 3, desc=lambda: "no such operator")
        return SimpleNamespace(parse=lambda _: not self.refuses, num_errors=1, get_error=lambda _: error)

    def Runtime(self, _log: Any) -> Any:  # noqa: N802
        return SimpleNamespace(deserialize_cuda_engine=lambda plan: self._engine() if b"plan" in plan else None)

    def _engine(self) -> Any:
        size = 4 * int(np.prod(self.SHAPE))

        def execute(stream: int) -> bool:
            assert stream == 77
            x = np.frombuffer(ctypes.string_at(self.addresses["x"], size), np.float32)
            ctypes.memmove(self.addresses["y"], (2 * x).tobytes(), size)
            return True

        context = SimpleNamespace(set_tensor_address=self.addresses.__setitem__, execute_async_v3=execute)
        return SimpleNamespace(
            create_execution_context=lambda: context,
            create_engine_inspector=lambda: SimpleNamespace(get_engine_information=lambda _: '{"Layers": []}'),
            num_io_tensors=2,
            get_tensor_name="yx".__getitem__,
            get_tensor_mode={"x": "in", "y": "out"}.__getitem__,
            get_tensor_shape=lambda _: self.SHAPE,
            get_tensor_dtype=lambda _: "float32",
        )


def images(count: int) -> NDArray[np.float32]:
    return np.random.default_rng(1).standard_normal((count, 16, 8, 8), dtype=np.float32)


@pytest.mark.parametrize(
    ("version", "strongly", "network", "flags"),
    [
        ("8.5.2.2", False, 0b01, {"INT8", "FP16"}),
        ("8.5.2.2", True, 0b01, {"INT8", "FP16"}),  # it knows no strong typing
        ("10.3.0", False, 0b00, {"INT8", "FP16"}),
        ("10.3.0", True, 0b10, set()),
        ("11.1.0", False, 0b10, set()),
    ],
)
def test_engine_is_built_with_the_versions_own_flags_and_runs(
    tmp_path: Path, version: str, strongly: bool, network: int, flags: set[str]
) -> None:
    folder = artefact(tmp_path / "a")
    trt, driver = TensorRTDouble(version), DriverDouble()
    cuda = Cuda(driver)
    built = tmp_path / "built"
    plan = tensorrt_engine.build_engine(folder / "model.onnx", built, strongly_typed=strongly, trt=trt, cuda=cuda)
    if network & 1:  # EXPLICIT_BATCH is flag 0
        assert trt.network_flags & 1
    assert trt.network_flags == network
    assert trt.flags == flags
    assert {p.name for p in built.iterdir()} == {"model.plan", "engine.json", "layers.json", "timing.cache"}
    run = tensorrt_engine.load_engine(plan, folder / "manifest.json", trt=trt, cuda=cuda)
    x = images(3)
    np.testing.assert_array_equal(run(x), 2 * x)
    assert run(x[:0]).shape == (0, 16, 8, 8)
    with pytest.raises(UsageError, match="shape"):
        run(x[:, :, :4])
    assert len(driver.memory) == 2
    del run
    assert not driver.memory


def test_engine_is_built_once_and_again_after_an_update(tmp_path: Path) -> None:
    folder = artefact(tmp_path / "net")
    before = sorted(p.name for p in folder.iterdir())
    old, new, cuda = TensorRTDouble("10.3.0"), TensorRTDouble("10.4.0"), Cuda(DriverDouble())
    for trt, builds in ((old, 1), (old, 1), (new, 1)):
        run = tensorrt_engine.build_or_load(folder / "model.onnx", trt=trt, cuda=cuda)
        np.testing.assert_array_equal(run(images(1)), 2 * images(1))
        assert len(trt.caches) == builds
    assert new.caches == [b"timed here"]
    assert sorted(p.name for p in folder.iterdir()) == before
    assert facts_of(tmp_path / "net.engine" / "engine.json").tensorrt == "10.4.0"


def test_timing_cache_of_another_device_is_left_aside(tmp_path: Path) -> None:
    folder = artefact(tmp_path / "net")
    (tmp_path / "built").mkdir()
    (tmp_path / "built" / "timing.cache").write_bytes(b"elsewhere")
    trt = TensorRTDouble("10.3.0")
    tensorrt_engine.build_engine(folder / "model.onnx", tmp_path / "built", trt=trt, cuda=Cuda(DriverDouble()))
    assert trt.caches == [b"elsewhere", b""]


def test_float_graph_is_built_without_int8(tmp_path: Path) -> None:
    nodes = [helper.make_node("Relu", ["x"], ["y"], name="relu")]
    folder = artefact(tmp_path / "a", model_of(nodes, [], TensorRTDouble.SHAPE, 17))
    trt = TensorRTDouble("10.3.0")
    tensorrt_engine.build_engine(folder / "model.onnx", tmp_path / "built", trt=trt, cuda=Cuda(DriverDouble()))
    assert trt.flags == {"FP16"}
    trt = TensorRTDouble("10.3.0")
    tensorrt_engine.build_engine(half_net(tmp_path, "h"), tmp_path / "built", trt=trt, cuda=Cuda(DriverDouble()))
    assert trt.flags == {"FP16"}


def test_refused_graph_names_its_node_and_other_versions_are_refused(tmp_path: Path) -> None:
    folder = artefact(tmp_path / "a")
    trt, cuda = TensorRTDouble("10.3.0"), Cuda(DriverDouble())
    trt.refuses = True
    with pytest.raises(UnsupportedGraph, match=r"node 3.*no such operator"):
        tensorrt_engine.build_engine(folder / "model.onnx", tmp_path / "built", trt=trt, cuda=cuda)
    trt.__version__ = "8.6.2"
    with pytest.raises(UsageError, match=r"8\.6\.2 is not one of"):
        tensorrt_engine.build_engine(folder / "model.onnx", tmp_path / "built", trt=trt, cuda=cuda)


def test_driver_errors_are_one_line() -> None:
    driver = DriverDouble()
    driver.fails = "cuCtxSetCurrent"
    with pytest.raises(DeviceError, match=r"cuCtxSetCurrent with error 700"):
        Cuda(driver)


def test_present_facts_come_from_the_board(tmp_path: Path) -> None:
    trt, cuda = TensorRTDouble("10.3.0.30"), Cuda(DriverDouble())
    assert tensorrt_engine.present_facts(trt, cuda, tmp_path) == Facts("10.3.0", "8.7", "Orin")
    (tmp_path / "proc/device-tree").mkdir(parents=True)
    (tmp_path / "etc").mkdir()
    (tmp_path / "proc/device-tree/model").write_bytes(b"NVIDIA Jetson Orin Nano Developer Kit\0")
    (tmp_path / "etc/nv_tegra_release").write_text(
        "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed Jan  8 01:49:37\n"
    )
    assert tensorrt_engine.present_facts(trt, cuda, tmp_path) == NANO


def test_artefact_runs_on_this_machine(tmp_path: Path) -> None:
    """The engine where TensorRT and a GPU are, ONNX Runtime elsewhere: a runner either way."""
    folder = artefact(tmp_path / "a")
    run = tensorrt.load(folder / "model.onnx", 1)
    assert run(images(2)).shape == (2, 16, 8, 8)


def test_engine_of_this_machine_is_the_graph(tmp_path: Path) -> None:
    reason = tensorrt_engine.missing()
    if reason is not None:
        pytest.skip(f"no engine can be built on this machine: {reason}")
    folder = artefact(tmp_path / "a")
    got = tensorrt.load(folder / "model.onnx", 1)(images(4))
    (folder / "manifest.json").unlink()  # then ONNX Runtime runs it
    want = tensorrt.load(folder / "model.onnx", 1)(images(4))
    np.testing.assert_allclose(got, want, atol=0.02 * float(np.abs(want).max()))


# -- NVIDIA's own parser and builder ---------------------------------------------------------------------------------

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="needs tensorrt-rtx: pip install xedge[tensorrt-lint]"
)


def saved(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    onnx.save(model, path)
    return path


def net(name: str) -> tuple[torch.nn.Module, tuple[int, ...]]:
    torch.manual_seed(0)
    if name == "efficientnet_lite0":
        lite = pytest.importorskip("efficientnet_lite_pytorch", reason="needs efficientnet-lite-pytorch")
        return lite.EfficientNet.from_name("efficientnet-lite0"), (3, 64, 64)
    channels, side = {"lenet5": (1, 28), "resnet20": (3, 32)}[name]
    return load.load_model(name, classes=10, channels=channels), (channels, side, side)


@needs_rtx
def test_tensorrt_takes_float16(tmp_path: Path) -> None:
    from xedge.targets.tensorrt_lint import lint

    assert lint(half_net(tmp_path, "a")) == []


@needs_rtx
@pytest.mark.parametrize("name", ["lenet5", "resnet20", "efficientnet_lite0"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_tensorrt_takes_what_xedge_writes_and_runs_it_in_int8(tmp_path: Path, name: str) -> None:
    from xedge.targets.tensorrt_lint import kernels, lint

    model = flavour(*net(name))
    path = saved(model, tmp_path)
    assert lint(path) == []
    built = kernels(path)
    # Every convolution and linear layer is a kernel whose activations come in as int8.
    weighted = {n.name for n in model.graph.node if n.op_type in ("Conv", "Gemm", "MatMul")}
    heavy = [k for k in built if k.kind in ("correlation", "gemm")]
    assert {k.reads for k in heavy} == {("Int8",)}
    assert weighted == {layer for k in heavy for layer in k.layers} & weighted
    assert len(heavy) == len(weighted)


REFUSED = {
    "activation zero-point": ({"zero": 3}, "QuantizeLinear", "x_Q", "zero point"),
    "uint8 activations": ({"activation": TensorProto.UINT8}, "QuantizeLinear", "x_Q", "uint8"),
    "uint8 with zero-point": ({"activation": TensorProto.UINT8, "zero": 128}, "QuantizeLinear", "x_Q", "zero point"),
    "weight zero-point": ({"weight_zero": 3}, "DequantizeLinear", "w_DQ", "zero point"),
    "uint8 weights": ({"weight": TensorProto.UINT8}, "DequantizeLinear", "w_DQ", "UINT8"),
    "int32 bias": ({"bias": "int32"}, "DequantizeLinear", "b_DQ", "Int32"),
    "int2 weights": ({"weight": TensorProto.INT2, "opset": 25}, "", "", "w_q"),
    "int4 weights of a convolution": ({"weight": TensorProto.INT4, "opset": 21}, "", "", "dtype"),
}


@needs_rtx
@pytest.mark.parametrize("name", REFUSED)
def test_tensorrt_refuses_what_it_cannot_run_and_the_node_is_named(tmp_path: Path, name: str) -> None:
    from xedge.targets.tensorrt_lint import lint

    options, operator, node, words = REFUSED[name]
    found = [f for f in lint(saved(convolution(**options), tmp_path)) if f.severity == "error"]
    assert found
    assert (found[0].operator, found[0].node) == (operator, node)
    assert words in found[0].message
    assert "\n" not in str(found[0])
    if not operator:  # int2 fails in the parser's constants, int4 in the builder
        assert found[0].stage == ("build" if "int4" in name else "parse")


@needs_rtx
def test_tensorrt_takes_the_graph_that_the_refused_ones_are_made_from(tmp_path: Path) -> None:
    from xedge.targets.tensorrt_lint import lint

    assert lint(saved(convolution(), tmp_path)) == []


@needs_rtx
def test_every_refused_node_is_named_not_the_first_alone(tmp_path: Path) -> None:
    from xedge.targets.tensorrt_lint import lint

    nodes = [
        helper.make_node("Det", ["x"], ["a"], name="first"),
        helper.make_node("Relu", ["x"], ["b"], name="fine"),
        helper.make_node("Det", ["b"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", (1, 3, 3)), ("y", (1,)))]
    model = helper.make_model(
        helper.make_graph(nodes, "g", ends[:1], ends[1:]), opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    )
    found = lint(saved(model, tmp_path))
    assert [(f.node, f.operator, f.message) for f in found] == [
        ("first", "Det", "not supported"),
        ("y", "Det", "not supported"),
    ]


@needs_rtx
def test_rounding_the_shortcut_alone_is_what_an_addition_wants(tmp_path: Path) -> None:
    """Same kernels in all three. Without Q/DQ on the shortcut it is written and read as float as well; with Q/DQ on
    the convolution's side too, nothing is saved and the sum is rounded once more."""
    from xedge.targets.tensorrt_lint import kernels

    def add_of(how: str) -> tuple[int, Any, int]:
        built = kernels(saved(residual(how), tmp_path))
        (add,) = [k for k in built if "add" in k.layers]
        return len(built), add, sum(k.writes.count("Float") for k in built)

    none, only, both = (add_of(how) for how in ("none", "residual", "both"))
    assert none[0] == only[0] == both[0]
    assert only[1].reads == both[1].reads == ("Int8", "Float")
    assert none[1].reads == ("Float", "Float")
    assert none[2] == only[2] + 1 == both[2] + 1
    assert both[1].name.count("Roun") == only[1].name.count("Roun") + 1


@needs_rtx
def test_command_prints_the_findings_and_exits_by_them(tmp_path: Path) -> None:
    path = saved(convolution(), tmp_path)
    good = CliRunner().invoke(main, ["lint", str(path)])
    assert (good.exit_code, good.output.strip()) == (0, f"{path}: TensorRT takes it")
    path = saved(convolution(zero=3), tmp_path)
    bad = CliRunner().invoke(main, ["lint", str(path), "--json"])
    assert bad.exit_code == UnsupportedGraph.exit_code
    assert json.loads(bad.stdout)[0]["node"] == "x_Q"
    assert len(bad.stderr.splitlines()) == 1


@pytest.mark.parametrize("content", [None, b"", b"no model"])
def test_command_refuses_what_is_no_onnx_in_one_line(tmp_path: Path, content: bytes | None) -> None:
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("needs tensorrt-rtx: pip install xedge[tensorrt-lint]")
    path = tmp_path / "m.onnx"
    if content is not None:
        path.write_bytes(content)
    done = CliRunner().invoke(main, ["lint", str(path)])
    assert done.exit_code == 2
    assert str(path) in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_lint_without_the_extra_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from xedge.targets import tensorrt_lint

    def absent(name: str) -> ModuleType:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(tensorrt_lint.importlib, "import_module", absent)
    with pytest.raises(UsageError, match=r"xedge\[tensorrt-lint\]"):
        tensorrt_lint.lint(saved(convolution(), tmp_path))
