"""A phone's side of adb, over TCP: CNXN, AUTH, OPEN, OKAY, WRTE, CLSE; shell v1 and v2; sync. For tests.

    python adb_daemon.py PORTFILE [FLAG]...     old: shell v1 only   stranger: trusts nobody   flip: damages a push
                                                cut:WORDS: drops the connection, once, where the host says WORDS

Its shell is this host's, its files are this host's. It keeps to what the real adbd does when a stream dies: SIGHUP to
the shell alone, and the pipes are closed; everything else is up to who is tested.
"""

from __future__ import annotations

import os
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
from pathlib import Path

HEADER = struct.Struct("<4sIIIII")
ROOM = 256 * 1024


def name(command: bytes) -> int:
    return int.from_bytes(command, "little")


class Stream:
    """One service under way. `take`: what came from the host; `done`: the host closed."""

    def __init__(self, phone: Phone, number: int, peer: int) -> None:
        self.phone, self.number, self.peer = phone, number, peer
        self.acknowledged = threading.Semaphore(1)
        self.open = True

    def write(self, data: bytes) -> None:
        for start in range(0, len(data), ROOM):
            self.acknowledged.acquire()
            if not self.open:
                return
            self.phone.send(b"WRTE", self.number, self.peer, data[start : start + ROOM])

    def close(self) -> None:
        if self.open:
            self.open = False
            self.phone.send(b"CLSE", self.number, self.peer)
            self.phone.streams.pop(self.number, None)

    def take(self, data: bytes) -> None:
        raise NotImplementedError

    def done(self) -> None:
        self.open = False
        self.acknowledged.release()


class Shell(Stream):
    """v2: packets of a kind, a length and bytes. v1: bytes, both streams in one, lines end as on a terminal."""

    def __init__(self, phone: Phone, number: int, peer: int, command: str, v2: bool) -> None:
        super().__init__(phone, number, peer)
        self.v2, self.inbox = v2, b""
        self.process = subprocess.Popen(
            ["sh", "-c", command], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if v2 else subprocess.STDOUT, start_new_session=True, bufsize=0,
        )  # fmt: skip
        pumps = [threading.Thread(target=self.pump, args=(self.process.stdout, 1), daemon=True)]
        if v2:
            pumps.append(threading.Thread(target=self.pump, args=(self.process.stderr, 2), daemon=True))
        for pump in pumps:
            pump.start()
        threading.Thread(target=self.finish, args=(pumps,), daemon=True).start()

    def pump(self, source: object, kind: int) -> None:
        while piece := os.read(source.fileno(), 1 << 15):  # type: ignore[attr-defined]
            self.write(struct.pack("<BI", kind, len(piece)) + piece if self.v2 else piece.replace(b"\n", b"\r\n"))

    def finish(self, pumps: list[threading.Thread]) -> None:
        code = self.process.wait()
        for pump in pumps:
            pump.join()
        if self.v2:
            self.write(struct.pack("<BIB", 3, 1, code & 0xFF))
        self.acknowledged.acquire()
        self.close()

    def take(self, data: bytes) -> None:
        assert self.process.stdin
        if not self.v2:
            self.process.stdin.write(data)
            return
        self.inbox += data
        while len(self.inbox) >= 5:
            kind, length = struct.unpack_from("<BI", self.inbox)
            if len(self.inbox) < 5 + length:
                return
            body, self.inbox = self.inbox[5 : 5 + length], self.inbox[5 + length :]
            if kind == 0 and body:
                self.process.stdin.write(body)
            elif kind == 4:
                self.process.stdin.close()

    def done(self) -> None:
        super().done()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGHUP)
            if self.process.stdin:
                self.process.stdin.close()


class Sync(Stream):
    """STAT, SEND, RECV, QUIT: four letters, a length, bytes."""

    inbox = b""
    target = -1
    failed = ""

    def take(self, data: bytes) -> None:
        self.inbox += data
        while len(self.inbox) >= 8:
            what, length = struct.unpack_from("<4sI", self.inbox)
            size = 0 if what in (b"DONE", b"QUIT") else length
            if len(self.inbox) < 8 + size:
                return
            body, self.inbox = self.inbox[8 : 8 + size], self.inbox[8 + size :]
            self.do(what, body)

    def later(self, data: bytes) -> None:
        """Answers wait for acknowledgements, which the thread that is here hears."""
        threading.Thread(target=self.write, args=(data,), daemon=True).start()

    def do(self, what: bytes, body: bytes) -> None:
        if what == b"STAT":
            try:
                found = os.stat(body)
                self.later(struct.pack("<4sIII", b"STAT", found.st_mode, found.st_size, int(found.st_mtime)))
            except OSError:
                self.later(struct.pack("<4sIII", b"STAT", 0, 0, 0))
        elif what == b"SEND":
            path, _, mode = body.rpartition(b",")
            self.failed = ""
            self.target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, stat.S_IMODE(int(mode)) | 0o600)
        elif what == b"DATA":
            try:
                if "flip" in self.phone.flags:
                    body = body[:-1] + bytes([body[-1] ^ 1])
                if not self.failed:
                    os.write(self.target, body)
            except OSError as error:
                self.failed = str(error.strerror)
        elif what == b"DONE":
            os.close(self.target)
            answer = self.failed.encode()
            self.later(struct.pack("<4sI", b"FAIL" if answer else b"OKAY", len(answer)) + answer)
        elif what == b"RECV":
            try:
                content = Path(os.fsdecode(body)).read_bytes()
            except OSError as error:
                text = str(error.strerror).encode()
                self.later(struct.pack("<4sI", b"FAIL", len(text)) + text)
                return
            pieces = [content[i : i + 65536] for i in range(0, len(content), 65536)]
            packed = b"".join(struct.pack("<4sI", b"DATA", len(p)) + p for p in pieces)
            self.later(packed + struct.pack("<4sI", b"DONE", 0))
        elif what == b"QUIT":
            self.close()


class Phone:
    """One connection from an adb server."""

    def __init__(self, connection: socket.socket, flags: set[str]) -> None:
        self.connection, self.flags = connection, flags
        self.streams: dict[int, Stream] = {}
        self.sending = threading.Lock()
        self.last = 0

    def send(self, command: bytes, first: int, second: int, data: bytes = b"") -> None:
        magic = name(command) ^ 0xFFFFFFFF
        head = HEADER.pack(command, first, second, len(data), sum(data) & 0xFFFFFFFF, magic)
        with self.sending:
            try:
                self.connection.sendall(head + data)
            except OSError:
                return

    def exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = self.connection.recv(size - len(data))
            if not piece:
                raise EOFError
            data += piece
        return data

    def serve(self) -> None:
        try:
            while True:
                command, first, second, length, _, magic = HEADER.unpack(self.exactly(HEADER.size))
                data = self.exactly(length)
                assert magic == name(command) ^ 0xFFFFFFFF
                self.handle(command, first, second, data)
        except (EOFError, OSError):
            pass
        finally:
            for stream in list(self.streams.values()):
                stream.done()
            self.connection.close()

    def handle(self, command: bytes, first: int, second: int, data: bytes) -> None:
        stream = self.streams.get(second)
        for flag in [flag for flag in self.flags if flag.startswith("cut:") and flag[4:].encode() in data]:
            self.flags.discard(flag)
            raise EOFError
        if command == b"AUTH" or (command == b"CNXN" and "stranger" in self.flags):
            self.send(b"AUTH", 1, 0, os.urandom(20))  # whatever was signed: another token to sign
        elif command == b"CNXN":
            features = b"cmd" if "old" in self.flags else b"shell_v2,cmd"
            banner = b"device::ro.product.name=test;ro.product.model=Test;ro.product.device=test;features=" + features
            self.send(b"CNXN", 0x01000000, ROOM, banner)
        elif command == b"OPEN":
            self.last += 1
            made = self.service(self.last, first, data.rstrip(b"\0").decode())
            if made is None:
                self.send(b"CLSE", 0, first)
            else:
                self.streams[self.last] = made
        elif command == b"WRTE" and stream:
            self.send(b"OKAY", second, first)
            stream.take(data)
        elif command == b"OKAY" and stream:
            stream.acknowledged.release()
        elif command == b"CLSE" and stream:
            self.streams.pop(second, None)
            stream.done()

    def service(self, number: int, peer: int, wish: str) -> Stream | None:
        kind, _, command = wish.partition(":")
        if kind == "sync":
            self.send(b"OKAY", number, peer)
            return Sync(self, number, peer)
        if kind.split(",")[0] == "shell":
            self.send(b"OKAY", number, peer)
            return Shell(self, number, peer, command, "v2" in kind.split(","))
        return None


def main() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    part = Path(sys.argv[1] + ".part")
    part.write_text(str(listener.getsockname()[1]))
    part.rename(sys.argv[1])
    flags = set(sys.argv[2:])
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=Phone(connection, flags).serve, daemon=True).start()


if __name__ == "__main__":
    main()
