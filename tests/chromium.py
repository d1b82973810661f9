"""Headless Chromium, Debian's, driven by playwright; every request that its pages make is written down."""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
from test_agent import network

from xedge.benchmarks import vendor_browser
from xedge.device import Device
from xedge.measure import Protocol
from xedge.transports.browser import Browser, Place

T = TypeVar("T")
SLOW = 120.0
"""Seconds after which a wait has failed, also on a machine that does much else."""
PATH = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


def needs() -> str | None:
    """Why these tests cannot run here."""
    if PATH is None:
        return "needs chromium: apt-get install chromium"
    if not vendor_browser.whole():
        return "needs LiteRT.js and ONNX Runtime Web: python -m xedge.benchmarks.vendor_browser"
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return "needs playwright: pip install playwright"
    return None


GPU = [
    "--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan,WebGPU",
    "--use-angle=swiftshader", "--enable-unsafe-swiftshader",
]  # fmt: skip
"""WebGPU on a renderer in software."""


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """A browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as api:
        browser = api.chromium.launch(executable_path=PATH, args=FLAGS + GPU)
        yield browser
        browser.close()


def new_page(browser: Any, requests: list[tuple[str, str]] | None = None) -> Any:
    """A page in a context of its own, patient with slow machines; what it asks for goes into `requests`."""
    context = browser.new_context(ignore_https_errors=True)
    context.set_default_timeout(SLOW * 1e3)
    if requests is not None:
        context.on("request", lambda request: requests.append((request.method, request.url)))
    return context.new_page()


@dataclass(frozen=True)
class Opened:
    """A transport and the page behind it. `requests`: (method, address) of all that the page asked for."""

    transport: Browser
    page: Any
    requests: list[tuple[str, str]]

    def reaches(self, words: str) -> None:
        """Wait until the page says so."""
        self.page.wait_for_function("words => document.getElementById('main').innerText.includes(words)", arg=words)


@contextlib.contextmanager
def opened(
    browser: Any, secure: bool = False, before: Callable[[Any], None] = lambda page: None, accelerator: str = "wasm"
) -> Iterator[Opened]:
    """The transport on this host itself, by https where `secure`, with its page open; `before` sees the page first."""
    requests: list[tuple[str, str]] = []
    page = new_page(browser, requests)
    before(page)
    transport = Browser(Place("127.0.0.1", 0, secure, accelerator), SLOW, lambda text: page.goto(link(text)))
    try:
        yield Opened(transport, page, requests)
    finally:
        transport.close()
        page.context.close()


def link(invitation: str) -> str:
    """The address in what the terminal shows."""
    return next(word for word in invitation.split() if word.startswith("http"))


class Aside(threading.Thread):
    """`work` in a thread of its own, while this one plays with the page."""

    def __init__(self, work: Callable[[], T]) -> None:
        super().__init__(daemon=True)
        self._work, self._made, self._error = work, None, None
        self.start()

    def run(self) -> None:
        try:
            self._made = self._work()
        except BaseException as error:
            self._error = error

    def outcome(self, seconds: float = SLOW) -> Any:
        """What it returned, or raise what it raised."""
        self.join(seconds)
        assert not self.is_alive(), "still at it"
        if self._error is not None:
            raise self._error
        return self._made


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


def device(transport: Browser) -> Device:
    return Device("phone", "browser", None, transport, "browser", ())
