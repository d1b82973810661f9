"""The agent in real processes, with real runtimes, on tiny networks."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from xedge.benchmarks import agent
from xedge.measure import agent_path
from xedge.targets import tflite

SHORT = ["--seconds", "0.02", "--min-runs", "20", "--warmup-seconds", "0.01", "--warmup-cap", "5"]


def network(path: Path, kind: int = TensorProto.FLOAT, batch: int | str = 1) -> Path:
    """Two inner products around a ReLU, with a Cast in front where the input is of another type."""
    rng = np.random.default_rng(3)
    one = numpy_helper.from_array(rng.standard_normal((8, 16)).astype(np.float32), "w1")
    two = numpy_helper.from_array(rng.standard_normal((16, 4)).astype(np.float32), "w2")
    nodes = [
        helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["f", "w1"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("MatMul", ["b", "w2"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", kind, [batch, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 4])],
        [one, two],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def convolution(path: Path) -> Path:
    """Something that targets/tflite.py takes."""
    w = numpy_helper.from_array(np.random.default_rng(4).standard_normal((4, 3, 3, 3)).astype(np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["a"], kernel_shape=[3, 3]), helper.make_node("Relu", ["a"], ["y"])],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, 6, 6])],
        [w],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def run(*arguments: object) -> tuple[int, list[dict[str, Any]], str]:
    argv = [sys.executable, str(agent_path()), *map(str, arguments)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def onnx_file(folder: Path) -> Path:
    return network(folder / "net.onnx")


@pytest.fixture(scope="module")
def tflite_file(folder: Path) -> Path:
    return tflite.compile(convolution(folder / "conv.onnx"), folder, "conv")


def test_every_line_in_its_order_and_the_end_counts_them(onnx_file: Path) -> None:
    code, lines, _ = run("--model", onnx_file, "--runtime", "onnxruntime", *SHORT)
    assert code == 0
    order = [(line["kind"], line.get("when")) for line in lines]
    assert order == [
        ("facts", "before"),
        ("warmup", None),
        ("probe", "before"),
        ("runs", None),
        ("probe", "after"),
        ("facts", "after"),
        ("end", None),
    ]
    assert lines[-1]["lines"] == 6
    facts = lines[0]
    assert facts["model_sha256"] == hashlib.sha256(onnx_file.read_bytes()).hexdigest()
    assert facts["runtime_version"] == onnxruntime.__version__
    assert facts["inputs"] == [["x", [1, 8], "float32"]]
    assert facts["cores"] == os.cpu_count()
    assert 0 < facts["clock_step_ns"] < 1_000_000


def test_it_runs_for_both_the_time_and_the_count(onnx_file: Path) -> None:
    _, lines, _ = run("--model", onnx_file, "--runtime", "onnxruntime", *SHORT, "--seconds", "0.3")
    runs, stride = lines[3]["ns"], lines[3]["stride"]
    assert len(runs) >= 20
    assert 0.1 < stride * sum(runs) / 1e9 < 1
    _, lines, _ = run("--model", onnx_file, "--runtime", "onnxruntime", *SHORT, "--seconds", "0", "--min-runs", "777")
    assert len(lines[3]["ns"]) == 777
    _, lines, _ = run("--model", onnx_file, "--runtime", "onnxruntime", *SHORT, "--seconds", "0.3", "--max-runs", "50")
    assert len(lines[3]["ns"]) <= 50  # spread over the whole time
    assert lines[3]["stride"] > 1
    assert 0.1 < lines[3]["stride"] * sum(lines[3]["ns"]) / 1e9 < 1  # a wall clock may be set back between two readings


def test_litert_is_timed_too(tflite_file: Path) -> None:
    code, lines, stderr = run("--model", tflite_file, "--runtime", "litert", *SHORT)
    assert code == 0, stderr
    assert lines[1]["steady"] is True
    assert len(lines[3]["ns"]) >= 20
    assert lines[0]["inputs"][0][1] == [1, 8, 8, 3]


def test_outputs_are_those_of_the_runtime(onnx_file: Path, tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((5, 8)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    code, lines, _ = run(
        "--model", onnx_file, "--runtime", "onnxruntime", "--input", tmp_path / "x.npy", "--output", tmp_path / "y.npy"
    )
    assert code == 0
    assert [line["kind"] for line in lines] == ["facts", "outputs", "end"]
    session = onnxruntime.InferenceSession(onnx_file)
    expected = np.concatenate([session.run(None, {"x": row[None]})[0] for row in x])
    assert np.array_equal(np.load(tmp_path / "y.npy"), expected)


def test_litert_and_onnxruntime_give_the_same_outputs(tflite_file: Path, folder: Path, tmp_path: Path) -> None:
    x = np.random.default_rng(1).standard_normal((3, 3, 8, 8)).astype(np.float32)
    np.save(tmp_path / "x.npy", x.transpose(0, 2, 3, 1))
    np.save(tmp_path / "n.npy", x)
    run("--model", tflite_file, "--runtime", "litert", "--input", tmp_path / "x.npy", "--output", tmp_path / "t.npy")
    run(
        "--model",
        folder / "conv.onnx",
        "--runtime",
        "onnxruntime",
        "--input",
        tmp_path / "n.npy",
        "--output",
        tmp_path / "o.npy",
    )
    lite, ort = np.load(tmp_path / "t.npy"), np.load(tmp_path / "o.npy")
    if lite.shape != ort.shape:
        lite = lite.transpose(0, 3, 1, 2)
    assert np.abs(lite - ort).max() < 1e-5


def test_a_given_input_is_checked_and_timed(onnx_file: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones((4, 8), np.float32))
    code, lines, _ = run("--model", onnx_file, "--runtime", "onnxruntime", "--input", tmp_path / "x.npy", *SHORT)
    assert code == 0
    assert len(lines[3]["ns"]) >= 20
    np.save(tmp_path / "x.npy", np.ones((4, 9), np.float32))
    code, lines, _ = run("--model", onnx_file, "--runtime", "onnxruntime", "--input", tmp_path / "x.npy", *SHORT)
    assert code == 2
    assert "[N * 1, 8] float32" in lines[-1]["error"]


@pytest.mark.parametrize("kind", [TensorProto.INT8, TensorProto.UINT8, TensorProto.INT64, TensorProto.FLOAT16])
def test_inputs_of_other_types_and_symbolic_batches(kind: int, tmp_path: Path) -> None:
    code, lines, _ = run("--model", network(tmp_path / "net.onnx", kind, "batch"), "--runtime", "onnxruntime", *SHORT)
    assert code == 0
    assert lines[0]["inputs"][0][1] == [1, 8]


def test_pinning_is_in_the_facts(onnx_file: Path) -> None:
    core = min(os.sched_getaffinity(0))
    code, lines, _ = run("--model", onnx_file, "--runtime", "onnxruntime", "--cpus", core, *SHORT)
    assert code == 0
    assert lines[0]["affinity"] == [core]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--model", "no.onnx", "--runtime", "onnxruntime"], 2, "no model file"),
        (["--model", "{onnx}", "--runtime", "tensorflow"], 2, "invalid choice"),
        (["--model", "{onnx}", "--runtime", "onnxruntime", "--min-runs", "0"], 2, "start at 1"),
        (["--model", "{onnx}", "--runtime", "onnxruntime", "--output", "y.npy"], 2, "needs --input"),
        (["--model", "{onnx}", "--runtime", "onnxruntime", "--cpus", "99999"], 2, "cannot pin"),
        (["--model", "{onnx}", "--runtime", "onnxruntime", "--input", "no.npy"], 2, "cannot read"),
        (["--model", "{garbage}", "--runtime", "onnxruntime"], 4, "refuses garbage.onnx"),
        (["--model", "{garbage}", "--runtime", "litert"], 4, "refuses garbage.onnx"),
        (["--runtime", "litert"], 2, "--model"),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(
    arguments: list[str], code: int, words: str, onnx_file: Path, folder: Path
) -> None:
    garbage = folder / "garbage.onnx"
    garbage.write_bytes(b"not a model")
    got, lines, _ = run(*[a.format(onnx=onnx_file, garbage=garbage) for a in arguments])
    assert got == code
    assert lines[-1]["kind"] == "error"
    assert words in lines[-1]["error"]
    assert "\n" not in lines[-1]["error"]


def test_a_runtime_that_is_not_there(onnx_file: Path, tmp_path: Path) -> None:
    (tmp_path / "tflite_runtime.py").write_text("raise ImportError('no wheel for this board')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    argv = [sys.executable, str(agent_path()), "--model", str(onnx_file), "--runtime", "tflite-runtime"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, env=environment, check=False)
    assert done.returncode == 3
    assert "pip install tflite-runtime" in json.loads(done.stdout)["error"]


def test_a_killed_agent_leaves_no_end(onnx_file: Path) -> None:
    argv = [sys.executable, str(agent_path()), "--model", str(onnx_file), "--runtime", "onnxruntime", "--seconds", "60"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        first = json.loads(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read()
    assert first["kind"] == "facts"
    assert '"end"' not in rest


def test_quantised_kernels_are_asked_to_compute_right(onnx_file: Path) -> None:
    model = agent.OnnxRuntime(str(onnx_file), 1)
    options = model._session.get_session_options()
    if platform.machine() in ("x86_64", "AMD64"):
        assert options.get_session_config_entry("session.x64quantprecision") == "1"
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (1, 1)
    assert options.execution_mode == onnxruntime.ExecutionMode.ORT_SEQUENTIAL


@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [(np.int8, -128, 127), (np.uint8, 0, 255), (np.int32, 0, 1), (np.int64, 0, 1), (np.bool_, 0, 1)],
)
def test_integer_inputs_span_their_type(dtype: type, low: int, high: int) -> None:
    made = agent.made_input((1, 3, 64, 64), dtype, np.random.default_rng(0))
    assert made.dtype == dtype
    assert (made.min(), made.max()) == (low, high)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_float_inputs_are_standard_normal_and_seeded(dtype: type) -> None:
    one, two, other = (agent.made_input((1, 4096), dtype, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert one.dtype == dtype
    assert np.array_equal(one, two)
    assert not np.array_equal(one, other)
    assert abs(float(one.astype(np.float64).std()) - 1) < 0.05


def settles(times: list[int], cap: float = 30.0) -> int | None:
    steady = agent.Steady(cap)
    for i in range(1, len(times) + 1):
        if steady.reached(times[:i]):
            return i
    return None


def test_steady_waits_for_the_ramp_to_end() -> None:
    ramp = [int(50_000 * (1 + 3 * np.exp(-i / 40))) for i in range(600)]
    settled = settles(ramp)
    assert settled is not None
    assert ramp[settled - 1] < 1.05 * 50_000
    assert settles([100_000] * 200) == 79  # a full window, then 40 agreements


def test_steady_never_comes_while_times_keep_growing() -> None:
    assert settles([int(50_000 * 1.005**i) for i in range(800)]) is None


def test_steady_is_not_put_off_by_preemptions() -> None:
    rng = np.random.default_rng(0)
    times = (50_000 * (1 + 0.02 * rng.standard_normal(400))).astype(int)
    times[rng.random(400) < 0.1] *= 80
    settled = settles([int(t) for t in times])
    assert settled is not None
    assert settled < 200


def test_steady_fits_slow_models_into_the_cap() -> None:
    settled = settles([2_000_000_000] * 20)
    assert settled is not None
    assert settled * 2 <= 30


def test_warm_up_gives_up_at_its_cap_and_says_so() -> None:
    length = 0.0001

    def slower() -> None:
        nonlocal length
        length *= 1.05
        time.sleep(length)

    ns, steady = agent.warm_up(slower, 0.0, 0.4)
    assert not steady
    assert len(ns) > 5
    ns, steady = agent.warm_up(lambda: time.sleep(0.0005), 0.2, 10.0)
    assert steady
    assert sum(ns) >= 0.19e9


def test_it_runs_on_a_board_python_3_8_standard_library_and_numpy() -> None:
    tree = ast.parse(agent_path().read_text(), feature_version=(3, 8))
    names = {
        alias.name.partition(".")[0] if isinstance(node, ast.Import) else (node.module or "").partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    runtimes = {"onnxruntime", "ai_edge_litert", "tflite_runtime"}
    assert names - set(sys.stdlib_module_names) - runtimes == {"numpy"}
    top = {
        (node.names[0].name if isinstance(node, ast.Import) else node.module or "")
        for node in tree.body
        if isinstance(node, (ast.Import, ast.ImportFrom))
    }
    assert not top & runtimes


# ---- Jetson ----

SHOWN = """cpu0:  Online=1 Governor=schedutil MinFreq=729600 MaxFreq=1344000 CurrentFreq=729600 IdleStates: WFI=1 c7=1
cpu1:  Online=1 Governor=schedutil MinFreq=1344000 MaxFreq=1344000 CurrentFreq=1344000 IdleStates: WFI=0 c7=0
GPU MinFreq=306000000 MaxFreq=918000000 CurrentFreq=306000000
EMC MinFreq=204000000 MaxFreq=2133000000 CurrentFreq=2133000000 FreqOverride=0"""


def test_a_jetsons_clocks_and_power_mode() -> None:
    shown = " ".join(SHOWN.split())
    assert agent.locked_clocks(shown) == {"cpu0": False, "cpu1": True, "GPU": False, "EMC": False}
    old = shown.replace("Governor", "Gonvernor")  # as a TX1 prints it
    assert agent.locked_clocks(old) == agent.locked_clocks(shown)
    assert agent.locked_clocks(None) == agent.locked_clocks("Error: must be root") == {}
    assert agent.power_mode("NV Power Mode: MAXN 0") == "MAXN 0"
    assert agent.power_mode("NVPM VERB: Current mode: NV Power Mode: MODE_15W_6CORE 2") == "MODE_15W_6CORE 2"
    assert agent.power_mode("nvpmodel: command not found") is None


def test_a_jetsons_tools_are_asked(tmp_path: Path, onnx_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (("nvpmodel", "NV Power Mode: MAXN\n0"), ("jetson_clocks", SHOWN)):
        (tmp_path / name).write_text(f"#!/bin/sh\ncat <<E\n{text}\nE\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    code, lines, _ = run("--model", onnx_file, "--runtime", "onnxruntime", *SHORT)
    assert code == 0
    assert (lines[0]["nvpmodel"], lines[0]["jetson_clocks"]["GPU"]) == ("MAXN 0", False)
    assert lines[-2]["nvpmodel"] == "MAXN 0"
    assert len(lines[0]["runtime_sha256"]) == 64
