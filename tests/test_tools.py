"""benchmark_model and trtexec in place of the agent: what they print, whole and damaged, and doubles of both behind a
real transport. benchmark_model's lines are in the forms of its log, trtexec's of its --exportTimes."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from small_run import network
from test_adb import Phone, server

from xedge.device import Device, open_device, read_description
from xedge.errors import DeviceError, UnsupportedGraph
from xedge.measure import Protocol, compare, fault, measure
from xedge.measurement import from_json, gate, to_json, to_text
from xedge.tools import benchmark_model, read_benchmark_model, read_times, state
from xedge.transports import adb
from xedge.transports.base import Completed
from xedge.transports.local import open_local
from xedge.transports.supervised import sha256

__all__ = ["server"]
SHORT = Protocol("quick", "", 7, 30, 0.1, 0.05, 5.0, 0, 0.0)
NEW = """INFO: STARTING!
INFO: Log parameter values verbosely: [0]
INFO: Num threads: [1]
INFO: Graph: [/data/local/tmp/model.tflite]
INFO: Loaded model /data/local/tmp/model.tflite
INFO: Created TensorFlow Lite XNNPACK delegate for CPU.
VERBOSE: Replacing 539 out of 548 node(s) with delegate (TfLiteXNNPackDelegate) node, yielding 19 partitions.
INFO: The input model file size (MB): 3.57776
INFO: Initialized session in 12.75ms.
INFO: Running benchmark for at least 1 iterations and at least 0.3 seconds but terminate if exceeding 150 seconds.
INFO: count=22 first=14744 curr=13602 min=13496 max=14744 avg=13764.3 std=251
INFO: Running benchmark for at least 100 iterations and at least 1 seconds but terminate if exceeding 120 seconds.
INFO: count=100 first=13577 curr=13480 min=13371 max=15216 avg=13520.2 std=183 p5=13400 median=13488 p95=13800
INFO: Inference timings in us: Init: 12750, First inference: 14744, Warmup (avg): 13764.3, Inference (avg): 13520.2
INFO: Note: as the benchmark tool itself affects memory footprint, the following is only APPROXIMATE.
"""
OLDER = NEW.replace(" p5=13400 median=13488 p95=13800", "")
TIMES = [
    {
        "startEnqMs": 10.0 * n, "endEnqMs": 10.0 * n + 0.1, "startH2dMs": 10.0 * n, "endH2dMs": 10.0 * n + 0.2,
        "startComputeMs": 10.0 * n + 0.2, "endComputeMs": 10.0 * n + 2.2, "startD2hMs": 10.0 * n + 2.2,
        "endD2hMs": 10.0 * n + 2.3, "h2dMs": 0.2, "computeMs": 2.0, "d2hMs": 0.1, "latencyMs": 2.3 + n / 1000,
    }
    for n in range(40)
]  # fmt: skip


def said(text: str, code: int = 0) -> Completed:
    return Completed(("benchmark_model",), code, text, "")


# ---- what they print ----


def test_the_median_where_it_is_printed_and_else_the_mean() -> None:
    new, older = (read_benchmark_model(said(text), "m") for text in (NEW, OLDER))
    assert (new["statistic"], new["ns"]) == ("median", 13_488_000)
    assert (older["statistic"], older["ns"]) == ("mean", 13_520_200)
    assert new["count"] == 100  # not the warm-up's
    assert new["first_ns"] == 14_744_000
    assert new["delegated"] == [["TfLiteXNNPackDelegate", 539, 548, 19]]
    assert read_benchmark_model(Completed((), 0, "", NEW), "m") == new  # by version its log goes to stderr


@pytest.mark.parametrize("cut", range(5, len(NEW) - len(NEW.splitlines()[-1]) - 60, 61))
def test_cut_off_anywhere_it_is_no_measurement(cut: int) -> None:
    with pytest.raises(DeviceError, match=r"breaks off|no times|two averages"):
        read_benchmark_model(said(NEW[:cut]), "m")


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("median=13488", "median=0", "no times"),
        ("median=13488", "median=1.2.3", "no times"),
        ("min=13371", "min=99999", "no times"),
        ("Inference (avg): 13520.2", "Inference (avg): 99999", "two averages differ"),
        ("Replacing 539 out of 548", "Replacing 549 out of 548", "549 out of 548"),
    ],
)
def test_garbage_is_no_measurement(old: str, new: str, what: str) -> None:
    assert old in NEW
    with pytest.raises(DeviceError, match=what):
        read_benchmark_model(said(NEW.replace(old, new)), "m")
    with pytest.raises(DeviceError, match="breaks off"):
        read_benchmark_model(said("\x00\xff garbage"), "m")


def test_a_refused_model_and_a_killed_program() -> None:
    with pytest.raises(UnsupportedGraph, match=r"ERROR: Didn't find op for builtin opcode 'CONV_2D' version '9'"):
        read_benchmark_model(
            said("ERROR: Didn't find op for builtin opcode 'CONV_2D' version '9'\nBenchmark failed", 1), "m"
        )
    with pytest.raises(DeviceError, match="ended by signal 9"):
        read_benchmark_model(said(NEW, -9), "m")


def test_trtexecs_times_are_raw() -> None:
    text = json.dumps(TIMES)
    assert read_times(text, 200, "m") == tuple(round(1e6 * row["latencyMs"]) for row in TIMES)
    older = json.dumps([{**row, "endToEndMs": row["latencyMs"]} for row in TIMES])  # with the warm-up
    assert len(read_times(older, 200, "m")) == 20


@pytest.mark.parametrize("cut", [0, 1, 100, 5000, -1])
def test_trtexecs_times_cut_off(cut: int) -> None:
    with pytest.raises(DeviceError, match="not whole"):
        read_times(json.dumps(TIMES)[:cut], 200, "m")


@pytest.mark.parametrize(
    "text", ["[]", "{}", "[1]", '[{"latencyMs": -1}]', '[{"latencyMs": NaN}]', '[{"latencyMs": "2"}]']
)
def test_trtexecs_times_that_are_none(text: str) -> None:
    with pytest.raises(DeviceError, match=r"not whole|no times"):
        read_times(text, 200, "m")


def test_every_setting_is_explicit() -> None:
    argv = benchmark_model("/p/benchmark_model", "/p/m.tflite", 2, 1.0, 100, 0.3, 120.0, (4, 5, 6, 7))
    assert argv[:3] == ["taskset", "f0", "/p/benchmark_model"]
    flags = dict(word.removeprefix("--").split("=") for word in argv[3:])
    for name in ("num_threads", "num_runs", "min_secs", "max_secs", "warmup_runs", "warmup_min_secs", "use_xnnpack"):
        assert flags[name]
    assert {flags[n] for n in ("use_gpu", "use_nnapi", "enable_op_profiling")} == {"false"}


# ---- doubles behind a transport ----

GOOGLES = """#!/bin/sh
# A test double of benchmark_model: it keeps its arguments and prints a log of that program's form.
echo "$@" >> {folder}/arguments
[ -f "${{1#--graph=}}" ] || {{ echo "ERROR: no graph"; exit 1; }}
cat {folder}/log
"""
NVIDIAS = """#!/bin/sh
# A test double of trtexec: it says its version, builds a file, and writes times of that program's form.
echo "$@" >> {folder}/arguments
echo "&&&& RUNNING TensorRT.trtexec [TensorRT v100300] # trtexec $*"
for word in "$@"; do case $word in
    --saveEngine=*) echo engine > "${{word#*=}}" ;;
    --loadEngine=*) [ -f "${{word#*=}}" ] || exit 1 ;;
    --exportTimes=*) cp {folder}/log "${{word#*=}}" ;;
esac; done
"""


def double(folder: Path, name: str, text: str, log: str) -> Path:
    program = folder / name
    program.write_text(text.format(folder=folder))
    program.chmod(0o755)
    (folder / "log").write_text(log)
    return program


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.tflite"
    path.write_bytes(b"only its name matters to a double")
    return path


def local(tools: dict[str, str]) -> Device:
    return Device("board", "fake", None, open_local(), "local", ("false",), (), tools)


def test_benchmark_model_in_place_of_the_agent(tmp_path: Path, model: Path) -> None:
    program = double(tmp_path, "benchmark_model", GOOGLES, OLDER)
    with local({"benchmark_model": str(program)}) as device:  # whose Python is none
        record = measure(device, model, None, SHORT)
        pairs = compare(device, model, model, SHORT)
    assert (record.runtime, record.verdict, len(record.processes)) == ("benchmark_model", "ok", 7)
    assert record.interval.median == pytest.approx(13.5202)
    assert record.quantile(0.9) is None
    assert record.first_ms == pytest.approx(14.744)
    first = record.processes[0]
    assert first.run_ns == ()  # nothing is made up
    assert first.before["runtime_sha256"] == sha256(program)
    assert first.before["model_sha256"] == sha256(model)
    words = "not known: single runs, the steady state, the device's speed during the runs; means in place of medians"
    assert words in to_text(record)
    assert words in to_text(pairs)
    assert pairs.finding == "undecided"
    assert from_json(json.loads(json.dumps(to_json(record)))) == record
    calls = (tmp_path / "arguments").read_text().splitlines()
    assert len(calls) == 21  # fresh processes
    assert all("--num_runs=30" in call for call in calls)
    assert gate(replace(record, device_kind="real"), 20.0) == "pass"


def test_a_double_that_breaks_off(tmp_path: Path, model: Path) -> None:
    program = double(tmp_path, "benchmark_model", GOOGLES, NEW[:500])
    with local({"benchmark_model": str(program)}) as device, pytest.raises(DeviceError, match="breaks off"):
        measure(device, model, None, SHORT)
    absent = {"benchmark_model": str(tmp_path / "none")}
    with local(absent) as device, pytest.raises(DeviceError, match="no such program on the device"):
        measure(device, model, None, SHORT)


def test_trtexec_builds_once_and_is_timed_in_fresh_processes(tmp_path: Path) -> None:
    program = double(tmp_path, "trtexec", NVIDIAS, json.dumps(TIMES))
    with local({"trtexec": str(program)}) as device:
        record = measure(device, network(tmp_path / "net.onnx", 8), None, SHORT)
    assert (record.runtime, record.runtime_version, record.verdict) == ("trtexec", "10.3.0", "ok")
    assert len(record.processes[0].run_ns) == 40
    assert math.isnan(record.first_ms)
    assert "not known: the steady state" in to_text(record)
    calls = (tmp_path / "arguments").read_text().splitlines()
    assert calls[0] == "--help"
    (build,) = (c for c in calls if "--saveEngine" in c)
    assert "--fp16" in build
    assert "--int8" not in build  # a graph without Q/DQ would get ranges that trtexec makes up
    assert sum("--loadEngine" in c for c in calls) == 7
    assert all("--useCudaGraph" in c and "--fp16" not in c for c in calls if "--loadEngine" in c)


@pytest.mark.parametrize("banner", ["[TensorRT v70201]", "nothing"])
def test_a_trtexec_of_another_version(tmp_path: Path, banner: str) -> None:
    program = double(tmp_path, "trtexec", NVIDIAS.replace("[TensorRT v100300]", banner), "[]")
    with local({"trtexec": str(program)}) as device, pytest.raises(DeviceError, match=r"version|TensorRT 7\.2"):
        measure(device, network(tmp_path / "net.onnx", 8), None, SHORT)


def test_a_phone_without_python(server: None, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real adb, a phone whose Python is named nowhere, and its device file."""
    monkeypatch.setattr(adb, "BASE", str(tmp_path / "data"))
    (tmp_path / "data").mkdir()
    phone = Phone(tmp_path)
    try:
        program = double(tmp_path, "benchmark_model", GOOGLES, NEW)
        file = tmp_path / "phone.toml"
        file.write_text(f'address = "adb://{phone.serial}"\nbenchmark_model = "{program}"\nkind = "fake"\n')
        assert read_description(file).tools == {"benchmark_model": str(program)}
        with open_device(str(file)) as device:
            record = measure(device, model, None, replace(SHORT, processes=2))
        assert record.processes[0].summary["ns"] == 13_488_000
        assert record.device == "phone"
    finally:
        phone.end()


def test_state_has_the_agents_names() -> None:
    transport = open_local()
    try:
        found = state(transport)
    finally:
        transport.close()
    assert set(found) == {"governors", "khz", "khz_limit", "celsius", "cooling", "battery"}
    assert len(found["celsius"]) == len(
        [p for p in Path("/sys/class/thermal").glob("thermal_zone*/temp") if readable(p)]
    )


def readable(path: Path) -> bool:
    try:
        return bool(path.read_text().strip())
    except OSError:
        return False


def test_clocks_that_change_throttle_a_tool_too(tmp_path: Path, model: Path) -> None:
    program = double(tmp_path, "benchmark_model", GOOGLES, NEW)
    with local({"benchmark_model": str(program)}) as device:
        (process,) = measure(device, model, None, replace(SHORT, processes=1)).processes
    assert fault(process, SHORT) is None
    slower = replace(process, after={**process.after, "khz_limit": {"cpu0": 1}})
    assert fault(slower, SHORT) == ("throttled", "khz_limit changed during the runs")
    few = replace(process, summary={**process.summary, "count": 3})
    assert fault(few, SHORT) is not None
