"""The web server behind a browser: one page, the runtimes, the files of one measurement, and what comes back.

    GET  /            the page; everything else wants "Authorization: Bearer ..."
    POST /claim       the link's token, once -> the key for all that follows
    GET  /tasks       an endless stream of JSON lines; its end is how either side learns of the other's
    GET  /lib/NAME    a runtime's file        GET  /file/DIGEST/NAME  what was pushed
    POST /alive       every few seconds       POST /output/ID, /result/ID  of a task

Paths are looked up in tables, never on the disk.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import html.parser
import json
import secrets
import select
import socket
import socketserver
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

LIMIT = 64 << 20
"""Bytes that one request may bring: a result with its outputs."""
TIMEOUT = 30.0
"""Seconds until a connection that says nothing is closed."""

_TYPES = {".js": "text/javascript", ".mjs": "text/javascript", ".wasm": "application/wasm"}


@dataclass
class Desk:
    """What the web server's threads and the transport share; every access holds `changed`.

    Attributes:
        token: of the link; good for one /claim before `expires` (monotonic seconds).
        key: of the browser that claimed it.
        known: the browser's facts, None before the claim.
        heard: when it was last heard of.
        gone: why it is lost.
        files: what was pushed, by its path in the URL.
        results, outputs: of tasks, by their number.
        awaited: the number of the task under way.
    """

    token: str
    expires: float
    key: str = field(default_factory=lambda: secrets.token_urlsafe(32))
    known: dict[str, str] | None = None
    listening: bool = False
    heard: float = 0.0
    gone: str | None = None
    lines: deque[dict[str, Any]] = field(default_factory=deque)
    files: dict[str, Path] = field(default_factory=dict)
    results: dict[int, tuple[int, str]] = field(default_factory=dict)
    outputs: dict[int, bytes] = field(default_factory=dict)
    awaited: int | None = None
    changed: threading.Condition = field(default_factory=threading.Condition)

    def lose(self, why: str) -> None:
        with self.changed:
            self.gone = self.gone or why
            self.changed.notify_all()


class _Refused(Exception):
    """Answered with `status` and one line."""

    def __init__(self, status: int, what: str) -> None:
        super().__init__(what)
        self.status = status


class _Inline(html.parser.HTMLParser):
    """Hashes of a page's own scripts and styles, for its Content-Security-Policy."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, list[str]] = {"script": [], "style": []}
        self._open = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._open = tag if tag in self.found and ("type", "text/plain") not in attrs else ""

    def handle_data(self, data: str) -> None:
        if self._open:
            digest = base64.b64encode(hashlib.sha256(data.encode()).digest()).decode()
            self.found[self._open].append(f"'sha256-{digest}'")
            self._open = ""


def policy(page: bytes) -> str:
    """The page's own scripts and style, WebAssembly, workers made of blobs, and this server: nothing else."""
    inline = _Inline()
    inline.feed(page.decode())
    return "; ".join(
        [
            "default-src 'none'",
            f"script-src {' '.join(inline.found['script'])} blob: 'wasm-unsafe-eval'",
            f"style-src {' '.join(inline.found['style'])}",
            "style-src-attr 'unsafe-inline'",
            "worker-src blob:",
            "connect-src 'self' blob:",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ]
    )


class Server(ThreadingHTTPServer):
    """Bound to one address. `libraries`: name -> file; `tls`: None for plain http on this host itself."""

    daemon_threads = True
    request_queue_size = 32

    def __init__(
        self, host: str, port: int, tls: ssl.SSLContext | None, page: bytes, libraries: Mapping[str, Path], desk: Desk
    ) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _Handler)
        self._tls, self.page, self.policy, self.libraries, self.desk = tls, page, policy(page), libraries, desk
        shown = f"[{host}]" if ":" in host else host
        self.origin = f"{'https' if tls else 'http'}://{shown}:{self.server_port}"
        self.origins = {self.origin} if tls else {self.origin, f"http://localhost:{self.server_port}"}

    def server_bind(self) -> None:
        """As the base class does, but without asking a name server who this is."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def get_request(self) -> tuple[socket.socket, Any]:
        """The handshake is left to the connection's own thread: nobody may hold up the others."""
        connection, peer = super().get_request()
        connection.settimeout(TIMEOUT)
        if self._tls:
            connection = self._tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        return connection, peer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that broke: the stream of tasks says so where it matters."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "xedge", ""
    timeout = TIMEOUT
    server: Server

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        """Nothing: a request's line is not for the terminal."""

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def _answer(self, serve: Callable[[], None]) -> None:
        try:
            self._check_origin()
            serve()
        except _Refused as refused:
            self.close_connection = True
            self._send(refused.status, json.dumps({"error": str(refused)}).encode(), "application/json")

    def _check_origin(self) -> None:
        """A page of another site that guessed this address, or points a name of its own at it, gets nothing."""
        scheme = self.server.origin.partition(":")[0]
        if f"{scheme}://{self.headers.get('Host', '')}" not in self.server.origins:
            raise _Refused(421, "this is another host")
        if self.headers.get("Origin", self.server.origin) not in self.server.origins:
            raise _Refused(403, "this came from another site")

    def _bearer(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _check_key(self) -> Desk:
        desk = self.server.desk
        with desk.changed:
            if desk.known is None or not _same(self._bearer(), desk.key):
                raise _Refused(403, "the key is wrong")
            desk.heard = time.monotonic()
        return desk

    def _send(self, status: int, body: bytes, kind: str) -> None:
        self._head(status, kind, len(body))
        self.wfile.write(body)

    def _head(self, status: int, kind: str, length: int | None) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Type": kind,
            "Content-Security-Policy": self.server.policy,
            "Cross-Origin-Opener-Policy": "same-origin",  # these two make the page cross-origin isolated
            "Cross-Origin-Embedder-Policy": "require-corp",
            "Cross-Origin-Resource-Policy": "same-origin",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
        }.items():
            self.send_header(name, value)
        if length is None:
            self.close_connection = True
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(length))
        self.end_headers()

    # -- what is served

    def _get(self) -> None:
        if self.path == "/":
            self._send(200, self.server.page, "text/html; charset=utf-8")
            return
        desk = self._check_key()
        _, _, rest = self.path.partition("/")
        place, _, name = rest.partition("/")
        if rest == "tasks":
            self._stream(desk)
        elif place == "lib" and name in self.server.libraries:
            file = self.server.libraries[name]
            self._file(file, _TYPES[file.suffix])
        elif place == "file" and name in desk.files:
            self._file(desk.files[name], "application/octet-stream")
        else:
            raise _Refused(404, "there is no such file")

    def _file(self, path: Path, kind: str) -> None:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise _Refused(404, f"cannot read {path.name}: {error.strerror}") from error
        self._send(200, data, kind)

    def _stream(self, desk: Desk) -> None:
        """Lines as they come, until the browser goes or the last line has `end`."""
        with desk.changed:
            if desk.listening:
                raise _Refused(409, "another page has this measurement")
            desk.listening = True
            desk.changed.notify_all()
        self._head(200, "application/x-ndjson", None)
        try:
            self.wfile.write(b"\n" * 1024)  # a browser may hold back the first bytes until there are more
            while True:
                with desk.changed:
                    line = desk.lines.popleft() if desk.lines else None
                    if line is None:
                        desk.changed.wait(0.25)
                if line is not None:
                    self.wfile.write(json.dumps(line).encode() + b"\n")
                    if "end" in line:
                        return
                elif select.select([self.connection], [], [], 0)[0]:
                    return  # it says nothing on this connection but good-bye
        except OSError:
            pass
        finally:
            desk.lose("the page was closed, or the network broke")

    # -- what is brought

    def _post(self) -> None:
        if self.path == "/claim":
            self._claim()
            return
        desk = self._check_key()
        _, what, *number = self.path.split("/")
        if what == "alive":
            self._body(1024)
        elif what in ("output", "result") and desk.awaited is not None and number == [str(desk.awaited)]:
            body = self._body(LIMIT)
            with desk.changed:
                task = int(number[0])
                if what == "output":
                    desk.outputs[task] = body
                else:
                    desk.results[task] = _result(body)
                desk.changed.notify_all()
        else:
            raise _Refused(404, "nobody waits for this")
        self._send(200, b"{}", "application/json")

    def _body(self, limit: int) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdecimal()):
            raise _Refused(411, "a request needs its length")
        if len(length) > 12 or int(length) > limit:
            raise _Refused(413, f"a request may bring {limit} bytes")
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise _Refused(400, "the request was cut")
        return body

    def _claim(self) -> None:
        desk = self.server.desk
        body = self._body(1 << 16)
        with desk.changed:
            if not _same(self._bearer(), desk.token):
                raise _Refused(403, "this link is not the one that xedge printed")
            if desk.known is not None:
                raise _Refused(409, "this link was used already; run xedge bench again for a new one")
            if time.monotonic() > desk.expires:
                raise _Refused(410, "this link has expired; run xedge bench again for a new one")
            try:
                known = json.loads(body)
                desk.known = {str(name)[:40]: _plain(value) for name, value in list(known.items())[:20]}
            except (ValueError, AttributeError):
                raise _Refused(400, "these are no facts") from None
            desk.heard = time.monotonic()
            desk.changed.notify_all()
        self._send(200, json.dumps({"key": desk.key}).encode(), "application/json")


def _same(given: str, secret: str) -> bool:
    return hmac.compare_digest(given.encode(), secret.encode())


def _plain(value: object) -> str:
    """A fact as one printable line."""
    return "".join(letter if letter.isprintable() else " " for letter in str(value))[:300]


def _result(body: bytes) -> tuple[int, str]:
    """What a worker ended with, or what stands for garbage: the reader of agents refuses it."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        said = json.loads(body)
        code, text = said["exit"], said["stdout"]
        if code in range(5) and isinstance(text, str):
            return int(code), text
    return 0, "{garbage\n"
