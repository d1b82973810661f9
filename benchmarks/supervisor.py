"""Stands on the device between the host and what runs there. Sent as one file; standard library, Python 3.8+, Linux.

    python supervisor.py TOKEN LEASE        LEASE: seconds without a word from the host after which everything ends

It starts commands and ends whole process trees: when their time is up, when the host closes the connection, when the
host is silent (a cable was pulled, a laptop sleeps), and when it is told to end itself. Nothing it started outlives it.
Files lie in a private folder that goes with it; one lock per device makes a second host wait.

The host writes JSON objects, one a line. The supervisor answers with lines that begin with TOKEN, so that greetings of
a login shell are never taken for answers:

    {"do": "put", "name": N, "data": B64, "first": bool}          no answer; the next one tells what went wrong
    {"do": "seal", "name": N, "sha256": H}      {"path": P}       the file is there, and its bytes are those
    {"do": "have", "name": N, "sha256": H}      {"path": P | null}
    {"do": "get", "path": P}                    {"data": B64}..., {"sha256": H}
    {"do": "run", "argv": [...], "timeout": S}  {"out": B64} and {"err": B64}..., {"exit": CODE, "sha256": H(out, err)}
                                                or {"late": S}: killed; or {"flood": bytes}: killed
    {"do": "lock", "wait": S, "owner": TEXT}    {"waiting": holder}..., {"locked": holder that died | null}
    {"do": "facts"}                             {"facts": {...}}
    {"do": "alive"}, {"do": "close"}            no answer

Every answer may be {"error": TEXT} instead. {"alive": true} comes in between, four times a lease.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import errno
import fcntl
import glob
import hashlib
import json
import os
import platform
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

PIECE = 48 * 1024
FLOOD = 256 << 20  # more output than any honest command of ours gives
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_LIBC = ctypes.CDLL(None)
_PROC = "/proc/self/.."  # /proc by a name for which qemu does not look into its own folder of files first


class Gone(Exception):
    """The host is gone, or said that it goes: end everything."""


class Refused(Exception):
    """One request cannot be done; the text goes to the host."""


def _prctl(option: int, value: int) -> bool:
    return bool(_LIBC.prctl(option, value, 0, 0, 0) == 0)


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def _stat(pid: int) -> list[str]:
    """/proc/PID/stat from the state on; empty where there is no such process."""
    # Of itself qemu makes up the file, with a start time that is a tick or two off the kernel's.
    return _read(f"{_PROC}/{pid}/stat").rpartition(")")[2].split()


def identity(pid: int) -> dict[str, Any]:
    """What names a process for ever: a number alone comes back after a while, and after a boot."""
    fields = _stat(pid)
    return {
        "pid": pid,
        "start": int(fields[19]) if fields else 0,
        "boot": _read("/proc/sys/kernel/random/boot_id").strip(),
    }


def lives(record: Any) -> bool:
    """Whether the process of this record still runs: the same number, start time and boot."""
    try:
        fields = _stat(int(record["pid"]))
        now = identity(int(record["pid"]))
        return bool(fields) and fields[0] != "Z" and (record["start"], record["boot"]) == (now["start"], now["boot"])
    except (KeyError, TypeError, ValueError):
        return False


def descendants() -> list[int]:
    """Every process below this one. As a subreaper this one inherits those whose parents died."""
    parents = {}
    for entry in os.listdir(_PROC):
        if entry.isdigit():
            fields = _stat(int(entry))
            if fields and fields[0] != "Z":
                parents[int(entry)] = int(fields[1])
    found, level = [], [os.getpid()]
    while level:
        level = [pid for pid, parent in parents.items() if parent in level]
        found += level
    return found


def marked(mark: str) -> list[int]:
    """Every process that was started with `mark` in its environment, whoever its parent is."""
    found = []
    for entry in os.listdir(_PROC):
        if entry.isdigit() and mark in _read(f"/proc/{entry}/environ").split("\0"):
            fields = _stat(int(entry))
            if fields and fields[0] != "Z":
                found.append(int(entry))
    return found


def sweep(base: str) -> None:
    """Remove the folders of supervisors that were killed outright."""
    for owner in glob.glob(os.path.join(glob.escape(base), "xedge-*", ".owner")):
        folder = os.path.dirname(owner)
        try:
            mine = os.lstat(folder).st_uid == os.getuid() and not os.path.islink(folder)
            if mine and not lives(json.loads(_read(owner))):
                shutil.rmtree(folder, ignore_errors=True)
        except (OSError, ValueError):
            continue


def facts() -> dict[str, str]:
    """What identifies the device, as text; what is absent is left out."""
    found = {
        "system": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "python": platform.python_version(),
        "host": platform.node(),
        "cores": str(os.cpu_count()),
    }
    board = _read("/proc/device-tree/model").strip("\0\n ")
    if board:
        found["board"] = board
    # An emulator answers for /proc/self/exe with the emulated program, but does not know this spelling of it.
    with contextlib.suppress(OSError):
        program = os.path.basename(os.readlink("/proc//self/exe"))
        if program.startswith("qemu-"):
            found["emulator"] = program
    import importlib.metadata

    for package in ("numpy", "onnxruntime", "ai-edge-litert", "tflite-runtime", "tensorrt"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


class Supervisor:
    """One host's session: reads requests from descriptor 0, answers on descriptor 1."""

    def __init__(self, token: str, lease: float) -> None:
        self.token, self.lease = token.encode(), lease
        self.heard = self.beaten = time.monotonic()
        self.inbox, self.outbox = bytearray(), bytearray(b"\n")  # a greeting may lack its newline
        self.folder = ""
        self.broken = ""  # why the file that is being put cannot be written
        self.lock = -1
        self.status: dict[int, int] = {}
        self.over = False
        self.bell, bell = os.pipe()
        for descriptor in (0, 1, self.bell, bell):
            os.set_blocking(descriptor, False)
        signal.set_wakeup_fd(bell, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(number, self._told)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        self.adopts = _prctl(_PR_SET_CHILD_SUBREAPER, 1)

    def _told(self, *_: object) -> None:
        self.over = True

    # -- talking

    def say(self, **answer: object) -> None:
        self.outbox += self.token + b" " + json.dumps(answer, separators=(",", ":")).encode() + b"\n"

    def turn(self, wait: float, *others: int) -> list[int]:
        """Wait for at most `wait` seconds, talk and listen; which of the descriptors `others` can be read."""
        now = time.monotonic()
        if now - self.beaten >= self.lease / 4:
            self.beaten = now
            self.say(alive=True)
        left = self.heard + self.lease - now
        if left <= 0 or self.over:
            raise Gone
        wait = max(0.0, min(wait, left, self.lease / 4))
        readable, writable, _ = select.select([0, self.bell, *others], [1] if self.outbox else [], [], wait)
        if self.bell in readable:
            with contextlib.suppress(BlockingIOError):
                while os.read(self.bell, 4096):
                    pass
        if writable:
            try:
                del self.outbox[: os.write(1, self.outbox[: 1 << 16])]
            except BlockingIOError:
                pass
            except OSError as error:
                raise Gone from error
        if 0 in readable:
            try:
                piece = os.read(0, 1 << 18)
            except BlockingIOError:
                piece = None
            except OSError as error:
                raise Gone from error
            if piece == b"":
                raise Gone
            self.heard = time.monotonic()
            self.inbox += piece or b""
        return [descriptor for descriptor in others if descriptor in readable]

    def flush(self, left: int = 0) -> None:
        """Until at most `left` bytes wait to be sent."""
        while len(self.outbox) > left:
            self.turn(self.lease)

    def requests(self) -> Iterator[dict[str, Any]]:
        """Every request, as it comes."""
        while True:
            line, newline, rest = self.inbox.partition(b"\n")
            if not newline:
                self.turn(self.lease)
                continue
            self.inbox = rest
            try:
                request = json.loads(line.decode())
            except ValueError:  # what else the line said is lost: no answer after this one would be the right one
                self.say(error="a request arrived garbled")
                self.flush()
                raise Gone from None
            if request["do"] == "close":
                raise Gone
            if request["do"] != "alive":
                yield request

    def quick(self) -> None:
        """Look whether the host closes or says that it lives, in the midst of a long request."""
        for line in self.inbox.splitlines(True):
            if b'"close"' in line:
                raise Gone
            if b'"alive"' not in line:
                return
            if line.endswith(b"\n"):
                del self.inbox[: len(line)]

    # -- files

    def path(self, name: str) -> str:
        path = os.path.normpath(os.path.join(self.folder, name))
        if not path.startswith(self.folder + os.sep):
            raise Refused(f"{name} lies outside the folder")
        return path

    def put(self, request: dict[str, Any]) -> None:
        path = self.path(request["name"]) + ".part"
        try:
            if request["first"]:
                self.broken = ""
                os.makedirs(os.path.dirname(path), exist_ok=True)
            if not self.broken:
                with open(path, "wb" if request["first"] else "ab") as file:
                    file.write(base64.b64decode(request["data"]))
        except (OSError, ValueError) as error:
            self.broken = getattr(error, "strerror", None) or str(error)
            with contextlib.suppress(OSError):
                os.unlink(path)

    def seal(self, request: dict[str, Any]) -> None:
        path = self.path(request["name"])
        if self.broken:
            raise Refused(f"cannot write in {self.folder}: {self.broken}")
        if digest(path + ".part") != request["sha256"]:
            os.unlink(path + ".part")
            raise Refused("arrived with another checksum")
        os.replace(path + ".part", path)
        self.say(path=path)

    def have(self, request: dict[str, Any]) -> None:
        path = self.path(request["name"])
        self.say(path=path if os.path.isfile(path) and digest(path) == request["sha256"] else None)

    def get(self, request: dict[str, Any]) -> None:
        told = hashlib.sha256()
        with open(request["path"], "rb") as file:
            for piece in iter(lambda: file.read(PIECE), b""):
                told.update(piece)
                self.say(data=base64.b64encode(piece).decode())
                self.flush(1 << 20)
        self.say(sha256=told.hexdigest())

    # -- processes

    def _reap(self) -> bool:
        """Collect the dead; whether any child is left."""
        try:
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return True
                self.status[pid] = status
        except ChildProcessError:
            return False

    def tree(self) -> list[int]:
        """All that the commands started and that still runs. Where orphans are not adopted (qemu), by their mark."""
        return descendants() if self.adopts else list({*descendants(), *marked(f"XEDGE_MARK={self.token.decode()}")})

    def kill_all(self) -> None:
        """The whole tree, until nothing is left of it; what hangs in the kernel is given up after 10 seconds."""
        end = time.monotonic() + 10
        while (self._reap() or not self.adopts) and time.monotonic() < end:
            found = self.tree()
            if not found and not self.adopts:
                return
            for pid in found:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)

    def run(self, request: dict[str, Any]) -> None:
        argv, timeout = [str(word) for word in request["argv"]], float(request["timeout"])
        end = time.monotonic() + timeout
        self.status.clear()
        try:
            child = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=self.folder,
                env={**os.environ, "XEDGE_MARK": self.token.decode()},
                start_new_session=True,
                preexec_fn=lambda: _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),  # should this process be killed itself
            )
        except OSError as error:
            raise Refused(f"{argv[0]}: cannot start: {error.strerror or error}") from error
        assert child.stdout is not None
        assert child.stderr is not None
        pipes = {child.stdout.fileno(): "out", child.stderr.fileno(): "err"}
        hashes = {"out": hashlib.sha256(), "err": hashlib.sha256()}
        said = 0
        try:
            while pipes:
                late = time.monotonic() >= end
                if late or said > FLOOD:
                    self.kill_all()
                    self.say(**({"late": timeout} if late else {"flood": said}))
                    return
                full = len(self.outbox) > 1 << 20  # the host reads slower than the command speaks
                for descriptor in self.turn(end - time.monotonic(), *([] if full else pipes)):
                    piece = os.read(descriptor, PIECE)
                    if not piece:
                        del pipes[descriptor]
                        continue
                    said += len(piece)
                    hashes[pipes[descriptor]].update(piece)
                    self.say(**{pipes[descriptor]: base64.b64encode(piece).decode()})
                self.quick()
                self._reap()
                if child.pid in self.status and self.tree():
                    self.kill_all()  # its children hold the pipes; they do not live on
            while child.pid not in self.status and time.monotonic() < end:  # it closed its output, and goes on
                self.turn(end - time.monotonic())
                self.quick()
                self._reap()
            self.kill_all()
            if child.pid not in self.status or time.monotonic() >= end:
                self.say(late=timeout)
                return
            status = self.status[child.pid]
            code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
            both = hashes["out"].hexdigest() + hashes["err"].hexdigest()
            self.say(exit=code, sha256=hashlib.sha256(both.encode()).hexdigest())
        finally:
            self.kill_all()
            child.returncode = 0  # reaped above: nothing for Popen to wait for
            child.stdout.close()
            child.stderr.close()

    # -- the device's lock

    def take(self, request: dict[str, Any]) -> None:
        """The kernel lets go of the lock when its holder dies, however it dies; what is written in it is for people."""
        place = os.environ.get("XEDGE_LOCK") or os.path.join(tempfile.gettempdir(), "xedge.lock")
        if self.lock < 0:
            try:
                self.lock = _open_lock(place)
            except OSError as error:
                raise Refused(f"cannot open the lock {place}: {error.strerror}; remove it") from error
        end, told = time.monotonic() + float(request["wait"]), 0.0
        while True:
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise Refused(f"cannot lock {place}: {error.strerror}") from error
            holder = _record(self.lock)
            if isinstance(holder, dict) and holder.get("owner") == request["owner"]:
                self.say(locked=None)  # another connection of the same host process
                return
            now = time.monotonic()
            if now >= end:
                raise Refused(f"still in use by {holder_text(holder)} after {request['wait']:g} s")
            if now - told >= 5:
                told = now
                self.say(waiting=holder_text(holder))
            self.turn(0.2)
            self.quick()
        before = _record(self.lock)
        record = {**identity(os.getpid()), "owner": request["owner"], "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.ftruncate(self.lock, 0)
        os.pwrite(self.lock, json.dumps(record).encode(), 0)
        stale = isinstance(before, dict) and bool(before) and not lives(before)
        self.say(locked=holder_text(before) if stale else None)

    # -- the session

    def serve(self) -> None:
        """Until the host is gone."""
        base = tempfile.gettempdir()
        sweep(base)
        self.folder = os.path.realpath(tempfile.mkdtemp(prefix="xedge-", dir=base))
        with open(os.path.join(self.folder, ".owner"), "w", encoding="utf-8") as file:
            json.dump(identity(os.getpid()), file)
        self.say(hello=1, folder=self.folder)
        do: dict[str, Callable[[dict[str, Any]], None]]
        do = {"put": self.put, "seal": self.seal, "have": self.have, "get": self.get, "run": self.run}
        do.update(lock=self.take, facts=lambda _: self.say(facts=facts()))
        for request in self.requests():
            try:
                do[request["do"]](request)
            except Refused as error:
                self.say(error=str(error))
            except OSError as error:
                self.say(error=f"{error.filename or request['do']}: {error.strerror or error}")

    def end(self) -> None:
        """Nothing stays: no process, no file, no lock."""
        self.kill_all()
        if self.lock >= 0:
            with contextlib.suppress(OSError):
                if (_record(self.lock) or {}).get("pid") == os.getpid():
                    os.ftruncate(self.lock, 0)
            os.close(self.lock)
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)


def digest(path: str) -> str:
    """The file's sha256."""
    told = hashlib.sha256()
    with open(path, "rb") as file:
        for piece in iter(lambda: file.read(1 << 20), b""):
            told.update(piece)
    return told.hexdigest()


def _open_lock(place: str) -> int:
    """The lock's file, made when absent, for every user; never through a symbolic link."""
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    try:  # without O_CREAT first: Linux forbids that on another user's file in /tmp
        return os.open(place, flags)
    except FileNotFoundError:
        pass
    try:
        descriptor = os.open(place, flags | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:  # another one was quicker
        return os.open(place, flags)
    os.fchmod(descriptor, 0o666)
    return descriptor


def _record(descriptor: int) -> Any:
    try:
        return json.loads(os.pread(descriptor, 4096, 0) or b"null")
    except (OSError, ValueError):
        return None


def holder_text(record: Any) -> str:
    """Who holds, or held, the lock, in words."""
    if not isinstance(record, dict):
        return "another job"
    return f"{record.get('owner')} (pid {record.get('pid')} there, since {record.get('since')})"


def main(token: str, lease: str) -> int:
    """Serve one host; 0 however it ends."""
    supervisor = Supervisor(token, float(lease))
    try:
        supervisor.serve()
    except Gone:
        pass
    except OSError as error:
        supervisor.say(error=f"{error.filename or 'supervisor'}: {error.strerror or error}")
        with contextlib.suppress(Gone):
            supervisor.flush()
    finally:
        supervisor.end()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2]))
