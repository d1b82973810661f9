"""A browser as a device: outputs and times from the real page in a real Chromium."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from chromium import FAST, Aside, device, link, live, new_page, onnx_file, opened, window
from markupsafe import escape
from onnx import TensorProto, helper
from small_run import run_folder
from test_agent import convolution

from xedge import bench
from xedge.agree import check_outputs, outputs_on
from xedge.device import look
from xedge.errors import DeviceError, UnsupportedGraph, UsageError
from xedge.measure import compare, measure
from xedge.measurement import BENCH, Comparison, append_measurement, gate, read_measurements, to_text
from xedge.progress import Talk
from xedge.targets import tflite
from xedge.transports import browser
from xedge.transports.browser import page_path

__all__ = ["onnx_file", "window"]


@pytest.fixture(scope="module")
def tflite_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tflite")
    return tflite.compile(convolution(folder / "conv.onnx"), folder, "conv")


@live
def test_a_tflite_over_https_gives_native_outputs_and_times_and_asks_nobody_else(
    window: Any, tflite_file: Path
) -> None:
    with opened(window, secure=True) as here:
        phone = device(here.transport)
        assert "bit for bit" in str(check_outputs(phone, tflite_file))
        timed = measure(phone, tflite_file, None, replace(FAST, processes=3))
        here.page.wait_for_timeout(100)  # lets the events in
        blocked = here.page.evaluate("fetch('https://192.0.2.1/').then(() => 'sent', error => String(error))")
        assert here.page.url == f"{here.transport._server.origin}/", "the token stays in the address bar"
    first = timed.processes[0]
    assert len(timed.processes) == 3
    assert all(len(p.run_ns) >= 20 and p.warmup_ns[0] > 0 for p in timed.processes)
    assert first.before["cross_origin_isolated"] is True
    assert first.before["clock_step_ns"] <= 20_000
    assert (timed.device_kind, first.before["backend"]) == ("browser", "browser wasm")
    assert "on phone (browser), litert 2.5.3 (browser wasm)" in to_text(timed)
    assert {first.before["agent_sha256"]} == {hashlib.sha256(page_path().read_bytes()).hexdigest()}
    with pytest.raises(UsageError, match="is browser, and a latency gate takes a real device"):
        gate(timed, 1000)
    origin = here.transport._server.origin
    assert len(here.requests) > 6
    strangers = {u for _, u in here.requests if not u.startswith((f"{origin}/", f"blob:{origin}/", "data:"))}
    assert strangers <= {"https://192.0.2.1/"}  # our own trial, which the policy stopped
    assert "Failed to fetch" in blocked


@live
def test_an_onnx_file_on_one_thread_and_two(window: Any, onnx_file: Path) -> None:
    with opened(window) as here:
        phone = device(here.transport)
        assert re.search(r"bit for bit|agree .* to \d{2,3} dB", str(check_outputs(phone, onnx_file)))
        for threads in (1, 2):
            process = measure(phone, onnx_file, None, FAST, threads=threads).processes[0]
            assert process.before["threads"] == threads
            assert process.before["runtime_version"] == "1.30.0 (browser wasm)"
            assert process.before["inputs"] == [["x", [1, 8], "float32"]]
        assert here.transport.facts()["cross-origin isolated"] == "yes"


@live
def test_a_tflite_on_two_threads_in_interleaved_pairs(window: Any, tflite_file: Path) -> None:
    with opened(window) as here:
        compared = compare(device(here.transport), tflite_file, tflite_file, FAST, threads=2)
    assert len(compared.ratios) == 1
    assert compared.b.processes[0].before["threads"] == 2


@live
def test_runs_shorter_than_the_clock_can_tell_are_batched_and_lose_their_tail(window: Any, onnx_file: Path) -> None:
    with opened(window) as here:
        timed = measure(device(here.transport), onnx_file, None, FAST)
    for process in timed.processes:
        step, batch = process.before["clock_step_ns"], process.after["batch"]
        assert batch > 1
        assert batch * np.median(process.run_ns) > 25 * step
        assert process.stride == batch
    assert timed.quantile(0.9) is None


@live
def test_arrays_of_several_types_come_and_go(window: Any, tmp_path: Path) -> None:
    with opened(window) as here:
        for kind in (TensorProto.FLOAT, TensorProto.UINT8, TensorProto.INT64):
            model = tmp_path / f"same{kind}.onnx"
            ends = (helper.make_tensor_value_info(name, kind, [2, 3]) for name in "xy")
            graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "same", *([end] for end in ends))
            onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), model)
            values = np.arange(-6, 6).astype(helper.tensor_dtype_to_np_dtype(kind)).reshape(4, 3)
            assert np.array_equal(outputs_on(device(here.transport), model, "onnxruntime", values), values)
        with pytest.raises(UsageError, match=r"input x wants \[N \* 2,3\]"):
            outputs_on(device(here.transport), model, "onnxruntime", values[:3])


@live
def test_webgpu_computes_what_this_host_does(window: Any, tflite_file: Path, onnx_file: Path) -> None:
    with opened(window, accelerator="webgpu") as here:
        if here.transport.facts()["WebGPU"] == "no":
            pytest.skip("needs a Chromium with SwiftShader's WebGPU: apt-get install chromium")
        phone = device(here.transport)
        for model in (tflite_file, onnx_file):
            assert re.search(r"bit for bit|agree .* to (\d{3}|[6-9]\d) dB", str(check_outputs(phone, model)))
        process = measure(phone, tflite_file, None, FAST).processes[0]
    assert process.before["backend"] == "browser webgpu"
    assert process.before["invoke"] == "upload, run, read back"
    assert process.before["adapter"]["vendor"]


@live
def test_how_far_its_outputs_are_is_kept_and_reported(window: Any, tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    with opened(window) as here:
        model, other = run / "targets/host-cpu/model.onnx", run / "original.onnx"
        record = bench._timed(device(here.transport), model, other, FAST, 1, Talk(quiet=True))
    append_measurement(run / BENCH, record)
    (kept,) = read_measurements(run / BENCH)
    assert isinstance(kept, Comparison)
    assert kept == record
    for side in (kept.a, kept.b):
        assert side.agreement is not None
        assert (side.agreement.inputs, side.agreement.unit) == (4, "range")
        assert 0 <= side.agreement.largest < 1e-4
    row = bench.refresh(run).row("compressed", "host-cpu")
    assert row is not None
    assert row.latency is not None
    assert row.latency.agreement == kept.b.agreement
    assert str(escape(kept.b.agreement)) in (run / "report.html").read_text()


@live
def test_wrong_outputs_are_not_timed(window: Any, onnx_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from xedge.benchmarks import agent

    right = agent.outputs
    monkeypatch.setattr(agent, "outputs", lambda model, batch: -right(model, batch))
    with (
        opened(window) as here,
        pytest.raises(UnsupportedGraph, match=r"something else than this host: -\d dB"),
    ):
        check_outputs(device(here.transport), onnx_file)


@live
def test_a_file_that_is_no_model_is_refused_and_the_next_one_runs(
    window: Any, tmp_path: Path, tflite_file: Path
) -> None:
    for name in ("bad.onnx", "bad.tflite"):
        (tmp_path / name).write_bytes(b"no model at all" * 9)
    with opened(window) as here:
        for name in ("bad.onnx", "bad.tflite"):
            with pytest.raises(UnsupportedGraph, match=rf"{name} on phone: .* refuses {name}") as caught:
                measure(device(here.transport), tmp_path / name, None, FAST)
            assert "\n" not in str(caught.value)
        measure(device(here.transport), tflite_file, None, FAST)


@live
def test_a_model_that_arrives_damaged_is_not_timed(window: Any, onnx_file: Path) -> None:
    def damage(route: Any) -> None:
        answer = route.fetch()
        route.fulfill(response=answer, body=answer.body()[:-1] + b"!")

    with opened(window, before=lambda page: page.route("**/file/**/net.onnx", damage)) as here:
        aside = Aside(lambda: measure(device(here.transport), onnx_file, None, FAST))
        while aside.is_alive():
            here.page.wait_for_timeout(100)  # lets the route answer
        with pytest.raises(DeviceError, match=r"net\.onnx on phone: the model arrived with another checksum"):
            aside.outcome()


@live
def test_looking_at_a_browser_says_what_it_is(window: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    page = new_page(window)
    monkeypatch.setattr(browser, "_show", lambda text: page.goto(link(text)))
    seen = look("browser://localhost")
    page.context.close()
    assert (seen.kind, seen.error) == ("browser", None)
    assert "Chrome" in seen.facts["browser"]
