"""A browser as a device: a page on this host's network that any phone opens, and that runs models as it is told.

    browser                     https on this host's address in its network, with a certificate made for the occasion
    browser://HOST:PORT         on one interface and port; plain http on localhost, for a browser here or adb reverse
    browser+webgpu://HOST:PORT  on the GPU, by WebGPU

The page (benchmarks/page.html) is the agent: it takes the agent's options and answers with the agent's lines.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.util
import io
import ipaddress
import secrets
import socket
import ssl
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256 as hash_of
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from xedge.errors import DeviceError, InternalError, UsageError
from xedge.transports.base import Completed
from xedge.transports.browser_server import Desk, Server
from xedge.transports.supervised import sha256

OPEN = 600.0
"""Seconds that the link is good for."""
LEASE = 20.0
"""Seconds of silence after which the browser is given up; it says that it lives every four."""

_OPTIONS = {
    "seconds": float, "min_runs": int, "max_seconds": float, "max_runs": int, "warmup_seconds": float,
    "warmup_cap": float, "seed": int, "threads": int, "runtime": str, "model": str, "input": str, "output": str,
}  # fmt: skip
_DEFAULTS: dict[str, Any] = {
    "seconds": 1.0, "min_runs": 100, "max_seconds": 120.0, "max_runs": 20_000, "warmup_seconds": 0.2,
    "warmup_cap": 30.0, "seed": 0, "threads": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where the page is served: an address of this host, a port (0 is any free one), whether by https.

    A browser gives threads, a fine clock and WebGPU to https, and to plain http on its own host alone.
    `accelerator`: what runs the models, ``wasm`` or ``webgpu``.
    """

    host: str
    port: int
    secure: bool
    accelerator: str


def parse(address: str) -> Place:
    """A ``browser`` address. UsageError where it is none, or names all interfaces or no interface of this host."""
    scheme, _, rest = address.partition("://")
    accelerator = "webgpu" if scheme == "browser+webgpu" else "wasm"
    where = f"--device {address}"
    if not rest:
        return Place(_own_address(where), 0, True, accelerator)
    try:
        parts = urlsplit(f"//{rest}")
        name, port = parts.hostname, parts.port or 0
    except ValueError:
        name, port = None, 0
    if not name or parts.netloc != rest or "@" in rest:
        raise UsageError("is no browser address", where=where, fix="write browser://HOST:PORT")
    try:
        host = str(socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise UsageError(f"unknown host: {error.strerror}", where=where) from error
    found = ipaddress.ip_address(host)
    if found.is_unspecified:
        raise UsageError("names every interface", where=where, fix="name one address of this host")
    return Place(host, port, not found.is_loopback, accelerator)


def _own_address(where: str) -> str:
    """This host's address in its network: whence a packet to the outside would go. None is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # an address reserved for documentation
            return str(probe.getsockname()[0])
        except OSError:
            raise DeviceError(
                "this host is in no network", where=where, fix="use browser://localhost with adb reverse, or name HOST"
            ) from None


def certificate(host: str) -> tuple[ssl.SSLContext, str]:
    """A fresh self-signed certificate for `host`, good for two days, and its SHA-256; the key never leaves memory
    but for a private file that is gone before this returns. DeviceError without the package cryptography."""
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
    except ImportError as error:
        raise DeviceError(
            "https needs the package cryptography", where="--device browser", fix="pip install 'xedge[browser]'"
        ) from error
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "xedge")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))  # phones' clocks
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(host))]), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(key, hashes.SHA256())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    with tempfile.NamedTemporaryFile() as file:  # readable by this user alone
        file.write(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        file.write(made.public_bytes(serialization.Encoding.PEM))
        file.flush()
        context.load_cert_chain(file.name)
    return context, made.fingerprint(hashes.SHA256()).hex(":").upper()


def page_path() -> Path:
    """The page that is served; the runtimes lie in the folder ``browser`` beside it."""
    spec = importlib.util.find_spec("xedge.benchmarks")
    if spec is None or not spec.submodule_search_locations:
        raise InternalError("the package lacks benchmarks/")
    return Path(spec.submodule_search_locations[0], "page.html")


class Browser:
    """The transport. It prints the link, and returns once a browser has opened it.

    Raises:
        UsageError: the address cannot be served on.
        DeviceError: the runtimes are not there, or nobody opened the link within `patience` seconds.
    """

    def __init__(self, place: Place, patience: float = OPEN, show: Callable[[str], None] | None = None) -> None:
        from xedge.benchmarks import vendor_browser

        folder = page_path().parent / "browser"
        if not vendor_browser.whole(folder):
            raise DeviceError(
                "LiteRT.js and ONNX Runtime Web are not there, or of other versions",
                where=str(folder),
                fix=f"{sys.executable} -m xedge.benchmarks.vendor_browser",
            )
        self._place, self._versions = place, vendor_browser.versions()
        self._desk = Desk(secrets.token_urlsafe(16), time.monotonic() + patience)
        self._outputs: dict[str, bytes] = {}
        self._tasks = 0
        page = page_path().read_bytes()
        self._page = hash_of(page).hexdigest()
        tls, fingerprint = certificate(place.host) if place.secure else (None, "")
        libraries = {name: folder / name for p in vendor_browser.PACKAGES for name in p.files.values()}
        try:
            self._server = Server(place.host, place.port, tls, page, libraries, self._desk)
        except OSError as error:
            raise UsageError(
                f"cannot serve there: {error.strerror or error}", where=f"{place.host}:{place.port}", fix="name another"
            ) from error
        threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True).start()
        try:
            (show or _show)(invitation(self.link, fingerprint))
            self._wait_for_claim(patience)
        except BaseException:
            self.close()
            raise

    @property
    def name(self) -> str:
        return f"browser at {self._server.origin}"

    @property
    def link(self) -> str:
        """With the token behind the #, which no browser sends to any server."""
        return f"{self._server.origin}/#{self._desk.token}"

    def _wait_for_claim(self, patience: float) -> None:
        desk = self._desk
        with desk.changed:
            if not desk.changed.wait_for(lambda: desk.known is not None, patience):
                raise DeviceError(f"nobody opened the link within {patience:g} s", where=self.name, fix="run it again")
            if not desk.changed.wait_for(lambda: desk.listening or desk.gone is not None, LEASE):
                raise DeviceError("the browser opened the link and went away", where=self.name, fix="run it again")

    # -- the five

    def push(self, path: Path) -> str:
        try:
            key = f"{sha256(path)[:16]}/{path.name}"
        except OSError as error:
            raise UsageError(f"cannot read: {error.strerror or error}", where=str(path)) from error
        with self._desk.changed:
            self._desk.files[key] = path
        return key

    def run(self, argv: Sequence[str], timeout: float) -> Completed:
        """The agent's command line, for the page: ``[the agent, --model, ...]``."""
        wish = self._task(argv)
        desk = self._desk
        end = time.monotonic() + timeout
        with desk.changed:
            desk.awaited = wish["id"]
            desk.lines.append({"task": wish})
            desk.changed.notify_all()
            try:
                while wish["id"] not in desk.results:
                    now = time.monotonic()
                    if desk.gone:
                        raise self._lost(desk.gone)
                    if now - desk.heard > LEASE:
                        desk.gone = f"no sign of life for {LEASE:g} s"
                        continue
                    if now > end:
                        desk.lines.append({"cancel": wish["id"]})
                        raise DeviceError(
                            f"not done after {timeout:g} s, stopped", where=self.name, fix="give it a smaller job"
                        )
                    desk.changed.wait(0.25)
            finally:
                desk.awaited = None
                output = desk.outputs.pop(wish["id"], None)
            code, said = desk.results.pop(wish["id"])
        if "output" in wish and output is not None:
            self._outputs[wish["output"]] = output
        return Completed(tuple(argv), code, said, "")

    def _lost(self, why: str) -> DeviceError:
        return DeviceError(why, where=self.name, fix="keep the page open, in front and the screen on, and run again")

    def _task(self, argv: Sequence[str]) -> dict[str, Any]:
        """The agent's options as the page takes them, with what the page cannot know."""
        wish = dict(_DEFAULTS)
        for flag, value in zip(argv[1::2], argv[2::2], strict=True):
            name = flag.removeprefix("--").replace("-", "_")
            if name == "cpus":
                raise UsageError("a browser cannot be pinned to cores", where=self.name, fix="leave cpus out")
            wish[name] = _OPTIONS[name](value)
        self._tasks += 1
        path = self._desk.files[wish["model"]]
        if wish["runtime"] not in self._versions:
            raise UsageError(f"no {wish['runtime']} in a browser", where=self.name, fix=", ".join(self._versions))
        return {
            **wish, "id": self._tasks, "name": path.name, "sha256": sha256(path), "agent_sha256": self._page,
            "accelerator": self._place.accelerator, "version": self._versions[wish["runtime"]],
        }  # fmt: skip

    def pull(self, remote: str, path: Path) -> None:
        if remote not in self._outputs:
            raise DeviceError(f"cannot fetch {remote}: it was not made", where=self.name)
        part = path.with_name(path.name + ".part")
        try:
            part.write_bytes(self._outputs[remote])
            part.replace(path)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise UsageError(f"cannot write: {error.strerror or error}", where=str(path)) from error

    def facts(self) -> dict[str, str]:
        with self._desk.changed:
            return dict(self._desk.known or {})

    def close(self) -> None:
        desk = self._desk
        with desk.changed:
            desk.expires = 0.0
            if desk.listening and not desk.gone:
                desk.lines.append({"end": "You can close this page."})
                desk.changed.notify_all()
                desk.changed.wait_for(lambda: desk.gone, 2)  # until it is said
            desk.gone = desk.gone or "the connection is closed"
        self._server.shutdown()
        self._server.server_close()


def invitation(link: str, fingerprint: str) -> str:
    """What the terminal shows: the link, the same as a QR code, and what the browser will warn of."""
    lines = [f"Open this on the device, once, within {OPEN / 60:g} minutes:", "", f"  {link}", ""]
    with contextlib.suppress(ImportError):
        import qrcode

        code = qrcode.QRCode(border=2)
        code.add_data(link)
        drawn = io.StringIO()
        code.print_ascii(out=drawn, invert=True)
        lines += [drawn.getvalue()]
    if fingerprint:
        lines += [
            "The browser will warn of an unknown certificate. This one is yours if its SHA-256 is",
            fingerprint,
            "",
        ]
    return "\n".join(lines)


def _show(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
