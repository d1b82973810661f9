"""A browser's web server against requests that no page would make; addresses, certificates, invitations."""

from __future__ import annotations

import http.client
import json
import re
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chromium import FAST, HERE, Aside, device, link
from test_agent import network

from xedge.agree import check_outputs
from xedge.benchmarks import vendor_browser
from xedge.device import at_hand, describe
from xedge.errors import DeviceError, UsageError
from xedge.measure import measure
from xedge.transports import browser
from xedge.transports.browser import Browser, Place, certificate, invitation, parse

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
