"""The protocol: what counts and what is run again, what the agent says; on injected times and real processes."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from injected_times import FAST, process, record, scripted, spoken
from onnx import TensorProto, helper, numpy_helper

from xedge.device import open_device
from xedge.errors import DeviceError, UnsupportedGraph, UsageError, XedgeError
from xedge.measure import (
    PRESETS,
    QUICK,
    STANDARD,
    compare,
    fault,
    faults,
    measure,
    pair_fault,
    pairs_verdict,
    preset,
    read_agent,
    runtime_for,
)
from xedge.measurement import append_measurement, read_measurements
from xedge.transports.base import Completed
from xedge.transports.supervised import sha256


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("a.onnx", "b.onnx"):
        (tmp_path / name).write_text(name)
    return tmp_path / "a.onnx", tmp_path / "b.onnx"


# ---------------------------------------------------------------------------------------------------- what counts


def test_a_sound_process_has_no_fault() -> None:
    assert fault(process(), FAST) is None


@pytest.mark.parametrize(
    ("spoiled", "verdict"),
    [
        ({"steady": False}, "not-steady"),
        ({"run_ns": (1_000_000,) * 19}, "incomplete"),
        ({"after": {"throttle_events": 1, "governors": ["performance"], "khz_limit": {"cpu0": 2000}}}, "throttled"),
        ({"after": {"governors": ["powersave"], "khz_limit": {"cpu0": 2000}}}, "throttled"),
        ({"after": {"governors": ["performance"], "khz_limit": {"cpu0": 1500}}}, "throttled"),
        (
            {"after": {"governors": ["performance"], "khz_limit": {"cpu0": 2000}, "cooling": {"zone": 3}}},
            "throttled",
        ),
    ],
)
def test_a_spoiled_process_is_named(spoiled: dict[str, Any], verdict: str) -> None:
    found = fault(process(**spoiled), FAST)
    assert found is not None
    assert found[0] == verdict


def test_the_seconds_count_too_unless_the_runs_are_at_their_limit() -> None:
    second = replace(FAST, seconds=1.0, max_runs=5000)
    assert fault(process(0.1, 5000), second) is None
    assert (fault(process(0.1, 4999), second) or ("", ""))[0] == "incomplete"
    assert fault(process(0.1, 2500, stride=4), second) is None


def test_a_chip_that_heats_up_is_seen_against_its_cool_probe() -> None:
    heating = [process(probe=1e5 * (1 + 0.03 * i)) for i in range(7)]
    assert list(faults(heating, FAST)) == [4, 5, 6]
    assert not faults([process(probe=1e5 * (1 + 0.015 * i)) for i in range(7)], FAST)


def test_a_pair_is_judged_by_its_own_probes_alone() -> None:
    assert pair_fault(process(probe=2e5), process(probe=2.1e5), FAST) is None
    assert pair_fault(process(probe=2e5), process(probe=2.3e5), FAST) is not None
    assert pair_fault(process(), process(probe_after=1.2e5), FAST) is not None
    assert (pair_fault(process(), process(steady=False), FAST) or ("", ""))[0] == "not-steady"


def test_a_minority_of_disturbed_pairs_is_named_but_does_not_spoil() -> None:
    noise = ("throttled", "x")
    assert pairs_verdict({}, 7) == ("ok", "")
    verdict, reason = pairs_verdict({0: noise, 1: noise, 2: noise}, 7)  # type: ignore[dict-item]
    assert verdict == "ok"
    assert reason.startswith("3 of 7 pairs")
    assert pairs_verdict(dict.fromkeys(range(4), noise), 7)[0] == "throttled"  # type: ignore[arg-type]
    assert pairs_verdict({0: ("incomplete", "x")}, 7)[0] == "incomplete"


def test_one_disturbed_process_is_run_again_and_kept_aside(pair: tuple[Path, Path]) -> None:
    device, transport = scripted(lambda name, n: process(2.0, probe=2e5) if n == 3 else process(1.0))
    slept: list[float] = []
    m = measure(device, pair[0], protocol=replace(FAST, cooldown_seconds=4.0), sleep=slept.append)
    assert (m.verdict, m.reason, len(transport.order), slept) == ("ok", "", 8, [4.0])
    assert [p.median_ms for p in m.processes] == [1.0] * 7
    assert [p.median_ms for p in m.replaced] == [2.0]
    assert (m.device, m.device_kind, m.runtime_version) == ("fake", "fake", "1.2.3")


def test_a_device_that_stays_hot_is_said_to_throttle(pair: tuple[Path, Path]) -> None:
    device, transport = scripted(lambda name, n: process(probe=1e5 if n < 2 else 1.5e5))
    m = measure(device, pair[0], protocol=FAST, sleep=lambda s: None)
    assert m.verdict == "throttled"
    assert m.reason.startswith("5 of 7 processes")
    assert len(transport.order) == 7 + 2 * 5


def test_a_model_that_never_settles_has_no_verdict_ok(pair: tuple[Path, Path]) -> None:
    device, _ = scripted(lambda name, n: process(steady=False))
    assert measure(device, pair[0], protocol=FAST).verdict == "not-steady"


def test_pairs_alternate_and_their_ratios_stand_drift(pair: tuple[Path, Path]) -> None:
    drift = itertools.count()
    cost = {"a.onnx": 2.0, "b.onnx": 1.0}
    device, transport = scripted(lambda name, n: process(cost[name] * (1 + 0.01 * next(drift))))
    c = compare(device, *pair, protocol=FAST)
    assert "".join(name[0] for name in transport.order) == "abbaabbaabbaab"
    assert c.verdict == "ok"
    assert c.ratio.lower < 2 < c.ratio.upper
    assert c.finding == "faster"
    assert c.p_value == pytest.approx(2 / 2**7)


def test_a_pair_is_run_again_whole(pair: tuple[Path, Path]) -> None:
    device, transport = scripted(lambda name, n: process(probe=2e5 if n == 5 else 1e5))
    c = compare(device, *pair, protocol=FAST)
    assert (len(transport.order), c.disturbed, c.verdict) == (16, (), "ok")
    assert (len(c.a.replaced), len(c.b.replaced)) == (1, 1)
    assert c.finding == "undecided"  # equal models
    assert transport.order[14:] == transport.order[4:6]


def test_a_comparison_too_disturbed_finds_nothing(pair: tuple[Path, Path]) -> None:
    device, _ = scripted(lambda name, n: process(3.0 if name == "a.onnx" else 1.0, probe_after=1.3e5))
    c = compare(device, *pair, protocol=FAST)
    assert (c.verdict, c.finding, len(c.disturbed)) == ("throttled", "undecided", 7)
    assert c.ratio.median == pytest.approx(3)  # seen, though not to be quoted


def test_few_pairs_find_nothing(pair: tuple[Path, Path]) -> None:
    device, _ = scripted(lambda name, n: process(3.0 if name == "a.onnx" else 1.0))
    assert compare(device, *pair, protocol=replace(FAST, processes=6)).finding == "undecided"


def test_slower_is_found_as_well(pair: tuple[Path, Path]) -> None:
    device, _ = scripted(lambda name, n: process(1.0 if name == "a.onnx" else 1.2))
    assert compare(device, *pair, protocol=FAST).finding == "slower"


# -------------------------------------------------------------------------------------------- the agent's output


def said(text: str, code: int = 0, stderr: str = "") -> Completed:
    return Completed(("python", "agent.py"), code, text, stderr)


GOOD = spoken(process(), "d" * 64)


def test_greetings_of_a_runtime_are_no_lines_of_the_agent() -> None:
    assert read_agent(said("INFO: delegate\n" + GOOD), "d" * 64, "x").run_ns == process().run_ns


@pytest.mark.parametrize("cut", [0.0, 0.3, 0.9, 0.999])
def test_an_output_that_was_cut_is_refused(cut: float) -> None:
    with pytest.raises(DeviceError):
        read_agent(said(GOOD[: int(len(GOOD) * cut)]), "d" * 64, "x")


@pytest.mark.parametrize("lost", range(6))
def test_an_output_with_a_line_lost_is_refused(lost: int) -> None:
    lines = GOOD.splitlines()
    with pytest.raises(DeviceError, match="no end"):
        read_agent(said("\n".join(lines[:lost] + lines[lost + 1 :])), "d" * 64, "x")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            '"ns": [3',
            '"ns": ["3',
        ),
        ('"ns": [1000000', '"ns": [-1'),
        ("1000000", "0"),
        ("1000000", "1.5"),
    ],
)
def test_times_that_are_no_times_are_refused(old: str, new: str) -> None:
    text = GOOD.replace("[3000000", '["3000000"', 1) if old.startswith('"ns": [3') else GOOD.replace(old, new)
    with pytest.raises(DeviceError, match="no times"):
        read_agent(said(text), "d" * 64, "x")


def test_other_bytes_than_were_sent_are_refused() -> None:
    with pytest.raises(DeviceError, match="other bytes"):
        read_agent(said(GOOD), "e" * 64, "x")


@pytest.mark.parametrize(("code", "error"), [(2, UsageError), (3, DeviceError), (4, UnsupportedGraph)])
def test_the_agents_errors_keep_their_kind(code: int, error: type[XedgeError]) -> None:
    with pytest.raises(error, match="x: it broke"):
        read_agent(said('{"kind": "error", "error": "it broke"}\n', code), "d" * 64, "x")


def test_a_crash_of_the_runtime_is_named() -> None:
    with pytest.raises(DeviceError, match="signal 11"):
        read_agent(said("", -11), "d" * 64, "x")
    with pytest.raises(DeviceError, match="No module named numpy"):
        read_agent(said("", 1, "Traceback\nModuleNotFoundError: No module named numpy\n"), "d" * 64, "x")


# ------------------------------------------------------------------------------------------------------- for real


def network(path: Path, width: int) -> Path:
    w = numpy_helper.from_array(np.random.default_rng(0).standard_normal((width, 3, 5, 5)).astype(np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"])],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 32, 32])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, width, 28, 28])],
        [w],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def test_a_network_of_eight_times_the_work_is_found_slower_on_this_host(tmp_path: Path) -> None:
    big, small = network(tmp_path / "big.onnx", 64), network(tmp_path / "small.onnx", 8)
    said: list[tuple[int, int, str]] = []
    with open_device("local") as device:
        c = compare(device, big, small, replace(FAST, seconds=0.03, retries=0), lambda *p: said.append(p))
    assert c.ratio.lower > 1.5
    assert c.p_value == pytest.approx(2 / 2**7)
    assert (c.a.sha256, c.b.sha256) == (sha256(big), sha256(small))
    assert {(p.before["model"], p.before["threads"]) for p in c.a.processes} == {("big.onnx", 1)}
    assert [p.before["seed"] for p in c.b.processes] == list(range(7))
    assert [done for done, _, _ in said] == list(range(7))
    path = tmp_path / "bench.jsonl"
    append_measurement(path, c)
    assert read_measurements(path) == [c]


def test_what_the_runtime_refuses_is_an_unsupported_graph(tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_bytes(b"garbage")
    with open_device("local") as device, pytest.raises(UnsupportedGraph, match=r"net\.onnx on local: .*refuses"):
        measure(device, tmp_path / "net.onnx", protocol=FAST)


def test_bad_requests() -> None:
    with open_device("local") as device, pytest.raises(UsageError, match="no such model file"):
        measure(device, Path("absent.onnx"), protocol=FAST)
    with pytest.raises(UsageError, match=r"\.onnx or \.tflite"):
        runtime_for(Path("net.pt"))
    with pytest.raises(UsageError, match="did you mean standard"):
        preset("standart")


def test_presets_can_decide() -> None:
    assert [preset(p.name) for p in PRESETS] == list(PRESETS)
    for protocol in PRESETS:
        assert record([1.0] * protocol.processes).interval.decisive
    assert (STANDARD.processes, STANDARD.min_runs, STANDARD.seconds) == (11, 100, 1.0)
    assert (QUICK.processes, QUICK.min_runs, QUICK.seconds) == (7, 30, 0.15)
