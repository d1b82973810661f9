"""A browser as a device: the real page in a real Chromium; its web server against requests that no page would make."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import io
import json
import os
import re
import signal
import ssl
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from chromium import SLOW, Aside, chromium, link, needs, new_page, opened
from markupsafe import escape
from onnx import TensorProto, helper
from PIL import Image
from small_run import run_folder
from test_agent import convolution, network

from xedge import bench
from xedge.agree import check_outputs, outputs_on, signal_over_difference
from xedge.benchmarks import vendor_browser
from xedge.device import Device, at_hand, describe, look, open_device
from xedge.errors import DeviceError, UnsupportedGraph, UsageError
from xedge.load import load_target
from xedge.measure import Protocol, compare, measure
from xedge.measurement import (
    BENCH,
    Comparison,
    append_measurement,
    gate,
    read_measurements,
    to_text,
)
from xedge.progress import Talk
from xedge.report import Crop, read_json, write_html
from xedge.targets import tflite
from xedge.transports import browser
from xedge.transports.browser import Browser, Place, certificate, invitation, page_path, parse
from xedge.transports.browser_server import policy
from xedge.units import unit_artefact, units_of

FAST = Protocol("test", "", 1, 20, 0.0, 0.0, 5.0, 0, 0.0)
HERE = Place("127.0.0.1", 0, False, "wasm")
live = pytest.mark.skipif(needs() is not None, reason=needs() or "")


@pytest.fixture(scope="module")
def window() -> Iterator[Any]:
    with chromium() as one:
        yield one


@pytest.fixture
def onnx_file(tmp_path: Path) -> Path:
    return network(tmp_path / "net.onnx")


@pytest.fixture(scope="module")
def tflite_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tflite")
    return tflite.compile(convolution(folder / "conv.onnx"), folder, "conv")


def device(transport: Browser) -> Device:
    return Device("phone", "browser", None, transport, "browser", ())


# ------------------------------------------------------------------------------------------------- in a real browser


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


@pytest.mark.parametrize(("kind", "by"), [("range", 1e-3), ("steps", 2)])
def test_differences_are_counted_in_steps_of_integers_and_parts_of_a_range(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, by: float
) -> None:
    from xedge.benchmarks import agent

    model = convolution(tmp_path / "conv.onnx")
    if kind == "steps":
        (unit,), model = units_of(onnx.load(model)), tmp_path / "conv.tflite"
        model.write_bytes(unit_artefact(unit, 3, 4, load_target("android")))

    def moved(_: Device, path: Path, runtime: str, batch: np.ndarray) -> np.ndarray:
        right = agent.outputs(agent.load(str(path), runtime, 1), batch)
        right.flat[right.argmax()] -= right.dtype.type(by)
        return right

    with open_device("local") as here:
        monkeypatch.setattr("xedge.agree.outputs_on", moved)
        found = check_outputs(here, model)
    assert found is not None
    assert (found.inputs, found.unit) == (4, kind)
    assert found.snr_db is not None
    if kind == "steps":
        assert found.largest == by
        assert "at most 2 steps apart, for 4 inputs" in str(found)
    else:
        assert 1e-5 < found.largest < by
        assert " of their range apart, for 4 inputs" in str(found)


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


LONG = Protocol("long", "", 7, 20, 60.0, 0.0, 5.0, 0, 0.0)


@live
def test_a_page_that_is_closed_in_the_midst_is_a_device_that_is_lost(window: Any, onnx_file: Path) -> None:
    with opened(window) as here:
        aside = Aside(lambda: measure(device(here.transport), onnx_file, None, LONG))
        here.reaches("timing")
        start = time.monotonic()
        here.page.close()
        with pytest.raises(DeviceError, match="the page was closed, or the network broke; keep the page open") as lost:
            aside.outcome()
        assert time.monotonic() - start < 10
        assert lost.value.exit_code == 5


@live
def test_a_page_that_falls_silent_is_given_up(window: Any, onnx_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(window) as here:
        aside = Aside(lambda: measure(device(here.transport), onnx_file, None, LONG))
        here.reaches("timing")
        monkeypatch.setattr(browser, "LEASE", 5.0)
        here.page.evaluate("() => { window.fetch = () => new Promise(() => {}) }")
        with pytest.raises(DeviceError, match="no sign of life for 5 s; keep the page open"):
            aside.outcome()


@live
def test_a_repetition_that_takes_too_long_is_stopped_and_the_page_goes_on(window: Any, onnx_file: Path) -> None:
    with opened(window) as here:
        agent, model = here.transport.push(page_path()), here.transport.push(onnx_file)
        words = [agent, "--model", model, "--runtime", "onnxruntime", "--seconds"]
        with pytest.raises(DeviceError, match="not done after 3 s, stopped"):
            here.transport.run([*words, "60"], 3)
        assert here.transport.run([*words, "0"], 30).exit_code == 0


@live
def test_a_page_in_the_background_times_nothing(window: Any, onnx_file: Path) -> None:
    hide = "hidden => { Object.defineProperty(document, 'hidden', {value: hidden, configurable: true});"
    hide += " document.dispatchEvent(new Event('visibilitychange')) }"
    slow = replace(FAST, seconds=1.0)
    with opened(window) as here:
        aside = Aside(lambda: measure(device(here.transport), onnx_file, None, slow))
        here.reaches("timing")
        here.page.evaluate(hide, True)
        here.reaches("Bring this page to the front")
        here.page.wait_for_timeout(1500)
        assert aside.is_alive()
        here.page.evaluate(hide, False)
        process = aside.outcome().processes[0]
    assert process.after["batch"] >= 1


@live
def test_a_link_opens_once(window: Any) -> None:
    shown: list[str] = []
    first, second = new_page(window), new_page(window)
    transport = Browser(HERE, SLOW, lambda text: (shown.append(link(text)), first.goto(link(text))))
    try:
        second.goto(shown[0])
        second.wait_for_selector(".failed")
        assert "this link was used already" in second.inner_text("#detail")
        second.goto(shown[0][:-3] + "abc")
        second.reload()
        second.wait_for_selector(".failed")
        second.goto(f"{transport._server.origin}/")
        second.wait_for_selector(".failed")
        assert "This link is not whole" in second.inner_text("#state")
        assert "Connected" in first.inner_text("#state")
    finally:
        transport.close()
        first.wait_for_function("() => document.getElementById('state').textContent === 'Done'")
        first.context.close()
        second.context.close()


@contextlib.contextmanager
def command(run: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`xedge bench RUN --device browser://localhost` under way, and what it said up to the end of the QR code."""
    script = str(Path(sys.executable).with_name("xedge"))
    words = [script, "bench", str(run), "--device", "browser://localhost", "--protocol", "standard"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stderr is not None
            said = ""
            while not said.endswith("▀\n"):
                line = process.stderr.readline()
                assert line, said
                said += line
            yield process, said
        finally:
            process.kill()


@live
def test_the_command_writes_whole_lines_or_none_and_ends_with_5(window: Any, tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with command(run) as (process, said):
        page = new_page(window)
        page.goto(link(said))
        page.wait_for_function("() => document.getElementById('state').textContent.startsWith('Repetition 2')")
        page.context.close()
        _, rest = process.communicate(timeout=SLOW)
    assert process.returncode == 5
    assert rest.splitlines()[-1].startswith("xedge: browser at http://127.0.0.1:")
    assert "the page was closed" in rest.splitlines()[-1]
    token = link(said).partition("#")[2]
    assert token
    assert token not in rest
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@live
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_page_knows_when_xedge_has_ended(window: Any, tmp_path: Path, number: signal.Signals) -> None:
    with command(run_folder(tmp_path / "run")) as (process, said):
        page = new_page(window)
        page.goto(link(said))
        page.wait_for_function("() => document.getElementById('state').textContent.startsWith('Repetition')")
        process.send_signal(number)
        words = "Connection lost" if number == signal.SIGKILL else "Done"
        page.wait_for_function("words => document.getElementById('state').textContent === words", arg=words)
        assert process.wait(SLOW) != 0
        assert page.evaluate("over")
        page.context.close()


@live
@pytest.mark.parametrize(("width", "side", "rows"), [(1280, 240, 1), (390, None, 2)])
def test_a_reports_pictures_show_alike(window: Any, tmp_path: Path, width: int, side: int | None, rows: int) -> None:
    """Side by side, equally large and twice their own size where there is room; the page's own policy lets them."""
    run = run_folder(tmp_path / "run")
    (run / "crops").mkdir()
    names = ("bicubic", "original", "compressed", "truth")
    for shade, name in enumerate(names):
        Image.fromarray(np.full((120, 120, 3), 60 * shade, np.uint8)).save(run / f"crops/{name}.png")
    scores = dict.fromkeys(names[:3], 0.9)
    crop = Crop(
        "a-long-name-of-a-photograph.png", "host-cpu", 8, 16, 120, scores, scores, {n: f"{n}.png" for n in names}
    )
    write_html(replace(read_json(run / "report.json"), crops=(crop,)), run / "report.html")
    page = new_page(window)
    page.set_viewport_size({"width": width, "height": 900})
    page.goto((run / "report.html").as_uri())
    boxes = page.evaluate("[...document.images].map(i => [i.naturalWidth, i.width, i.height, i.y])")
    inside = page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.context.close()
    assert [box[0] for box in boxes] == [120] * 4, "not shown"
    assert len({tuple(box[1:3]) for box in boxes}) == 1
    assert boxes[0][1] == boxes[0][2] == (side or boxes[0][1])
    assert len({box[3] for box in boxes}) == rows
    assert inside


@live
def test_looking_at_a_browser_says_what_it_is(window: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    page = new_page(window)
    monkeypatch.setattr(browser, "_show", lambda text: page.goto(link(text)))
    seen = look("browser://localhost")
    page.context.close()
    assert (seen.kind, seen.error) == ("browser", None)
    assert "Chrome" in seen.facts["browser"]


# ---------------------------------------------------------------------------- the web server, without any browser


class Stranger:
    """An HTTP client that says what no page of ours would."""

    def __init__(self, transport_link: str) -> None:
        self.address, _, self.token = transport_link.removeprefix("http://").partition("/#")
        self.key = ""

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(self.address, timeout=10)
        try:
            words = {"Authorization": f"Bearer {self.key}", **{k.replace("_", "-"): v for k, v in headers.items()}}
            connection.request(method, path, body, words)
            answer = connection.getresponse()
            self.headers = dict(answer.getheaders())
            return answer.status, answer.read()
        finally:
            connection.close()

    def claim(self, token: str | None = None, facts: bytes = b"{}") -> tuple[int, bytes]:
        self.key = self.token if token is None else token
        status, body = self.ask("POST", "/claim", facts)
        if status == 200:
            self.key = json.loads(body)["key"]
        return status, body

    def listen(self) -> http.client.HTTPResponse:
        """The stream of tasks."""
        self.line = http.client.HTTPConnection(self.address, timeout=10)
        self.line.request("GET", "/tasks", headers={"Authorization": f"Bearer {self.key}"})
        return self.line.getresponse()


@pytest.fixture
def runtimes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The web server does not care whether the runtimes are there."""
    monkeypatch.setattr(vendor_browser, "whole", lambda folder: True)


@pytest.fixture
def claimed(runtimes: None) -> Iterator[tuple[Browser, Stranger, http.client.HTTPResponse]]:
    strangers: list[tuple[Stranger, http.client.HTTPResponse]] = []

    def come(text: str) -> None:
        stranger = Stranger(link(text))
        assert stranger.claim(facts=b'{"system": "a\\u001b[31mb", "cores": 4}')[0] == 200
        strangers.append((stranger, stranger.listen()))

    transport = Browser(HERE, 5, come)
    yield transport, *strangers[0]
    transport.close()
    strangers[0][1].close()
    strangers[0][0].line.close()


def test_a_wrong_token_and_a_used_one_are_refused(claimed: tuple[Browser, Stranger, Any]) -> None:
    transport, stranger, _ = claimed
    other = Stranger(transport.link)
    assert other.claim("wrong") == (403, b'{"error": "this link is not the one that xedge printed"}')
    assert other.claim("")[0] == 403
    status, body = other.claim()
    assert (status, b"used already" in body) == (409, True)
    for key in ("", "wrong", stranger.token):
        other.key = key
        for method, path in (("GET", "/tasks"), ("GET", "/lib/litert.js"), ("POST", "/alive"), ("POST", "/result/1")):
            assert other.ask(method, path)[0] == 403
    other.key = stranger.key
    assert other.ask("GET", "/tasks")[0] == 409
    assert transport.facts() == {"system": "a [31mb", "cores": "4"}


def test_an_expired_token_is_refused(runtimes: None) -> None:
    late: list[tuple[int, bytes]] = []

    def come(text: str) -> None:
        time.sleep(0.3)
        late.append(Stranger(link(text)).claim())

    with pytest.raises(DeviceError, match=r"browser at http://127.0.0.1:\d+: nobody opened the link within 0.1 s"):
        Browser(HERE, 0.1, come)
    assert late[0] == (410, b'{"error": "this link has expired; run xedge bench again for a new one"}')


def test_a_browser_that_opens_the_link_and_goes(runtimes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(browser, "LEASE", 0.5)
    with pytest.raises(DeviceError, match="opened the link and went away"):
        Browser(HERE, 5, lambda text: Stranger(link(text)).claim())


@pytest.mark.parametrize(
    "path",
    [
        "/lib/", "/lib/../page.html", "/lib/..%2fagent.py", "/lib//etc/passwd", "/lib/NOTICE.txt", "/etc/passwd",
        "/file/../../etc/passwd", "/file/", "/page.html", "/..", "/lib/litert.js?x", "/claim", "/lib/LITERT.JS",
    ],
)  # fmt: skip
def test_only_what_is_listed_is_served(claimed: tuple[Browser, Stranger, Any], path: str) -> None:
    assert claimed[1].ask("GET", path) == (404, b'{"error": "there is no such file"}')


def test_requests_are_limited_and_of_this_origin(claimed: tuple[Browser, Stranger, Any], tmp_path: Path) -> None:
    _, stranger, _ = claimed
    assert stranger.ask("POST", "/alive", b"x" * 1025)[0] == 413
    assert stranger.ask("POST", "/alive", Content_Length="9" * 40)[0] == 413
    assert stranger.ask("POST", "/alive", Content_Length="-1")[0] == 411
    assert stranger.ask("POST", "/claim", Content_Length=str(1 << 17))[0] == 413
    assert stranger.ask("POST", "/result/None", b"{}")[0] == 404
    assert stranger.ask("POST", "/result/7", b"{}")[0] == 404
    assert stranger.ask("DELETE", "/")[0] == 501
    assert stranger.ask("GET", "/", Host="evil.example")[0] == 421
    assert stranger.ask("POST", "/alive", b"", Origin="https://evil.example")[0] == 403
    assert stranger.ask("POST", "/alive", b"")[0] == 200
    assert stranger.ask("GET", "/")[0] == 200
    assert stranger.headers["Cross-Origin-Opener-Policy"] == "same-origin"
    assert stranger.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
    assert "default-src 'none'" in stranger.headers["Content-Security-Policy"]


def task(stream: http.client.HTTPResponse) -> dict[str, Any]:
    while not (line := stream.readline().strip()):
        pass
    found: dict[str, Any] = json.loads(line)["task"]
    return found


@pytest.mark.parametrize(
    "said", [b"garbage", b"{}", b'{"exit": "0", "stdout": ""}', b'{"exit": 0, "stdout": "{x"}', b""]
)
def test_garbage_for_an_answer_is_a_device_error(
    claimed: tuple[Browser, Stranger, Any], tmp_path: Path, said: bytes
) -> None:
    transport, stranger, stream = claimed
    model = network(tmp_path / "net.onnx")
    aside = Aside(lambda: measure(device(transport), model, None, FAST))
    wish = task(stream)
    assert (wish["name"], wish["runtime"], wish["min_runs"], wish["threads"]) == ("net.onnx", "onnxruntime", 20, 1)
    assert stranger.ask("GET", f"/file/{wish['model']}") == (200, model.read_bytes())
    assert stranger.ask("POST", f"/result/{wish['id']}", said)[0] == 200
    with pytest.raises(DeviceError, match=r"the agent's output (is garbled|has no end)"):
        aside.outcome()


def test_a_result_that_is_cut_off_is_no_result(claimed: tuple[Browser, Stranger, Any], tmp_path: Path) -> None:
    transport, stranger, stream = claimed
    aside = Aside(lambda: measure(device(transport), network(tmp_path / "net.onnx"), None, FAST))
    wish = task(stream)
    connection = http.client.HTTPConnection(stranger.address, timeout=10)
    connection.putrequest("POST", f"/result/{wish['id']}")
    connection.putheader("Authorization", f"Bearer {stranger.key}")
    connection.putheader("Content-Length", "1000")
    connection.endheaders(b'{"exit": 0')
    connection.close()
    assert not transport._desk.results
    stream.close()
    with pytest.raises(DeviceError, match="the page was closed, or the network broke"):
        aside.outcome()


def test_outputs_that_are_no_array_are_refused(claimed: tuple[Browser, Stranger, Any], tmp_path: Path) -> None:
    transport, stranger, stream = claimed
    aside = Aside(lambda: check_outputs(device(transport), network(tmp_path / "net.onnx")))
    number = task(stream)["id"]
    assert stranger.ask("POST", f"/output/{number}", b"\x93NUMPY garbage")[0] == 200
    end = json.dumps({"exit": 0, "stdout": '{"kind": "end", "lines": 0}\n'}).encode()
    assert stranger.ask("POST", f"/result/{number}", end)[0] == 200
    with pytest.raises(DeviceError, match="its outputs are garbled"):
        aside.outcome()


def test_what_was_made_is_pulled_whole_or_not_at_all(claimed: tuple[Browser, Stranger, Any], tmp_path: Path) -> None:
    transport, _, _ = claimed
    with pytest.raises(DeviceError, match=r"cannot fetch x/out\.npy: it was not made"):
        transport.pull("x/out.npy", tmp_path / "out.npy")
    transport._outputs["x/out.npy"] = b"1" * 1000
    with pytest.raises(UsageError, match="cannot write"):
        transport.pull("x/out.npy", tmp_path / "no" / "out.npy")
    transport.pull("x/out.npy", tmp_path / "out.npy")
    assert [(p.name, p.stat().st_size) for p in tmp_path.iterdir()] == [("out.npy", 1000)]


def test_a_browser_is_not_pinned_and_has_two_runtimes(claimed: tuple[Browser, Stranger, Any], tmp_path: Path) -> None:
    model = network(tmp_path / "net.onnx")
    with pytest.raises(UsageError, match="cannot be pinned to cores"):
        measure(device(claimed[0]), model, None, FAST, cpus=(0,))
    with pytest.raises(UsageError, match="no tflite-runtime in a browser"):
        measure(device(claimed[0]), model, "tflite-runtime", FAST)


def test_a_port_that_is_taken(claimed: tuple[Browser, Stranger, Any]) -> None:
    port = claimed[0]._server.server_port
    with pytest.raises(UsageError, match=rf"127.0.0.1:{port}: cannot serve there: Address already in use"):
        Browser(Place("127.0.0.1", port, False, "wasm"), 1, lambda text: None)


def test_without_the_runtimes_the_error_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vendor_browser, "whole", lambda folder: False)
    with pytest.raises(DeviceError, match=r"are not there.*-m xedge\.benchmarks\.vendor_browser"):
        Browser(HERE, 1)


# ------------------------------------------------------------------------------------------- addresses, certificates


def test_addresses() -> None:
    assert parse("browser://localhost:8000") == Place("127.0.0.1", 8000, False, "wasm")
    assert parse("browser+webgpu://127.0.0.1") == Place("127.0.0.1", 0, False, "webgpu")
    assert parse("browser://192.0.2.7:443") == Place("192.0.2.7", 443, True, "wasm")
    assert describe("browser").kind == describe("browser+webgpu://10.0.0.1").kind == "browser"


@pytest.mark.parametrize(
    ("address", "line"),
    [
        ("browser://0.0.0.0", "names every interface; name one address"),
        ("browser://me@host", "is no browser address"),
        ("browser://host/path", "is no browser address"),
        ("browser://host:port", "is no browser address"),
        ("browser://no-such-host.invalid", "unknown host"),
    ],
)
def test_addresses_that_are_none(address: str, line: str) -> None:
    with pytest.raises(UsageError, match=line) as caught:
        parse(address)
    assert address in str(caught.value)


def test_an_address_of_another_machine_is_not_served_on(runtimes: None) -> None:
    with pytest.raises(UsageError, match=r"192.0.2.7:0: cannot serve there"):
        Browser(Place("192.0.2.7", 0, False, "wasm"), 1)


def test_device_files_of_browsers(tmp_path: Path) -> None:
    file = tmp_path / "pixel.toml"
    file.write_text('address = "browser://localhost"\n')
    assert (describe(str(file)).name, describe(str(file)).kind) == ("pixel", "browser")
    file.write_text('address = "browser://localhost"\nkind = "real"\n')
    with pytest.raises(UsageError, match="a browser's times are its own"):
        describe(str(file))


def test_devices_at_hand_wait_for_no_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("xedge.transports.adb.attached", lambda: ["0123", "4567"])
    (tmp_path / "devices").mkdir()
    for name, address in {"phone": "browser", "tablet": "browser+webgpu://10.0.0.9", "pixel": "adb://0123"}.items():
        (tmp_path / "devices" / f"{name}.toml").write_text(f'address = "{address}"\n')
    assert at_hand() == ["local", "devices/pixel.toml", "adb://4567"]


def test_a_certificate_is_for_its_address_alone_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x509 = pytest.importorskip("cryptography.x509", reason="needs cryptography: pip install 'xedge[browser]'")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    context, fingerprint = certificate("192.0.2.9")
    again = certificate("192.0.2.9")[1]
    assert not list(tmp_path.iterdir())
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    assert re.fullmatch(r"([0-9A-F]{2}:){31}[0-9A-F]{2}", fingerprint)
    assert fingerprint != again
    assert x509


def test_the_invitation_holds_the_link_and_its_qr_code() -> None:
    pytest.importorskip("qrcode", reason="needs qrcode: pip install 'xedge[browser]'")
    text = invitation("https://192.0.2.9:8443/#abc", "AA:BB")
    assert "https://192.0.2.9:8443/#abc" in text.splitlines()[2]
    assert text.count("█") > 100
    assert "AA:BB" in text


def test_the_page_is_one_file_and_its_policy_knows_its_scripts() -> None:
    page = page_path().read_text()
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)
    scripts = re.findall(r"<script>(.*?)</script>", page, flags=re.DOTALL)
    assert len(scripts) == 1
    said = policy(page.encode())
    assert f"'sha256-{base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()}'" in said
    assert "unsafe-eval'" in said.replace("wasm-unsafe-eval", "unsafe-eval")
    assert "'unsafe-eval'" not in said
    assert "http" not in said


def test_decibels() -> None:
    signal = np.array([1.0, -1.0, 1.0, -1.0])
    assert signal_over_difference(signal, signal * 1.1) == pytest.approx(20)
    assert signal_over_difference(signal, signal * np.nan) == -np.inf
    assert signal_over_difference(np.ones(3), np.zeros(3)) == -np.inf


# --------------------------------------------------------------------------------------------- what npm brings


def archive(files: dict[str, bytes]) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return made.getvalue()


def npm(folder: Path, data: bytes, code: int = 0) -> None:
    """A program called npm that packs `data`, whatever is asked."""
    (folder / "archive").write_bytes(data)
    script = folder / "npm"
    script.write_text(
        f"#!{sys.executable}\nimport shutil, sys\nat = sys.argv.index('--pack-destination') + 1\n"
        f"shutil.copy({str(folder / 'archive')!r}, sys.argv[at] + '/a.tgz')\n"
        f"print('npm error offline', file=sys.stderr)\nprint('a.tgz')\nsys.exit({code})\n"
    )
    script.chmod(0o755)


def test_vendoring_takes_the_pinned_archive_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = archive({"dist/a.js": b"wanted", "dist/b.js": b"not wanted", "../../evil": b"x"})
    digest = base64.b64encode(hashlib.sha512(data).digest()).decode()
    package = vendor_browser.Package("a", "1.0.0", "MIT", digest, {"dist/a.js": "ours.js"})
    monkeypatch.setattr(vendor_browser, "PACKAGES", (package,))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    place = tmp_path / "place"
    place.mkdir()
    npm(tmp_path, data)
    vendor_browser.vendor(place / "browser")
    assert {f.name for f in (place / "browser").iterdir()} == {"ours.js", "NOTICE.txt"}
    assert (place / "browser/ours.js").read_bytes() == b"wanted"
    assert vendor_browser.whole(place / "browser")
    npm(tmp_path, data + b"\0")
    with pytest.raises(DeviceError, match=r"a@1\.0\.0: npm brought another archive than the one pinned"):
        vendor_browser.vendor(place / "other")
    npm(tmp_path, data, code=1)
    with pytest.raises(DeviceError, match="npm failed: npm error offline"):
        vendor_browser.vendor(place / "other")
    monkeypatch.setenv("PATH", str(place))
    with pytest.raises(UsageError, match="npm is not installed"):
        vendor_browser.vendor(place / "other")
    assert [p.name for p in place.iterdir()] == ["browser"]


def test_every_pinned_file_is_one_the_page_asks_for_and_the_other_way_round() -> None:
    page = page_path().read_text()
    pinned = {name for package in vendor_browser.PACKAGES for name in package.files.values()}
    stems = set(re.findall(r'"(litert[\w.-]*\.js|ort\.[\w.]+\.mjs|ort-wasm-simd-threaded(?:\.\w+)?)"', page))
    stems |= {f"litert_wasm_{v}" for v in re.findall(r'"(\w*internal)"', page)}
    wanted = {s for s in stems if s.endswith(("js", "mjs"))}
    wanted |= {f"{s}.{'mjs' if s.startswith('ort') else 'js'}" for s in stems - wanted}
    wanted |= {f"{s}.wasm" for s in stems if not s.endswith(("js", "mjs"))}
    assert pinned == wanted
    assert all(len(base64.b64decode(package.integrity)) == 64 for package in vendor_browser.PACKAGES)
