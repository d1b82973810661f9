"""The page in a real Chromium: closed, silent, hidden, opened twice, left by xedge; and the report's pictures."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chromium import FAST, HERE, SLOW, Aside, device, link, live, new_page, onnx_file, opened, window
from PIL import Image
from small_run import run_folder

from xedge.errors import DeviceError
from xedge.measure import Protocol, measure
from xedge.report import Crop, read_json, write_html
from xedge.transports import browser
from xedge.transports.browser import Browser, page_path

__all__ = ["onnx_file", "window"]
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
